"""What a network was trained to see, and a batch in [0, 1] brought to it: any network trains on the same volumes.

Shapes: B, C, D, H, W = batch, channel, slice, row, column.
"""

from typing import Literal

import torch
from torch import Tensor

from p2w.errors import UserError

Feeding = Literal["unit", "symmetric", "positive-z", "hu"]
"""unit: [0, 1] as it is. symmetric: [-1, 1]. positive-z: mean 0, deviation 1 over voxels > 0. hu: back to HU, +-1000."""


def feed(x: Tensor, feeding: Feeding, channels: int) -> Tensor:
    """(B, C, D, H, W) in [0, 1] -> what a network with `channels` input channels wants, float32, (B, channels, D, H, W).

    A pure function: statistics are per sample and channel. One grey channel is repeated for a network of several; any
    other mismatch raises UserError. "positive-z" treats every voxel alike, also those at 0 (MedicalNet's own code puts
    noise there [C], which would make the result random); a channel without spread becomes 0.
    """
    if x.shape[1] != channels and x.shape[1] != 1:
        raise UserError(
            f"volumes of {x.shape[1]} channels for a network of {channels}; load it with in_channels={x.shape[1]}"
        )
    x = x.float()
    if feeding == "symmetric":
        x = 2 * x - 1
    elif feeding == "hu":
        x = 2000 * x - 1000
    elif feeding == "positive-z":
        x = _positive_z(x)
    return x.expand(-1, channels, -1, -1, -1)


def _positive_z(x: Tensor) -> Tensor:
    """Mean and (biased) deviation of the voxels > 0 of each sample and channel; no host sync."""
    inside = (x > 0).float()
    count = inside.sum((2, 3, 4), keepdim=True).clamp(min=1)
    mean = (x * inside).sum((2, 3, 4), keepdim=True) / count
    deviation = (((x - mean) * inside).square().sum((2, 3, 4), keepdim=True) / count).sqrt()
    spread = deviation > 1e-6  # float32 of [0, 1]: below is rounding
    return torch.where(spread, (x - mean) / torch.where(spread, deviation, 1.0), 0.0)
