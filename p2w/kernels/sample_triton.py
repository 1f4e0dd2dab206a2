"""Counter-based random numbers and boxes on a GPU, one Triton launch each.

They are defined in p2w.rng (`uniforms`) and p2w.geometry (`sample_boxes`); in plain torch a batch of boxes takes about 60
small kernels. The integers are the same, so uniforms agree with the CPU's bit for bit. Boxes go through float64
logarithms and exponentials, which libraries round differently in the last bit: they agree to float32 rounding.

Runs without a GPU in Triton's interpreter (TRITON_INTERPRET=1 before triton is imported): the tests do.
"""

import contextlib
import math
from contextlib import AbstractContextManager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# What Triton compiles is typed by Triton:
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)  # SplitMix64's increment and multipliers, as in p2w.rng
FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
SECOND = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def splitmix64(z):
    """SplitMix64's finaliser on uint64; p2w.rng.splitmix64 on int64 gives the same bits. Other kernels call it too."""
    z = (z ^ (z >> 30)) * FIRST
    z = (z ^ (z >> 27)) * SECOND
    return z ^ (z >> 31)


@triton.jit
def _stream(ids, state_high, state_low):
    """Start of the stream of every sub-scan. The state is split in halves, since Triton types ints by their size."""
    high = state_high.to(tl.int64).to(tl.uint64, bitcast=True) << 32
    state = high | (state_low.to(tl.int64) & 0xFFFFFFFF).to(tl.uint64, bitcast=True)
    return splitmix64((ids.to(tl.uint64, bitcast=True) ^ state) + GOLDEN)


@triton.jit
def _uniform(stream, counter):
    """Uniform number `counter`, counted from 1, of a stream: float64 in [0, 1) of 53 random bits."""
    bits = splitmix64(stream + counter.to(tl.uint64) * GOLDEN)
    return (bits >> 11).to(tl.int64, bitcast=True).to(tl.float64) * (1.0 / (1 << 53))


@triton.jit(do_not_specialize=["state_high", "state_low", "count"])
def uniforms_kernel(
    ids_ptr,  # (B,) int64
    out_ptr,  # (B, count) float64
    state_high,
    state_low,
    count,
    BLOCK: tl.constexpr,
):
    """Fill BLOCK uniform numbers of one sub-scan."""
    sample = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    stream = _stream(tl.load(ids_ptr + sample), state_high, state_low)
    tl.store(out_ptr + sample * count + k, _uniform(stream, (k + 1).to(tl.int64)), mask=k < count)


@triton.jit(do_not_specialize=["state_high", "state_low", "count"])
def boxes_kernel(
    ids_ptr,  # (B,) int64
    out_ptr,  # (B, 6) float32
    state_high,
    state_low,
    count,  # B
    LOW: tl.constexpr,  # constants and not arguments: a float argument would be rounded to float32
    HIGH: tl.constexpr,
    WIDEST: tl.constexpr,  # log of the largest ratio of edge factors
    DEPTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Fill BLOCK boxes, with the arithmetic of p2w.geometry.sample_boxes in the same order."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = n < count
    stream = _stream(tl.load(ids_ptr + n, mask=there, other=0), state_high, state_low)
    one = tl.full((BLOCK,), 1, tl.int64)
    log_f = tl.log(_uniform(stream, one) * (HIGH - LOW) + LOW)
    a, b, c = _uniform(stream, one * 2), _uniform(stream, one * 3), _uniform(stream, one * 4)
    mean = (a + b + c) / 3
    narrowed = tl.minimum(-log_f / 2, WIDEST)
    for k in tl.static_range(3):
        length = DEPTH if k == 0 else (HEIGHT if k == 1 else WIDTH)
        aspect = a if k == 0 else (b if k == 1 else c)
        edge = tl.minimum(tl.exp(log_f / 3 + (aspect - mean) * narrowed), 1.0)
        start = _uniform(stream, one * (5 + k)) * (1 - edge)
        at = out_ptr + n * 6 + k
        tl.store(at, tl.minimum(start * length, length).to(tl.float32), mask=there)
        tl.store(at + 3, tl.minimum((start + edge) * length, length).to(tl.float32), mask=there)


def _halves(state: int) -> tuple[int, int]:
    """The two 32-bit halves of a 64-bit state, each as a signed number."""
    high, low = (state >> 32) & 0xFFFFFFFF, state & 0xFFFFFFFF
    return high - ((high >> 31) << 32), low - ((low >> 31) << 32)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def uniforms(ids: Tensor, state: int, count: int) -> Tensor:
    """Uniform numbers (B, count) float64 in [0, 1) for ids (B,) int64; `state` is the hash of seed, epoch and part."""
    out = torch.empty(len(ids), count, dtype=torch.float64, device=ids.device)
    if out.numel():
        block = min(1024, triton.next_power_of_2(count))
        with _on(ids.device):
            uniforms_kernel[(len(ids), triton.cdiv(count, block))](
                ids.contiguous(), out, *_halves(state), count, BLOCK=block, num_warps=1 if block < 256 else 4
            )
    return out


def boxes(
    ids: Tensor,
    state: int,
    shape_dhw: tuple[int, int, int],
    volume_fraction: tuple[float, float],
    max_aspect: float,
) -> Tensor:
    """Boxes (B, 6) float32 for ids (B,) int64; the caller has checked the ranges."""
    out = torch.empty(len(ids), 6, dtype=torch.float32, device=ids.device)
    if out.numel():
        with _on(ids.device):
            boxes_kernel[(triton.cdiv(len(ids), 32),)](
                ids.contiguous(),
                out,
                *_halves(state),
                len(ids),
                LOW=volume_fraction[0],
                HIGH=volume_fraction[1],
                WIDEST=math.log(max_aspect),
                DEPTH=shape_dhw[0],
                HEIGHT=shape_dhw[1],
                WIDTH=shape_dhw[2],
                BLOCK=32,
                num_warps=1,
            )
    return out
