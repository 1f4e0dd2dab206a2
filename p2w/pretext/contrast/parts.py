"""Two parts of each whole."""

import torch
from torch import Tensor

from p2w import geometry
from p2w.config import Config
from p2w.geometry import Keys
from p2w.pretext.intensity import transform

MIRRORS = 1000  # the keys' number for which axes are mirrored; parts are counted from 0


def part_of(batch_BDHW: Tensor, keys: Keys, part: int, settings: Config) -> Tensor:
    """Part number `part` of wholes int16 HU (B, D, H, W) -> (B, 1, d, h, w) in [0, 1], its intensities transformed."""
    config = settings.pretext
    shape = (batch_BDHW.shape[1], batch_BDHW.shape[2], batch_BDHW.shape[3])
    boxes = geometry.sample_boxes(keys, part, shape, config.volume_fraction, config.aspect_range)
    parts = geometry.crop_resize(
        batch_BDHW, boxes, config.size, window_hu=config.window_hu, antialias=config.antialias
    )
    return transform(parts, keys, part, settings.intensity)


def mirrored(parts: Tensor, keys: Keys) -> Tensor:
    """Parts (B, 1, d, h, w), each mirrored along z, y, x with probability 1/2, independently."""
    turned = geometry.uniforms(keys, MIRRORS, 3) < 0.5
    for axis in range(3):
        parts = torch.where(turned[:, axis].view(-1, 1, 1, 1, 1), parts.flip(2 + axis), parts)
    return parts
