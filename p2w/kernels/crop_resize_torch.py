"""Crop-resize-normalise in plain torch: the CPU's path, and a GPU's where Triton is missing.

The convention is p2w.geometry's. Weights are made in float64, so that positions far from 0 cost no digits.
"""

import math

import torch
from torch import Tensor


def axis_weights(start: float, end: float, size: int, antialias: bool) -> tuple[int, Tensor]:
    """First voxel n0 and weights (size, n) float64 of the n voxels that the box touches on an axis."""
    first, last = math.floor(start), math.ceil(end)
    scale = (end - start) / size
    reach = max(1.0, scale) if antialias else 1.0
    centre = start + (torch.arange(size, dtype=torch.float64) + 0.5) * scale
    voxel = torch.arange(first, last, dtype=torch.float64) + 0.5
    weights = (1 - (voxel[None, :] - centre[:, None]).abs() / reach).clamp_(min=0)
    return first, weights / weights.sum(1, keepdim=True)


def run(
    whole: Tensor,
    boxes: Tensor,
    part: Tensor,
    target: Tensor | None,
    *,
    window_hu: tuple[float, float],
    antialias: bool,
) -> None:
    """Fill part (B, 1, d, h, w), and target when there is one, from whole (B, D, H, W) and boxes (B, 6)."""
    for b, box in enumerate(boxes.tolist()):
        _resize(whole[b], box, part[b, 0], window_hu, antialias)
        if target is not None:
            _resize(whole[b], [0, 0, 0, *whole.shape[1:]], target[b, 0], window_hu, antialias)


def _resize(whole: Tensor, box: list[float], out: Tensor, window: tuple[float, float], aa: bool) -> None:
    axes = [axis_weights(box[k], box[k + 3], out.shape[k], aa) for k in range(3)]
    (z, wz), (y, wy), (x, wx) = [(first, w.float().to(whole.device)) for first, w in axes]
    crop = whole[z : z + wz.shape[1], y : y + wy.shape[1], x : x + wx.shape[1]].float()
    crop = crop.clamp_(*window).sub_(window[0]).div_(window[1] - window[0])
    crop = torch.matmul(wy, torch.matmul(crop, wx.T))
    out.copy_((wz @ crop.flatten(1)).view(out.shape).clamp_(0, 1))
