"""What several proxies do to volumes. B, D, H, W = batch, slice, row, column; d, h, w = of the network's input."""

import torch
from torch import Tensor

from p2w import geometry
from p2w.config import PretextConfig


def resized_whole(batch_BDHW: Tensor, config: PretextConfig) -> Tensor:
    """Wholes, int16 HU (B, D, H, W) -> (B, 1, d, h, w) in [0, 1]: all of each, resized to `config.size`."""
    boxes = torch.zeros(len(batch_BDHW), 6, device=batch_BDHW.device)
    for axis, edge in enumerate(batch_BDHW.shape[1:]):
        boxes[:, 3 + axis].fill_(edge)
    return geometry.crop_resize(
        batch_BDHW, boxes, config.size, window_hu=config.window_hu, antialias=config.antialias
    )


def flipped(volumes: Tensor, axes: Tensor) -> Tensor:
    """Volumes (N, d, h, w), each flipped along the axes of its own that `axes` (N, 3) bool names."""
    for axis in range(3):
        volumes = torch.where(axes[:, axis].view(-1, 1, 1, 1), volumes.flip(axis + 1), volumes)
    return volumes


def integers(u: Tensor, low: Tensor | int, high: Tensor | int) -> Tensor:
    """Draws in [0, 1) -> int64, uniform from `low` to `high`, both included."""
    drawn = (u * (high - low + 1)).long()
    return drawn if isinstance(low, int) and low == 0 else low + drawn
