"""SparK (Tian et al. 2023): masked volumes for convolutional encoders, which compute on the patches that are seen alone.

Of the whole, resized, `spark.ratio` of its patches are hidden. At every layer, a convolution smears the border of a hidden
patch further into what is seen. Here each convolution is given zeros in hidden patches, and each norm takes its statistics
from seen voxels alone: what a sparse convolution computes. The decoder joins the features of all levels, each with a learned
vector in its hidden positions, and is asked for the hidden voxels. Loss: mean squared error over these.

What differs from the paper: voxels are predicted as they are, not normalised by patch, so that the output is a volume; and
the decoder is the one that every pretext here has with skips, where there it is a lighter one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from p2w.errors import UserError
from p2w.geometry import Size
from p2w.model.decoder import build_decoder
from p2w.model.encoder import Encoder, Network
from p2w.pretext.mae import SimMim
from p2w.pretext.protocol import Views, check_size
from p2w.pretext.settings import Bounds, PretextConfig
from p2w.rng import SampleKeys


@dataclass(frozen=True)
class SparkConfig:
    """The mask of spark."""

    patch: Annotated[tuple[int, int, int], Bounds(1, usual="8 8 8")] = (8, 8, 8)
    """Voxels z y x of a patch: a multiple of the encoder's strides that divides pretext.size [P: the last stride]."""
    ratio: Annotated[float, Bounds(0, 1)] = 0.6
    """Share of the patches that are hidden [P: Tian et al. 2023]."""
    fill: ClassVar[Literal["mean", "zero"]] = "zero"


class Spark(SimMim):
    """Which patches are hidden is a function of (seed, epoch, id) alone; as many in every whole."""

    summary = "a whole's patches but three fifths, as a sparse volume -> the others"
    group: ClassVar = "spark"
    usual_patch: ClassVar = "8 8 8"
    usual_ratio: ClassVar = 0.6
    groups: ClassVar = {"spark": SparkConfig}
    capturable = False

    def __init__(self, config: PretextConfig, spark: SparkConfig) -> None:
        super().__init__(config, spark)

    def sample(self, batch_BDHW: Tensor, keys: SampleKeys, step: int = 0) -> Views:
        """As SimMIM's, with 0 in hidden patches, and which patches are hidden, (B, N) bool, numbered z, y, x."""
        views = super().sample(batch_BDHW, keys, step)
        return replace(views, extra_inputs=(self.hidden_patches(keys),))

    def build(self, encoder: Encoder) -> Network:
        """Encoder, and a decoder with skips. Raises UserError for a transformer, and for patches that its strides cut."""
        if encoder.token_edge:
            raise UserError(
                f"pretext.name={self.config.name}: is made for convolutions; pass --pretext.name mae, which leaves out a "
                "transformer's tokens, or another --model.name"
            )
        check_size(self.config.size, encoder)
        if any(patch % by for patch, by in zip(self.patch, encoder.divisor, strict=True)):
            by = " ".join(map(str, encoder.divisor))
            raise UserError(
                f"spark.patch={self.patch}: must be a multiple of the encoder's strides, {by}; pass --spark.patch {by}"
            )
        return SparseAutoencoder(encoder, self.grid, self.hidden)


