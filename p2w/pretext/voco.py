"""VoCo (Wu, Zhuang and Chen 2024): where does a random crop of the whole lie, by its likeness to crops at fixed positions?

The whole, resized, is cut into a grid of base crops. A random crop of the same size overlaps up to eight of them; the share
of its volume that lies in each is what its cosine to that base crop's embedding is asked to be. Embeddings of different base
crops are pushed apart. Loss of a whole: mean of -log(1 - |share - cosine|) over random crops and base crops, and
`voco.spread` x the mean |cosine| of two base crops. In the first term no gradient flows to the base crops.

What differs from the paper, or is not said there as far as we know: crops are cut from sub-scans, so positions are those
within 128 mm or so of a scan, where there they are of whole scans; cosines below 0 count as 0; the widths of the projection
head.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from p2w import geometry, rng
from p2w.errors import UserError
from p2w.geometry import Size
from p2w.model.encoder import Encoder, Network, Output
from p2w.pretext.contrastive.losses import full_precision, l2_normalise
from p2w.pretext.protocol import Pretext, Views
from p2w.pretext.settings import Bounds, PretextConfig, Shows
from p2w.pretext.volume_ops import resized_whole, split_cubes
from p2w.rng import SampleKeys

LEAST = 1e-6  # added to 1 - |share - cosine|: its logarithm stays finite, and has a gradient also where all crops look alike


@dataclass(frozen=True)
class VocoConfig:
    """Crops and head of voco."""

    grid: Annotated[tuple[int, int, int], Bounds(1, usual="1 4 4")] = (1, 4, 4)
    """Base crops along z y x [P: 4 x 4 in the plane]; pretext.size over it must be multiples of the encoder's strides."""
    crops: Annotated[int, Bounds(1, 64)] = 4
    """Random crops of each whole [?]."""
    spread: Annotated[float, Bounds(0, 1e6)] = 1.0
    """Weight of the term that pushes base crops apart [P]."""
    hidden: Annotated[int, Bounds(1, 65536)] = 256
    """Width of the hidden layer between pooled features and embedding [?]."""
    dim: Annotated[int, Bounds(1, 65536)] = 128
    """Channels of the embedding [?]."""


