"""Counter-based random numbers, boxes, and shuffles within small blocks on a GPU, in one or two Triton launches each.

Numbers and boxes are defined in p2w.rng (`uniforms`) and p2w.geometry (`sample_boxes`); in plain torch a batch of boxes
takes about 60 small kernels. The integers are the same, so uniforms agree with the CPU's bit for bit. Boxes go through
float64 logarithms and exponentials, which libraries round differently in the last bit: they agree to float32 rounding.

Shuffles have the bits of p2w.pretext.models_genesis. The first launch finds the last block that covers each voxel: every
block writes its number over its voxels, the largest stays; a maximum does not depend on the order of the writes. The second
follows each voxel's way through the permutation of its block and copies the value found there. Blocks are worked out from
their uniform draws wherever they are needed: no table of them. B, N, V = batch, blocks of a volume, voxels of a volume.

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


BLOCKS = 64  # blocks of a program of the first launch
VOXELS = 512  # voxels of a program of the second


@triton.jit
def _extent(draws_ptr, block, inside, N: tl.constexpr, AXIS: tl.constexpr, EDGE: tl.constexpr):
    """First voxel and edge of blocks along one axis, int32, from the draws (6, N) of a volume: sizes, then positions."""
    draw = tl.load(draws_ptr + AXIS * N + block, mask=inside, other=0.0)
    size = 1 + (draw * tl.maximum(1, EDGE // 10)).to(tl.int32)
    draw = tl.load(draws_ptr + (3 + AXIS) * N + block, mask=inside, other=0.0)
    return (draw * (EDGE - size + 1)).to(tl.int32), size


@triton.jit
def last_block_kernel(
    draws_ptr,  # (B, 6, N) float64 in [0, 1)
    chosen_ptr,  # (B,) bool
    last_ptr,  # (B, V) int32, -1 beforehand
    N: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    MOST_X: tl.constexpr,  # voxels of the longest block along x, up to the next power of two
    BLOCKS: tl.constexpr,
):
    """Number of the last block that covers each voxel."""
    sample = tl.program_id(1)
    if tl.load(chosen_ptr + sample):
        draws_ptr += sample.to(tl.int64) * (6 * N)
        last_ptr += sample.to(tl.int64) * (D * H * W)
        block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
        inside = block < N
        z, depth = _extent(draws_ptr, block, inside, N, 0, D)
        y, height = _extent(draws_ptr, block, inside, N, 1, H)
        x, width = _extent(draws_ptr, block, inside, N, 2, W)
        along = tl.arange(0, MOST_X)[None, :]
        row = inside[:, None] & (along < width[:, None])
        number = block[:, None] + tl.zeros((BLOCKS, MOST_X), tl.int32)
        for dz in range(tl.maximum(1, D // 10)):
            for dy in range(tl.maximum(1, H // 10)):
                start = ((z + dz) * H + y + dy) * W + x
                mask = row & ((dz < depth) & (dy < height))[:, None]
                tl.atomic_max(last_ptr + (start[:, None] + along), number, mask=mask, sem="relaxed")


@triton.jit
def shuffle_kernel(
    volumes_ptr,  # (B, V)
    draws_ptr,  # (B, 6, N) float64 in [0, 1)
    seeds_ptr,  # (B, N) float64 in [0, 1): of the blocks' permutations
    chosen_ptr,  # (B,) bool
    last_ptr,  # (B, V) int32
    out_ptr,  # (B, V)
    N: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    ROUNDS: tl.constexpr,
    ODD: tl.constexpr,
    VOXELS: tl.constexpr,
):
    """Each voxel's new value: that of the voxel which the permutation of its last block names."""
    sample = tl.program_id(1).to(tl.int64)
    voxel = tl.program_id(0) * VOXELS + tl.arange(0, VOXELS)
    inside = voxel < D * H * W
    source = voxel
    volumes_ptr += sample * (D * H * W)
    if tl.load(chosen_ptr + sample):
        last = tl.load(last_ptr + sample * (D * H * W) + voxel, mask=inside, other=-1)
        covered = last >= 0
        block = tl.maximum(last, 0)
        draws_ptr += sample * (6 * N)
        z, depth = _extent(draws_ptr, block, covered, N, 0, D)
        y, height = _extent(draws_ptr, block, covered, N, 1, H)
        x, width = _extent(draws_ptr, block, covered, N, 2, W)
        slot = ((voxel // (H * W) - z) * height + voxel // W % H - y) * width + voxel % W - x
        slot = tl.where(covered, slot, 0)
        size = depth * height * width
        draw = tl.load(seeds_ptr + sample * N + block, mask=covered, other=0.0)
        seed = (draw * 9007199254740992.0).to(tl.int64).to(tl.uint64)  # all 53 bits of the draw
        for n in tl.static_range(ROUNDS):
            key = splitmix64(seed + (n * ODD % 2**62))
            even = (key >> 1) & 0x3FFFFFFFFFFFFFFF
            partner = (even % size.to(tl.uint64)).to(tl.int32) - slot
            partner = tl.where(partner < 0, partner + size, partner)
            coin = (key ^ (tl.maximum(slot, partner).to(tl.uint64) * ODD)) * ODD
            slot = tl.where((coin >> 63) != 0, partner, slot)
        there = ((slot // (height * width) + z) * H + slot // width % height + y) * W + slot % width + x
        source = tl.where(covered, there, voxel)
    value = tl.load(volumes_ptr + source, mask=inside)
    tl.store(out_ptr + sample * (D * H * W) + voxel, value, mask=inside)


def local_shuffle(
    volumes: Tensor, draws: Tensor, seeds: Tensor, chosen: Tensor, rounds: int, odd: int
) -> Tensor:
    """Volumes (B, 1, d, h, w), contiguous, shuffled where `chosen` (B,) bool; the others are copied.

    `draws` (B, 6 N) float64 in [0, 1): edges along z, y, x, then positions; `seeds` (B, N) alike. `rounds` and `odd` are of
    the permutation, see p2w.pretext.models_genesis.
    """
    batch, _, d, h, w = volumes.shape
    count, voxels = seeds.shape[1], d * h * w
    volumes = volumes.contiguous()
    out = torch.empty_like(volumes)
    last = torch.full((batch, voxels), -1, dtype=torch.int32, device=volumes.device)
    sizes = {"N": count, "D": d, "H": h, "W": w}
    with _on(volumes.device):
        last_block_kernel[(triton.cdiv(count, BLOCKS), batch)](
            draws, chosen, last, **sizes, MOST_X=triton.next_power_of_2(max(1, w // 10)), BLOCKS=BLOCKS
        )
        shuffle_kernel[(triton.cdiv(voxels, VOXELS), batch)](
            volumes, draws, seeds, chosen, last, out, **sizes, ROUNDS=rounds, ODD=odd, VOXELS=VOXELS
        )
    return out
