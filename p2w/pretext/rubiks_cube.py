"""Rubik's cube+ (Zhu et al. 2020) and Rubik's cube++ (Tao et al. 2020): a volume cut into cubes that are moved and turned.

Rubik's cube+: order, orientation and masking of eight cubes (Zhu et al. 2020).

Input: eight cubes of the whole in one of K orders, each turned or not by 180° about two axes, each masked or not. Asked: the
order, two turns and the mask of every cube. The encoder sees each cube by itself (Siamese); only the order is read from the
features of all eight.

Rubik's cube++: restore a volume whose cubes were permuted and turned (after Tao et al. 2020). What may differ: the paper
calls its puzzle a volume-wise transformation; whether it turns whole layers, as the toy does, or single cubes is in no text
or code that we could read. Public code of others moves single cubes and turns none. Here every cube is moved and turned by
itself, which leaves no context at all; the critic is trained in the same backward pass, as a step has only one here.

Input: the whole as a grid of cubes in random order, each turned by 180° or not about two axes. Target: the whole. Loss: mean
squared error, plus `rubik.adversary` times the loss of a critic that tells restored volumes from real ones; its gradient
reaches encoder and decoder reversed, so that one backward pass trains both sides. Validation looks at the restoration alone.

An adversary trained in the same backward pass: a critic behind a gradient reversal (Ganin & Lempitsky 2015).
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from p2w import geometry, rng
from p2w.errors import UserError
from p2w.geometry import Size
from p2w.model.conv import Conv3d
from p2w.model.decoder import EncoderDecoder, build_decoder
from p2w.model.encoder import Encoder, Network, Output
from p2w.pretext.protocol import Pretext, Views, check_size
from p2w.pretext.settings import Bounds, PretextConfig, Shows
from p2w.pretext.volume_ops import cube_permutations, join_cubes, resized_whole, split_cubes, turn_cubes
from p2w.rng import SampleKeys

GRID: Size = (2, 2, 2)
CUBES = 8
COINS, OFFSETS, HOLES = 0, 1, 2  # which stream draws what


@dataclass(frozen=True)
class RubikConfig:
    """Settings of rubiks_cube and rubiks_cube_pp: the puzzles."""

    orders: Annotated[int, Bounds(2, 1000)] = 100
    """rubiks_cube: orders of its 2x2x2 cubes to tell apart, far from one another [P]."""
    gap: Annotated[float, Bounds(0, 0.5)] = 0.1
    """rubiks_cube: share of an octant's edge that its cube leaves out, so that cubes do not fit edge to edge [?]."""
    masked: Annotated[float, Bounds(0, 1)] = 0.5
    """rubiks_cube: probability that a cube is masked [?]."""
    hidden: Annotated[float, Bounds(0, 1)] = 0.5
    """rubiks_cube: share of the voxels of a masked cube that are set to 0 [?]."""
    turn_weight: Annotated[float, Bounds(0, 1000)] = 1.0
    """rubiks_cube: weight of the turns beside the order [?]."""
    mask_weight: Annotated[float, Bounds(0, 1000)] = 1.0
    """rubiks_cube: weight of the masks beside the order [?]."""
    grid: Annotated[tuple[int, int, int], Bounds(1, usual="2 2 2")] = (2, 2, 2)
    """rubiks_cube_pp: cubes along z, y, x [?]; divides pretext.size."""
    adversary: Annotated[float, Bounds(0, 1000)] = 0.01
    """rubiks_cube_pp: weight of the critic beside the mean squared error; 0 builds none [?]."""
    critic_width: Annotated[int, Bounds(1, 1024)] = 16
    """rubiks_cube_pp: channels of the critic's first convolution [?]."""


