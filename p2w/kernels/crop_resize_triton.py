"""Crop-resize-normalise on a GPU: part and target of a whole batch in one Triton launch.

The convention is p2w.geometry's. The filter is separable, and each axis is done in the way that costs least:

1. z and y, in registers: a program makes SLICES output slices one after the other, TILE_H rows of each. For
   every voxel row that a slice needs it loads 16 bytes a thread, clips and scales the voxels to [0, 1] (one
   instruction), and adds them, weighted, to its rows. Where the box shrinks along z, a voxel has weight in two
   neighbouring slices and no more: it is loaded and converted once and added to both.
2. x, in the tensor cores: a product with the banded matrix of weights, made once a program. Both factors are
   split into two float16 numbers (22 bits together), and three of the four products are summed in float32:
   the fourth is below 2^-22. One float16 or TF32 product would miss the 1e-5 that is promised.

Positions are float64 (in float32 weights would be off by 1e-5 near voxel 128), sums are float32. Programs
are numbered sample by sample, part before target, so that a whole comes from memory once and then from the
cache. Outputs depend on their own sample alone, and which slices share a program on nothing else than the sizes:
bits do not depend on the batch.

Runs without a GPU in Triton's interpreter (TRITON_INTERPRET=1 before triton is imported): the tests do.
"""

import contextlib
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# What Triton compiles is typed by Triton:
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

# Weights are this much larger: their lower halves stay clear of float16's subnormals
UNIT = tl.constexpr(128.0)


@dataclass(frozen=True)
class Tuning:
    """Parameters of the launch that change results by rounding at most; bench/kernel.py tries others."""

    # Output slices a program: more share weights and voxels, fewer fill the card at small batches
    slices: int = 8
    elements: int = 8192  # of a tile, rows x columns of voxels: 64 x 128 for the paper's sizes
    tile_h: int = 64  # most output rows a tile
    tile_w: int = 64  # most output columns a tile
    num_warps: int = 4  # for tiles of up to 8,192 elements


@triton.jit
def _clamp(start, end, length):
    """Edges of a box as float64, limited to the whole, so that reads stay inside whatever the box is."""
    start = tl.minimum(tl.maximum(start.to(tl.float64), 0.0), length)
    return start, tl.minimum(tl.maximum(end.to(tl.float64), start), length)


@triton.jit
def _taps(start, end, output, size, length, ANTIALIAS: tl.constexpr):
    """Weights of voxels in outputs: lowest voxel, its distance to the centre, weight at the centre and its decrease per
    voxel (normalised, times UNIT), first voxel with a weight and one past the last."""
    scale = (end - start) / size
    reach = tl.maximum(scale, 1.0) if ANTIALIAS else scale * 0.0 + 1.0
    centre = start + (tl.minimum(output, size - 1).to(tl.float64) + 0.5) * scale  # a tile may hang over
    lowest = tl.floor(centre - reach + 0.5)
    distance = (lowest + 0.5 - centre).to(tl.float32)
    inverse = (1 / reach).to(tl.float32)
    lowest = lowest.to(tl.int32)
    first = tl.minimum(tl.floor(start).to(tl.int32), length - 1)
    last = tl.maximum(tl.ceil(end).to(tl.int32), first + 1)
    total = distance * 0
    for k in range(tl.ceil(2 * reach).to(tl.int32)):
        weight = tl.maximum(1 - tl.abs(distance + k) * inverse, 0.0)
        total += tl.where((lowest + k >= first) & (lowest + k < last), weight, 0.0)
    top = UNIT / tl.maximum(total, 0.25)  # at least 1/2 for every box that is one
    stop = tl.minimum(tl.ceil(centre + reach - 0.5).to(tl.int32), last)
    return lowest, distance, top, top * inverse, tl.maximum(lowest, first), stop


@triton.jit
def _weight(voxel, lowest, distance, top, slope):
    """Weight, times UNIT, of voxels that the box touches. Integers cancel exactly before distances are added."""
    return tl.maximum(top - tl.abs((voxel - lowest).to(tl.float32) + distance) * slope, 0.0)


@triton.jit
def _level(hu, low, scale, shift, NEAR: tl.constexpr):
    """Clipped to the window and scaled to [0, 1]: one fused multiply-add that saturates, where that is exact."""
    level = hu * scale + shift if NEAR else (hu - low) * scale
    return tl.minimum(tl.maximum(level, 0.0), 1.0)


