"""Models Genesis: restore a cube from a version of it that was deformed in four ways (Zhou et al. 2019, 2021).

Input: a cube of the scan at native voxels, flipped, shuffled in small blocks, sent through a random intensity curve, painted
over. Target: the cube, flipped alike. Loss: mean squared error. Its network is the U-Net with skips: recipe `genesis`.

Local shuffling permutes the voxels within thousands of small blocks at once, as the authors' code does one by one.

There, each block takes its voxels from the *unshuffled* volume and overwrites what earlier blocks left. So a voxel's value
is decided by the last block that covers it, and all voxels can be worked out side by side: find that block, then look up
where its permutation takes the voxel from. Block after block gives exactly this result for the same draws (a test does so).
B, N = batch, blocks of a volume; V = its voxels.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, cast

import torch
from torch import Tensor

from p2w import geometry, rng
from p2w.errors import UserError
from p2w.model.decoder import EncoderDecoder, build_decoder
from p2w.model.encoder import Encoder, Network, Output
from p2w.pretext.protocol import Pretext, Views, check_size
from p2w.pretext.settings import Bounds, PretextConfig, Shows
from p2w.pretext.volume_ops import apply_tables, bezier, flipped, resized_whole
from p2w.rng import SampleKeys, uniform_integers

ROUNDS = 8  # the probability that no round moves a voxel is then 2^-8
_ODD = 0x5851F42D4C957F2D  # spreads a small number over 64 bits before it is mixed


def local_shuffle(
    volumes: Tensor, keys: SampleKeys, part: int, count: int, chosen: Tensor | None = None
) -> Tensor:
    """Volumes (B, 1, d, h, w), shuffled in `count` blocks each, from the streams of parts `part` and `part` + 1.

    Edges are uniform from 1 to a tenth of the volume's, positions uniform over all inside it, as in the authors' code.
    Where `chosen` (B,) bool says no, the volume stays as it is; None: all are shuffled.
    """
    if rng.backend(volumes.device)[0] == "triton":
        from p2w.kernels import sample_triton  # noqa: PLC0415  triton is optional and slow to import

        if chosen is None:
            chosen = torch.ones(len(volumes), dtype=torch.bool, device=volumes.device)
        draws, seeds = rng.uniforms(keys, part, 6 * count), rng.uniforms(keys, part + 1, count)
        return sample_triton.local_shuffle(volumes, draws, seeds, chosen, ROUNDS, _ODD)
    if chosen is not None and volumes.device.type == "cpu":  # on a GPU, choosing rows would wait for it
        made, names = volumes.clone(), SampleKeys(keys.seed, keys.epoch, keys.ids[chosen])
        made[chosen] = local_shuffle(volumes[chosen], names, part, count)
        return made
    shape = (volumes.shape[2], volumes.shape[3], volumes.shape[4])
    starts, sizes = draw_blocks(keys, part, count, shape)
    last = last_block(starts, sizes, shape)
    seeds = (rng.uniforms(keys, part + 1, count) * 2**53).long()
    source = _source(last, starts, sizes, seeds, shape)
    shuffled = volumes.flatten(1).gather(1, source).view_as(volumes)
    return shuffled if chosen is None else torch.where(chosen.view(-1, 1, 1, 1, 1), shuffled, volumes)


def draw_blocks(
    keys: SampleKeys, part: int, count: int, shape: tuple[int, int, int]
) -> tuple[list[Tensor], list[Tensor]]:
    """First voxels and edges of the blocks, each a list z, y, x of (B, N) int64."""
    u = rng.uniforms(keys, part, 6 * count).view(-1, 6, count)
    sizes = [uniform_integers(u[:, k], 1, max(1, edge // 10)) for k, edge in enumerate(shape)]
    starts = [uniform_integers(u[:, 3 + k], 0, edge - sizes[k]) for k, edge in enumerate(shape)]
    return starts, sizes


def last_block(starts: list[Tensor], sizes: list[Tensor], shape: tuple[int, int, int]) -> Tensor:
    """(B, V) int64: number of the last block that covers each voxel, -1 where none does."""
    (batch, count), device = starts[0].shape, starts[0].device
    d, h, w = shape
    most = [max(1, edge // 10) for edge in shape]
    last = torch.full((batch, d * h * w + 1), -1, device=device)  # one more, for voxels outside the block
    along = torch.arange(most[2], device=device)
    number = torch.arange(count, device=device).view(1, -1, 1).expand(batch, count, most[2]).flatten(1)
    inside_x = along < sizes[2][:, :, None]
    for dz in range(most[0]):  # a loop over offsets with all blocks at a time takes little memory
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
    """(B, V): the slot to which the permutation of block `block` (B, V) maps `slot` (B, V); `volume`, `seeds` (B, N) int64.

    The swap-or-not shuffle (Hoang, Morris, Rogaway 2012): each round pairs the slots k - slot and slot of a block, k
    random, and swaps a pair or not by a random bit of its own. A permutation for any volume, without a table of it.
    """
    size = volume.gather(1, block)
    for n in range(ROUNDS):
        keys = rng.splitmix64(seeds + n * _ODD % 2**62)
        partner = ((keys >> 1) & (2**62 - 1)).remainder(volume).gather(1, block) - slot
        partner = torch.where(partner < 0, partner + size, partner)
        coin = (
            keys.gather(1, block) ^ (torch.maximum(slot, partner) * _ODD)
        ) * _ODD  # its sign, of the keys' 64 bits
        slot = torch.where(coin < 0, partner, slot)
    return slot


CUBE, COINS, SHUFFLE, CURVE, BLOCKS, NOISE = (
    0,
    1,
    2,
    4,
    5,
    6,
)  # the random stream of each step; shuffling takes two
FLIPS = 3  # at most, each tried only if the one before was made [C]
PAINTED = 5  # blocks at most, each tried only if the one before was made [C]
AGAIN = 0.95  # probability of another block [C]
MARGIN = 3  # voxels between a painted block and the border [C]


@dataclass(frozen=True)
class GenesisConfig:
    """Settings of models_genesis: the deformations."""

    cube: Literal["crop", "whole"] = "crop"
    """What is deformed: a random crop of pretext.size native voxels [C], or the whole resized to it."""
    flip: Annotated[float, Bounds(0, 1)] = 0.4
    """Probability of a flip along a random axis, and of another after it, up to three [C]; the target is flipped too."""
    shuffle: Annotated[float, Bounds(0, 1)] = 0.5
    """Probability of shuffling voxels within small blocks [C]."""
    blocks: Annotated[int, Bounds(1, 1_000_000)] = 10_000
    """Blocks that are shuffled, of edges up to a tenth of the cube's [C]."""
    curve: Annotated[float, Bounds(0, 1)] = 0.9
    """Probability of a Bezier curve through the intensities [C]."""
    decreasing: Annotated[float, Bounds(0, 1)] = 0.5
    """Share of those curves that fall, so that bright becomes dark [C]."""
    paint: Annotated[float, Bounds(0, 1)] = 0.9
    """Probability of noise painted over the cube [C]."""
    outpaint: Annotated[float, Bounds(0, 1)] = 0.8
    """Share of the painted cubes whose noise lies outside of a few blocks; in the others it lies inside [C]."""


