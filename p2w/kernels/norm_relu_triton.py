"""Batch norm in training followed by ReLU, forward and backward, as one operation in Triton.

A map (B, C, D, H, W) in channels_last_3d is a table in memory: R = B D H W rows, C columns. The forward pass reads it
twice (moments, then output), the backward pass reads it and the output's gradient twice (two sums, then the input's
gradient). It keeps the input and three numbers per channel for the backward pass; neither x-hat nor the mask of the ReLU.

Moments: each program sums deviations from the mean of its own first tile, which cancels little, however large a channel's
mean is beside its deviation. Per-program means and sums of squared deviations (M2) are combined in float64 by a small
second kernel. Everything is summed in a fixed order, without atomics: the same input gives the same bits on one card.
Across ranks, count x mean and count x mean² are each split into a leading part of eight bits, which float32 sums exactly,
and a rest: the difference of two large sums then keeps its digits, and one all-reduce does the work of two.

Tiles of the second pass run from the last row to the first: what the first pass read last is still in the L2 cache.
Runs without a GPU in Triton's interpreter (TRITON_INTERPRET=1 before triton is imported): the tests do.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from p2w.errors import UserError

# What Triton compiles is typed by Triton:
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

Reduce = Callable[[Tensor], object]  # sums a 1-D float32 tensor over ranks, in place

PROGRAMS = 256  # of a first pass: an H100's 132 processors hold two each, with up to 128 registers a thread
COLUMNS = 128  # channels of a tile at most
MOMENTS, OUTPUT, SUMS, INPUT_GRAD = 8192, 4096, 4096, 2048  # elements of each kernel's tile at most
RUN = 4  # tiles that a program of a second pass takes, so that it loads the channels' numbers once
WARPS = 8
COMBINED = 1024  # partial results that a program combines at a time


@triton.jit
def _tile(rows, tile, C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Offsets (ROWS, COLS) of a tile from its first row (int32), that row's offset (int64), and a mask of what exists."""
    row = tl.arange(0, ROWS)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row < rows - tile * ROWS)[:, None]
    if C % COLS:
        inside = inside & (column < C)[None, :]
    return row[:, None] * C + column[None, :], tl.cast(tile, tl.int64) * (ROWS * C), inside


@triton.jit
def _channels(pointer, C: tl.constexpr, COLS: tl.constexpr):
    """This program's float32 (COLS,) of a vector of C numbers."""
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)
    return tl.load(pointer + column, mask=column < C, other=0.0).to(tl.float32)


