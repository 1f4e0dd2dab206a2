"""Crop-resize-normalise on a GPU: part and target of a whole batch in one Triton launch.

The convention is p2w.geometry's. One program makes TILE_H x TILE_W outputs of one output slice of one sample:
it works out the taps of its slice, rows and columns, then sums the voxels they name. Programs are numbered
sample by sample, part before target, so that a whole comes from memory once and then from the cache.
Positions are float64 (a few per program; in float32 weights would be off by 1e-5 near voxel 128), voxels
and sums float32. Outputs depend on their own sample alone: bits do not depend on the batch.

Runs without a GPU in Triton's interpreter (TRITON_INTERPRET=1 before triton is imported): the tests do.
"""


# What Triton compiles is typed by Triton:
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _taps(start, end, output, size, length, ANTIALIAS: tl.constexpr):
    """Lowest voxel, its distance to the centre, 1 / reach, voxels touched first .. last - 1, tap count."""
    start = tl.minimum(
        tl.maximum(start.to(tl.float64), 0.0), length
    )  # whatever a box holds, reads stay inside
    end = tl.minimum(tl.maximum(end.to(tl.float64), start), length)
    scale = (end - start) / size
    reach = tl.maximum(scale, 1.0) if ANTIALIAS else scale * 0.0 + 1.0
    centre = start + (tl.minimum(output, size - 1).to(tl.float64) + 0.5) * scale  # a tile may hang over
    lowest = tl.floor(centre - reach + 0.5)
    first = tl.minimum(tl.floor(start).to(tl.int32), length - 1)
    last = tl.maximum(tl.ceil(end).to(tl.int32), first + 1)
    distance = (lowest + 0.5 - centre).to(tl.float32)
    return (
        lowest.to(tl.int32),
        distance,
        (1 / reach).to(tl.float32),
        first,
        last,
        tl.ceil(2 * reach).to(tl.int32),
    )


@triton.jit
def _weight(k, lowest, distance, inverse_reach, first, last):
    """Weight of tap k before normalisation, and its voxel, moved inside the box where the weight is 0."""
    voxel = lowest + k
    weight = tl.maximum(1 - tl.abs(distance + k) * inverse_reach, 0.0)
    weight = tl.where((voxel >= first) & (voxel < last), weight, 0.0)
    return weight, tl.minimum(tl.maximum(voxel, first), last - 1)


@triton.jit
def _sum_of_weights(count, lowest, distance, inverse_reach, first, last):
    total = distance * 0
    for k in range(count):
        total += _weight(k, lowest, distance, inverse_reach, first, last)[0]
    return total


