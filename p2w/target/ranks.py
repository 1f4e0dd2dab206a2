"""One trial on several ranks is the same trial: sums, batch statistics and gradients are those of the whole batch.

Pretraining leaves batch statistics to each rank. Here batches are small and sets are small, a result is compared with others
by a t-test, and it must not depend on the number of ranks. So ranks share what they compute:

- `total` sums over ranks and lets the gradient through: soft Dice is a ratio of sums over the whole batch;
- `share_statistics` makes batch norm average over all ranks;
- `average_gradients` is one all-reduce after the backward pass. DDP would hide it behind the backward pass, but lays its
  buckets out anew after the first one, so that a trial which continues after an interruption would differ in its last bits.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from p2w.world import World


class _Total(torch.autograd.Function):
    """All-reduce whose gradient is all-reduced too: every rank computes the same loss from the total."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        """Sum over ranks; `values` is left as it is."""
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """The sum over ranks of what each wants."""
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def total(values: Tensor, world: World) -> Tensor:
    """The sum over all ranks, any shape; differentiable. A loss made of it stands for the mean of the ranks' losses."""
    return values if world.size == 1 else _Total.apply(values)


class SharedBatchNorm3d(nn.BatchNorm3d):
    """Batch norm over the samples of all ranks, on the CPU, where torch's SyncBatchNorm does not run."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) -> the same shape; in training all ranks must call it together."""
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        values = x.float()
        axes = (0, 2, 3, 4)
        sums = torch.cat((values.sum(axes), values.new_tensor([values.numel() / values.shape[1]])))
        sums = _Total.apply(sums)
        count, mean = sums[-1].detach(), sums[:-1] / sums[-1]
        away = values - mean.view(1, -1, 1, 1, 1)
        variance = _Total.apply(away.square().sum(axes)) / count  # about the mean: no digits cancel
        self._remember(mean.detach(), variance.detach() * (count / (count - 1)))
        out = away * torch.rsqrt(variance + self.eps).view(1, -1, 1, 1, 1)
        if self.affine:
            out = out * self.weight.view(1, -1, 1, 1, 1) + self.bias.view(1, -1, 1, 1, 1)
        return out.to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        """Running statistics, as nn.BatchNorm3d keeps them."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)


def share_statistics(network: nn.Module, world: World) -> nn.Module:
    """The network with batch norm over all ranks; parameters, buffers and their names stay. One rank: as it is."""
    if world.size == 1:
        return network
    if world.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for module in network.modules():
        if type(module) is nn.BatchNorm3d:
            module.__class__ = SharedBatchNorm3d  # it holds the same, and forward alone differs
    return network


def average_gradients(parameters: list[nn.Parameter], world: World) -> None:
    """The mean over ranks, in place and in one piece; the same parameters have gradients on every rank."""
    if world.size == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    pieces = (flat / world.size).split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(pieces, gradients, strict=True)])


def gather_rows(values: Tensor, world: World, count: int) -> Tensor:
    """Row i of all ranks' rows dealt out as i = rank, rank + size, …: (n of this rank, …) -> (count, …), on every rank."""
    if world.size == 1:
        return values
    most = -(-count // world.size)
    padded = values.new_zeros((most, *values.shape[1:]))
    padded[: len(values)] = values
    everyone = world.gather(padded).view(world.size, most, *values.shape[1:])
    return everyone.transpose(0, 1).reshape(world.size * most, *values.shape[1:])[:count]