class RubiksCube(Pretext):
    """Solve a puzzle of eight cubes, which is a function of (seed, epoch, id) alone.

    Target (B, 25): the order's number, 8 x 2 turns, 8 masks.
    """

    summary = "eight cubes moved, turned, masked -> order, turns, masks"
    groups: ClassVar = {"rubik": RubikConfig}
    reconstructs = False
    shows: Shows = "whole"

    @property
    def kept_edge(self) -> float:
        """A cube leaves a gap to its octant's border, and is resized to the octant."""
        return 1 - self.rubik.gap

    def __init__(self, config: PretextConfig, rubik: RubikConfig) -> None:
        self.config, self.rubik = config, rubik
        self._orders: dict[torch.device, Tensor] = {}

    def sample(self, batch_BDHW: Tensor, keys: SampleKeys, step: int = 0) -> Views:
        """Wholes, int16 HU (B, D, H, W) -> the cubes as they were put together, (B, 1, d, h, w) in [0, 1]."""
        settings, device = self.rubik, batch_BDHW.device
        u = rng.uniforms(keys, COINS, 1 + 3 * CUBES)
        number = (u[:, 0] * settings.orders).long()
        if device not in self._orders:  # once: a copy to the device waits for it
            self._orders[device] = torch.from_numpy(cube_permutations(settings.orders)).to(device)
        turns = (u[:, 1 : 1 + 2 * CUBES] < 0.5).view(-1, CUBES, 2)
        masked = u[:, 1 + 2 * CUBES :] < settings.masked
        cubes = turn_cubes(self.cubes(batch_BDHW, self._orders[device][number], keys), turns)
        holes = rng.uniforms(keys, HOLES, cubes[0].numel()).view_as(cubes) < settings.hidden
        cubes = torch.where(holes & masked[..., None, None, None], 0.0, cubes)
        target = torch.cat((number[:, None], turns.flatten(1), masked), 1).float()
        return Views(join_cubes(cubes, GRID), target)

    def cubes(self, batch_BDHW: Tensor, order: Tensor, keys: SampleKeys) -> Tensor:
        """(B, 8, d/2, h/2, w/2): octant order[:, i] of each whole at position i, less a random rim."""
        gap, config = self.rubik.gap, self.config
        offset = rng.uniforms(keys, OFFSETS, 3 * CUBES).view(-1, CUBES, 3)
        octants = (order // 4, order // 2 % 2, order % 2)
        low, high = [], []
        for k, length in enumerate(batch_BDHW.shape[1:]):
            edge = length if keys.real is None else keys.real[:, k, None].double()
            half = edge / 2
            start = octants[k] * half + offset[..., k] * (gap * half)
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

    def image_columns(self, views: Views) -> dict[str, Tensor]:
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
        cubes = split_cubes(x, GRID)
        features = self.encoder.pooled(cubes.flatten(0, 1)[:, None]).view(len(x), CUBES, -1)
        order = self.order(features.flatten(1))
        return order.float(), self.turns(features).float(), self.masked(features)[..., 0].float()


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


def reverse_gradient(x: Tensor) -> Tensor:
    """`x` itself, whose gradient comes back with the other sign: what lowers a loss behind it raises that loss before it."""
    return _Reverse.apply(x)


class Discriminator(nn.Module):
    """Volumes (B, 1, d, h, w) -> scores (B,): positive for real ones. Its means are over one volume only: without
    batch norm, a score depends on no other sample and no other rank."""

    LEVELS = 3

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        cin = 1
        for level in range(self.LEVELS):
            cout = width * 2**level
            layers += [Conv3d(cin, cout, kernel_size=3, stride=2, padding=1), nn.LeakyReLU(0.2)]
            cin = cout
        self.layers = nn.Sequential(*layers, Conv3d(cin, 1, kernel_size=1))

    def forward(self, x: Tensor) -> Tensor:
        """Mean score over all voxels of the coarsest features."""
        scores: Tensor = self.layers(x)
        return scores.float().mean((1, 2, 3, 4))


def discriminate(real: Tensor, made: Tensor) -> Tensor:
    """The critic's loss: mean binary cross entropy of calling `real` (B,) real and `made` (B,) made."""
    return F.softplus(-real).mean() + F.softplus(made).mean()


ORDER, TURNS = 0, 1  # which stream draws what


class RubiksCubePp(Pretext):
    """Restore a volume from its puzzle. Order and turns are functions of (seed, epoch, id) alone."""

    summary = "a volume of moved and turned cubes -> the volume, against a critic"
    groups: ClassVar = {"rubik": RubikConfig}
    reconstructs = True
    shows: Shows = "whole"

    def __init__(self, config: PretextConfig, rubik: RubikConfig) -> None:
        self.config, self.rubik = config, rubik
        if any(edge % count for edge, count in zip(config.size, rubik.grid, strict=True)):
            raise UserError(
                f"rubik.grid={rubik.grid}: must divide pretext.size={config.size}; pass e.g. --rubik.grid 2 2 2"
            )

    def sample(self, batch_BDHW: Tensor, keys: SampleKeys, step: int = 0) -> Views:
        """Wholes, int16 HU (B, D, H, W) -> puzzle and whole, (B, 1, d, h, w) in [0, 1]."""
        whole, grid = resized_whole(batch_BDHW, self.config, keys.real), self.rubik.grid
        cubes = split_cubes(whole, grid)
        count = cubes.shape[1]
        order = rng.uniforms(keys, ORDER, count).argsort(stable=True, dim=1)
        turns = (rng.uniforms(keys, TURNS, 2 * count) < 0.5).view(-1, count, 2)
        moved = cubes.gather(1, order.view(-1, count, 1, 1, 1).expand_as(cubes))
        return Views(
            join_cubes(turn_cubes(moved, turns), grid),
            whole,
            extra_inputs=(whole,) if self.rubik.adversary else (),
        )

    def build(self, encoder: Encoder) -> Network:
        """Encoder, decoder (skips off unless asked), sigmoid; the critic beside them, unless its weight is 0."""
        check_size(self.config.size, encoder)
        decoder = build_decoder(encoder, self.config.skips)
        if not self.rubik.adversary:
            return EncoderDecoder(encoder, decoder)
        return AdversarialNetwork(encoder, decoder, Discriminator(self.rubik.critic_width))

    def loss(self, output: Output, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error, and the critic's loss where the network gave its scores; in float32."""
        volume, *scores = output if isinstance(output, tuple) else (output,)
        error = torch.nn.functional.mse_loss(volume.float(), views.target.float())
        if not scores:
            return error, {}
        critic = discriminate(*scores)
        fooled = (scores[1] > 0).float().mean()
        return error + self.rubik.adversary * critic, {
            "mse": error.detach(),
            "critic": critic.detach(),
            "fooled": fooled,
        }

    def image_columns(self, views: Views) -> dict[str, Tensor]:
        """Puzzle and whole."""
        return {"puzzle": views.input, "whole": views.target}


class AdversarialNetwork(EncoderDecoder):
    """Restores; in training, given the real volumes, it also gives its critic's scores of both."""

    def __init__(self, encoder: Encoder, decoder: nn.Module, critic: Discriminator) -> None:
        super().__init__(encoder, decoder)
        self.critic = critic

    def forward(self, x: Tensor, real: Tensor | None = None) -> Output:  # type: ignore[override]
        """(B, 1, d, h, w) -> volume alike in [0, 1]; with `real`, in training, scores (B,) of it and of the volume."""
        volume = super().forward(x)
        if real is None or not self.training:
            return volume
        return volume, self.critic(real), self.critic(reverse_gradient(volume))