class Voco(Pretext):
    """Where the random crops of a whole lie is a function of (seed, epoch, id) alone."""

    summary = "a random crop -> how far it overlaps each of the crops on a grid"
    groups: ClassVar = {"voco": VocoConfig}
    reconstructs = False
    shows: Shows = "whole"
    capturable = True

    def __init__(self, config: PretextConfig, voco: VocoConfig) -> None:
        """Raise UserError where the grid does not divide the whole, or has a single cell."""
        self.config, self.voco = config, voco
        if any(edge % cells for edge, cells in zip(config.size, voco.grid, strict=True)):
            raise UserError(
                f"voco.grid={voco.grid}: must divide pretext.size={config.size}; pass e.g. --voco.grid 1 4 4"
            )
        if math.prod(voco.grid) < 2:
            raise UserError(
                f"voco.grid={voco.grid}: a single base crop tells no places apart; pass --voco.grid 1 4 4"
            )
        cell = [edge // cells for edge, cells in zip(config.size, voco.grid, strict=True)]
        self.cell: Size = (cell[0], cell[1], cell[2])

    def sample(self, batch_BDHW: Tensor, keys: SampleKeys, step: int = 0) -> Views:
        """Wholes, int16 HU (B, D, H, W) -> the first random crop (B, 1, d, h, w) in [0, 1] and the shares of all K of them
        that lie in each of N base crops, (B, K, N); as extra inputs the other random crops (B, K - 1, d, h, w) and the base
        crops (B, N, d, h, w), numbered z, y, x."""
        config, grid = self.config, self.voco.grid
        bases = split_cubes(resized_whole(batch_BDHW, config, keys.real), grid)
        extent = geometry.whole_boxes(batch_BDHW, keys.real)[:, 3:]
        u = rng.uniforms(keys, 0, 3 * self.voco.crops).view(-1, self.voco.crops, 3).float()
        # Axis by axis, with plain numbers: a tensor of them would make the host wait for the device.
        corner = torch.stack([u[:, :, axis] * (cells - 1) for axis, cells in enumerate(grid)], 2)  # in cells
        edge = torch.stack([extent[:, axis] / cells for axis, cells in enumerate(grid)], 1)[:, None]
        crops = [
            geometry.crop_resize(
                batch_BDHW,
                box.contiguous(),
                self.cell,
                window_hu=config.window_hu,
                antialias=config.antialias,
            )
            for box in torch.cat((corner * edge, (corner + 1) * edge), 2).unbind(1)
        ]
        others = torch.cat(crops[1:], 1) if len(crops) > 1 else bases[:, :0]
        return Views(crops[0], overlaps(corner, grid), extra_inputs=(others, bases))

    def build(self, encoder: Encoder) -> Network:
        """Encoder and projection head. Raises UserError for cells that are no multiples of the encoder's strides."""
        by = encoder.divisor
        few = (
            math.prod(edge // stride for edge, stride in zip(self.cell, by, strict=True))
            < encoder.least_voxels
        )
        if few or any(edge % stride for edge, stride in zip(self.cell, by, strict=True)):
            usual = " ".join(
                str(2 * stride * cells) for stride, cells in zip(by, self.voco.grid, strict=True)
            )
            raise UserError(
                f"voco.grid={self.voco.grid}: cuts pretext.size={self.config.size} into crops of {self.cell} voxels, which "
                f"must be multiples of the encoder's strides, {by}; pass e.g. --pretext.size {usual}"
            )
        return PlaceNetwork(encoder, self.voco)

    def loss(self, output: Output, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of both terms; for the log each of them, and how often the nearest base crop is the right one."""
        cosine, between = output
        place = -(1 - (views.target - cosine).abs() + LEAST).log().mean()
        spread = between.abs().mean()
        right = (cosine.argmax(2) == views.target.argmax(2)).float().mean()
        terms = {"place": place.detach(), "spread": spread.detach(), "accuracy": right}
        return place + self.voco.spread * spread, terms

    def image_columns(self, views: Views) -> dict[str, Tensor]:
        """A random crop, and the base crop that it overlaps most."""
        bases = views.extra_inputs[1]
        nearest = bases[torch.arange(len(bases), device=bases.device), views.target[:, 0].argmax(1)]
        return {"random crop": views.input, "nearest base crop": nearest[:, None]}


def overlaps(corner: Tensor, grid: Size) -> Tensor:
    """Corners (B, K, 3) z, y, x of crops of one cell, in cells -> the share of each that lies in each cell, (B, K, N)."""
    shares = []
    for axis, cells in enumerate(grid):
        number = torch.arange(cells, device=corner.device)
        shares.append((1 - (corner[:, :, axis, None] - number).abs()).clamp(min=0))
    z, y, x = shares
    return torch.einsum("bkz,bky,bkx->bkzyx", z, y, x).flatten(2)


class PlaceNetwork(Network):
    """A crop (B, 1, d, h, w) -> its embedding (B, C) of unit length.

    With other random crops (B, K - 1, d, h, w) and base crops (B, N, d, h, w): cosines of random and base crops (B, K, N),
    at least 0, and of each two base crops (B, N (N - 1) / 2).
    """

    def __init__(self, encoder: Encoder, voco: VocoConfig) -> None:
        super().__init__()
        self.encoder = encoder
        # Features of a new encoder are nearly parallel, and cosines of nearly 1 have nearly no gradient: batch norm takes
        # off what all crops have in common.
        self.head = nn.Sequential(
            nn.Linear(encoder.channels[-1], voco.hidden),
            nn.BatchNorm1d(voco.hidden),
            nn.ReLU(),
            nn.Linear(voco.hidden, voco.dim),
        )
        encoder.only_pooled()

    def embed(self, crops: Tensor) -> Tensor:
        """In float32, whatever the precision of the encoder."""
        features = self.encoder.pooled(crops)
        with full_precision(features):
            return l2_normalise(self.head(features))

    def forward(self, crop: Tensor, others: Tensor | None = None, bases: Tensor | None = None) -> Output:
        """One pass of the encoder over all crops."""
        if others is None or bases is None:
            return self.embed(crop)
        every = torch.cat((crop, others, bases), 1)
        embedded = self.embed(every.flatten(0, 1)[:, None]).unflatten(0, every.shape[:2])
        count = 1 + others.shape[1]
        random, base = embedded[:, :count], embedded[:, count:]
        with full_precision(embedded):
            cosine = functional.relu(random @ base.detach().transpose(1, 2))
            between = base @ base.transpose(1, 2)
        first, second = torch.triu_indices(bases.shape[1], bases.shape[1], 1, device=bases.device)
        return cosine, between[:, first, second]
