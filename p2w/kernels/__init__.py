"""GPU kernels, each behind one function of p2w.geometry."""
