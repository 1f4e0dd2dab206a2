"""Decoders: from an encoder's features back to a volume. They see an encoder only through its channels and strides.

Shapes: B, C, D, H, W = batch, channel, slice, row, column.
"""

import itertools

import torch
from torch import Tensor, nn

from p2w.model.protocol import Encoder, Network
from p2w.model.unet3d import ConvNormAct, Final, UNet3dDecoder


def build_decoder(encoder: Encoder, skips: bool, out_channels: int = 1) -> nn.Module:
    """The paper's decoder where the encoder has its four levels, else one level of `GeneralDecoder` for each of its levels.

    `skips` joins the encoder's features at every level. The decoder maps features, fine to coarse, to logits
    (B, out_channels, D, H, W) at the size of the encoder's input, whose edges are multiples of its last stride.
    """
    kind = UNet3dDecoder if encoder.strides == (1, 2, 4, 8) else GeneralDecoder
    return kind(encoder.channels, encoder.strides, skips, out_channels)


class GeneralDecoder(nn.Module):
    """U-shaped, over any number of levels; levels of equal stride are joined without up-sampling."""

    def __init__(
        self, channels: tuple[int, ...], strides: tuple[int, ...], skips: bool = False, out_channels: int = 1
    ) -> None:
        super().__init__()
        self.skips = skips
        pairs = list(zip(channels, strides, strict=True))
        self.ups = nn.ModuleList(
            Widen(cin, coarse // fine, cout if skips else 0, cout)
            for (cout, fine), (cin, coarse) in reversed(list(itertools.pairwise(pairs)))
        )
        narrow = max(channels[0] // 2, 1)
        self.last = Widen(channels[0], strides[0], 0, narrow) if strides[0] > 1 else nn.Identity()
        self.out_tr = Final(narrow if strides[0] > 1 else channels[0], out_channels)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Features fine to coarse -> logits (B, out_channels, D, H, W)."""
        x = features[-1]
        for up, skip in zip(self.ups, reversed(features[:-1]), strict=True):
            x = up(x, skip if self.skips else None)
        return self.out_tr(self.last(x))


class Widen(nn.Module):
    """Multiply the edges by `factor`, join the skip where there is one, then two ConvNormAct."""

    def __init__(self, cin: int, factor: int, skip: int, cout: int) -> None:
        super().__init__()
        up = nn.ConvTranspose3d(cin, cout, kernel_size=factor, stride=factor)
        self.up_conv = up if factor > 1 else nn.Identity()
        self.ops = nn.Sequential(
            ConvNormAct((cout if factor > 1 else cin) + skip, cout), ConvNormAct(cout, cout)
        )

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """(B, cin, D, H, W), (B, skip, fD, fH, fW) or None -> (B, cout, fD, fH, fW)."""
        x = self.up_conv(x)
        return self.ops(x if skip is None else torch.cat((x, skip), dim=1))


class EncoderDecoder(Network):
    """Encoder and decoder in a row, sigmoid at the end: part (B, 1, D, H, W) in, volume in [0, 1] of that size out."""

    def __init__(self, encoder: Encoder, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) -> (B, out, D, H, W) in [0, 1], float32 whatever the AMP dtype."""
        return torch.sigmoid(self.decoder(self.encoder(x)).float())