class ModelsGenesis(Pretext):
    """Restore a deformed cube. The cube and its deformations are functions of (seed, epoch, id) alone."""

    summary = "a cube flipped, shuffled, recoloured, painted over -> the cube"
    groups: ClassVar = {"genesis": GenesisConfig}
    reconstructs = True
    capturable = True

    def __init__(self, config: PretextConfig, genesis: GenesisConfig) -> None:
        self.config, self.genesis = config, genesis
        self._numbers: dict[object, Tensor] = {}

    @property
    def shows(self) -> Shows:
        """What the cube is: a crop at native voxels, or the whole resized."""
        return self.genesis.cube

    def sample(self, batch_BDHW: Tensor, keys: SampleKeys, step: int = 0) -> Views:
        """Wholes, int16 HU (B, D, H, W) -> deformed and original cube, (B, 1, d, h, w) in [0, 1]."""
        settings, coins = self.genesis, rng.uniforms(keys, COINS, 3 + 2 * FLIPS)
        cube = self.cube(batch_BDHW, keys)
        cube = flipped(cube[:, 0], flips(coins[:, 3:], settings.flip))[:, None]
        made = local_shuffle(cube, keys, SHUFFLE, settings.blocks, coins[:, 0] < settings.shuffle)
        curved = (coins[:, 1] < settings.curve).view(-1, 1, 1, 1, 1)
        made = torch.where(curved, apply_tables(made, curves(keys, settings.decreasing)), made)
        noise = rng.uniforms(keys, NOISE, made[0].numel()).float().view_as(made)
        return Views(torch.where(self.painted(coins[:, 2], keys), noise, made), cube)

    def cube(self, batch_BDHW: Tensor, keys: SampleKeys) -> Tensor:
        """(B, 1, d, h, w): a random crop at native voxels, or with `genesis.cube whole` all of the whole, resized.

        The crop lies inside what is real of a whole; along an axis where that is less than the crop, it is resized to it.
        """
        if self.genesis.cube == "whole":
            return resized_whole(batch_BDHW, self.config, keys.real)
        size, shape = self.config.size, batch_BDHW.shape[1:]
        if any(edge > there for edge, there in zip(size, shape, strict=True)):
            raise UserError(
                f"pretext.size={size}: no cube of that size fits sub-scans of {tuple(shape)} voxels; pass a smaller "
                "one, or --genesis.cube whole"
            )
        room = tuple(there - edge + 1 for edge, there in zip(size, shape, strict=True))
        spans, edges = self.numbers(batch_BDHW.device, room, size)
        if keys.real is not None:
            spans = (keys.real.double() - edges + 1).clamp(min=1)
        starts = (rng.uniforms(keys, CUBE, 3) * spans).long()
        boxes = torch.cat((starts, starts + edges), 1).float()
        if keys.real is not None:
            boxes = torch.minimum(boxes, keys.real.repeat(1, 2))
        return geometry.crop_resize(batch_BDHW, boxes, size, window_hu=self.config.window_hu, antialias=False)

    def painted(self, coin: Tensor, keys: SampleKeys) -> Tensor:
        """(B, 1, d, h, w) bool, where noise replaces the cube; `coin` (B,) decides whether, and whether outside or in.

        Inside: up to five blocks, edges a sixth to a third. Outside: all but up to five, edges three to four sevenths.
        """
        settings, size, device = self.genesis, self.config.size, coin.device
        paints, outside = coin < settings.paint, coin < settings.paint * settings.outpaint
        u = rng.uniforms(keys, BLOCKS, 7 * PAINTED).view(len(coin), PAINTED, 7)
        made = u[..., 6] < AGAIN
        made[:, 0].logical_or_(outside)  # the first block of what is kept is always there
        made = made.cumprod(1).bool()
        edges, *limits = self.numbers(
            device, size, tuple(edge // 6 for edge in size),
            tuple(edge // 3 - edge // 6 + 1 for edge in size), tuple(edge - 4 * edge // 7 for edge in size),
            tuple(4 * edge // 7 - 3 * edge // 7 + 1 for edge in size),
        )  # fmt: skip
        low, span = (torch.where(outside[:, None, None], limits[2 + k], limits[k]) for k in (0, 1))
        length = low + (u[..., :3] * span).long()  # (B, PAINTED, 3)
        rest = edges - length
        margin = (rest // 2).clamp(max=MARGIN)
        start = uniform_integers(u[..., 3:6], margin, rest - margin)
        position = self.numbers(device, tuple(range(max(size))))[0]
        inside = (position >= start[..., None]) & (position < (start + length)[..., None])
        z, y, x = (inside[:, :, k, :edge] for k, edge in enumerate(size))
        blocks = (made[..., None] & z)[..., None] & y[:, :, None]
        blocks = blocks[..., None] & x[:, :, None, None]
        union = blocks.any(1, keepdim=True)
        outside, paints = (one.view(-1, 1, 1, 1, 1) for one in (outside, paints))
        return (union ^ outside) & paints

    def numbers(self, device: torch.device, *rows: tuple[int, ...]) -> Tensor:
        """Rows of whole numbers as a tensor on the device, made once: a copy to a GPU waits for it."""
        if (device, rows) not in self._numbers:
            self._numbers[device, rows] = torch.tensor(rows, device=device)
        return self._numbers[device, rows]

    def build(self, encoder: Encoder) -> Network:
        """Encoder, decoder (`pretext.skips`; published with), sigmoid."""
        check_size(self.config.size, encoder)
        return EncoderDecoder(encoder, build_decoder(encoder, self.config.skips))

    def loss(self, output: Output, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error between output and cube, in float32."""
        return torch.nn.functional.mse_loss(cast(Tensor, output).float(), views.target.float()), {}

    def image_columns(self, views: Views) -> dict[str, Tensor]:
        """Deformed and original."""
        return {"deformed": views.input, "cube": views.target}


def flips(u: Tensor, probability: float) -> Tensor:
    """(B, 3) bool, axes that are flipped an odd number of times; `u` (B, 2 FLIPS): whether again, along which axis."""
    again = (u[:, :FLIPS] < probability).cumprod(1)
    axis = uniform_integers(u[:, FLIPS:], 0, 2)
    return torch.zeros(len(u), 3, dtype=torch.int64, device=u.device).scatter_add_(1, axis, again) % 2 == 1


def curves(keys: SampleKeys, decreasing: float) -> Tensor:
    """Tables (B, K): Bezier curves, rising from 0 to 1 or, with probability `decreasing`, falling from 1 to 0."""
    u = rng.uniforms(keys, CURVE, 5).float()
    rising = bezier(u[:, :4])
    return torch.where(u[:, 4:] < decreasing, rising.flip(1), rising)
