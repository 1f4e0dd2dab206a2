"""Decoders, from an encoder's features back to a volume, and the heads of target tasks.

Shapes: B, C, D, H, W = batch, channel, slice, row, column.
"""

import itertools

import torch
from torch import Tensor, nn

from p2w.model.encoder import Encoder, Network, normalise_input
from p2w.model.unet3d import ConvNormAct, Final, UNet3dDecoder, UpBlock

WIDEST = 256  # most channels of a level of the general decoder; the paper's decoder has 256 | 128 | 64


def build_decoder(encoder: Encoder, skips: bool, out_channels: int = 1) -> nn.Module:
    """The encoder's own decoder where it has one; the paper's where it has the paper's four levels; else a `GeneralDecoder`.

    `skips` joins the encoder's features at every level. The decoder maps features, fine to coarse, to logits
    (B, out_channels, D, H, W) at the size of the encoder's input, whose edges are multiples of its last stride.
    """
    own = encoder.build_decoder(skips, out_channels)
    if own is not None:
        return own
    if encoder.strides == (1, 2, 4, 8) and not encoder.slice_strides:
        return UNet3dDecoder(encoder.channels, encoder.strides, skips, out_channels)
    return GeneralDecoder(encoder.channels, encoder.strides, skips, out_channels, encoder.slice_strides)


class GeneralDecoder(nn.Module):
    """U-shaped, over any number of levels; levels of equal stride are joined without up-sampling.

    A level is as wide as the encoder's, but no wider than `WIDEST`: I3D's own 832 channels would make 86 M parameters
    of a decoder for an encoder of 12 M. `slice_strides` are the strides along z where they differ.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        strides: tuple[int, ...],
        skips: bool = False,
        out_channels: int = 1,
        slice_strides: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.skips = skips
        edges = [(z, s, s) for z, s in zip(slice_strides or strides, strides, strict=True)]
        widths = [min(c, WIDEST) for c in channels[:-1]] + [channels[-1]]
        pairs = list(zip(channels, widths, edges, strict=True))
        self.ups = nn.ModuleList(
            UpsampleBlock(cin, _ratio(coarse, fine), skip if skips else 0, cout)
            for (skip, cout, fine), (_, cin, coarse) in reversed(list(itertools.pairwise(pairs)))
        )
        narrow = max(widths[0] // 2, 1)
        widens = max(edges[0]) > 1
        self.last = UpsampleBlock(widths[0], edges[0], 0, narrow) if widens else nn.Identity()
        self.out_tr = Final(narrow if widens else widths[0], out_channels)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Features fine to coarse -> logits (B, out_channels, D, H, W)."""
        x = features[-1]
        for up, skip in zip(self.ups, reversed(features[:-1]), strict=True):
            x = up(x, skip if self.skips else None)
        return self.out_tr(self.last(x))


class UpsampleBlock(UpBlock):
    """Multiply the edges by the factor of each axis, join the skip where there is one, then two ConvNormAct."""

    def __init__(self, cin: int, factor: tuple[int, int, int], skip: int, cout: int) -> None:
        super().__init__()
        widens = max(factor) > 1
        up = nn.ConvTranspose3d(cin, cout, kernel_size=factor, stride=factor)
        self.up_conv = up if widens else nn.Identity()
        self.ops = nn.Sequential(ConvNormAct((cout if widens else cin) + skip, cout), ConvNormAct(cout, cout))


def _ratio(coarse: tuple[int, int, int], fine: tuple[int, int, int]) -> tuple[int, int, int]:
    return (coarse[0] // fine[0], coarse[1] // fine[1], coarse[2] // fine[2])


class EncoderDecoder(Network):
    """Encoder and decoder in a row, sigmoid at the end: part (B, 1, D, H, W) in, volume in [0, 1] of that size out."""

    def __init__(self, encoder: Encoder, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        if not getattr(decoder, "skips", True):
            encoder.only_pooled()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) -> (B, out, D, H, W) in [0, 1], float32 whatever the AMP dtype."""
        return torch.sigmoid(self.decoder(self.encoder(x)).float())


HIDDEN = 1024  # units between pooled features and logits, as in Models Genesis' protocol (docs/paper.md)


class Classifier(Network):
    """Encoder, global average pool of its coarsest features, 1024 units with ReLU, logits: one, or `outputs` of them."""

    def __init__(self, encoder: Encoder, outputs: int = 1) -> None:
        super().__init__()
        self.encoder = encoder
        encoder.only_pooled()
        self.head = nn.Sequential(
            nn.Linear(encoder.channels[-1], HIDDEN), nn.ReLU(inplace=True), nn.Linear(HIDDEN, outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) in [0, 1] -> logits (B,) of one output, else (B, outputs); float32 whatever the AMP dtype."""
        features = self.encoder.pooled(normalise_input(x, self.encoder.input_norm, self.encoder.in_channels))
        logits: Tensor = self.head(features).float()
        return logits[:, 0] if logits.shape[1] == 1 else logits


class Segmenter(Network):
    """Encoder and decoder without a sigmoid: a logit for each voxel and output channel of the decoder."""

    def __init__(self, encoder: Encoder, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) in [0, 1] -> logits (B, out_channels, D, H, W), float32 whatever the AMP dtype."""
        return self.decoder(
            self.encoder(normalise_input(x, self.encoder.input_norm, self.encoder.in_channels))
        ).float()
