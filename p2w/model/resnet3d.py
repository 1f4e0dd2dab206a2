"""MedicalNet's 3D ResNets (Chen et al. 2019), dilated so that the deepest features keep stride 8.

Stem 7x7x7 stride 2, max-pool 3 stride 2; `layer2` halves once more, `layer3` and `layer4` dilate by 2 and 4 instead.
Parameter names are those of the published weights (`layer3.22.conv3.weight`).

Shapes: B, C, D, H, W = batch, channel, slice, row, column.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from p2w.errors import UserError
from p2w.model.conv import Conv3d, initialise, scale_channels
from p2w.model.encoder import Encoder, InputNorm
from p2w.model.norm import BatchNorm3d

BLOCKS = {
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
BASIC = (10, 18, 34)  # depths of two 3x3x3 convolutions a block; deeper ones have bottlenecks
SHORTCUT_A = (18, 34)  # depths whose shortcut drops voxels and appends zeros instead of convolving


class ShortcutA(nn.Module):
    """Take every stride-th voxel and append channels of zeros: (B, C, D, H, W) -> (B, cout, D/stride, …).

    It has no parameters. Gradients pass through it; MedicalNet's own code cuts them off here, with the same features.
    """

    def __init__(self, cout: int, stride: int) -> None:
        super().__init__()
        self.cout, self.stride = cout, stride

    def forward(self, x: Tensor) -> Tensor:
        """Drop voxels, append zeros."""
        s = self.stride
        x = x[:, :, ::s, ::s, ::s]
        return functional.pad(x, (0, 0, 0, 0, 0, 0, 0, self.cout - x.shape[1]))


class Basic(nn.Module):
    """Two 3x3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, cin: int, planes: int, stride: int, dilation: int, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _conv3(cin, planes, stride, dilation)
        self.bn1 = BatchNorm3d(planes, relu=True)
        self.conv2 = _conv3(planes, planes, 1, dilation)
        self.bn2 = BatchNorm3d(planes)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(B, cin, D, H, W) -> (B, planes, D/stride, …)."""
        y = self.bn1(self.conv1(x))
        y = self.bn2(self.conv2(y))
        return torch.relu_(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """Convolutions 1x1x1, 3x3x3 and 1x1x1, the last to four times the planes, and a shortcut."""

    expansion = 4

    def __init__(self, cin: int, planes: int, stride: int, dilation: int, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = Conv3d(cin, planes, 1, bias=False)
        self.bn1 = BatchNorm3d(planes, relu=True)
        self.conv2 = _conv3(planes, planes, stride, dilation)
        self.bn2 = BatchNorm3d(planes, relu=True)
        self.conv3 = Conv3d(planes, 4 * planes, 1, bias=False)
        self.bn3 = BatchNorm3d(4 * planes)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(B, cin, D, H, W) -> (B, 4 planes, D/stride, …)."""
        y = self.bn1(self.conv1(x))
        y = self.bn2(self.conv2(y))
        y = self.bn3(self.conv3(y))
        return torch.relu_(y + (x if self.downsample is None else self.downsample(x)))


class ResNet3d(Encoder):
    """Features of the stem, `layer1` and `layer4`, at strides 2, 4 and 8; `layer2` and `layer3` are as coarse as the last.

    At width 32 depth 101 has channels (64, 256, 2048).
    """

    input_norm: InputNorm = "positive-z"
    input_convs = ("conv1.weight",)

    def __init__(self, depth: int, width: int = 32, in_channels: int = 1) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise UserError(f"a 3D ResNet of depth {depth}: one of {', '.join(map(str, BLOCKS))}")
        block = Basic if depth in BASIC else Bottleneck
        planes = [scale_channels(c, width) for c in (64, 128, 256, 512)]
        self.channels = (planes[0], planes[0] * block.expansion, planes[3] * block.expansion)
        self.strides = (2, 4, 8)
        self.in_channels = in_channels
        self.conv1 = Conv3d(in_channels, planes[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = BatchNorm3d(planes[0], relu=True)
        self.maxpool = nn.MaxPool3d(3, stride=2, padding=1)
        layers, cin = [], planes[0]
        for p, n, stride, dilation in zip(planes, BLOCKS[depth], (1, 2, 1, 1), (1, 1, 2, 4), strict=True):
            layers.append(_layer(block, depth in SHORTCUT_A, cin, p, n, stride, dilation))
            cin = p * block.expansion
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        initialise(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_channels, D, H, W), edges divisible by 8 -> list of features, fine to coarse."""
        fine = self.bn1(self.conv1(x))
        middle = self.layer1(self.maxpool(fine))
        return [fine, middle, self.layer4(self.layer3(self.layer2(middle)))]


def _conv3(cin: int, cout: int, stride: int, dilation: int) -> Conv3d:
    return Conv3d(cin, cout, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)


def _layer(
    block: type[Basic] | type[Bottleneck],
    drops: bool,
    cin: int,
    planes: int,
    blocks: int,
    stride: int,
    dilation: int,
) -> nn.Sequential:
    """`blocks` blocks in a row; the first changes stride and channels, and has the shortcut that follows."""
    cout = planes * block.expansion
    shortcut: nn.Module | None = None
    if stride != 1 or cin != cout:
        shortcut = (
            ShortcutA(cout, stride)
            if drops
            else nn.Sequential(Conv3d(cin, cout, 1, stride=stride, bias=False), BatchNorm3d(cout))
        )
    first = block(cin, planes, stride, dilation, shortcut)
    return nn.Sequential(first, *(block(cout, planes, 1, dilation, None) for _ in range(blocks - 1)))
