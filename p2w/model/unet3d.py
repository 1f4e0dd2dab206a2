"""The paper's network: a 3D U-Net, without skip connections by default (paper, section 3; skips are its ablation).

Widths are those of Models Genesis (32-64 | 64-128 | 128-256 | 256-512); `width` scales them all. Parameter names
follow the Models Genesis torch port, so weights travel both ways (`p2w.weights.foreign`).

Shapes: B, C, D, H, W = batch, channel, slice, row, column.
"""

import itertools

import torch
from torch import Tensor, nn

from p2w.errors import UserError
from p2w.model.conv import Conv3d, freeze_cancelled_bias
from p2w.model.encoder import Encoder
from p2w.model.forms import FOLDED, PLAIN, FoldCost, Formed, can_fold, fold_and_convolve, fold_cost
from p2w.model.norm import BatchNorm3d, convolve, leaves_bias_out, normalise


class ConvNormAct(nn.Module):
    """3x3x3 convolution, batch norm, ReLU: (B, Cin, D, H, W) -> (B, Cout, D/stride, H/stride, W/stride)."""

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = Conv3d(cin, cout, kernel_size=3, stride=stride, padding=1)
        self.bn1 = BatchNorm3d(cout, relu=True)
        freeze_cancelled_bias(self.conv1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the three layers one after the other."""
        return self.normalise(convolve(self.conv1, self.bn1, x))

    def normalise(self, convolved: Tensor) -> Tensor:
        """Batch norm and ReLU of the output of this block's convolution, computed by `convolve`."""
        return normalise(self.conv1, self.bn1, convolved)


class Level(nn.Module):
    """Two ConvNormAct in a row; on the way down the second doubles the channels."""

    def __init__(self, cin: int, middle: int, cout: int) -> None:
        super().__init__()
        self.ops = nn.Sequential(ConvNormAct(cin, middle), ConvNormAct(middle, cout))

    def forward(self, x: Tensor) -> Tensor:
        """(B, cin, D, H, W) -> (B, cout, D, H, W)."""
        return self.ops(x)


class UNet3dEncoder(Encoder):
    """Four levels with 2x max-pooling between them.

    `channels` and `strides` describe the returned features, fine to coarse; at width 32 they are
    (64, 128, 256, 512) and (1, 2, 4, 8): a 32 x 64 x 64 part becomes 512 x 4 x 8 x 8.
    """

    input_convs = ("down_tr64.ops.0.conv1.weight",)

    def __init__(self, width: int = 32, in_channels: int = 1) -> None:
        super().__init__()
        if width < 1:
            raise UserError(f"model.width={width}: must be at least 1; the paper's network has 32")
        w = width
        self.channels = (2 * w, 4 * w, 8 * w, 16 * w)
        self.strides = (1, 2, 4, 8)
        self.in_channels = in_channels
        self.down_tr64 = Level(in_channels, w, 2 * w)
        self.down_tr128 = Level(2 * w, 2 * w, 4 * w)
        self.down_tr256 = Level(4 * w, 4 * w, 8 * w)
        self.down_tr512 = Level(8 * w, 8 * w, 16 * w)
        self.pool = nn.MaxPool3d(2)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_channels, D, H, W), edges divisible by 8 -> list of features, fine to coarse."""
        fine = self.down_tr64(x)
        middle = self.down_tr128(self.pool(fine))
        coarse = self.down_tr256(self.pool(middle))
        return [fine, middle, coarse, self.down_tr512(self.pool(coarse))]


class UpBlock(Formed):
    """Up-sampling `up_conv`, the skip where there is one, then the two ConvNormAct of `ops`.

    Two forms where there is no skip and the edges double: up-sampling and the first convolution one after the other
    ("plain"), or as one ("folded", see p2w.model.forms).
    """

    up_conv: nn.Module
    ops: nn.Sequential

    def possible_forms(self) -> tuple[str, ...]:
        """Folded where nothing stands between up-sampling and convolution."""
        first = self.first
        no_skip = first.conv1.in_channels == getattr(self.up_conv, "out_channels", -1)
        return (PLAIN, FOLDED) if no_skip and can_fold(self.up_conv, first.conv1) else (PLAIN,)

    def forms(self, device: torch.device, dtype: torch.dtype | None, samples: int) -> tuple[str, ...]:
        """Both forms run everywhere."""
        return self.possible_forms()

    def formed(self, x: Tensor) -> Tensor:
        """(B, Cin, D, H, W) -> what the first batch norm is given, (B, Cout, fD, fH, fW), of a block without skip."""
        conv, norm = self.first.conv1, self.first.bn1
        if self.form == FOLDED and isinstance(self.up_conv, nn.ConvTranspose3d):
            return fold_and_convolve(x, self.up_conv, conv, biased=not leaves_bias_out(conv, norm))
        return convolve(conv, norm, self.up_conv(x))

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """(B, Cin, D, H, W), (B, Cskip, fD, fH, fW) or None -> (B, Cout, fD, fH, fW), with f the up-sampling's factors."""
        if skip is not None:
            return self.ops(torch.cat((self.up_conv(x), skip), dim=1))
        return self.ops[1](self.first.normalise(self.formed(x)))

    @property
    def first(self) -> ConvNormAct:
        """The first of the two ConvNormAct."""
        first = self.ops[0]
        assert isinstance(first, ConvNormAct)
        return first


