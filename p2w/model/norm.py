"""Batch norm of every network here: with or without ReLU, in several forms, over one rank or over all.

Three forms give the same function:

- plain: torch's batch norm on (B, C, D, H, W), then ReLU in place;
- flat: the same on the view (B, C, D * H, W). PyTorch's fast kernels for channels-last memory know four axes only;
- fused: one Triton kernel for norm and ReLU, on CUDA.

A convolution's bias directly before batch norm is cancelled where the statistics are the batch's. It is left out of the
arithmetic there, and given to the norm as `shift`, so that the running mean is still that of the convolution with its bias:
eval mode and checkpoints are the same with and without.

Over all ranks (`synchronise_batch_norm`), statistics and gradients are those of the whole batch, as on one rank that has it.
Before a network is judged, its running statistics are computed anew (`recalibrated`).

Shapes: B, C, D, H, W = batch, channel, slice, row, column.
"""

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from p2w.errors import UserError
from p2w.model.conv import Conv3d, freeze_cancelled_bias
from p2w.model.forms import PLAIN, Formed

FLAT, FUSED = "flat", "fused"
Module = TypeVar("Module", bound=nn.Module)


class BatchNorm3d(Formed, nn.BatchNorm3d):
    """`nn.BatchNorm3d` and, with `relu`, ReLU: (B, C, D, H, W) -> the same shape. Keys and values are nn.BatchNorm3d's."""

    over_ranks: bool = False
    """Whether the statistics are those of all ranks' samples; set by `synchronise_batch_norm`."""

    def __init__(
        self, channels: int, eps: float = 1e-5, momentum: float = 0.1, *, relu: bool = False
    ) -> None:
        super().__init__(channels, eps=eps, momentum=momentum)
        self.relu = relu

    def extra_repr(self) -> str:
        """The settings that torch's own representation leaves out."""
        more = f", relu={self.relu}" + ", over all ranks" * self.over_ranks
        return super().extra_repr() + more

    def possible_forms(self) -> tuple[str, ...]:
        """Synchronised over ranks there is a single computation, whatever the form says."""
        return (PLAIN, *(() if self.over_ranks else (FLAT,)), *((FUSED,) if self.relu else ()))

    def forms(self, device: torch.device, dtype: torch.dtype | None, samples: int) -> tuple[str, ...]:
        """As `Formed.forms`: fused needs CUDA, triton and the ReLU."""
        can = device.type == "cuda" and fused_kernel() is not None
        return tuple(form for form in self.possible_forms() if form != FUSED or can)

    def formed(self, x: Tensor) -> Tensor:
        """The whole of `forward`, since all of it depends on the form."""
        return self(x)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """Norm and, where there is one, ReLU. In training over ranks all ranks must call it together.

        `shift` (C,) is added to the mean that the running mean takes in: the bias that the convolution before left out.
        """
        if not uses_batch_statistics(self):
            return self._by_torch(x, 0.0)
        momentum = _next_momentum(self)
        reduce = sum_over_ranks if self.over_ranks and dist.is_initialized() else None
        kernel = fused_kernel() if self.form == FUSED and self.relu and x.is_cuda else None
        if kernel is not None and x.is_contiguous(memory_format=torch.channels_last_3d):
            return kernel(
                x, self.weight, self.bias, self.running_mean, self.running_var,
                shift=shift, momentum=momentum, eps=self.eps, reduce=reduce,
            )  # fmt: skip
        if reduce is None:  # noqa: SIM108
            out = self._by_torch(x, momentum)
        else:
            out = self._activated(_over_ranks(self, x, momentum))
        if shift is not None and self.running_mean is not None:
            # Through `data`: torch saves the running mean for the backward pass, which in training does not read it, and
            # would refuse one that was changed meanwhile.
            self.running_mean.data.add_(shift.detach(), alpha=momentum)
        return out

    def _by_torch(self, x: Tensor, momentum: float) -> Tensor:
        """Norm and ReLU by torch, on a view with four axes unless the form is plain; updates the running statistics."""
        given = x if self.form == PLAIN else x.flatten(2, 3)
        out = functional.batch_norm(
            given, self.running_mean, self.running_var, self.weight, self.bias,
            uses_batch_statistics(self), momentum, self.eps,
        )  # fmt: skip
        out = self._activated(out)  # before it is seen as a view, whose gradient would be copied
        return out if self.form == PLAIN else out.unflatten(2, x.shape[2:4])

    def _activated(self, out: Tensor) -> Tensor:
        return torch.relu_(out) if self.relu else out