@triton.jit
def crop_resize_kernel(
    whole_ptr,  # (B, D, H, W) int16 or float32 HU, inner three axes contiguous
    boxes_ptr,  # (B, 6) float32
    part_ptr,  # (B, d, h, w)
    target_ptr,  # (B, d, h, w); not touched unless JOBS is 2
    whole_stride,  # elements from a whole to the next
    depth,
    height,
    width,
    low_hu,
    window,  # high - low, HU
    OUT_D: tl.constexpr,
    OUT_H: tl.constexpr,
    OUT_W: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    JOBS: tl.constexpr,
    ANTIALIAS: tl.constexpr,
):
    """One tile of one slice of one job (part or target) of one sample."""
    ACROSS: tl.constexpr = (OUT_W + TILE_W - 1) // TILE_W
    DOWN: tl.constexpr = (OUT_H + TILE_H - 1) // TILE_H
    tile = tl.program_id(0) % (OUT_D * DOWN * ACROSS)
    job = tl.program_id(0) // (OUT_D * DOWN * ACROSS)
    sample = (job // JOBS).to(tl.int64)  # 1,024 wholes of 64x128x128 are 2^30 voxels: offsets need 64 bits
    is_part = job % JOBS == 0
    out_z = tile // (DOWN * ACROSS)
    out_y = tile // ACROSS % DOWN * TILE_H + tl.arange(0, TILE_H)
    out_x = tile % ACROSS * TILE_W + tl.arange(0, TILE_W)

    box = boxes_ptr + sample * 6
    z0, z1 = tl.where(is_part, tl.load(box), 0.0), tl.where(is_part, tl.load(box + 3), depth)
    y0, y1 = tl.where(is_part, tl.load(box + 1), 0.0), tl.where(is_part, tl.load(box + 4), height)
    x0, x1 = tl.where(is_part, tl.load(box + 2), 0.0), tl.where(is_part, tl.load(box + 5), width)
    z_low, z_dist, z_inv, z_first, z_last, z_count = _taps(z0, z1, out_z, OUT_D, depth, ANTIALIAS)
    y_low, y_dist, y_inv, y_first, y_last, y_count = _taps(y0, y1, out_y, OUT_H, height, ANTIALIAS)
    x_low, x_dist, x_inv, x_first, x_last, x_count = _taps(x0, x1, out_x, OUT_W, width, ANTIALIAS)

    voxels = whole_ptr + sample * whole_stride
    total = tl.zeros((TILE_H, TILE_W), tl.float32)
    for kx in range(x_count):  # outermost: a thread has more columns than rows, so their weights cost most
        x_weight, x = _weight(kx, x_low, x_dist, x_inv, x_first, x_last)
        column = tl.zeros((TILE_H, TILE_W), tl.float32)
        for kz in range(z_count):
            z_weight, z = _weight(kz, z_low, z_dist, z_inv, z_first, z_last)
            slice_ptr = voxels + z.to(tl.int64) * height * width
            for pair in range(0, y_count, 2):  # two loads in flight; past the count the weight is 0
                for k in tl.static_range(2):
                    y_weight, y = _weight(pair + k, y_low, y_dist, y_inv, y_first, y_last)
                    hu = tl.load(slice_ptr + (y[:, None] * width + x[None, :])).to(tl.float32)
                    level = tl.minimum(tl.maximum(hu - low_hu, 0.0), window)
                    column += (z_weight * y_weight)[:, None] * level
        total += x_weight[None, :] * column
    y_sum = _sum_of_weights(y_count, y_low, y_dist, y_inv, y_first, y_last)
    x_sum = _sum_of_weights(x_count, x_low, x_dist, x_inv, x_first, x_last)
    z_sum = _sum_of_weights(z_count, z_low, z_dist, z_inv, z_first, z_last)
    value = tl.minimum(total / (z_sum * y_sum[:, None] * x_sum[None, :] * window), 1.0)

    at = ((sample * OUT_D + out_z) * OUT_H + out_y[:, None]) * OUT_W + out_x[None, :]
    inside = (out_y < OUT_H)[:, None] & (out_x < OUT_W)[None, :]
    if JOBS == 1:
        tl.store(part_ptr + at, value.to(part_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(part_ptr + at, value.to(part_ptr.dtype.element_ty), mask=inside & is_part)
        tl.store(target_ptr + at, value.to(target_ptr.dtype.element_ty), mask=inside & (job % JOBS == 1))


def tiles(size: tuple[int, int, int]) -> tuple[int, int, int]:
    """(TILE_H, TILE_W, programs a sample and job) for outputs of `size` (d, h, w)."""
    d, h, w = size
    tile_h, tile_w = min(8, triton.next_power_of_2(h)), min(64, triton.next_power_of_2(w))
    return tile_h, tile_w, d * triton.cdiv(h, tile_h) * triton.cdiv(w, tile_w)


def run(
    whole: Tensor,
    boxes: Tensor,
    part: Tensor,
    target: Tensor | None,
    *,
    window_hu: tuple[float, float],
    antialias: bool,
) -> None:
    """Fill part (B, 1, d, h, w), and target when there is one, from whole (B, D, H, W) and boxes (B, 6)."""
    _, depth, height, width = whole.shape
    if whole.stride()[1:] != (height * width, width, 1):
        whole = whole.contiguous()
    d, h, w = part.shape[2:]
    tile_h, tile_w, programs = tiles((d, h, w))
    jobs = 1 if target is None else 2
    low, high = map(float, window_hu)
    with torch.cuda.device(whole.device) if whole.is_cuda else contextlib.nullcontext():
        crop_resize_kernel[(programs * jobs * len(whole),)](
            whole,
            boxes.contiguous(),
            part,
            part if target is None else target,
            whole.stride(0),
            depth,
            height,
            width,
            low,
            high - low,
            OUT_D=d,
            OUT_H=h,
            OUT_W=w,
            TILE_H=tile_h,
            TILE_W=tile_w,
            JOBS=jobs,
            ANTIALIAS=antialias,
        )
