"""Masked volumes: restore the patches that were hidden (He et al. 2022, brought to volumes).

Input: the whole, resized, in which `mae.ratio` of its patches are filled with one grey. Target: the whole. Loss: mean
squared error over the hidden voxels alone. A transformer would leave hidden patches out; a convolutional encoder, as here,
computes on them, so it sees the fill and pays for it: this proxy is the task of MAE, without its saving.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, cast

import torch
from torch import Tensor

from p2w import rng
from p2w.errors import UserError
from p2w.model.decoder import EncoderDecoder, build_decoder
from p2w.model.encoder import Encoder, Network, Output
from p2w.pretext.protocol import Pretext, Views, check_size
from p2w.pretext.settings import Bounds, PretextConfig, Shows
from p2w.pretext.volume_ops import resized_whole
from p2w.rng import SampleKeys


@dataclass(frozen=True)
class MaeConfig:
    """Settings of mae: the mask."""

    patch: Annotated[tuple[int, int, int], Bounds(1, usual="4 8 8")] = (4, 8, 8)
    """Voxels z y x of a patch [?]; divides pretext.size."""
    ratio: Annotated[float, Bounds(0, 1)] = 0.75
    """Share of the patches that are hidden [P: He et al. 2022]."""
    fill: Literal["mean", "zero"] = "mean"
    """What stands in hidden patches: the mean of what is seen of that whole, or 0 [?]."""


class Mae(Pretext):
    """Which patches are hidden is a function of (seed, epoch, id) alone; as many in every whole."""

    summary = "a whole with three quarters of its patches hidden -> these"
    groups: ClassVar = {"mae": MaeConfig}
    reconstructs = True
    capturable = True
    shows: Shows = "whole"

    def __init__(self, config: PretextConfig, mae: MaeConfig) -> None:
        self.config, self.mae = config, mae
        grid = [edge // patch for edge, patch in zip(config.size, mae.patch, strict=True)]
        self.grid = (grid[0], grid[1], grid[2])
        if any(edge % patch for edge, patch in zip(config.size, mae.patch, strict=True)):
            raise UserError(
                f"mae.patch={mae.patch}: must divide pretext.size={config.size}; pass e.g. --mae.patch 4 8 8"
            )
        patches = grid[0] * grid[1] * grid[2]
        self.hidden = round(mae.ratio * patches)
        if not 0 < self.hidden < patches:
            raise UserError(
                f"mae.ratio={mae.ratio}: hides {self.hidden} of {patches} patches, some must be hidden and some seen; "
                "the usual ratio is 0.75, smaller patches are more"
            )

    def sample(self, batch_BDHW: Tensor, keys: SampleKeys, step: int = 0) -> Views:
        """Wholes, int16 HU (B, D, H, W) -> masked and whole, (B, 1, d, h, w) in [0, 1], and the mask, True where hidden."""
        whole = resized_whole(batch_BDHW, self.config, keys.real)
        mask = self.mask(keys)
        seen = torch.where(mask, 0.0, whole)
        if self.mae.fill == "mean":
            mean = seen.sum((1, 2, 3, 4), keepdim=True) / (~mask).sum((1, 2, 3, 4), keepdim=True)
            seen = torch.where(mask, mean, seen)
        return Views(seen, whole, mask)

    def mask(self, keys: SampleKeys) -> Tensor:
        """(B, 1, d, h, w) bool: the patches with the lowest draws."""
        u = rng.uniforms(keys, 0, self.grid[0] * self.grid[1] * self.grid[2])
        mask = (u.argsort(1).argsort(1) < self.hidden).view(len(u), 1, *self.grid)
        for axis, patch in enumerate(self.mae.patch):
            mask = mask.repeat_interleave(patch, 2 + axis)
        return mask

    def build(self, encoder: Encoder) -> Network:
        """Encoder, decoder (skips off unless asked), sigmoid."""
        check_size(self.config.size, encoder)
        return EncoderDecoder(encoder, build_decoder(encoder, self.config.skips))

    def loss(self, output: Output, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error over hidden voxels, in float32."""
        assert views.mask is not None
        error = (cast(Tensor, output).float() - views.target.float()) ** 2
        return (error * views.mask).sum() / views.mask.sum(), {}

    def image_columns(self, views: Views) -> dict[str, Tensor]:
        """What is seen, and the whole."""
        return {"masked": views.input, "whole": views.target}