class SynchronisedBatchNorm(_BatchNorm):
    """Replaces torch's nn.BatchNorm1d, 2d and 3d in `synchronise_batch_norm`: statistics of all ranks' samples."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, …) -> the same shape; in training all ranks must call it together."""
        if uses_batch_statistics(self) and dist.is_initialized():
            return _over_ranks(self, x, _next_momentum(self))
        return super().forward(x)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of axes."""


class ConvBatchNorm(nn.Sequential):
    """A convolution with bias and a batch norm, keyed 0 and 1: (B, Cin, D, H, W) -> (B, Cout, D', H', W')."""

    def __init__(self, conv: Conv3d, norm: BatchNorm3d) -> None:
        super().__init__(conv, norm)
        freeze_cancelled_bias(conv)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and normalise."""
        conv, norm = self
        assert isinstance(conv, Conv3d) and isinstance(norm, BatchNorm3d)
        return normalise(conv, norm, convolve(conv, norm, x))


def convolve(conv: Conv3d, norm: BatchNorm3d, x: Tensor) -> Tensor:
    """`conv` of x (B, Cin, D, H, W), without the bias where `norm`, which comes next, cancels it."""
    return conv(x, biased=False) if leaves_bias_out(conv, norm) else conv(x)


def normalise(conv: Conv3d, norm: BatchNorm3d, convolved: Tensor) -> Tensor:
    """Apply `norm` to the output of `convolve`; its running mean includes the bias that was left out there."""
    return norm(convolved, conv.bias if leaves_bias_out(conv, norm) else None)


def leaves_bias_out(conv: Conv3d, norm: _BatchNorm) -> bool:
    """Whether the bias of `conv` is cancelled by `norm` and can be left out.

    A bias that takes gradients, because somebody made every parameter trainable, is computed with: DistributedDataParallel
    would wait for its gradient for ever, though it is zero but for rounding.
    """
    return conv.bias is not None and not conv.bias.requires_grad and uses_batch_statistics(norm)


def uses_batch_statistics(norm: _BatchNorm) -> bool:
    """Whether `norm` normalises by the batch's own mean and variance: in training, and where it keeps no running ones."""
    return norm.training or norm.running_mean is None


@functools.cache
def fused_kernel() -> Callable[..., Tensor] | None:
    """The Triton kernel of batch norm with ReLU; None where triton is not installed."""
    try:
        from p2w.kernels.norm_relu_triton import norm_relu  # noqa: PLC0415  (triton: only where it is used)
    except ImportError:
        return None
    return norm_relu


def synchronise_batch_norm(network: Module, ranks: int) -> Module:
    """The network itself, with batch norm in training over the samples of all ranks; parameters, buffers and names stay.

    For `ranks` 1 nothing changes. Torch's own nn.BatchNorm1d, 2d and 3d are included. The processes of the default group
    of torch.distributed then must run the network together. Raises UserError for another kind of batch norm.
    """
    if ranks == 1:
        return network
    for name, module in network.named_modules():
        if isinstance(module, BatchNorm3d):
            module.over_ranks = True
        elif type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            module.__class__ = SynchronisedBatchNorm  # the same tensors; only `forward` differs
        elif isinstance(module, _BatchNorm) and not isinstance(
            module, SynchronisedBatchNorm | nn.SyncBatchNorm
        ):
            raise UserError(
                f"{name}: batch norm of the kind {type(module).__name__} cannot be computed over {ranks} ranks; take "
                "torch's nn.BatchNorm3d or p2w.model.norm.BatchNorm3d"
            )
    return network


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum over all ranks, in place and returned."""
    dist.all_reduce(values)
    return values


def _next_momentum(norm: _BatchNorm) -> float:
    """Count a batch; the weight of its statistics in the running ones. Torch's rule: without momentum, a plain mean."""
    if not norm.training or norm.num_batches_tracked is None:
        return 0.0 if norm.momentum is None else norm.momentum
    norm.num_batches_tracked.add_(1)
    return 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum


def _over_ranks(norm: _BatchNorm, x: Tensor, momentum: float) -> Tensor:
    """Batch norm (B, C, …) -> the same shape by the statistics of all ranks; updates the running ones as torch does."""
    out, mean, variance, count = _NormOverRanks.apply(x, norm.weight, norm.bias, norm.eps)
    if norm.running_mean is not None and norm.running_var is not None:
        with torch.no_grad():
            unbiased = variance * (count / (count - 1).clamp(min=1))
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
            norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)
    return out


