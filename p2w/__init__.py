"""p2w: Parts2Whole pretraining of 3D encoders on CT, from scans to weights."""

__version__ = "0.1.0"