class SparseAutoencoder(Network):
    """(B, 1, D, H, W) and which patches are hidden (B, N), `count` of each row -> the volume (B, 1, D, H, W) in [0, 1].

    With the input alone every patch counts as seen, and encoder and decoder are the usual ones.
    """

    def __init__(self, encoder: Encoder, grid: Size, count: int) -> None:
        super().__init__()
        self.encoder, self.grid, self.count = encoder, grid, count
        self.decoder = build_decoder(encoder, skips=True)
        # The coarsest features go into the decoder as they are, if it reads them
        joined = encoder.channels[:-1]
        filled = joined if encoder.only_skips else encoder.channels
        self.hidden_vectors = nn.ParameterList(0.02 * torch.randn(channels) for channels in filled)
        self.joins = nn.ModuleList(nn.Conv3d(channels, channels, kernel_size=1) for channels in joined)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Seen patches through the encoder, then all positions through the decoder."""
        if hidden is None:
            features: list[Tensor] = self.encoder(x)
        else:
            patches = hidden.shape[1]
            kept = hidden.int().argsort(dim=1, stable=True)[:, : patches - self.count]
            seen = SeenPatches(kept, ~hidden.view(-1, *self.grid))
            with sparse(self.encoder, seen):
                features = self.encoder(x)
            for at, vector in enumerate(self.hidden_vectors):
                fill = vector.to(features[at].dtype).view(1, -1, 1, 1, 1)
                features[at] = torch.where(seen.mask(features[at]), features[at], fill)
        *fine, coarsest = features
        joined = [join(level) for join, level in zip(self.joins, fine, strict=True)]
        return torch.sigmoid(self.decoder([*joined, coarsest]).float())


class SeenPatches:
    """Where the seen voxels of a batch are, at any resolution whose edges are multiples of the grid's.

    `kept` (B, K): numbers of the patches that are seen, in the order z, y, x. `grid` (B, Z, Y, X) bool: the same as a map.
    """

    def __init__(self, kept: Tensor, grid: Tensor) -> None:
        self.kept, self.grid = kept, grid
        self._masks: dict[tuple[int, ...], Tensor] = {}
        self._positions: dict[tuple[int, ...], Tensor] = {}

    def mask(self, x: Tensor) -> Tensor:
        """(B, 1, D, H, W) bool, True where seen, at the resolution of x (B, C, D, H, W)."""
        edges = tuple(x.shape[2:])
        if edges not in self._masks:
            mask = self.grid
            for axis, edge in enumerate(edges, start=1):
                mask = mask.repeat_interleave(edge // mask.shape[axis], axis)
            self._masks[edges] = mask[:, None]
        return self._masks[edges]

    def positions(self, x: Tensor) -> Tensor:
        """(B, 1, n): where the n seen voxels of each sample stand in x (B, C, D, H, W) with its last three axes as one."""
        edges = tuple(x.shape[2:])
        if edges not in self._positions:
            grid = self.grid.shape[1:]
            (a, b, c), device = (edge // cells for edge, cells in zip(edges, grid, strict=True)), x.device
            z, y, x_ = self.kept // (grid[1] * grid[2]), self.kept // grid[2] % grid[1], self.kept % grid[2]
            corner = (z * a * edges[1] + y * b) * edges[2] + x_ * c
            inside = torch.arange(a, device=device)[:, None, None] * edges[1]
            inside = (inside + torch.arange(b, device=device)[:, None]) * edges[2]
            inside = inside + torch.arange(c, device=device)
            self._positions[edges] = (corner[:, :, None] + inside.flatten()).flatten(1)[:, None]
        return self._positions[edges]


@contextmanager
def sparse(encoder: nn.Module, seen: SeenPatches) -> Iterator[None]:
    """Within it, convolutions of `encoder` are given zeros where nothing is seen, and norms see the seen voxels alone.

    The norms' output is zero elsewhere. In front of an activation that keeps zero, the features at seen positions are then
    those of convolutions that visit seen positions alone.
    """
    hooks = []
    for module in encoder.modules():
        if isinstance(module, nn.Conv3d):
            hooks.append(module.register_forward_pre_hook(partial(_hide, seen)))
        elif isinstance(module, (_NormBase, nn.GroupNorm)):
            shape: list[Tensor] = []  # what the norm was given, for the hook behind it
            hooks.append(module.register_forward_pre_hook(partial(_gather, seen, shape)))
            hooks.append(module.register_forward_hook(partial(_scatter, seen, shape)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hide(seen: SeenPatches, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    x, *rest = given
    return (x * seen.mask(x), *rest)


def _gather(
    seen: SeenPatches, dense: list[Tensor], module: nn.Module, given: tuple[Any, ...]
) -> tuple[Any, ...]:
    """(B, C, D, H, W) -> (B, C, n, 1, 1): a volume as any for the norm."""
    x, *rest = given
    dense.append(x)
    index = seen.positions(x).expand(-1, x.shape[1], -1)
    return (x.flatten(2).gather(2, index)[..., None, None], *rest)


def _scatter(
    seen: SeenPatches, dense: list[Tensor], module: nn.Module, given: tuple[Any, ...], out: Tensor
) -> Tensor:
    """The inverse of `_gather`, with zeros where nothing is seen, in the memory layout that the norm was given."""
    like = dense.pop()
    index = seen.positions(like).expand(-1, like.shape[1], -1)
    volume = torch.zeros_like(like, dtype=out.dtype, requires_grad=False)
    return volume.flatten(2).scatter_(2, index, out.flatten(2)).view_as(volume)