class _NormOverRanks(torch.autograd.Function):
    """Batch norm by the statistics of all ranks' samples, with one sum over ranks in each direction.

    Passes over the map are torch's own batch-norm kernels, five times as fast on a CPU as the same in single operations:
    in training mode for this rank's moments, in evaluation mode with the moments of all ranks. These are joined in float64,
    where their digits do not cancel. A rank may have no sample.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(output like x, mean (C,), biased variance (C,), number of values a channel (), the last three float64)."""
        own, channels = x.numel() // x.shape[1], x.shape[1]
        moments = x.new_zeros(2 * channels + 1, dtype=torch.float64)
        if own:
            # With eps 0 the third result is 1 / deviation, also where the variance is far below any eps.
            _, near, inverse = torch.native_batch_norm(_map(x), None, None, None, None, True, 0.0, 0.0)
            squares = inverse.double() ** -2 + near.double() ** 2
            moments[:channels], moments[channels:-1], moments[-1] = own * near.double(), own * squares, own
        moments = sum_over_ranks(moments)
        count = moments[-1]
        mean, square = (moments[:-1] / count).chunk(2)
        variance = (square - mean.square()).clamp(min=0)
        wide = torch.promote_types(x.dtype, torch.float32)
        centre, spread = mean.to(wide), variance.to(wide)
        out = _normalised(x, weight, bias, centre, spread, eps)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, centre, spread, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return out, mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """The input's gradient takes sums over all ranks; weight and bias get this rank's own, and DDP adds those up."""
        x, weight, centre, spread, count = ctx.saved_tensors
        factor = torch.ones_like(centre) if weight is None else weight.to(centre.dtype)
        if x.numel():
            to_x, to_weight, to_bias = torch.ops.aten.native_batch_norm_backward(
                _map(gradients[0].to(x.dtype)), _map(x), factor, centre, spread, None, None, False, ctx.eps,
                [True] * 3,
            )  # fmt: skip
        else:
            to_x, to_weight, to_bias = _map(x).clone(), torch.zeros_like(centre), torch.zeros_like(centre)
        means = sum_over_ranks(torch.cat((to_bias, to_weight)).double()).div_(count)
        of_gradient, of_product = means.to(centre.dtype).chunk(2)
        scale = torch.rsqrt(spread + ctx.eps)
        # The gradient through the moments is linear in x: one more pass of the same kind.
        through = (-factor * scale.square() * of_product, -factor * scale * of_gradient)
        to_x = to_x.view_as(x) + _normalised(x, *through, centre, torch.ones_like(spread), 0.0)
        return (
            to_x,
            to_weight.to(weight.dtype) if weight is not None and ctx.needs_input_grad[1] else None,
            to_bias if ctx.needs_input_grad[2] else None,
            None,
        )


def _map(x: Tensor) -> Tensor:
    """View x (B, C, …) in the way in which torch's kernels are fastest: on a GPU with four axes, on a CPU as it is."""
    return x.flatten(2, 3) if x.is_cuda and x.ndim == 5 else x


def _normalised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, by channel; like x (B, C, …)."""
    if not x.numel():
        return torch.empty_like(x)
    out = torch.native_batch_norm(_map(x), weight, bias, mean, variance, False, 0.0, eps)[0]
    # Not a view for autograd, so that ReLU may work in place on the output of a Function.
    return out if out.shape == x.shape else torch.ops.aten._unsafe_view(out, x.shape)


class _OwnBatchNorm(_BatchNorm):
    """Replaces synchronised batch norms in `recalibrated`: statistics of this rank's batch, without other ranks."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of axes."""


@torch.no_grad()
def recalibrated(
    network: Module, inputs: Iterable[Tensor], gather: Callable[[Tensor], Tensor] = lambda rows: rows
) -> Module:
    """A copy of `network` in evaluation mode, whose running statistics are the mean of those of some batches.

    Running statistics are an average over the last steps of training: those of the first steps still hold the mean 0 and
    variance 1 that they began with, and all lag behind the weights. Here weights stand still, and every batch counts alike
    (torch's cumulative average; Izmailov et al. 2018, section 3.2). Statistics of a batch are mean and unbiased variance of
    each channel, by the batch alone, as in training on one rank; a batch does not see the statistics of another.

    Args:
        inputs: this rank's batches (B, C, D, H, W); the network is called with each of them alone. Read only where the
            network has running statistics, which instance norm, group norm and layer norm have not.
        gather: statistics (n, S) float64 of this rank's batches -> (N, S), those of all ranks in the batches' order. So the
            result has the same bits however batches are shared out. A collective, where it is one.

    Raises ValueError when there is no batch.
    """
    copied = copy.deepcopy(network).eval()
    norms = [one for one in copied.modules() if isinstance(one, _BatchNorm) and one.running_mean is not None]
    if not norms:
        return copied
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        if isinstance(norm, BatchNorm3d):
            norm.over_ranks = False
        elif isinstance(norm, SynchronisedBatchNorm | nn.SyncBatchNorm):
            norm.__class__ = _OwnBatchNorm  # type: ignore[assignment]  # all hold the same; forward alone differs
        norm.train()
        norm.momentum, norm.num_batches_tracked = 1.0, None  # what it keeps is of the last batch alone
    buffers = [cast(Tensor, buffer) for norm in norms for buffer in (norm.running_mean, norm.running_var)]
    rows = [_statistics(copied, batch, buffers) for batch in inputs]
    empty = torch.cat([buffer.flatten() for buffer in buffers]).double()[None, :][:0]
    mean = _mean_rows(gather(torch.cat([empty, *rows])))
    for buffer, value in zip(buffers, mean.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(value)
    for norm, (momentum, tracked) in zip(norms, before, strict=True):
        norm.momentum, norm.num_batches_tracked = momentum, tracked
    return copied.eval()


def _statistics(network: nn.Module, batch: Tensor, buffers: Iterable[Tensor]) -> Tensor:
    """Means and variances (1, S) float64 that the norms of `network` keep of a batch."""
    network(batch)
    return torch.cat([buffer.flatten() for buffer in buffers]).double()[None, :]


def _mean_rows(rows: Tensor) -> Tensor:
    """(N, S) -> (S,), summed row by row, so that the order of additions does not depend on the machine's threads."""
    if not len(rows):
        raise ValueError("no batch to recalibrate batch norm on")
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total / len(rows)