def fold_cost_of(block: UpBlock, size: tuple[int, int, int]) -> FoldCost | None:
    """FLOPs of a block's two forms for an input of `size` (D, H, W); None where it cannot be folded."""
    if FOLDED not in block.possible_forms():
        return None
    assert isinstance(block.up_conv, nn.ConvTranspose3d)
    return fold_cost(block.up_conv, block.first.conv1, size)


def folded_by_count(block: UpBlock, samples: int, size: tuple[int, int, int]) -> bool:
    """Whether the folded form has less arithmetic, for `samples` inputs of `size` (D, H, W) at a time.

    This rule decides where forms are not timed.
    """
    cost = fold_cost_of(block, size)
    return cost is not None and cost.saves(samples)


class Up(UpBlock):
    """Double the edges, join the skip where there is one, then two ConvNormAct."""

    def __init__(self, cin: int, skip: int, cout: int) -> None:
        super().__init__()
        self.up_conv = nn.ConvTranspose3d(cin, cin, kernel_size=2, stride=2)
        self.ops = nn.Sequential(ConvNormAct(cin + skip, cout), ConvNormAct(cout, cout))


class Final(nn.Module):
    """1x1x1 convolution to the output channels."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.final_conv = nn.Conv3d(cin, cout, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, cin, D, H, W) -> (B, cout, D, H, W), before the sigmoid."""
        return self.final_conv(x)


class UNet3dDecoder(nn.Module):
    """The paper's decoder, from features to a volume; of the encoder it needs only `channels` and `strides`."""

    def __init__(
        self, channels: tuple[int, ...], strides: tuple[int, ...], skips: bool = False, out_channels: int = 1
    ) -> None:
        super().__init__()
        steps = [coarse // fine for fine, coarse in itertools.pairwise(strides)]
        if len(channels) != 4 or strides[0] != 1 or steps != [2, 2, 2]:
            raise UserError(
                f"decoder: strides {strides} given, (1, 2, 4, 8) needed; take unet3d as the encoder"
            )
        c1, c2, c3, c4 = channels
        self.skips = skips
        self.up_tr256 = Up(c4, c3 if skips else 0, c3)
        self.up_tr128 = Up(c3, c2 if skips else 0, c2)
        self.up_tr64 = Up(c2, c1 if skips else 0, c1)
        self.out_tr = Final(c1, out_channels)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Features fine to coarse -> logits (B, out_channels, D, H, W) at the input's size."""
        fine, middle, coarse, x = features
        for up, skip in ((self.up_tr256, coarse), (self.up_tr128, middle), (self.up_tr64, fine)):
            x = up(x, skip if self.skips else None)
        return self.out_tr(x)
