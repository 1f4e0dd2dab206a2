"""What other ranks have, with and without gradients; in one process, what is there. Equal shapes on all ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def gather(values: Tensor) -> Tensor:
    """(B, …) of each rank -> (ranks * B, …) in rank order, on all of them; no gradient flows."""
    return values.detach() if _alone() else _all(values.detach())


def gather_with_gradient(values: Tensor) -> Tensor:
    """`gather` through which gradients flow back to the rank that a row came from, summed over all ranks.

    With a loss that is the mean over a rank's own rows, and DDP's mean over the ranks, the weights' gradient is that of
    the mean over all rows, as one process with all of them would have it.
    """
    gathered: Tensor = values if _alone() else _Gather.apply(values)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        context.rows = len(values)
        return _all(values)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        first = dist.get_rank() * context.rows
        return total[first : first + context.rows]


def _all(values: Tensor) -> Tensor:
    parts = [
        torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())
    ]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)
