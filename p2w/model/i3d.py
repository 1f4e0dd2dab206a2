"""I3D (Carreira and Zisserman 2017): Inception-v1 inflated to three dimensions; the first axis, time, is z here.

Parameter names are those of the public torch weights (`Mixed_3b.b0.conv3d.weight`). Padding is TensorFlow's "SAME"
throughout, batch norm has eps 1e-3, and the momentum of the other encoders, 0.1.

Shapes: B, C, D, H, W = batch, channel, slice, row, column.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from p2w.model.conv import SameConv3d, initialise, pad_same, scale_channels
from p2w.model.encoder import Encoder, InputNorm, PublishedFormat
from p2w.model.norm import BatchNorm3d

# One line a mixed block: 1x1x1 | 1x1x1 -> 3x3x3 | 1x1x1 -> 3x3x3 | max-pool -> 1x1x1
MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}


class Unit(nn.Module):
    """Convolution, batch norm, ReLU: (B, cin, D, H, W) -> (B, cout, ceil(D / stride), …)."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv3d = SameConv3d(cin, cout, kernel, stride)
        # The public torch weights come with momentum 0.01, which keeps a fifth of the statistics of video after 160 steps.
        self.bn = BatchNorm3d(cout, eps=1e-3, relu=True)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the three layers one after the other."""
        return self.bn(self.conv3d(x))


class Mixed(nn.Module):
    """Four branches on the same input, whose outputs are concatenated along the channels."""

    def __init__(self, cin: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        c0, c1a, c1b, c2a, c2b, c3 = channels
        self.b0 = Unit(cin, c0, 1)
        self.b1a = Unit(cin, c1a, 1)
        self.b1b = Unit(c1a, c1b, 3)
        self.b2a = Unit(cin, c2a, 1)
        self.b2b = Unit(c2a, c2b, 3)
        self.b3b = Unit(cin, c3, 1)
        self.cout = c0 + c1b + c2b + c3

    def forward(self, x: Tensor) -> Tensor:
        """(B, cin, D, H, W) -> (B, cout, D, H, W)."""
        around = functional.max_pool3d(x, 3, stride=1, padding=1)
        branches = (self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(around))
        return torch.cat(branches, dim=1)


class I3D(Encoder):
    """Features of 1a, 2c, 3c, 4f, 5c: at width 32 channels (64, 192, 480, 832, 1024), row and column strides 2 to 32.

    Slices shrink later: strides (2, 2, 2, 4, 8). A 32 x 64 x 64 part becomes 1024 x 4 x 2 x 2. Published weights have 3
    input channels; `normalise_input` repeats a grey one, and weights summed over them do the same with one.
    """

    input_norm: InputNorm = "symmetric"
    input_convs = ("Conv3d_1a_7x7.conv3d.weight",)
    published = (PublishedFormat("I3D", known_by="Conv3d_1a_7x7.conv3d.weight", head=("logits.",)),)

    def __init__(self, width: int = 32, in_channels: int = 1) -> None:
        super().__init__()
        first, second = scale_channels(64, width), scale_channels(192, width)
        self.in_channels = in_channels
        self.Conv3d_1a_7x7 = Unit(in_channels, first, 7, stride=2)
        self.Conv3d_2b_1x1 = Unit(first, first, 1)
        self.Conv3d_2c_3x3 = Unit(first, second, 3)
        cin, out = second, {}
        for name, channels in MIXED.items():
            mixed = Mixed(cin, tuple(scale_channels(c, width) for c in channels))
            self.add_module(name, mixed)
            cin = out[name] = mixed.cout
        self.channels = (first, second, out["Mixed_3c"], out["Mixed_4f"], out["Mixed_5c"])
        self.strides, self.slice_strides = (2, 4, 8, 16, 32), (2, 2, 2, 4, 8)
        initialise(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_channels, D, H, W) of any size -> list of features, fine to coarse."""
        c1a = self.Conv3d_1a_7x7(x)
        c2c = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(_pool(c1a, (1, 3, 3), (1, 2, 2))))
        c3c = self._mix("3bc", _pool(c2c, (1, 3, 3), (1, 2, 2)))
        c4f = self._mix("4bcdef", _pool(c3c, (3, 3, 3), (2, 2, 2)))
        return [c1a, c2c, c3c, c4f, self._mix("5bc", _pool(c4f, (2, 2, 2), (2, 2, 2)))]

    def _mix(self, stage: str, x: Tensor) -> Tensor:
        """The mixed blocks of a stage: "3bc" is 3b, 3c."""
        for letter in stage[1:]:
            x = self.get_submodule(f"Mixed_{stage[0]}{letter}")(x)
        return x


def _pool(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    """Max-pool with "SAME" padding; zeros do not change the maximum of a ReLU's outputs."""
    return functional.max_pool3d(pad_same(x, kernel, stride), kernel, stride)
