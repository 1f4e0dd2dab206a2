"""Rubik's cube++: restore a volume whose cubes were permuted and turned (Tao et al. 2020; FACTS 5).

Input: the whole as a grid of cubes in random order, each turned by 180° or not about two axes. Target: the whole. Loss: mean
squared error, plus `rubik.adversary` times the loss of a critic that tells restored volumes from real ones; its gradient
reaches encoder and decoder reversed, so that one backward pass trains both sides. Validation looks at the restoration alone.
"""

import torch
from torch import Tensor, nn

from p2w import geometry
from p2w.config import PretextConfig
from p2w.errors import UserError
from p2w.geometry import Keys
from p2w.model.decoder import EncoderDecoder, build_decoder
from p2w.model.protocol import Encoder, Network, Output
from p2w.pretext.adversary import Critic, reverse, verdicts
from p2w.pretext.cubes import join, split, turn
from p2w.pretext.protocol import Views, check_size
from p2w.pretext.views import resized_whole
from p2w.pretext_config import RubikConfig

ORDER, TURNS = 0, 1  # which stream draws what


class RubiksCubePp:
    """Order and turns are a function of (seed, epoch, id) alone."""

    reconstructs = True

    def __init__(self, config: PretextConfig, rubik: RubikConfig) -> None:
        self.config, self.rubik = config, rubik
        if any(edge % count for edge, count in zip(config.size, rubik.grid, strict=True)):
            raise UserError(
                f"rubik.grid={rubik.grid}: must divide pretext.size={config.size}; pass e.g. --rubik.grid 2 2 2"
            )

    def sample(self, batch_BDHW: Tensor, keys: Keys) -> Views:
        """Wholes, int16 HU (B, D, H, W) -> puzzle and whole, (B, 1, d, h, w) in [0, 1]."""
        whole, grid = resized_whole(batch_BDHW, self.config), self.rubik.grid
        cubes = split(whole, grid)
        count = cubes.shape[1]
        order = geometry.uniforms(keys, ORDER, count).argsort(stable=True, dim=1)
        turns = (geometry.uniforms(keys, TURNS, 2 * count) < 0.5).view(-1, count, 2)
        moved = cubes.gather(1, order.view(-1, count, 1, 1, 1).expand_as(cubes))
        return Views(join(turn(moved, turns), grid), whole, beside=(whole,) if self.rubik.adversary else ())

    def build(self, encoder: Encoder) -> Network:
        """Encoder, decoder (skips off unless asked), sigmoid; the critic beside them, unless its weight is 0."""
        check_size(self.config.size, encoder)
        decoder = build_decoder(encoder, self.config.skips)
        if not self.rubik.adversary:
            return EncoderDecoder(encoder, decoder)
        return Contested(encoder, decoder, Critic(self.rubik.critic_width))

    def loss(self, output: Output, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error, and the critic's loss where the network gave its scores; in float32."""
        volume, *scores = output if isinstance(output, tuple) else (output,)
        error = torch.nn.functional.mse_loss(volume.float(), views.target.float())
        if not scores:
            return error, {}
        critic = verdicts(*scores)
        fooled = (scores[1] > 0).float().mean()
        return error + self.rubik.adversary * critic, {
            "mse": error.detach(),
            "critic": critic.detach(),
            "fooled": fooled,
        }

    def panels(self, views: Views) -> dict[str, Tensor]:
        """Puzzle and whole."""
        return {"puzzle": views.input, "whole": views.target}


class Contested(EncoderDecoder):
    """Restores; in training, given the real volumes, it also says what its critic makes of both."""

    def __init__(self, encoder: Encoder, decoder: nn.Module, critic: Critic) -> None:
        super().__init__(encoder, decoder)
        self.critic = critic

    def forward(self, x: Tensor, real: Tensor | None = None) -> Output:  # type: ignore[override]
        """(B, 1, d, h, w) -> volume alike in [0, 1]; with `real`, in training, scores (B,) of it and of the volume."""
        volume = super().forward(x)
        if real is None or not self.training:
            return volume
        return volume, self.critic(real), self.critic(reverse(volume))
