"""An up-sampling and the convolution after it, computed as one: less arithmetic if no other layer lies between them.

ConvTranspose3d(kernel 2, stride 2) and then Conv3d(kernel 3, padding 1) are linear. Together they are one
ConvTranspose3d(kernel 4, stride 2, padding 1), whose weights follow from theirs: along an axis, the up-sampling puts voxel i
to voxels 2i + a (a = 0, 1), and tap k of the convolution takes voxel p to output p + 1 - k; so voxel i goes to output
2i - 1 + (a + 2 - k). The up-sampling's bias is not the same everywhere in the output, because the convolution pads with
zeros; a channel of ones, which ends at the same edges, carries it.

Shapes: B, C, D, H, W = batch, channel, slice, row, column.
"""

import contextlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

FOLDED = "folded"  # the form's name
CHANNELS = 8  # tensor cores take multiples of it: channels of weight 0 are added to the channel of ones until one is reached


@dataclass(frozen=True)
class FoldCost:
    """FLOPs of one forward pass, a multiply and an add counted as two; a backward pass has twice as many."""

    plain: int
    """For a sample, with up-sampling and convolution one after the other."""
    folded: int
    """For a sample, with the folded weights."""
    fold: int
    """For folding the weights, however many samples there are."""

    def saves(self, samples: int) -> bool:
        """Whether the folded form, with the folding itself, has less arithmetic."""
        return samples * self.folded + self.fold < samples * self.plain


def can_fold(up: nn.Module, conv: nn.Module) -> bool:
    """Whether the two are an up-sampling by 2 along every axis and a 3x3x3 convolution as described above."""
    return (
        isinstance(up, nn.ConvTranspose3d)
        and isinstance(conv, nn.Conv3d)
        and up.kernel_size == up.stride == (2, 2, 2)
        and up.padding == up.output_padding == (0, 0, 0)
        and conv.kernel_size == (3, 3, 3)
        and conv.padding == conv.stride == conv.dilation == (1, 1, 1)
        and up.groups == conv.groups == 1
        and up.dilation == (1, 1, 1)
    )


def fold_weights(up: Tensor, bias: Tensor | None, conv: Tensor) -> Tensor:
    """Weights of the one transposed convolution: (Cin + 1, Cout, 4, 4, 4), the last row for a channel of ones.

    `up` (Cin, Cmid, 2, 2, 2) and `bias` (Cmid,) are those of the up-sampling, `conv` (Cout, Cmid, 3, 3, 3).
    """
    middle, out = up.shape[1], conv.shape[0]
    ones = up.new_zeros(middle) if bias is None else bias
    rows = torch.cat((up, ones.view(1, -1, 1, 1, 1).expand(1, -1, 2, 2, 2)))
    taps = conv.flip(2, 3, 4).permute(1, 0, 2, 3, 4).reshape(middle, -1)
    pairs = rows.permute(0, 2, 3, 4, 1).reshape(-1, middle) @ taps
    folded = pairs.view(len(rows), 2, 2, 2, out, 3, 3, 3).permute(0, 4, 1, 2, 3, 5, 6, 7)
    for axis in range(3):  # the next axis' (2, …, 3) becomes 4: the taps of offset a begin at a
        behind = (0, 0) * (2 - axis)
        first, second = folded.unbind(2)
        folded = functional.pad(first, (*behind, 0, 1)) + functional.pad(second, (*behind, 1, 0))
    return folded


def fold_and_convolve(x: Tensor, up: nn.ConvTranspose3d, conv: nn.Conv3d, biased: bool = True) -> Tensor:
    """`conv(up(x))` by folded weights: (B, Cin, D, H, W) -> (B, Cout, 2D, 2H, 2W); `conv` has its bias where `biased`.

    Weights are folded in their own precision, also under autocast, which then rounds them once. Channels-last stays.
    """
    filled = _filled(x.shape[1]) - x.shape[1]
    with _no_autocast(x.device.type):
        weight = fold_weights(up.weight, up.bias, conv.weight)
        weight = functional.pad(weight, (0, 0) * 4 + (0, filled - 1))
    if x.is_contiguous(memory_format=torch.channels_last_3d):
        weight = weight.contiguous(memory_format=torch.channels_last_3d)
    with_ones = functional.pad(x, (0, 0) * 3 + (0, filled), value=1.0)
    return functional.conv_transpose3d(with_ones, weight, conv.bias if biased else None, stride=2, padding=1)


def _no_autocast(device: str) -> contextlib.AbstractContextManager[object]:
    """Autocast switched off; on the meta device, which has no autocast, nothing is done."""
    known = torch.amp.autocast_mode.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if known else contextlib.nullcontext()


def fold_cost(up: nn.ConvTranspose3d, conv: nn.Conv3d, size: tuple[int, int, int]) -> FoldCost:
    """FLOPs of both forms for an input of `size` (D, H, W) at the up-sampling."""
    cin, middle, cout = up.in_channels, up.out_channels, conv.out_channels
    voxels = 2 * math.prod(size)
    return FoldCost(
        plain=voxels * middle * (8 * cin + 8 * 27 * cout),
        folded=voxels * 64 * _filled(cin) * cout,
        fold=2 * 8 * 27 * (cin + 1) * middle * cout,
    )


def _filled(channels: int) -> int:
    """`channels` plus at least one, rounded up to a multiple that tensor cores take."""
    return (channels // CHANNELS + 1) * CHANNELS
