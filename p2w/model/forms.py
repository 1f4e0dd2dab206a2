"""Forms of a module: several ways to compute the same function, of which the fastest depends on the machine and the sizes.

A module that has forms says which of them can run somewhere, and computes what depends on the form apart from the rest, so
that each form can be compared with the plain one and timed. A form is a plain attribute: no parameter, no buffer, no key of
the state dict. Checkpoints know nothing of it.

One form is defined here, "folded": an up-sampling and the convolution after it, computed as one, with less arithmetic if no
other layer lies between them. ConvTranspose3d(kernel 2, stride 2) and then Conv3d(kernel 3, padding 1) are linear. Together
they are one ConvTranspose3d(kernel 4, stride 2, padding 1), whose weights follow from theirs: along an axis, the up-sampling
puts voxel i to voxels 2i + a (a = 0, 1), and tap k of the convolution takes voxel p to output p + 1 - k; so voxel i goes to
output 2i - 1 + (a + 2 - k). The up-sampling's bias is not the same everywhere in the output, since the convolution pads with
zeros; a channel of ones, which ends at the same edges, carries it.

Shapes: B, C, D, H, W = batch, channel, slice, row, column.
"""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from p2w.errors import UserError

PLAIN, FOLDED = "plain", "folded"  # names of forms
CHANNELS = 8  # tensor cores take multiples of it: channels of weight 0 are added to the channel of ones until one is reached


class Formed(nn.Module):
    """A module that computes the same function in several forms; `form` says which one is used."""

    form: str = PLAIN

    def forms(self, device: torch.device, dtype: torch.dtype | None, samples: int) -> tuple[str, ...]:
        """Names of the forms that can run on `device`, "plain" first.

        `dtype` is that of the network's arithmetic under autocast (None: float32 without autocast), `samples` how many
        samples pass at a time. Whether a form is faster there is for the caller to measure.
        """
        raise NotImplementedError

    def formed(self, x: Tensor) -> Tensor:
        """What depends on the form, computed in the form that is set, from the module's first input (B, C, D, H, W)."""
        raise NotImplementedError

    def possible_forms(self) -> tuple[str, ...]:
        """Names of all forms that this module has on any device, "plain" first."""
        raise NotImplementedError


def formed_modules(model: nn.Module) -> list[tuple[str, Formed]]:
    """(name, module) of every module of `model` that has more than one form on some device, in the model's own order."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, Formed) and len(module.possible_forms()) > 1
    ]


def set_forms(model: nn.Module, forms: Mapping[str, str]) -> None:
    """Set the form of the modules that `forms` names, {module name: form}; other modules keep theirs.

    Raises UserError for a module that is not in the model, or a form that the module does not have; then none is set.
    """
    there = dict(formed_modules(model))
    for name, form in forms.items():
        module = there.get(name)
        if module is None:
            raise UserError(
                f"form of {name!r}: no such module has forms; known are {', '.join(there) or 'none'}"
            )
        if form not in module.possible_forms():
            raise UserError(f"form {form!r} of {name}: unknown; one of {', '.join(module.possible_forms())}")
    for name, form in forms.items():
        there[name].form = form


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
