"""Parts2Whole: reconstruct the whole from one of its parts (paper, section 2); and the autoencoder, its trivial case.

Input: a random part, resized. Target: the whole it was cut from, resized to the same size. Loss: mean squared error.
Beyond the paper, and off by default: `intensity.strength` changes the part's intensities and not the whole's; with
`position.weight` the network also says where the part lies and how large it is.

Where the part lies in its whole, and how large it is, can be an answer beside the whole (`position.weight`).

Autoencoder: the whole in, the whole out; what Parts2Whole is at `--pretext.volume-fraction 1 1`.

The control of the paper's idea: the same network, loss and data, nothing to complete.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from p2w import geometry
from p2w.config import PretextConfig
from p2w.errors import UserError
from p2w.model.decoder import EncoderDecoder, build_decoder
from p2w.model.encoder import Encoder, Network, Output
from p2w.pretext.protocol import Views, check_size
from p2w.pretext.volume_ops import intensity_transform
from p2w.pretext_config import IntensityConfig, PositionConfig
from p2w.rng import SampleKeys


def part_locations(boxes: Tensor, shape_dhw: Sequence[int]) -> Tensor:
    """Boxes (B, 6), voxels, of wholes of `shape_dhw` -> (B, 6): centres z, y, x from -1 to 1 (0: the middle of the whole),
    and natural logarithms of the edges as shares of the whole's."""
    low, high = boxes[:, :3], boxes[:, 3:]
    columns = [(low[:, k] + high[:, k]) / edge - 1 for k, edge in enumerate(shape_dhw)]
    columns += [((high[:, k] - low[:, k]) / edge).log() for k, edge in enumerate(shape_dhw)]
    return torch.stack(columns, 1)


class PartLocation(EncoderDecoder):
    """Encoder and decoder, and a linear head on the pooled bottleneck that guesses the place."""

    def __init__(self, encoder: Encoder, decoder: nn.Module) -> None:
        super().__init__(encoder, decoder)
        self.place = nn.Linear(encoder.channels[-1], 6)

    def forward(self, x: Tensor, places: Tensor | None = None) -> Output:  # type: ignore[override]
        """(B, 1, d, h, w) -> volume of that size in [0, 1]; in training, where `places` (B, 6) are asked for, also by how
        much the guess of each misses them, (B, 6) float32. Validation so compares wholes alone, with place or without."""
        features = self.encoder(x)
        volume = torch.sigmoid(self.decoder(features).float())
        if places is None or not self.training:
            return volume
        return volume, self.place(features[-1].float().mean((2, 3, 4))).float() - places


class Parts2Whole:
    """One part a whole and step; the part's box is a function of (seed, epoch, id) alone."""

    reconstructs = True
    capturable = True

    def __init__(
        self,
        config: PretextConfig,
        intensity: IntensityConfig | None = None,
        position: PositionConfig | None = None,
    ) -> None:
        self.config, self.intensity = config, intensity or IntensityConfig()
        self.place_weight = position.weight if position else 0.0

    def sample(self, batch_BDHW: Tensor, keys: SampleKeys) -> Views:
        """Wholes, int16 HU (B, D, H, W) -> part and whole, (B, 1, d, h, w) in [0, 1]; beside them the part's place (B, 6),
        where it is asked for."""
        config = self.config
        shape = (batch_BDHW.shape[1], batch_BDHW.shape[2], batch_BDHW.shape[3])
        boxes = geometry.sample_boxes(keys, 0, shape, config.volume_fraction, config.aspect_range)
        part, whole = geometry.part_and_whole(
            batch_BDHW, boxes, config.size, window_hu=config.window_hu, antialias=config.antialias
        )
        beside = (part_locations(boxes, shape),) if self.place_weight else ()
        return Views(intensity_transform(part, keys, 0, self.intensity), whole, extra_inputs=beside)

    def build(self, encoder: Encoder) -> Network:
        """Encoder, decoder (skips off unless asked), sigmoid; a head for the place, where it is asked for."""
        check_size(self.config.size, encoder)
        kind = PartLocation if self.place_weight else EncoderDecoder
        return kind(encoder, build_decoder(encoder, self.config.skips))

    def loss(self, output: Output, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error between output and whole, in float32 (paper: Euclidean distance); plus the weighted mean
        squared miss of the place, where it is asked for."""
        volume, *misses = output if isinstance(output, tuple) else (output,)
        error = torch.nn.functional.mse_loss(volume.float(), views.target.float())
        if not misses:
            return error, {}
        miss = misses[0].square().mean()
        return error + self.place_weight * miss, {"mse": error.detach(), "place": miss.detach()}

    def image_columns(self, views: Views) -> dict[str, Tensor]:
        """Part and whole."""
        return {"part": views.input, "whole": views.target}


class Autoencoder(Parts2Whole):
    """The part is the whole, whatever `pretext.volume_fraction` says; with `intensity.strength` it restores intensities."""

    def __init__(self, config: PretextConfig, intensity: IntensityConfig, position: PositionConfig) -> None:
        if position.weight:
            raise UserError(
                f"position.weight={position.weight}: pretext.name=autoencoder shows no part whose place could be asked for; "
                "pass --position.weight 0"
            )
        super().__init__(replace(config, volume_fraction=(1.0, 1.0)), intensity)

    def image_columns(self, views: Views) -> dict[str, Tensor]:
        """What is seen and what is asked."""
        return {"input": views.input, "whole": views.target}
