"""The parts of bench/soak.py: starts of launch/train.py, the faults injected into them, and the checks after each."""