@triton.jit
def _halves(x):
    """x (at most 2^15) as a sum of two float16, to 22 bits."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def crop_resize_kernel(  # noqa: PLR0915  one launch is one function
    whole_ptr,  # (B, D, H, W / PACK): float32 or int16 HU, or int32, pairs of int16; inner axes contiguous
    boxes_ptr,  # (B, 6) float32
    part_ptr,  # (B, d, h, w)
    target_ptr,  # (B, d, h, w); not touched unless JOBS is 2
    whole_stride,  # from a whole to the next, in VECTOR elements
    pitch,  # from a row to the next, in VECTOR elements
    depth,
    height,
    width,
    low,  # of the window, HU (times 2^16 for pairs, as are scale and shift)
    scale,  # 1 / window
    shift,  # -low / window
    OUT_D: tl.constexpr,
    OUT_H: tl.constexpr,
    OUT_W: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    SPAN: tl.constexpr,  # columns of voxels that a tile may need, a power of two
    SLICES: tl.constexpr,
    VECTOR: tl.constexpr,  # 4: every row starts at a multiple of 16 bytes
    JOBS: tl.constexpr,
    ANTIALIAS: tl.constexpr,
    NEAR: tl.constexpr,  # the window is near enough to 0 for _level's one instruction
):
    """SLICES slices of one tile of one job (part or target) of one sample."""
    PAIRS: tl.constexpr = whole_ptr.dtype.element_ty == tl.int32
    PACK: tl.constexpr = 2 if PAIRS else 1
    ACROSS: tl.constexpr = (OUT_W + TILE_W - 1) // TILE_W
    DOWN: tl.constexpr = (OUT_H + TILE_H - 1) // TILE_H
    TILES: tl.constexpr = (OUT_D + SLICES - 1) // SLICES * DOWN * ACROSS
    tile = tl.program_id(0) % TILES
    job = tl.program_id(0) // TILES
    sample = (job // JOBS).to(tl.int64)  # 1,024 wholes of 64x128x128 are 2^30 voxels: offsets need 64 bits
    is_part = job % JOBS == 0
    from_z = tile // (DOWN * ACROSS) * SLICES
    out_y = tile // ACROSS % DOWN * TILE_H + tl.arange(0, TILE_H)
    out_x = tile % ACROSS * TILE_W + tl.arange(0, TILE_W)

    box = boxes_ptr + sample * 6
    z0, z1 = tl.where(is_part, tl.load(box), 0.0), tl.where(is_part, tl.load(box + 3), depth)
    y0, y1 = tl.where(is_part, tl.load(box + 1), 0.0), tl.where(is_part, tl.load(box + 4), height)
    x0, x1 = tl.where(is_part, tl.load(box + 2), 0.0), tl.where(is_part, tl.load(box + 5), width)
    z0, z1 = _clamp(z0, z1, depth)
    y0, y1 = _clamp(y0, y1, height)
    x0, x1 = _clamp(x0, x1, width)
    y_low, y_dist, y_top, y_slope, y_from, y_stop = _taps(y0, y1, out_y, OUT_H, height, ANTIALIAS)
    x_low, x_dist, x_top, x_slope, x_from, x_stop = _taps(x0, x1, out_x, OUT_W, width, ANTIALIAS)
    y_count = tl.max(y_stop - y_from, 0)
    x_first, x_last = tl.min(x_from, 0), tl.max(x_stop, 0)

    # Banded weights (SPAN, TILE_W) of the columns from `left` on; outside the box a column is far from all.
    left = x_first // 8 * 8
    x = left + tl.arange(0, SPAN)
    far = tl.where((x >= x_first) & (x < x_last), tl.arange(0, SPAN).to(tl.float32), 1e9)
    offset = far[:, None] + (left - x_low).to(tl.float32)[None, :]
    band = tl.maximum(x_top[None, :] - tl.abs(offset + x_dist[None, :]) * x_slope[None, :], 0.0)
    band_high, band_low = _halves(band)

    columns = left // PACK + tl.arange(0, SPAN // PACK)
    there = (columns < pitch * VECTOR) & (columns < (x_last + 7) // 8 * (8 // PACK))  # whole vectors
    voxels = whole_ptr + sample * whole_stride * VECTOR
    plane = (pitch * VECTOR).to(tl.int64) * height

    rolls = (z1 - z0 >= OUT_D) if ANTIALIAS else False  # a voxel weighs in two neighbouring slices at most
    passes_on = tl.where(rolls, 1.0, 0.0)
    next_even = tl.zeros((TILE_H, SPAN // PACK), tl.float32)
    next_odd = tl.zeros((TILE_H, SPAN // PACK), tl.float32)
    done = 0
    a_low, a_dist, a_top, a_slope, a_from, a_stop = _taps(z0, z1, from_z, OUT_D, depth, ANTIALIAS)
    for out_z in range(from_z, tl.minimum(from_z + SLICES, OUT_D)):
        b_low, b_dist, b_top, b_slope, b_from, b_stop = _taps(z0, z1, out_z + 1, OUT_D, depth, ANTIALIAS)
        even, odd = next_even, next_odd  # columns; all of them where voxels do not come in pairs
        next_even = tl.zeros((TILE_H, SPAN // PACK), tl.float32)
        next_odd = tl.zeros((TILE_H, SPAN // PACK), tl.float32)
        for k in range(y_count):
            y = y_from + k
            needed = y < y_stop
            y_weight = tl.where(needed, _weight(y, y_low, y_dist, y_top, y_slope), 0.0)[:, None]
            row = voxels + (y[:, None] * (pitch * VECTOR) + columns[None, :])
            for z in range(tl.maximum(a_from, done), a_stop):
                here = y_weight * _weight(z, a_low, a_dist, a_top, a_slope)
                later = y_weight * (_weight(z, b_low, b_dist, b_top, b_slope) * passes_on)
                hu = tl.load(row + z * plane, mask=needed[:, None] & there[None, :], other=0)
                if PAIRS:  # as float32, either half is its HU times 2^16
                    level = _level((hu & -65536).to(tl.float32), low, scale, shift, NEAR)
                    odd += here * level
                    next_odd += later * level
                    hu = hu << 16
                level = _level(hu.to(tl.float32), low, scale, shift, NEAR)
                even += here * level
                next_even += later * level
        rows = tl.reshape(tl.join(even, odd), (TILE_H, SPAN)) if PAIRS else even
        rows_high, rows_low = _halves(rows)
        total = tl.dot(rows_low, band_high)
        total = tl.dot(rows_high, band_low, total)
        total = tl.dot(rows_high, band_high, total)
        value = tl.minimum(total * (1 / (UNIT * UNIT * UNIT)), 1.0)
        at = ((sample * OUT_D + out_z) * OUT_H + out_y[:, None]) * OUT_W + out_x[None, :]
        inside = (out_y < OUT_H)[:, None] & (out_x < OUT_W)[None, :]
        if is_part:
            tl.store(part_ptr + at, value.to(part_ptr.dtype.element_ty), mask=inside)
        else:
            tl.store(target_ptr + at, value.to(target_ptr.dtype.element_ty), mask=inside)
        done = tl.where(rolls, a_stop, 0)
        a_low, a_dist, a_top, a_slope, a_from, a_stop = b_low, b_dist, b_top, b_slope, b_from, b_stop


def _power(n: int) -> int:
    """The lowest power of two not below n; at least 16, the smallest size for tensor cores."""
    return max(16, 1 << (n - 1).bit_length())


def _span(width: int, out_width: int, tile_w: int) -> int:
    """Columns of voxels, a power of two, that `tile_w` output columns may need of a whole `width` wide.

    A box is never wider than the whole, so the whole's scale bounds them; 9 for the start at a multiple of 8.
    """
    return _power(min(width, math.ceil((tile_w + 2) * max(1.0, width / out_width)) + 9))


def fits(width: int, out_width: int) -> bool:
    """Whether tiles fit a GPU's shared memory: wholes up to 1,024 voxels wide, or reduced by a factor of at most 56."""
    return _span(width, out_width, 16) <= 1024


