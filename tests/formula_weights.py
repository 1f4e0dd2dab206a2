"""Weights and volumes that follow from names and shapes alone: a recorded output needs no recorded weights beside it."""

import math
import zlib

import numpy as np


def formula_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A value for every tensor of a state dict, float32, of the size that a trained network has."""
    return {name: _value(name, tuple(shape)) for name, shape in shapes.items()}


def _value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    draw = np.random.RandomState(zlib.crc32(name.encode()))  # its stream is the same in all versions of NumPy
    values = draw.random_sample(shape).astype(np.float32)
    if len(shape) > 1:
        return (values - np.float32(0.5)) * np.float32(3 / math.sqrt(math.prod(shape[1:])))
    return values + np.float32(0.5) if name.endswith(("weight", "running_var")) else values - np.float32(0.5)


def formula_volume(shape: tuple[int, ...]) -> np.ndarray:
    """Values in [0, 1], float32, without a symmetry."""
    return (np.sin(np.arange(math.prod(shape)) ** 1.3) / 2 + 0.5).astype(np.float32).reshape(shape)
