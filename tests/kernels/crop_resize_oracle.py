"""Crop-resize-normalise as p2w.geometry words it: float64 NumPy, slow, naive. The kernels are held to it."""

import math

import numpy as np


def weights(start: float, end: float, size: int, length: int, antialias: bool) -> np.ndarray:
    """(size, length): what voxel v of the whole weighs in output i, both loops written out."""
    matrix = np.zeros((size, length))
    scale = (end - start) / size
    reach = max(1.0, scale) if antialias else 1.0
    for i in range(size):
        for v in range(math.floor(start), math.ceil(end)):
            matrix[i, v] = max(0.0, 1 - abs(v + 0.5 - (start + (i + 0.5) * scale)) / reach)
        matrix[i] /= matrix[i].sum()
    return matrix


def resize(whole, box, size, window_hu=(-1000.0, 1000.0), antialias=True) -> np.ndarray:
    """(d, h, w) float64 from one whole (D, H, W) and one box [z0, y0, x0, z1, y1, x1]."""
    low, high = window_hu
    box = [float(edge) for edge in box]
    levels = (np.clip(np.asarray(whole, np.float64), low, high) - low) / (high - low)
    z, y, x = (weights(box[k], box[k + 3], size[k], levels.shape[k], antialias) for k in range(3))
    return np.einsum("az,by,cx,zyx->abc", z, y, x, levels, optimize=True)


def resize_batch(wholes, boxes, size, **options) -> np.ndarray:
    """(B, 1, d, h, w) of wholes (B, D, H, W) and boxes (B, 6)."""
    return np.stack([resize(w, b, size, **options) for w, b in zip(wholes, boxes, strict=True)])[:, None]


def bf16_step(values: np.ndarray) -> np.ndarray:
    """Distance from a value to the next bfloat16, which keeps 8 significant bits; 0 has none."""
    _, exponent = np.frexp(values)
    return np.where(values == 0, 0.0, np.ldexp(1.0, exponent - 8))
