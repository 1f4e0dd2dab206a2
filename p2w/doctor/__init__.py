"""`p2w doctor`: what this machine has, against what a run needs."""
