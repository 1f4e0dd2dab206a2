"""NiftyNet's dense V-Net (Gibson et al. 2018): three dense stacks and a head without a decoding path.

The input is averaged to half its size, and joined with the output of a 5x5x5 convolution of stride 2. Three stacks follow:
5, 10 and 10 convolutions, each of which adds 4, 8 or 16 channels. Every stack has a skip convolution (12, 24, 24 channels),
and the first two have a convolution of stride 2 that leads to the next stack (24 channels).

As an `Encoder` it returns four features: the image at half size joined with the first skip, the second skip, the third skip,
and the output of the third stack, which classification pools. The head, this network's decoder, reads the skips alone.

Shapes: B, C, D, H, W = batch, channel, slice, row, column.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from p2w.errors import UserError
from p2w.model.conv import SameConv3d, average_same, initialise, scale_channels
from p2w.model.encoder import Encoder, InputNorm
from p2w.model.norm import BatchNorm3d

STACKS = ((5, 4, 12), (10, 8, 24), (10, 16, 24))  # convolutions, growth, channels of the skip
FIRST = 24  # channels of the first convolution and of those downwards


class SameConvNorm(nn.Module):
    """Convolution, batch norm and, with `relu`, ReLU: (B, cin, D, H, W) -> (B, cout, …)."""

    def __init__(self, cin: int, cout: int, kernel: int = 3, stride: int = 1, relu: bool = True) -> None:
        super().__init__()
        self.conv = SameConv3d(cin, cout, kernel, stride)
        self.bn = BatchNorm3d(cout, relu=relu)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers one after the other."""
        return self.bn(self.conv(x))


class DenseStack(nn.Module):
    """Convolutions that each read the outputs of all earlier ones, a skip convolution, and with `down` one of stride 2."""

    def __init__(self, cin: int, convolutions: int, growth: int, skip: int, down: int | None) -> None:
        super().__init__()
        self.stack = nn.ModuleList(SameConvNorm(cin + i * growth, growth) for i in range(convolutions))
        self.cout = cin + convolutions * growth
        self.skip = SameConvNorm(self.cout, skip)
        self.down = None if down is None else SameConvNorm(self.cout, down, stride=2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, cin, D, H, W) -> skip (B, skip, D, H, W), and (B, down, D/2, …); without `down` the stack's output instead."""
        for conv in self.stack:
            x = torch.cat((x, conv(x)), dim=1)
        return self.skip(x), x if self.down is None else self.down(x)


class DenseVNet(Encoder):
    """The encoder, without NiftyNet's dropout and spatial prior; width 32: channels (13, 24, 24, 184), strides (2, 4, 8, 8).

    Its published weights were trained on HU without normalisation (their configuration has none), on volumes whose rows and
    columns run in the opposite direction. Their kernels are mirrored when they are read. A layer of stride 2 pads an even
    edge on one side only, and for mirrored kernels that has to be the other side, which `mirrored` does: the network of
    the published weights is `dense_vnet:mirrored=True`.
    """

    input_norm: InputNorm = "hu"
    input_convs = (
        "initial.conv.weight",
        *(f"blocks.0.stack.{i}.conv.weight" for i in range(STACKS[0][0])),
        "blocks.0.skip.conv.weight",
        "blocks.0.down.conv.weight",
    )
    norms_input = tuple(f"image_bn.{name}" for name in ("weight", "bias", "running_mean", "running_var"))
    beside_pooled = tuple(f"blocks.{i}.skip." for i in range(len(STACKS)))
    only_skips = True

    def __init__(self, width: int = 32, in_channels: int = 1, *, mirrored: bool = False) -> None:
        super().__init__()
        self.front = (False, mirrored, mirrored)
        down = scale_channels(FIRST, width)
        skips = [scale_channels(skip, width) for _, _, skip in STACKS]
        self.in_channels = in_channels
        self.image_bn = BatchNorm3d(in_channels)
        self.initial = SameConvNorm(in_channels, down, kernel=5, stride=2, relu=False)
        blocks, cin = [], in_channels + down
        for i, (convolutions, growth, _) in enumerate(STACKS):
            last = i == len(STACKS) - 1
            blocks.append(
                DenseStack(cin, convolutions, scale_channels(growth, width), skips[i], None if last else down)
            )
            cin = down
        self.blocks = nn.ModuleList(blocks)
        self.channels = (in_channels + skips[0], skips[1], skips[2], blocks[-1].cout)
        self.strides = (2, 4, 8, 8)
        for module in self.modules():
            if isinstance(module, SameConv3d):
                module.front = self.front
        initialise(self)

    def build_decoder(self, skips: bool, out_channels: int = 1) -> nn.Module:
        """Return NiftyNet's head. Raises UserError without skips."""
        return DenseVNetHead(self.channels, skips, out_channels)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_channels, D, H, W), edges divisible by 8 -> list of features, fine to coarse."""
        image = self.image_bn(average_same(x, self.front))
        skips, x = [], torch.cat((image, self.initial(x)), dim=1)
        for block in self.blocks:
            skip, x = block(x)
            skips.append(skip)
        return [torch.cat((image, skips[0]), dim=1), *skips[1:], x]


class DenseVNetHead(nn.Module):
    """The decoder: skips are resized to half the input's size and joined; a 3x3x3 convolution and a resize follow.

    Raises UserError without skips, because it reads nothing else.
    """

    def __init__(self, channels: tuple[int, ...], skips: bool = True, out_channels: int = 1) -> None:
        super().__init__()
        self.skips = skips
        if not skips:
            raise UserError(
                "dense_vnet: its head is made of skips; pass --pretext.skips, or take another network"
            )
        self.conv = SameConv3d(sum(channels[:-1]), out_channels, 3, bias=True)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Features of a DenseVNet -> logits (B, out_channels, D, H, W)."""
        half = features[0].shape[2:]
        resized = [
            functional.interpolate(f, half, mode="trilinear", align_corners=False) for f in features[:-1]
        ]
        logits = self.conv(torch.cat(resized, dim=1))
        return functional.interpolate(logits, scale_factor=2, mode="trilinear", align_corners=False)
