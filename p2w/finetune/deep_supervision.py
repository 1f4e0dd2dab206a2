"""Deep supervision: a loss at every level of a decoder, against the target at that level's resolution.

As in nnU-Net (Isensee et al. 2021; Lee et al. 2015): the loss at full resolution weighs 1, each coarser one half of the one
before, and the weights are divided by their sum. The convolutions that make logits of a level's features are used in
training alone: they are neither saved with the weights nor used in validation.

Shapes: B, C, D, H, W = batch, channel, slice, row, column.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from p2w.errors import UserError
from p2w.finetune.task_types import TaskType
from p2w.model import Network
from p2w.model.unet3d import ConvNormAct, UpBlock
from p2w.world import World


def decoder_levels(network: Network) -> list[UpBlock]:
    """The blocks of a network's decoder before its last one, coarse to fine; empty where the decoder has no levels."""
    decoder = getattr(network, "decoder", None)
    blocks = [] if decoder is None else [one for one in decoder.modules() if isinstance(one, UpBlock)]
    return blocks[:-1]


def wants_supervision(network: Network, setting: str) -> bool:
    """Whether `recipe.deep_supervision` asks for it. Raises UserError where it is "on" and the decoder has no levels."""
    levels = bool(decoder_levels(network))
    if setting == "on" and not levels:
        raise UserError(
            "--recipe.deep-supervision on: this network has no decoder with levels; pass auto or off"
        )
    return setting != "off" and levels


class DeepSupervision(nn.Module):
    """Logits of the levels of a network's decoder, and the loss over all. New weights draw from torch's generator."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        levels = decoder_levels(network)
        self._levels = tuple(levels)  # in a tuple they are not modules of this one
        out = network.get_submodule("decoder.out_tr.final_conv")
        assert isinstance(out, nn.Conv3d)
        widths = [_width(level) for level in levels]
        self.heads = nn.ModuleList(nn.Conv3d(width, out.out_channels, 1) for width in widths)
        self._features: list[Tensor] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """In the block, keep what the levels compute in each pass, which `logits` and `loss` need."""

        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._features.append(output)

        handles = [level.register_forward_hook(keep) for level in self._levels]
        try:
            yield
        finally:
            self._features.clear()
            for handle in handles:
                handle.remove()

    def logits(self) -> list[Tensor]:
        """Logits (B, out, d, h, w) float32 of the levels in the last pass, coarse to fine; its features are then freed."""
        found = [head(feature).float() for head, feature in zip(self.heads, self._features, strict=True)]
        self._features.clear()
        return found

    def loss(
        self, full: Tensor, coarser: list[Tensor], target: Tensor, kind: TaskType, batch: int, world: World
    ) -> Tensor:
        """The weighted mean of the losses of `full` (B, out, D, H, W) and of `coarser`, coarse to fine."""
        weights = [0.5**k for k in range(len(coarser) + 1)]
        every = [full, *reversed(coarser)]
        losses = [kind.loss(one, at_size(target, one.shape[2:]), batch, world) for one in every]
        parts = [loss * (weight / sum(weights)) for loss, weight in zip(losses, weights, strict=True)]
        return torch.stack(parts).sum()


def _width(level: UpBlock) -> int:
    """The channels of what a block computes."""
    last = level.ops[1]
    assert isinstance(last, ConvNormAct)
    return last.conv1.out_channels


def at_size(target: Tensor, size: torch.Size) -> Tensor:
    """A target (B, K, D, H, W) with the edges `size`, each voxel the nearest; a level's edges divide the target's."""
    for axis, edge in enumerate(size, start=2):
        times = target.shape[axis] // edge
        if times > 1:
            target = target.narrow(axis, times // 2, target.shape[axis] - times // 2)
            target = target[(slice(None),) * axis + (slice(None, None, times),)]
    return target