def tile_elements(tuning: Tuning, pairs: bool, capability: int) -> int:
    """Voxels per tile, so that registers suffice: before Hopper the product in x takes more of them, and so do loads of
    voxels that are not in pairs."""
    return tuning.elements if pairs and capability >= 9 else tuning.elements // 2


def tiles(width: int, size: tuple[int, int, int], elements: int, tuning: Tuning) -> dict[str, int]:
    """Constants of the kernel for wholes `width` voxels wide and outputs of `size` (d, h, w)."""
    tile_w = min(tuning.tile_w, _power(size[2]))
    while tile_w > 16 and _span(width, size[2], tile_w) > 256:
        tile_w //= 2
    span = _span(width, size[2], tile_w)
    tile_h = min(tuning.tile_h, _power(size[1]), max(16, elements // span))
    return {"TILE_H": tile_h, "TILE_W": tile_w, "SPAN": span, "SLICES": tuning.slices}


@functools.lru_cache
def _window(low: float, high: float, unit: int) -> tuple[float, float, float, bool]:
    """(low, scale, shift, NEAR) of crop_resize_kernel, for HU that are multiplied by `unit`."""
    scale = torch.tensor(1 / (high - low) / unit, dtype=torch.float32)
    exact = -low * unit * scale.item()
    shift = torch.tensor(exact, dtype=torch.float32)
    if shift.item() > exact:  # rounded down, so that voxels at the window's lower end become 0 exactly
        shift = torch.nextafter(shift, torch.tensor(-math.inf))
    return low * unit, scale.item(), shift.item(), max(abs(low), abs(high)) <= 4 * (high - low)


def arguments(
    whole: Tensor,
    part: Tensor,
    target: Tensor | None,
    *,
    window_hu: tuple[float, float],
    antialias: bool,
    tuning: Tuning,
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any], int]:
    """(whole as the kernel reads it, scalars, constants, programs) of a launch."""
    _, depth, height, width = whole.shape
    if whole.stride()[1:] != (height * width, width, 1):
        whole = whole.contiguous()
    pairs = (
        whole.dtype == torch.int16
        and width % 2 == 0
        and whole.stride(0) % 2 == 0
        and whole.data_ptr() % 4 == 0
    )
    pitch = width // 2 if pairs else width
    if pairs:
        whole = whole.view(torch.int32)
    vector = 4 if pitch % 4 == 0 and whole.stride(0) % 4 == 0 and whole.data_ptr() % 16 == 0 else 1
    low, scale, shift, near = _window(*map(float, window_hu), unit=1 << 16 if pairs else 1)
    size = (part.shape[2], part.shape[3], part.shape[4])
    jobs = 1 if target is None else 2
    capability = torch.cuda.get_device_capability(whole.device)[0] if whole.is_cuda else 9
    constants = tiles(width, size, tile_elements(tuning, pairs, capability), tuning) | {
        "OUT_D": size[0], "OUT_H": size[1], "OUT_W": size[2],
        "VECTOR": vector, "JOBS": jobs, "ANTIALIAS": antialias, "NEAR": near,
    }  # fmt: skip
    programs = math.prod(
        -(-n // constants[name])
        for n, name in zip(size, ("SLICES", "TILE_H", "TILE_W"), strict=True)
    )  # fmt: skip
    scalars = (whole.stride(0) // vector, pitch // vector, depth, height, width, low, scale, shift)
    return whole, scalars, constants, programs * jobs * len(whole)


def run(
    whole: Tensor,
    boxes: Tensor,
    part: Tensor,
    target: Tensor | None,
    *,
    window_hu: tuple[float, float],
    antialias: bool,
    tuning: Tuning = Tuning(),
) -> Any:
    """Fill part (B, 1, d, h, w), and target when there is one, from whole (B, D, H, W) and boxes (B, 6).

    Returns what Triton compiled (`n_regs`, `n_spills`), None in the interpreter.
    """
    whole, scalars, constants, programs = arguments(
        whole, part, target, window_hu=window_hu, antialias=antialias, tuning=tuning
    )
    elements = constants["TILE_H"] * constants["SPAN"]
    warps = tuning.num_warps * max(1, elements // 8192)
    with torch.cuda.device(whole.device) if whole.is_cuda else contextlib.nullcontext():
        return crop_resize_kernel[(programs,)](
            whole,
            boxes.contiguous(),
            part,
            part if target is None else target,
            *scalars,
            **constants,
            num_warps=min(16, warps),
        )
