"""Shuffle voxels within thousands of small blocks on a GPU: two launches, the bits of p2w.pretext.models_genesis.

The first finds the last block that covers each voxel: every block writes its number over its voxels, the largest stays; a
maximum does not depend on the order of the writes. The second follows each voxel's way through the permutation of its block
and copies the value found there. Blocks are worked out from their uniform draws wherever they are needed: no table of them.
Wholes that are not chosen are copied. B, N, V = batch, blocks of a volume, voxels of a volume.

Runs without a GPU in Triton's interpreter (TRITON_INTERPRET=1 before triton is imported): the tests do.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from p2w.kernels.sample_triton import splitmix64

# What Triton compiles is typed by Triton:
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

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


def run(volumes: Tensor, draws: Tensor, seeds: Tensor, chosen: Tensor, rounds: int, odd: int) -> Tensor:
    """Volumes (B, 1, d, h, w), contiguous, shuffled where `chosen` (B,) bool.

    `draws` (B, 6 N) float64 in [0, 1): edges along z, y, x, then places; `seeds` (B, N) alike. `rounds` and `odd` are of the
    permutation, see p2w.pretext.models_genesis.
    """
    batch, _, d, h, w = volumes.shape
    count, voxels = seeds.shape[1], d * h * w
    volumes, out = (
        volumes.contiguous(),
        torch.empty(volumes.shape, dtype=volumes.dtype, device=volumes.device),
    )
    last = torch.full((batch, voxels), -1, dtype=torch.int32, device=volumes.device)
    sizes = {"N": count, "D": d, "H": h, "W": w}
    with torch.cuda.device(volumes.device) if volumes.is_cuda else contextlib.nullcontext():
        last_block_kernel[(triton.cdiv(count, BLOCKS), batch)](
            draws, chosen, last, **sizes, MOST_X=triton.next_power_of_2(max(1, w // 10)), BLOCKS=BLOCKS
        )
        shuffle_kernel[(triton.cdiv(voxels, VOXELS), batch)](
            volumes, draws, seeds, chosen, last, out, **sizes, ROUNDS=rounds, ODD=odd, VOXELS=VOXELS
        )
    return out