@triton.jit
def moments_kernel(x_ptr, partial_ptr, rows, C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Write mean and M2 of the rows of tiles p, p + P, p + 2 P, … to partial (2, P, C), for program p of P."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    within, start, inside = _tile(rows, program, C, ROWS, COLS)
    first = tl.load(x_ptr + start + within, mask=inside, other=0.0).to(tl.float32)
    pivot = tl.sum(first, 0) / tl.minimum(rows - program * ROWS, ROWS).to(tl.float32)
    ones = tl.zeros((ROWS, COLS), tl.float32)
    twos = tl.zeros((ROWS, COLS), tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        within, start, inside = _tile(rows, tile, C, ROWS, COLS)
        x = tl.load(x_ptr + start + within, mask=inside, other=0.0).to(tl.float32)
        deviation = tl.where(inside, x - pivot[None, :], 0.0)
        ones += deviation
        twos += deviation * deviation
    count = _rows_of(program, programs, rows, ROWS).to(tl.float32)
    sums = tl.sum(ones, 0)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)
    at = partial_ptr + program * C + column
    tl.store(at, pivot + sums / count, mask=column < C)
    m2 = tl.sum(twos, 0) - sums * sums / count
    tl.store(at + programs * C, tl.where(m2 < 0, 0.0, m2), mask=column < C)  # NaN stays


@triton.jit
def _rows_of(program, programs, rows, ROWS: tl.constexpr):
    """Number of rows of the tiles p, p + P, p + 2 P, …, int32, for one p or a vector of them below `programs`."""
    last = tl.cdiv(rows, ROWS) - 1
    missing = tl.where((last - program) % programs == 0, (last + 1) * ROWS - rows, 0)
    return ((last - program) // programs + 1) * ROWS - missing


@triton.jit
def _finish(mean, m2, count, channel, shift_ptr, running_ptrs, saved_ptr, momentum, eps, C: tl.constexpr):
    """Write mean, 1 / deviation and count to saved (3, C), and update the running statistics; computed in float64."""
    running_mean_ptr, running_var_ptr = running_ptrs
    inside = channel < C
    tl.store(saved_ptr + channel, mean.to(tl.float32), mask=inside)
    tl.store(saved_ptr + C + channel, (1 / tl.sqrt(m2 / count + eps)).to(tl.float32), mask=inside)
    counts = tl.zeros_like(mean).to(tl.float32) + count.to(tl.float32)
    tl.store(saved_ptr + 2 * C + channel, counts, mask=inside)
    shift = 0.0
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + channel, mask=inside, other=0.0).to(tl.float64)
    old = tl.load(running_mean_ptr + channel, mask=inside, other=0.0).to(tl.float64)
    new = old + momentum * (mean + shift - old)
    tl.store(running_mean_ptr + channel, new.to(tl.float32), mask=inside)
    old = tl.load(running_var_ptr + channel, mask=inside, other=0.0).to(tl.float64)
    new = old + momentum * (m2 / tl.maximum(count - 1, 1.0) - old)
    tl.store(running_var_ptr + channel, new.to(tl.float32), mask=inside)


@triton.jit
def combine_moments_kernel(
    partial_ptr,  # (2, P, C): means, M2
    shift_ptr,  # (C,) or None: is added to the mean that the running mean follows
    running_mean_ptr,  # (C,)
    running_var_ptr,  # (C,)
    out_ptr,  # saved (3, C), or with RANKS the packet (5 C + 1,) for the all-reduce
    rows, programs, momentum, eps,
    C: tl.constexpr, ROWS: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Combine the moments of all programs into `saved` and the running statistics, or into the packet for all ranks."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ones = tl.zeros((PROGRAMS, BLOCK), tl.float64)
    twos = tl.zeros((PROGRAMS, BLOCK), tl.float64)
    for begin in range(0, programs, PROGRAMS):
        program = begin + tl.arange(0, PROGRAMS)
        inside = (program < programs)[:, None] & (channel < C)[None, :]
        at = program[:, None] * C + channel[None, :]
        mean = tl.load(partial_ptr + at, mask=inside, other=0.0).to(tl.float64)
        m2 = tl.load(partial_ptr + programs * C + at, mask=inside, other=0.0).to(tl.float64)
        count = _rows_of(program, programs, rows, ROWS).to(tl.float64)[:, None]
        ones += count * mean
        twos += m2 + count * mean * mean
    count = tl.cast(rows, tl.float64)
    mean = tl.sum(ones, 0) / count
    m2 = tl.sum(twos, 0) - count * mean * mean
    m2 = tl.where(m2 < 0, 0.0, m2)
    if RANKS:
        inside = channel < C
        one, two = count * mean, count * mean * mean
        one_lead = one.to(tl.float32).to(tl.bfloat16).to(tl.float32)
        two_lead = two.to(tl.float32).to(tl.bfloat16).to(tl.float32)
        tl.store(out_ptr + channel, one_lead, mask=inside)
        tl.store(out_ptr + C + channel, (one - one_lead).to(tl.float32), mask=inside)
        tl.store(out_ptr + 2 * C + channel, two_lead, mask=inside)
        tl.store(out_ptr + 3 * C + channel, (two - two_lead).to(tl.float32), mask=inside)
        tl.store(out_ptr + 4 * C + channel, m2.to(tl.float32), mask=inside)
        tl.store(out_ptr + 5 * C, count.to(tl.float32), mask=tl.program_id(0) == 0)
    else:
        running = (running_mean_ptr, running_var_ptr)
        _finish(mean, m2, count, channel, shift_ptr, running, out_ptr, momentum, eps, C)


@triton.jit
def combine_ranks_kernel(
    packet_ptr, shift_ptr, running_mean_ptr, running_var_ptr, saved_ptr, momentum, eps,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the sum of the ranks' packets to `saved` and the running statistics."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < C
    count = tl.load(packet_ptr + 5 * C).to(tl.float64)
    one = tl.load(packet_ptr + channel, mask=inside, other=0.0).to(tl.float64)
    one += tl.load(packet_ptr + C + channel, mask=inside, other=0.0).to(tl.float64)
    two = tl.load(packet_ptr + 2 * C + channel, mask=inside, other=0.0).to(tl.float64)
    two += tl.load(packet_ptr + 3 * C + channel, mask=inside, other=0.0).to(tl.float64)
    mean = one / count
    m2 = two - one * mean
    m2 = tl.where(m2 < 0, 0.0, m2)  # between the ranks, to which each rank's own is added
    m2 += tl.load(packet_ptr + 4 * C + channel, mask=inside, other=0.0).to(tl.float64)
    running = (running_mean_ptr, running_var_ptr)
    _finish(mean, m2, count, channel, shift_ptr, running, saved_ptr, momentum, eps, C)


@triton.jit
def output_kernel(
    x_ptr, y_ptr, weight_ptr, bias_ptr, saved_ptr, rows,
    C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """y = ReLU of the normalised x; NaN stays NaN."""
    mean = _channels(saved_ptr, C, COLS)[None, :]
    scale = (_channels(saved_ptr + C, C, COLS) * _channels(weight_ptr, C, COLS))[None, :]
    bias = _channels(bias_ptr, C, COLS)[None, :]
    end = tl.cdiv(rows, ROWS) - tl.program_id(0) * RUN
    for tile in range(end - 1, tl.maximum(end - RUN, 0) - 1, -1):
        within, start, inside = _tile(rows, tile, C, ROWS, COLS)
        y = (tl.load(x_ptr + start + within, mask=inside).to(tl.float32) - mean) * scale + bias
        y = tl.where(y < 0, 0.0, y)
        tl.store(y_ptr + start + within, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sums_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, saved_ptr, partial_ptr, rows,
    C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Write the sums of g and g x-hat, g = dy where the ReLU is active, to partial (2, P, C); tiles as for the moments."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    mean = _channels(saved_ptr, C, COLS)[None, :]
    inverse = _channels(saved_ptr + C, C, COLS)
    scale = (inverse * _channels(weight_ptr, C, COLS))[None, :]
    bias = _channels(bias_ptr, C, COLS)[None, :]
    ones = tl.zeros((ROWS, COLS), tl.float32)
    twos = tl.zeros((ROWS, COLS), tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        within, start, inside = _tile(rows, tile, C, ROWS, COLS)
        deviation = tl.load(x_ptr + start + within, mask=inside, other=0.0).to(tl.float32) - mean
        dy = tl.load(dy_ptr + start + within, mask=inside, other=0.0).to(tl.float32)
        dy = tl.where(deviation * scale + bias <= 0, 0.0, dy)
        ones += dy
        twos += dy * deviation
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)
    at = partial_ptr + program * C + column
    tl.store(at, tl.sum(ones, 0), mask=column < C)
    tl.store(at + programs * C, tl.sum(twos, 0) * inverse, mask=column < C)


@triton.jit
def combine_sums_kernel(
    partial_ptr,  # (2, P, C)
    sums_ptr,  # (2, C): for the input's gradient; to be summed over ranks
    bias_grad_ptr,  # (C,): this rank's
    weight_grad_ptr,  # (C,)
    programs, C: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Combine the sums of all programs, for the gradient of the input and as gradients of bias and weight."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ones = tl.zeros((PROGRAMS, BLOCK), tl.float64)
    twos = tl.zeros((PROGRAMS, BLOCK), tl.float64)
    for begin in range(0, programs, PROGRAMS):
        program = begin + tl.arange(0, PROGRAMS)
        inside = (program < programs)[:, None] & (channel < C)[None, :]
        at = program[:, None] * C + channel[None, :]
        ones += tl.load(partial_ptr + at, mask=inside, other=0.0).to(tl.float64)
        twos += tl.load(partial_ptr + programs * C + at, mask=inside, other=0.0).to(tl.float64)
    inside = channel < C
    one, two = tl.sum(ones, 0).to(tl.float32), tl.sum(twos, 0).to(tl.float32)
    tl.store(sums_ptr + channel, one, mask=inside)
    tl.store(sums_ptr + C + channel, two, mask=inside)
    tl.store(bias_grad_ptr + channel, one, mask=inside)
    tl.store(weight_grad_ptr + channel, two, mask=inside)


@triton.jit
def input_grad_kernel(
    dy_ptr, x_ptr, dx_ptr, weight_ptr, bias_ptr, saved_ptr, sums_ptr, rows,
    C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """dx = weight / deviation x (g - mean of g - x-hat x mean of g x-hat), means over the rows of all ranks."""
    mean = _channels(saved_ptr, C, COLS)[None, :]
    inverse, count = _channels(saved_ptr + C, C, COLS), _channels(saved_ptr + 2 * C, C, COLS)
    count = tl.maximum(count, 1.0)  # columns past the last hold 0
    scale = inverse * _channels(weight_ptr, C, COLS)
    bias = _channels(bias_ptr, C, COLS)[None, :]
    constant = (scale * _channels(sums_ptr, C, COLS) / count)[None, :]
    slope = (scale * inverse * _channels(sums_ptr + C, C, COLS) / count)[None, :]
    scale = scale[None, :]
    end = tl.cdiv(rows, ROWS) - tl.program_id(0) * RUN
    for tile in range(end - 1, tl.maximum(end - RUN, 0) - 1, -1):
        within, start, inside = _tile(rows, tile, C, ROWS, COLS)
        deviation = tl.load(x_ptr + start + within, mask=inside).to(tl.float32) - mean
        dy = tl.load(dy_ptr + start + within, mask=inside).to(tl.float32)
        dy = tl.where(deviation * scale + bias <= 0, 0.0, dy)
        dx = dy * scale - constant - deviation * slope
        tl.store(dx_ptr + start + within, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class TileGrid:
    """The division of an array (rows, channels) into tiles of at most `elements`, and of tiles among programs."""

    rows: int
    channels: int
    elements: int

    @property
    def columns(self) -> int:
        """Number of channels of a tile, a power of two."""
        return min(COLUMNS, triton.next_power_of_2(self.channels))

    @property
    def height(self) -> int:
        """Number of rows of a tile, a power of two."""
        return min(self.elements // self.columns, triton.next_power_of_2(max(self.rows, 1)))

    @property
    def tiles(self) -> int:
        """Number of tiles along the rows; 0 on a rank without samples."""
        return triton.cdiv(self.rows, self.height)

    @property
    def across(self) -> int:
        """Number of tiles along the channels."""
        return triton.cdiv(self.channels, self.columns)

    @property
    def programs(self) -> int:
        """Number of programs that share the rows in the first pass; each writes one partial result per channel."""
        return max(1, min(self.tiles, PROGRAMS // self.across))

    @property
    def sizes(self) -> dict[str, int]:
        """Compile-time constants of the kernels that read the array."""
        return {"C": self.channels, "ROWS": self.height, "COLS": self.columns}

    @property
    def combining(self) -> dict[str, int]:
        """Compile-time constants of the kernels that combine partial results."""
        programs = min(256, triton.next_power_of_2(self.programs))
        return {"C": self.channels, "PROGRAMS": programs, "BLOCK": min(32, COMBINED // programs)}

    @property
    def combiners(self) -> int:
        """Number of programs that combine partial results."""
        return triton.cdiv(self.channels, self.combining["BLOCK"])


class _NormRelu(torch.autograd.Function):
    """The autograd function of `norm_relu`, whose arguments are checked already."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor,
        shift: Tensor | None, momentum: float, eps: float, reduce: Reduce | None,
    ) -> Tensor:  # fmt: skip
        rows, channels = x.numel() // x.shape[1], x.shape[1]
        cut, fine = TileGrid(rows, channels, MOMENTS), TileGrid(rows, channels, OUTPUT)
        partial = torch.empty(2, cut.programs, channels, dtype=torch.float32, device=x.device)
        saved = torch.empty(3, channels, dtype=torch.float32, device=x.device)
        packet = saved if reduce is None else _sums(5 * channels + 1, x)
        follow = (shift, running_mean, running_var)
        y = torch.empty_like(x)
        with _on(x):
            if rows:
                moments_kernel[(cut.programs, cut.across)](x, partial, rows, **cut.sizes, num_warps=WARPS)
                combine_moments_kernel[(cut.combiners,)](
                    partial, *follow, packet, rows, cut.programs, momentum, eps,
                    ROWS=cut.height, RANKS=reduce is not None, **cut.combining, num_warps=WARPS,
                )  # fmt: skip
            if reduce is not None:
                reduce(packet)
                combine_ranks_kernel[(triton.cdiv(channels, 32),)](
                    packet, *follow, saved, momentum, eps, C=channels, BLOCK=32, num_warps=1
                )
            if rows:
                output_kernel[(triton.cdiv(fine.tiles, RUN), fine.across)](
                    x, y, weight, bias, saved, rows, **fine.sizes, RUN=RUN, num_warps=WARPS
                )
        ctx.save_for_backward(x, weight, bias, saved)
        ctx.reduce = reduce
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, saved = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last_3d)
        rows, channels = x.numel() // x.shape[1], x.shape[1]
        cut, fine = TileGrid(rows, channels, SUMS), TileGrid(rows, channels, INPUT_GRAD)
        partial = torch.empty(2, cut.programs, channels, dtype=torch.float32, device=x.device)
        sums = _sums(2 * channels, x)
        weight_grad, bias_grad = (
            torch.empty_like(one) if rows else torch.zeros_like(one) for one in (weight, bias)
        )
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        with _on(x):
            if rows:
                sums_kernel[(cut.programs, cut.across)](
                    dy, x, weight, bias, saved, partial, rows, **cut.sizes, num_warps=WARPS
                )
                combine_sums_kernel[(cut.combiners,)](
                    partial, sums, bias_grad, weight_grad, cut.programs, **cut.combining, num_warps=WARPS
                )
            if ctx.reduce is not None:
                ctx.reduce(sums)
            if rows and dx is not None:
                input_grad_kernel[(triton.cdiv(fine.tiles, RUN), fine.across)](
                    dy, x, dx, weight, bias, saved, sums, rows, **fine.sizes, RUN=RUN, num_warps=WARPS
                )
        return dx, weight_grad, bias_grad, None, None, None, None, None, None


def norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    shift: Tensor | None = None,
    momentum: float,
    eps: float,
    reduce: Reduce | None = None,
) -> Tensor:
    """ReLU of the batch norm in training of x (B, C, D, H, W): (B, C, D, H, W) of x's dtype, in channels_last_3d.

    `x` is bfloat16, float16 or float32; in another memory format it is copied first. `weight`, `bias`, `running_mean`,
    `running_var` and `shift` are contiguous float32 (C,). The running statistics are updated in place, as torch does it:
    the mean follows the batch's mean plus `shift` (a convolution's bias that was left out, since the norm cancels it), the
    variance its unbiased variance. Gradients flow to x, weight and bias.

    `reduce` sums a 1-D float32 tensor over ranks in place: the statistics are then those of all ranks' batches together,
    of whatever sizes, none included. It is called once forward and once backward, so every rank must run both. Gradients of
    weight and bias are this rank's share, as torch's SyncBatchNorm leaves them. None: this rank's batch alone.

    Raises UserError for shapes, types and devices that break these rules, and for one value per channel.
    """
    _check(x, (weight, bias, running_mean, running_var, *(() if shift is None else (shift,))), reduce)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    return _NormRelu.apply(x, weight, bias, running_mean, running_var, shift, momentum, eps, reduce)


def _sums(count: int, x: Tensor) -> Tensor:
    """The buffer float32 (count,) that `reduce` sums; zeros on a rank without samples, where no kernel fills it."""
    make = torch.empty if x.numel() else torch.zeros
    return make(count, dtype=torch.float32, device=x.device)


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _check(x: Tensor, vectors: tuple[Tensor, ...], reduce: Reduce | None) -> None:
    if x.ndim != 5 or 0 in x.shape[1:] or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise UserError(
            f"norm_relu: x must be (B, C, D, H, W) bfloat16, float16 or float32, got {tuple(x.shape)} {x.dtype}"
        )
    channels = x.shape[1]
    for vector in vectors:
        if (
            vector.shape != (channels,)
            or vector.dtype != torch.float32
            or vector.device != x.device
            or not vector.is_contiguous()
        ):
            raise UserError(
                "norm_relu: weight, bias, running statistics and shift must be contiguous "
                f"({channels},) float32 on {x.device}, got {tuple(vector.shape)} {vector.dtype} on {vector.device}"
            )
    if x.numel() <= channels and reduce is None:
        raise UserError(
            f"norm_relu: batch norm needs more than one value per channel, got x of {tuple(x.shape)}; "
            "pass a larger batch"
        )
