"""One trial on several ranks is the same trial: sums, batch statistics and gradients are those of the whole batch.

Batches are small and sets are small, a result is compared with others by a t-test, and it must not depend on the number of
ranks. So ranks share what they compute:

- `total` sums over ranks and lets the gradient through: soft Dice is a ratio of sums over the whole batch;
- `p2w.model.norm.synchronise_batch_norm` makes batch norm average over all ranks;
- `average_gradients` is one all-reduce after the backward pass. DDP would hide it behind the backward pass, but lays its
  buckets out anew after the first one, so that a trial which continues after an interruption would differ in its last bits.
"""

from typing import Any

import crc32c
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


def checksum(network: nn.Module) -> str:
    """Of all its weights, on the CPU: ranks start from the same, or gradients are averaged that do not belong together."""
    crc = 0
    for value in network.state_dict().values():
        crc = crc32c.crc32c(value.detach().cpu().contiguous().numpy().tobytes(), crc)
    return f"crc32c:{crc:08x}"
