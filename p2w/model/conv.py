"""The 3D convolution of every network here: torch's, except where torch's is known to be wrong or to do too much.

It also has TensorFlow's padding, which I3D and dense V-Net need, and scales channels from the published widths.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from p2w.errors import UserError


class Conv3d(nn.Conv3d):
    """`nn.Conv3d`, (B, Cin, D, H, W) -> (B, Cout, D', H', W'), that uses no bf16 on a CPU for maps of two slices.

    oneDNN 3.12 (torch 2.13, AMX) reads memory that it never wrote when it computes the weights' gradient of a bf16
    convolution of 3 slices over a map of D = 2: of 15 sizes tried, all five with D = 2 gave values up to infinity, all
    others the right ones. `p2w.train.preflight` compares the run's own network with fp32 at start, should there be more.
    """

    bias_cancelled: bool = False
    """Whether a batch norm follows directly, which subtracts the bias again; see `freeze_cancelled_bias`."""

    def forward(self, x: Tensor, biased: bool = True) -> Tensor:
        """Convolve, in float32 where bf16 gives wrong values; without the bias unless `biased`."""
        bias = self.bias if biased else None
        if x.device.type == "cpu" and x.shape[2] == 2 and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return self._conv_forward(x.float(), self.weight, bias)
        return self._conv_forward(x, self.weight, bias)


def freeze_cancelled_bias(conv: Conv3d) -> None:
    """Take the bias of `conv`, which a batch norm follows directly, out of training.

    The norm subtracts the mean of the batch, and with it the bias: the output does not depend on it, and its gradient is
    exactly zero. It stays a parameter with its name, so that weights travel both ways, and counts again in eval mode.
    """
    conv.bias_cancelled = True
    if conv.bias is not None:
        conv.bias.requires_grad_(False)


def cancelled_biases(network: nn.Module) -> list[nn.Parameter]:
    """The biases of `network` that a batch norm cancels, in the order of its modules."""
    return [conv.bias for conv in _cancelling(network) if isinstance(conv.bias, nn.Parameter)]


def for_optimizer(network: nn.Module) -> list[nn.Parameter]:
    """Parameters that take gradients, and the cancelled biases of convolutions whose weights do, in the network's order.

    An optimizer skips what has no gradient. The biases are in its list because states saved by earlier versions count them.
    """
    beside = {id(conv.bias) for conv in _cancelling(network) if conv.weight.requires_grad}
    return [weight for weight in network.parameters() if weight.requires_grad or id(weight) in beside]


def let_train(network: nn.Module, but: tuple[str, ...] = ()) -> None:
    """Make every parameter take gradients, except biases that a batch norm cancels and names that begin with one of `but`.

    No gradient reaches the exceptions, and DistributedDataParallel would wait for it for ever.
    """
    cancelled = {id(bias) for bias in cancelled_biases(network)}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(not name.startswith(but) and id(parameter) not in cancelled)


def _cancelling(network: nn.Module) -> list[Conv3d]:
    """Convolutions whose bias a batch norm cancels."""
    return [module for module in network.modules() if isinstance(module, Conv3d) and module.bias_cancelled]


PUBLISHED_WIDTH = 32  # every network has its published size at this width, as the paper's U-Net has


def scale_channels(channels: int, width: int) -> int:
    """A published number of channels at `width`, at least 1. Raises UserError for a width below 1."""
    if width < 1:
        raise UserError(f"model.width={width}: must be at least 1; published networks have {PUBLISHED_WIDTH}")
    return max(1, round(channels * width / PUBLISHED_WIDTH))


Sides = tuple[bool, bool, bool]
BEHIND: Sides = (False, False, False)  # an odd zero goes to the end of every axis


def pad_same(
    x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int], front: Sides = BEHIND
) -> Tensor:
    """Pad (B, C, D, H, W) with zeros as TensorFlow's "SAME" does, for ceil(size / stride) outputs; an odd zero goes last.

    `front`: the axes (D, H, W) along which it goes first instead, for kernels that were mirrored along these axes.
    """
    pads: list[int] = []
    for size, k, s, first in zip(
        reversed(x.shape[2:]), reversed(kernel), reversed(stride), reversed(front), strict=True
    ):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        less = total // 2
        pads += [total - less, less] if first else [less, total - less]
    return functional.pad(x, pads) if any(pads) else x


class SameConv3d(Conv3d):
    """Convolution with a cubic kernel and TensorFlow's "SAME" padding; no bias unless asked for."""

    front = BEHIND
    """The axes along which an odd zero goes first."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1, bias: bool = False) -> None:
        # At stride 1 an odd kernel's padding is the same on both sides, which needs no copy of the map.
        super().__init__(cin, cout, kernel, stride, padding=kernel // 2 if stride == 1 else 0, bias=bias)
        self.kernel, self.by = (kernel,) * 3, (stride,) * 3

    def forward(self, x: Tensor, biased: bool = True) -> Tensor:
        """(B, cin, D, H, W) -> (B, cout, ceil(D / stride), …), without the bias unless `biased`."""
        padded = pad_same(x, self.kernel, self.by, self.front) if self.by != (1, 1, 1) else x
        return super().forward(padded, biased)


def average_same(x: Tensor, front: Sides = BEHIND) -> Tensor:
    """3x3x3 average pooling of stride 2, "SAME"; as in TensorFlow the mean leaves padding out. `front`: see pad_same."""
    kernel, stride = (3, 3, 3), (2, 2, 2)
    inside = pad_same(torch.ones_like(x[:1, :1]), kernel, stride, front)
    mean = functional.avg_pool3d(pad_same(x, kernel, stride, front), kernel, stride)
    return mean / functional.avg_pool3d(inside, kernel, stride)


def initialise(network: nn.Module) -> None:
    """He's normal initialisation for ReLU, by the outputs, of every convolution; norms start as the identity."""
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
