"""Models Genesis: restore a cube from a version of it that was deformed in four ways (Zhou et al. 2019, 2021; FACTS 5).

Input: a cube of the scan at native voxels, flipped, shuffled in small blocks, sent through a random intensity curve, painted
over. Target: the cube, flipped alike. Loss: mean squared error. Its network is the U-Net with skips: recipe `genesis`.
"""

from typing import cast

import torch
from torch import Tensor

from p2w import geometry
from p2w.config import PretextConfig
from p2w.errors import UserError
from p2w.geometry import Keys
from p2w.model.decoder import EncoderDecoder, build_decoder
from p2w.model.protocol import Encoder, Network, Output
from p2w.pretext.intensity import bezier, look_up
from p2w.pretext.local_shuffle import local_shuffle
from p2w.pretext.protocol import Views, check_size
from p2w.pretext.views import flipped, integers, resized_whole
from p2w.pretext_config import GenesisConfig

CUBE, COINS, SHUFFLE, CURVE, BLOCKS, NOISE = 0, 1, 2, 4, 5, 6  # which stream draws what; shuffling takes two
FLIPS = 3  # at most, each tried only if the one before was made [C]
PAINTED = 5  # blocks at most, each tried only if the one before was made [C]
AGAIN = 0.95  # probability of another block [C]
MARGIN = 3  # voxels between a painted block and the border [C]


class ModelsGenesis:
    """The cube and all that is done to it is a function of (seed, epoch, id) alone."""

    reconstructs = True
    capturable = True

    def __init__(self, config: PretextConfig, genesis: GenesisConfig) -> None:
        self.config, self.genesis = config, genesis
        self._numbers: dict[object, Tensor] = {}

    def sample(self, batch_BDHW: Tensor, keys: Keys) -> Views:
        """Wholes, int16 HU (B, D, H, W) -> deformed and original cube, (B, 1, d, h, w) in [0, 1]."""
        settings, coins = self.genesis, geometry.uniforms(keys, COINS, 3 + 2 * FLIPS)
        cube = self.cube(batch_BDHW, keys)
        cube = flipped(cube[:, 0], flips(coins[:, 3:], settings.flip))[:, None]
        made = local_shuffle(cube, keys, SHUFFLE, settings.blocks, coins[:, 0] < settings.shuffle)
        curved = (coins[:, 1] < settings.curve).view(-1, 1, 1, 1, 1)
        made = torch.where(curved, look_up(made, curves(keys, settings.decreasing)), made)
        noise = geometry.uniforms(keys, NOISE, made[0].numel()).float().view_as(made)
        return Views(torch.where(self.painted(coins[:, 2], keys), noise, made), cube)

    def cube(self, batch_BDHW: Tensor, keys: Keys) -> Tensor:
        """(B, 1, d, h, w): a random crop at native voxels, or with `genesis.cube whole` all of the whole, resized."""
        if self.genesis.cube == "whole":
            return resized_whole(batch_BDHW, self.config)
        size, shape = self.config.size, batch_BDHW.shape[1:]
        if any(edge > there for edge, there in zip(size, shape, strict=True)):
            raise UserError(
                f"pretext.size={size}: no cube of that size fits sub-scans of {tuple(shape)} voxels; pass a smaller "
                "one, or --genesis.cube whole"
            )
        room = tuple(there - edge + 1 for edge, there in zip(size, shape, strict=True))
        spans, edges = self.numbers(batch_BDHW.device, room, size)
        starts = (geometry.uniforms(keys, CUBE, 3) * spans).long()
        boxes = torch.cat((starts, starts + edges), 1).float()
        return geometry.crop_resize(batch_BDHW, boxes, size, window_hu=self.config.window_hu, antialias=False)

    def painted(self, coin: Tensor, keys: Keys) -> Tensor:
        """(B, 1, d, h, w) bool, where noise replaces the cube; `coin` (B,) decides whether, and whether outside or in.

        Inside: up to five blocks, edges a sixth to a third. Outside: all but up to five, edges three to four sevenths.
        """
        settings, size, device = self.genesis, self.config.size, coin.device
        paints, outside = coin < settings.paint, coin < settings.paint * settings.outpaint
        u = geometry.uniforms(keys, BLOCKS, 7 * PAINTED).view(len(coin), PAINTED, 7)
        made = u[..., 6] < AGAIN
        made[:, 0].logical_or_(outside)  # the first block of what is kept is always there
        made = made.cumprod(1).bool()
        edges, *limits = self.numbers(
            device,
            size,
            tuple(edge // 6 for edge in size),
            tuple(edge // 3 - edge // 6 + 1 for edge in size),
            tuple(edge - 4 * edge // 7 for edge in size),
            tuple(4 * edge // 7 - 3 * edge // 7 + 1 for edge in size),
        )
        low, span = (torch.where(outside[:, None, None], limits[2 + k], limits[k]) for k in (0, 1))
        length = low + (u[..., :3] * span).long()  # (B, PAINTED, 3)
        rest = edges - length
        margin = (rest // 2).clamp(max=MARGIN)
        start = integers(u[..., 3:6], margin, rest - margin)
        place = self.numbers(device, tuple(range(max(size))))[0]
        inside = (place >= start[..., None]) & (place < (start + length)[..., None])
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

    def panels(self, views: Views) -> dict[str, Tensor]:
        """Deformed and original."""
        return {"deformed": views.input, "cube": views.target}


def flips(u: Tensor, probability: float) -> Tensor:
    """(B, 3) bool, axes that are flipped an odd number of times; `u` (B, 2 FLIPS): whether again, along which axis."""
    again = (u[:, :FLIPS] < probability).cumprod(1)
    axis = integers(u[:, FLIPS:], 0, 2)
    return torch.zeros(len(u), 3, dtype=torch.int64, device=u.device).scatter_add_(1, axis, again) % 2 == 1


def curves(keys: Keys, decreasing: float) -> Tensor:
    """Tables (B, K): Bezier curves, rising from 0 to 1 or, with probability `decreasing`, falling from 1 to 0."""
    u = geometry.uniforms(keys, CURVE, 5).float()
    rising = bezier(u[:, :4])
    return torch.where(u[:, 4:] < decreasing, rising.flip(1), rising)
