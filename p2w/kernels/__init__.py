"""GPU kernels, each behind one function of p2w.geometry, p2w.model.norm or p2w.pretext.models_genesis."""
