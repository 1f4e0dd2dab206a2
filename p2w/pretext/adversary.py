"""An adversary trained in the same backward pass: a critic behind a gradient reversal (Ganin & Lempitsky 2015)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from p2w.model.conv import Conv3d


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


def reverse(x: Tensor) -> Tensor:
    """`x` itself, whose gradient comes back with the other sign: what lowers a loss behind it raises that loss before it."""
    return _Reverse.apply(x)


class Critic(nn.Module):
    """Volumes (B, 1, d, h, w) -> scores (B,): positive for real ones. Its means are over places of one volume only: without
    batch norm, a score depends on no other sample and no other rank."""

    LEVELS = 3

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        cin = 1
        for level in range(self.LEVELS):
            cout = width * 2**level
            layers += [Conv3d(cin, cout, kernel_size=3, stride=2, padding=1), nn.LeakyReLU(0.2)]
            cin = cout
        self.layers = nn.Sequential(*layers, Conv3d(cin, 1, kernel_size=1))

    def forward(self, x: Tensor) -> Tensor:
        """Mean score over all places."""
        scores: Tensor = self.layers(x)
        return scores.float().mean((1, 2, 3, 4))


def verdicts(real: Tensor, made: Tensor) -> Tensor:
    """The critic's loss: mean binary cross entropy of calling `real` (B,) real and `made` (B,) made."""
    return F.softplus(-real).mean() + F.softplus(made).mean()
