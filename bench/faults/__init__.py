"""The parts of bench/soak.py: lives of launch/train.py, the faults put into them, and what must hold after each."""
