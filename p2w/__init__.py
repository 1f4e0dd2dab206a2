"""p2w: Parts2Whole pretraining of 3D encoders on CT, from scans to weights."""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `p2w.load` at its first use: it needs torch, which preprocessing does not."""
    if name == "load":
        return importlib.import_module("p2w.weights.load").load
    raise AttributeError(f"module 'p2w' has no attribute {name!r}")
