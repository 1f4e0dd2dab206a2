"""Contrastive losses as pure functions in float32 on any device, and embeddings gathered from all ranks.

Shapes: B = wholes of this rank, N = of all ranks or what is remembered, C = channels of an embedding (unit length),
P = prototypes, L = cells of a feature map.
"""

import contextlib
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional


def _is_single_process() -> bool:
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def all_gather(values: Tensor) -> Tensor:
    """(B, …) of each rank -> (ranks * B, …) in rank order, on all of them; no gradient flows."""
    return values.detach() if _is_single_process() else _all_gather(values.detach())


def all_gather_with_gradient(values: Tensor) -> Tensor:
    """`all_gather` through which gradients flow back to the rank that a row came from, summed over all ranks.

    With a loss that is the mean over a rank's own rows, and DDP's mean over the ranks, the weights' gradient is that of
    the mean over all rows, as one process with all of them would have it.
    """
    gathered: Tensor = values if _is_single_process() else _Gather.apply(values)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        context.rows = len(values)
        return _all_gather(values)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        first = dist.get_rank() * context.rows
        return total[first : first + context.rows]


def _all_gather(values: Tensor) -> Tensor:
    parts = [
        torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())
    ]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


@torch.no_grad()
def average_over_ranks(tensors: list[Tensor]) -> None:
    """Give each of the floating tensors the mean of all ranks', in place."""
    if _is_single_process() or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


# For each of a rank's wholes (B,): its loss, the cosine of its positive pair, and 1 if no negative is nearer than that.
ContrastOutcome = tuple[Tensor, Tensor, Tensor]


def full_precision(like: Tensor) -> contextlib.AbstractContextManager[None]:
    """Float32 arithmetic on a tensor's device, inside autocast."""
    kind = like.device.type
    return contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def l2_normalise(vectors: Tensor) -> Tensor:
    """(…, C) -> the same directions, length 1, float32."""
    return functional.normalize(vectors.float(), dim=-1)


def first_of_each(numbers: Tensor) -> Tensor:
    """(N,) integers -> (N,): the index at which each number comes first."""
    return (numbers[:, None] == numbers[None, :]).int().argmax(1)


def negative_mask(ids: Tensor, everyone: Tensor) -> Tensor:
    """(B, N) bool: which of all wholes may be a negative of each own one: every other whole, counted once if it comes twice.

    A validation batch is filled up with wholes that it has already, and another sub-scan may stand in for a damaged one.
    """
    once = first_of_each(everyone) == torch.arange(len(everyone), device=everyone.device)
    return (ids[:, None] != everyone[None, :]) & once[None, :]


def info_nce(
    anchor: Tensor, positive: Tensor, others: Tensor, allowed: Tensor, temperature: float
) -> ContrastOutcome:
    """-log( exp(s+/t) / (exp(s+/t) + sum exp(s-/t)) ), s cosines (paper, section 3).

    `anchor`, `positive` (B, C), `others` (N, C), all of unit length; `allowed` (B, N): which are negatives of which.
    Without negatives the loss is 0.
    """
    with full_precision(anchor):
        alike = (anchor * positive).sum(1)
        apart = (anchor @ others.T).masked_fill(~allowed, -math.inf)
    logits = torch.cat((alike[:, None], apart), 1) / temperature
    losses = logits.logsumexp(1) - logits[:, 0]
    return losses, alike.detach(), (alike > apart.amax(1)).float()


def local_global(
    anchor: Tensor, own: Tensor, cells: Tensor, allowed: Tensor, temperature: float
) -> ContrastOutcome:
    """Every cell of the own whole's other part is a positive of the anchor, all cells of other wholes are its negatives.

    `anchor` (B, C), `own` (B, L, C), `cells` (N, L, C), all of unit length; `allowed` (B, N). The loss of a whole is the
    mean over its L cells of InfoNCE with that cell as the positive (AMDIM, Bachman et al. 2019, here of cosines).
    """
    with full_precision(anchor):
        alike = torch.einsum("bc,blc->bl", anchor, own)
        apart = torch.einsum("bc,nlc->bnl", anchor, cells)
    apart = apart.masked_fill(~allowed[:, :, None], -math.inf).flatten(1)
    against = (apart / temperature).logsumexp(1, keepdim=True)
    losses = (torch.logaddexp(alike / temperature, against) - alike / temperature).mean(1)
    nearest = (alike > apart.amax(1, keepdim=True)).float().mean(1)
    return losses, alike.detach().mean(1), nearest


@torch.no_grad()
def sinkhorn(scores: Tensor, counts: Tensor, iterations: int, epsilon: float) -> Tensor:
    """Soft assignment (N, P) of wholes to prototypes: rows sum to 1, and the rows that count fill all prototypes alike.

    `scores` (N, P) cosines, `counts` (N,) bool. Columns and rows of exp(scores / epsilon) are scaled in turn (Cuturi 2013;
    SwAV, Caron et al. 2020), in logarithms; rows last. Rows that do not count have no influence on the scaling.
    """
    logs = scores.float() / epsilon
    hidden = ~counts[:, None]
    wholes = counts.sum().log()
    for _ in range(iterations):
        logs = (
            logs - logs.masked_fill(hidden, -math.inf).logsumexp(0, keepdim=True) - math.log(scores.shape[1])
        )
        logs = logs - logs.logsumexp(1, keepdim=True) - wholes
    return (logs + wholes).exp()


def average_outcomes(one: ContrastOutcome, two: ContrastOutcome) -> ContrastOutcome:
    """The mean of the two results, value by value."""
    loss, cosine, nearest = ((a + b) / 2 for a, b in zip(one, two, strict=True))
    return loss, cosine, nearest
