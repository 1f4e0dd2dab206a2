"""What the networks of others share: TensorFlow's padding, and widths at a fraction of the published ones."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from p2w.errors import UserError
from p2w.model.conv import Conv3d

PUBLISHED_WIDTH = 32  # every network has its published size at this width, as the paper's U-Net has


def scaled(channels: int, width: int) -> int:
    """A published number of channels at `width`, at least 1. Raises UserError for a width below 1."""
    if width < 1:
        raise UserError(f"model.width={width}: must be at least 1; published networks have {PUBLISHED_WIDTH}")
    return max(1, round(channels * width / PUBLISHED_WIDTH))


def pad_same(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    """Zeros round (B, C, D, H, W) as TensorFlow's "SAME" wants them: ceil(size / stride) outputs, the odd one behind."""
    pads: list[int] = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        pads += [total // 2, total - total // 2]
    return functional.pad(x, pads) if any(pads) else x


class SameConv3d(Conv3d):
    """Convolution with a cubic kernel and TensorFlow's "SAME" padding; no bias unless asked for."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1, bias: bool = False) -> None:
        # At stride 1 an odd kernel's padding is the same on both sides, which needs no copy of the map.
        super().__init__(cin, cout, kernel, stride, padding=kernel // 2 if stride == 1 else 0, bias=bias)
        self.kernel, self.by = (kernel,) * 3, (stride,) * 3

    def forward(self, x: Tensor, biased: bool = True) -> Tensor:
        """(B, cin, D, H, W) -> (B, cout, ceil(D / stride), …), without the bias unless `biased`."""
        return super().forward(pad_same(x, self.kernel, self.by) if self.by != (1, 1, 1) else x, biased)


def average_same(x: Tensor) -> Tensor:
    """Average pool 3x3x3, stride 2, "SAME": the mean of what lies inside, as TensorFlow takes it."""
    kernel, stride = (3, 3, 3), (2, 2, 2)
    inside = pad_same(torch.ones_like(x[:1, :1]), kernel, stride)
    mean = functional.avg_pool3d(pad_same(x, kernel, stride), kernel, stride)
    return mean / functional.avg_pool3d(inside, kernel, stride)


def initialise(network: nn.Module) -> None:
    """He's normal initialisation for ReLU, by the outputs, of every convolution; norms start as the identity."""
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
