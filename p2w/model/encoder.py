"""The interface of encoders, all that decoders, heads and pretexts may rely on; and how their input is normalised.

Shapes: B, C, D, H, W = batch, channel, slice, row, column.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from p2w.errors import UserError
from p2w.model.conv import let_train

InputNorm = Literal["unit", "symmetric", "positive-z", "hu", "z"]
"""unit: [0, 1] as it is. symmetric: [-1, 1]. positive-z: mean 0, deviation 1 over voxels > 0; z: over all. hu: back to HU,
+-1000."""


def normalise_input(x: Tensor, input_norm: InputNorm, channels: int) -> Tensor:
    """(B, C, D, H, W) in [0, 1] -> what a network with `channels` input channels wants, float32, (B, channels, D, H, W).

    A pure function: statistics are per sample and channel. One grey channel is repeated for a network of several; any
    other mismatch raises UserError. "positive-z" is MedicalNet's rule on the volume that it is given, whose background is 0:
    here that is [0, 1], so the statistics are those of voxels above -1000 HU (docs/weights.md). It treats every voxel alike,
    also those at 0 (MedicalNet's own code puts noise there, which would make the result random); a channel without spread
    becomes 0. "z" is nnssl's: mean 0, deviation 1 over all voxels.
    """
    if x.shape[1] != channels and x.shape[1] != 1:
        raise UserError(
            f"volumes of {x.shape[1]} channels for a network of {channels}; load it with in_channels={x.shape[1]}"
        )
    x = x.float()
    if input_norm == "symmetric":
        x = 2 * x - 1
    elif input_norm == "hu":
        x = 2000 * x - 1000
    elif input_norm == "positive-z":
        x = _z_score(x, (x > 0).float())
    elif input_norm == "z":
        x = _z_score(x, torch.ones_like(x))
    return x.expand(-1, channels, -1, -1, -1)


def _z_score(x: Tensor, inside: Tensor) -> Tensor:
    """Mean and (biased) deviation of the voxels where `inside` is 1, of each sample and channel; no host sync."""
    count = inside.sum((2, 3, 4), keepdim=True).clamp(min=1)
    mean = (x * inside).sum((2, 3, 4), keepdim=True) / count
    deviation = (((x - mean) * inside).square().sum((2, 3, 4), keepdim=True) / count).sqrt()
    spread = deviation > 1e-6  # float32 of [0, 1]: below is rounding
    return torch.where(spread, (x - mean) / torch.where(spread, deviation, 1.0), 0.0)


Output = Tensor | tuple[Tensor, ...]  # of a network; every tensor has one entry a sample along its first axis


@dataclass(frozen=True)
class PublishedFormat:
    """How a file of published weights of this network is recognised, and its names become those of the network."""

    title: str
    """What people call these weights."""
    known_by: str
    """The name of a tensor (without `module.`) that such a file has and no other network's file."""
    head: tuple[str, ...] = ()
    """Prefixes of the tensors that are a decoder or a classifier, which a target task replaces."""
    rename: tuple[tuple[str, str], ...] = ()
    """(regular expression, replacement) pairs, applied one after the other: the file's names -> the network's."""


class Encoder(nn.Module):
    """`forward((B, C, D, H, W)) -> list of features, fine to coarse`, described by `channels` and `strides`.

    `strides` are those of rows and columns; `slice_strides` of slices, where they shrink later (I3D).
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    slice_strides: tuple[int, ...] = ()
    in_channels: int = 1
    least_voxels: int = 1
    """How many voxels the coarsest features need: instance norm takes two."""
    input_norm: InputNorm = "unit"
    """The input that it was trained on: what `normalise_input` makes of a batch in [0, 1]."""
    input_convs: tuple[str, ...] = ()
    """Weights of the convolutions whose first `in_channels` inputs are the image: they adapt when the channels differ."""
    norms_input: tuple[str, ...] = ()
    """Tensors with one value for each image channel."""
    channels_last: bool = True
    """Whether channels-last memory is the faster layout for it: what `train.channels_last auto` takes."""
    beside_pooled: tuple[str, ...] = ()
    """Prefixes of parameters that `pooled` does not depend on."""
    only_skips: bool = False
    """Whether its decoder reads the skips alone, so that it cannot be had without them."""
    published: tuple[PublishedFormat, ...] = ()
    """Formats of the published weights for it."""
    token_edge: int = 0
    """Voxels along each edge of a token, where `visible_tokens` can leave tokens out; 0: it cannot."""

    def visible_tokens(self, x: Tensor, kept: Tensor) -> Tensor:
        """The coarsest features of some tokens alone, computed without the others: x (B, C, D, H, W) and numbers (B, K) of
        tokens in the order z, y, x -> (B, K, channels[-1]). Only where `token_edge` is not 0."""
        raise NotImplementedError(f"{type(self).__name__} has no tokens that could be left out")

    def build_decoder(self, skips: bool, out_channels: int = 1) -> nn.Module | None:
        """A decoder of its own, as `p2w.model.decoder.build_decoder` describes it; None: a general one fits."""
        return None

    @property
    def divisor(self) -> tuple[int, int, int]:
        """The numbers that the edges (D, H, W) of an input must be multiples of."""
        return ((self.slice_strides or self.strides)[-1], self.strides[-1], self.strides[-1])

    def only_pooled(self) -> None:
        """Freeze what `pooled` does not depend on: no gradient reaches it, and DDP would wait for it for ever."""
        let_train(self, but=self.beside_pooled)

    def pooled(self, x: Tensor) -> Tensor:
        """Global average pool of the coarsest features, (B, channels[-1]) float32: the representation analysed."""
        features: list[Tensor] = self(x)
        return features[-1].float().mean(dim=(2, 3, 4))


class Network(nn.Module):
    """What a pretext builds: any module that keeps the encoder as `.encoder`.

    `forward(input, *extra_inputs) -> Output`. It also runs with the input alone, which is how it is checked and drawn.
    """

    encoder: Encoder


def set_memory_format(network: Network, channels_last: str) -> str:
    """Lay out the network's weights as `train.channels_last` says; a phrase for the log that says which layout and why.

    Activations follow the layout of the weights.
    """
    auto = channels_last == "auto"
    last = network.encoder.channels_last if auto else channels_last == "on"
    if last:
        network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # torch's stub knows 2D only
    why = f"auto: faster for {type(network.encoder).__name__}" if auto else "asked for"
    return f"channels {'last' if last else 'first'} ({why})"
