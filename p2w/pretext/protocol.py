"""What a pretext is. Shapes: B, C, D, H, W = batch, channel, slice, row, column; all axes z, y, x."""

import math
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from p2w.errors import UserError
from p2w.geometry import Size
from p2w.model.encoder import Encoder, Network, Output
from p2w.rng import SampleKeys


@dataclass(frozen=True)
class Views:
    """What one batch of wholes became; every tensor has one entry a whole along its first axis.

    `input` (B, C, d, h, w) in [0, 1] goes to the network, followed by `extra_inputs`, should the network need more (another
    part, the wholes' ids); `target` and `mask` are for the loss alone.
    """

    input: Tensor
    target: Tensor
    mask: Tensor | None = None
    extra_inputs: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.input)

    def rows(self, some: slice) -> "Views":
        """The same of some of the wholes."""
        mask = None if self.mask is None else self.mask[some]
        beside = tuple(tensor[some] for tensor in self.extra_inputs)
        return replace(self, input=self.input[some], target=self.target[some], mask=mask, extra_inputs=beside)

    def split(self, passes: int) -> "list[Views]":
        """Equal shares of the wholes, in order; `passes` divides their number."""
        share = len(self) // passes
        return [self.rows(slice(n * share, (n + 1) * share)) for n in range(passes)]


class Pretext(Protocol):
    """A proxy task. All randomness comes from the keys, so a batch can be replayed.

    `reconstructs`: the network answers with a volume (B, 1, d, h, w) in [0, 1] to be compared with `target`. Then
    `network(views.input)` alone gives that volume without talking to other ranks, for rank 0 to draw it.

    `capturable`, where a pretext has it and it is true: network and loss are made of device operations alone, the same ones
    at every step, so that a CUDA graph of one step stands for all.
    """

    reconstructs: bool

    def sample(self, batch_BDHW: Tensor, keys: SampleKeys) -> Views:
        """Wholes, int16 HU on the device -> views on the same device."""

    def build(self, encoder: Encoder) -> Network:
        """Put the decoder or head of this task behind the encoder. Raises UserError where the two do not go together."""

    def loss(self, output: Output, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, a mean over the wholes of `views`, and further scalars worth logging.

        What a whole costs may depend on others only through `output`: validation asks for one whole at a time. A further
        scalar `mse` is the mean squared error of a reconstruction, and is drawn in the place of a loss of several terms.
        """

    def image_columns(self, views: Views) -> dict[str, Tensor]:
        """Titles and volumes (B, 1, d, h, w) in [0, 1] of what is shown and what is asked, for pictures."""


def check_size(size: Size, encoder: Encoder) -> None:
    """Raise UserError where the edges of the network's input, in voxels, are no multiples of the encoder's strides, or
    leave its coarsest features fewer voxels than it can normalise."""
    by, least = encoder.divisor, encoder.least_voxels
    fits = [max(stride, edge // stride * stride) for edge, stride in zip(size, by, strict=True)]
    few = math.prod(edge // stride for edge, stride in zip(fits, by, strict=True)) < least
    wide = 2 if few else 1
    remedy = f"pass e.g. --pretext.size {fits[0]} {wide * fits[1]} {wide * fits[2]}"
    if any(edge < stride or edge % stride for edge, stride in zip(size, by, strict=True)):
        same = len(set(by)) == 1
        rule = f"{by[0]}, the encoder's stride" if same else f"its own of {by}, the encoder's strides"
        raise UserError(f"pretext.size={size}: each edge must be a multiple of {rule}; {remedy}")
    if few:
        raise UserError(
            f"pretext.size={size}: at the encoder's stride, {by[-1]}, its coarsest features must be {least} voxels at "
            f"least, to be normalised; {remedy}"
        )
