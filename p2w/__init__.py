"""p2w: Parts2Whole pretraining of 3D encoders on CT, from scans to weights."""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `p2w.load` and `p2w.card` at their first use: they need torch, which preprocessing does not."""
    if name in ("load", "card"):
        return getattr(importlib.import_module("p2w.weights.load"), name)
    raise AttributeError(f"module 'p2w' has no attribute {name!r}")
