"""Rubik's cube+: order, orientation and masking of eight cubes (Zhu et al. 2020; FACTS 5).

Input: eight cubes of the whole in one of K orders, each turned or not by 180° about two axes, each masked or not. Asked: the
order, two turns and the mask of every cube. The encoder sees each cube by itself (Siamese); only the order is read from the
features of all eight.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from p2w import geometry
from p2w.config import PretextConfig
from p2w.errors import UserError
from p2w.geometry import Keys, Size
from p2w.model.protocol import Encoder, Network, Output
from p2w.pretext.cubes import join, permutations, split, turn
from p2w.pretext.protocol import Views
from p2w.pretext_config import RubikConfig

GRID: Size = (2, 2, 2)
CUBES = 8
COINS, PLACES, HOLES = 0, 1, 2  # which stream draws what


class RubiksCube:
    """Everything is a function of (seed, epoch, id). Target (B, 25): the order's number, 8 x 2 turns, 8 masks."""

    reconstructs = False

    def __init__(self, config: PretextConfig, rubik: RubikConfig) -> None:
        self.config, self.rubik = config, rubik
        self._orders: dict[torch.device, Tensor] = {}

    def sample(self, batch_BDHW: Tensor, keys: Keys) -> Views:
        """Wholes, int16 HU (B, D, H, W) -> the cubes as they were put together, (B, 1, d, h, w) in [0, 1]."""
        settings, device = self.rubik, batch_BDHW.device
        u = geometry.uniforms(keys, COINS, 1 + 3 * CUBES)
        number = (u[:, 0] * settings.orders).long()
        if device not in self._orders:  # once: a copy to the device waits for it
            self._orders[device] = torch.from_numpy(permutations(settings.orders)).to(device)
        turns = (u[:, 1 : 1 + 2 * CUBES] < 0.5).view(-1, CUBES, 2)
        masked = u[:, 1 + 2 * CUBES :] < settings.masked
        cubes = turn(self.cubes(batch_BDHW, self._orders[device][number], keys), turns)
        holes = geometry.uniforms(keys, HOLES, cubes[0].numel()).view_as(cubes) < settings.hidden
        cubes = torch.where(holes & masked[..., None, None, None], 0.0, cubes)
        target = torch.cat((number[:, None], turns.flatten(1), masked), 1).float()
        return Views(join(cubes, GRID), target)

    def cubes(self, batch_BDHW: Tensor, order: Tensor, keys: Keys) -> Tensor:
        """(B, 8, d/2, h/2, w/2): octant order[:, i] of each whole at place i, less a random rim."""
        gap, config = self.rubik.gap, self.config
        place = geometry.uniforms(keys, PLACES, 3 * CUBES).view(-1, CUBES, 3)
        octants = (order // 4, order // 2 % 2, order % 2)
        low, high = [], []
        for k, edge in enumerate(batch_BDHW.shape[1:]):
            half = edge / 2
            start = octants[k] * half + place[..., k] * (gap * half)
            low.append(start)
            high.append((start + (1 - gap) * half).clamp(max=edge))
        boxes = torch.stack((*low, *high), -1).float()
        size = (config.size[0] // 2, config.size[1] // 2, config.size[2] // 2)
        resize = {"window_hu": config.window_hu, "antialias": config.antialias}
        each = [geometry.crop_resize(batch_BDHW, boxes[:, i], size, **resize) for i in range(CUBES)]  # type: ignore[arg-type]
        return torch.cat(each, 1)

    def build(self, encoder: Encoder) -> Network:
        """The encoder behind three heads. Raises UserError where a cube does not fit the encoder."""
        stride = 2 * encoder.strides[-1]
        if any(edge < stride or edge % stride for edge in self.config.size):
            raise UserError(
                f"pretext.size={self.config.size}: each edge must be a multiple of {stride}, twice the encoder's stride, "
                f"for {self.config.name}; pass e.g. --pretext.size "
                f"{' '.join(str(max(stride, edge // stride * stride)) for edge in self.config.size)}"
            )
        return Siamese(encoder, self.rubik.orders)

    def loss(self, output: Output, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy of the order, plus weighted binary cross entropies of turns and masks, each a mean over cubes."""
        order, turns, masked = (one.float() for one in cast(tuple[Tensor, ...], output))
        number, target = views.target[:, 0].long(), views.target[:, 1:].float()
        parts = {
            "order": F.cross_entropy(order, number),
            "turns": F.binary_cross_entropy_with_logits(turns.flatten(1), target[:, : 2 * CUBES]),
            "masked": F.binary_cross_entropy_with_logits(masked, target[:, 2 * CUBES :]),
        }
        loss = (
            parts["order"]
            + self.rubik.turn_weight * parts["turns"]
            + self.rubik.mask_weight * parts["masked"]
        )
        right = (order.argmax(1) == number).float().mean()
        return loss, {**{name: value.detach() for name, value in parts.items()}, "order_accuracy": right}

    def panels(self, views: Views) -> dict[str, Tensor]:
        """The cubes as they were put together."""
        return {"cubes": views.input}


class Siamese(Network):
    """(B, 1, d, h, w), eight cubes in a block -> logits of order (B, K), turns (B, 8, 2), masks (B, 8), float32."""

    def __init__(self, encoder: Encoder, orders: int) -> None:
        super().__init__()
        self.encoder = encoder
        encoder.only_pooled()
        channels = encoder.channels[-1]
        self.order = nn.Sequential(
            nn.Linear(CUBES * channels, 2 * channels), nn.ReLU(), nn.Linear(2 * channels, orders)
        )
        self.turns, self.masked = nn.Linear(channels, 2), nn.Linear(channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cubes one by one through the encoder, pooled, then the heads."""
        cubes = split(x, GRID)
        features = self.encoder.pooled(cubes.flatten(0, 1)[:, None]).view(len(x), CUBES, -1)
        order = self.order(features.flatten(1))
        return order.float(), self.turns(features).float(), self.masked(features)[..., 0].float()
