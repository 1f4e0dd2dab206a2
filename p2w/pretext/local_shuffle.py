"""Shuffle voxels within thousands of small blocks at once, as Models Genesis does one block after the other.

There, each block takes its voxels from the *unshuffled* volume and overwrites what earlier blocks left. So a voxel's value
is decided by the last block that covers it, and all voxels can be worked out side by side: find that block, then look up
where its permutation takes the voxel from. Block after block gives exactly this result for the same draws (a test does so).
B, N = batch, blocks of a volume; V = its voxels.
"""

import torch
from torch import Tensor

from p2w import geometry
from p2w.geometry import Keys
from p2w.pretext.views import integers

ROUNDS = 8  # after which a voxel has stayed where it was, for want of a round that moves it, once in 2^8
_ODD = 0x5851F42D4C957F2D  # spreads a small number over 64 bits before it is mixed


def local_shuffle(volumes: Tensor, keys: Keys, part: int, count: int, chosen: Tensor | None = None) -> Tensor:
    """Volumes (B, 1, d, h, w), shuffled in `count` blocks each, from the streams of parts `part` and `part` + 1.

    Edges are uniform from 1 to a tenth of the volume's, places uniform over all inside it (Models Genesis, FACTS 5).
    Where `chosen` (B,) bool says no, the volume stays as it is; None: all are shuffled.
    """
    if geometry.backend(volumes.device)[0] == "triton":
        from p2w.kernels import local_shuffle_triton  # noqa: PLC0415  triton is optional and slow to import

        if chosen is None:
            chosen = torch.ones(len(volumes), dtype=torch.bool, device=volumes.device)
        draws, seeds = geometry.uniforms(keys, part, 6 * count), geometry.uniforms(keys, part + 1, count)
        return local_shuffle_triton.run(volumes, draws, seeds, chosen, ROUNDS, _ODD)
    if chosen is not None and volumes.device.type == "cpu":  # on a GPU, choosing rows would wait for it
        made, names = volumes.clone(), Keys(keys.seed, keys.epoch, keys.ids[chosen])
        made[chosen] = local_shuffle(volumes[chosen], names, part, count)
        return made
    shape = (volumes.shape[2], volumes.shape[3], volumes.shape[4])
    starts, sizes = draw_blocks(keys, part, count, shape)
    last = last_block(starts, sizes, shape)
    seeds = (geometry.uniforms(keys, part + 1, count) * 2**53).long()
    source = _source(last, starts, sizes, seeds, shape)
    shuffled = volumes.flatten(1).gather(1, source).view_as(volumes)
    return shuffled if chosen is None else torch.where(chosen.view(-1, 1, 1, 1, 1), shuffled, volumes)


def draw_blocks(
    keys: Keys, part: int, count: int, shape: tuple[int, int, int]
) -> tuple[list[Tensor], list[Tensor]]:
    """First voxels and edges of the blocks, each a list z, y, x of (B, N) int64."""
    u = geometry.uniforms(keys, part, 6 * count).view(-1, 6, count)
    sizes = [integers(u[:, k], 1, max(1, edge // 10)) for k, edge in enumerate(shape)]
    starts = [integers(u[:, 3 + k], 0, edge - sizes[k]) for k, edge in enumerate(shape)]
    return starts, sizes


def last_block(starts: list[Tensor], sizes: list[Tensor], shape: tuple[int, int, int]) -> Tensor:
    """(B, V) int64: number of the last block that covers each voxel, -1 where none does."""
    (batch, count), device = starts[0].shape, starts[0].device
    d, h, w = shape
    most = [max(1, edge // 10) for edge in shape]
    last = torch.full((batch, d * h * w + 1), -1, device=device)  # one more, for what lies outside its block
    along = torch.arange(most[2], device=device)
    number = torch.arange(count, device=device).view(1, -1, 1).expand(batch, count, most[2]).flatten(1)
    inside_x = along < sizes[2][:, :, None]
    for dz in range(most[0]):  # over offsets, all blocks at a time: little memory
        for dy in range(most[1]):
            inside = ((dz < sizes[0]) & (dy < sizes[1]))[:, :, None] & inside_x
            row = ((starts[0] + dz) * h + starts[1] + dy) * w + starts[2]
            at = torch.where(inside, row[:, :, None] + along, d * h * w)
            last.scatter_reduce_(1, at.flatten(1), number, "amax")
    return last[:, :-1]


def _source(
    last: Tensor, starts: list[Tensor], sizes: list[Tensor], seeds: Tensor, shape: tuple[int, int, int]
) -> Tensor:
    """(B, V) int64: the voxel that each voxel's value is taken from."""
    d, h, w = shape
    own = torch.arange(d * h * w, device=last.device)
    z, y, x = own // (h * w), own // w % h, own % w
    block = last.clamp(min=0)
    z0, y0, x0, ny, nx = (values.gather(1, block) for values in (*starts, *sizes[1:]))
    slot = ((z - z0) * ny + y - y0) * nx + x - x0
    slot = permuted(torch.where(last < 0, 0, slot), block, sizes[0] * sizes[1] * sizes[2], seeds)
    there = ((slot // (ny * nx) + z0) * h + slot // nx % ny + y0) * w + slot % nx + x0
    return torch.where(last < 0, own, there)


def permuted(slot: Tensor, block: Tensor, volume: Tensor, seeds: Tensor) -> Tensor:
    """Where the permutation of block `block` (B, V) takes its place `slot` (B, V); `volume`, `seeds` (B, N) int64.

    The swap-or-not shuffle (Hoang, Morris, Rogaway 2012): each round pairs the places k - slot and slot of a block, k
    random, and swaps a pair or not by a random bit of its own. A permutation for any volume, without a table of it.
    """
    size = volume.gather(1, block)
    for n in range(ROUNDS):
        keys = geometry.mix(seeds + n * _ODD % 2**62)
        partner = ((keys >> 1) & (2**62 - 1)).remainder(volume).gather(1, block) - slot
        partner = torch.where(partner < 0, partner + size, partner)
        coin = (
            keys.gather(1, block) ^ (torch.maximum(slot, partner) * _ODD)
        ) * _ODD  # its sign, of the keys' 64 bits
        slot = torch.where(coin < 0, partner, slot)
    return slot
