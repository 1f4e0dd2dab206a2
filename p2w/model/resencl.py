"""nnU-Net's residual encoder, ResEncL (Isensee et al. 2024, "nnU-Net Revisited"): for weights that nnU-Net can load.

Six stages of residual blocks, each of which halves the edges but the first. Parameter names are those of nnU-Net's
`ResidualEncoderUNet.encoder`, each once (`p2w.weights.nnunet` writes each under two names, as nnU-Net does). Strides are 2
along every axis; nnU-Net's anisotropic plans take these weights too, its own trainer averages the kernels.

Shapes: B, C, D, H, W = batch, channel, slice, row, column.
"""

import math

from torch import Tensor, nn

from p2w.errors import UserError
from p2w.model.conv import Conv3d
from p2w.model.encoder import Encoder

BLOCKS = (1, 3, 4, 6, 6, 6)
WIDTHS = (1, 2, 4, 8, 10, 10)  # times `width`: 32, 64, 128, 256, 320, 320
SLOPE = 0.01  # of LeakyReLU


class ConvInstanceNorm(nn.Module):
    """Convolution, instance norm, LeakyReLU where `acts`: (B, cin, D, H, W) -> (B, cout, D/stride, H/stride, W/stride)."""

    def __init__(self, cin: int, cout: int, kernel: int = 3, stride: int = 1, *, acts: bool = True) -> None:
        super().__init__()
        bias = kernel > 1  # nnU-Net's projections have none
        self.conv = Conv3d(cin, cout, kernel, stride, padding=kernel // 2, bias=bias)
        self.norm = nn.InstanceNorm3d(cout, eps=1e-5, affine=True)
        self.acts = acts
        nn.init.kaiming_normal_(self.conv.weight, a=SLOPE)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers one after the other."""
        x = self.norm(self.conv(x))
        return nn.functional.leaky_relu_(x, SLOPE) if self.acts else x


class ResidualBlock(nn.Module):
    """Two ConvNorm and a shortcut, which averages if the block has a stride and projects if channels change."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvInstanceNorm(cin, cout, stride=stride)
        self.conv2 = ConvInstanceNorm(cout, cout, acts=False)
        nn.init.zeros_(self.conv2.norm.weight)  # a new block passes its input on, as in nnU-Net
        shortcut: list[nn.Module] = [nn.AvgPool3d(stride)] if stride > 1 else []
        if cin != cout:
            shortcut.append(ConvInstanceNorm(cin, cout, kernel=1, acts=False))
        self.skip = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """(B, cin, D, H, W) -> (B, cout, D/stride, H/stride, W/stride)."""
        return nn.functional.leaky_relu_(self.conv2(self.conv1(x)) + self.skip(x), SLOPE)


class Stem(nn.Module):
    """One ConvNorm at full size; the list of one is nnU-Net's naming."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvInstanceNorm(cin, cout))

    def forward(self, x: Tensor) -> Tensor:
        """(B, cin, D, H, W) -> (B, cout, D, H, W)."""
        return self.convs(x)


class Stage(nn.Module):
    """`count` blocks; the first has the stride."""

    def __init__(self, cin: int, cout: int, stride: int, count: int) -> None:
        super().__init__()
        later = (ResidualBlock(cout, cout, 1) for _ in range(count - 1))
        self.blocks = nn.Sequential(ResidualBlock(cin, cout, stride), *later)

    def forward(self, x: Tensor) -> Tensor:
        """(B, cin, D, H, W) -> (B, cout, D/stride, H/stride, W/stride)."""
        return self.blocks(x)


class ResEncL(Encoder):
    """Six levels; at width 32, nnU-Net's, `channels` are (32, 64, 128, 256, 320, 320) and `strides` (1, 2, 4, 8, 16, 32).

    A 32 x 64 x 64 part becomes 320 x 1 x 2 x 2. Instance norm needs two voxels a map at least, so 32 x 32 x 32 is refused.
    """

    least_voxels = 2
    input_convs = ("stem.convs.0.conv.weight",)

    def __init__(self, width: int = 32, in_channels: int = 1) -> None:
        super().__init__()
        self.channels = tuple(width * times for times in WIDTHS)
        self.strides = (1, 2, 4, 8, 16, 32)
        self.in_channels = in_channels
        self.stem = Stem(in_channels, width)
        before = (width, *self.channels)
        self.stages = nn.Sequential(
            *(
                Stage(cin, cout, 1 if n == 0 else 2, count)
                for n, (cin, cout, count) in enumerate(zip(before, self.channels, BLOCKS, strict=False))
            )
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_channels, D, H, W), edges divisible by 32 -> list of features, fine to coarse.

        Raises UserError for an input whose coarsest maps would have a single voxel.
        """
        refuse_size(x, self)
        x, features = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


def refuse_size(x: Tensor, encoder: Encoder) -> None:
    """Raise UserError where the edges of x (B, C, D, H, W) do not fit the encoder's strides and norms."""
    size, stride = tuple(x.shape[2:]), encoder.strides[-1]
    if any(edge % stride for edge in size):
        raise UserError(f"input {size}: each edge must be a multiple of {stride}; pad or crop it")
    if math.prod(edge // stride for edge in size) < encoder.least_voxels:
        raise UserError(
            f"input {size}: its coarsest features would be {encoder.least_voxels - 1} voxel, too few to be normalised; "
            f"double an edge"
        )
