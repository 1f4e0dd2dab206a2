"""Parts2Whole: reconstruct the whole from one of its parts (paper, section 2); and the autoencoder, its trivial case.

Input: a random part, resized. Target: the whole it was cut from, resized to the same size. Loss: mean squared error.
Beyond the paper, and off by default: `intensity.strength` changes the part's intensities and not the whole's; with
`position.weight` the network also predicts where the part lies and how large it is.

The autoencoder's input and target are both the whole: it is Parts2Whole at `--pretext.volume-fraction 1 1`, and the control
of the paper's idea, with the same network, loss and data, and nothing to complete.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from p2w import geometry
from p2w.errors import UserError
from p2w.model.decoder import EncoderDecoder, build_decoder
from p2w.model.encoder import Encoder, Network, Output
from p2w.pretext.protocol import Pretext, Views, check_size
from p2w.pretext.settings import Bounds, PretextConfig, Shows
from p2w.pretext.volume_ops import IntensityConfig, intensity_transform
from p2w.rng import SampleKeys


@dataclass(frozen=True)
class PositionConfig:
    """Where a part lies and how large it is, as an extra target of parts2whole: beyond the paper."""

    weight: Annotated[float, Bounds(0, 1000)] = 0.0
    """Weight of the mean squared error of centre and log edges beside that of the voxels; 0: they are not predicted [?]."""


def part_locations(boxes: Tensor, shape_dhw: Sequence[int], real: Tensor | None = None) -> Tensor:
    """Boxes (B, 6), voxels, of wholes of `shape_dhw` -> (B, 6): centres z, y, x from -1 to 1 (0: the middle of the whole),
    and natural logarithms of the edges as shares of the whole's. `real` (B, 3) is the size of wholes filled up with air."""
    low, high = boxes[:, :3], boxes[:, 3:]
    edges: Sequence[float | Tensor] = shape_dhw if real is None else real.unbind(1)
    columns = [(low[:, k] + high[:, k]) / edge - 1 for k, edge in enumerate(edges)]
    columns += [((high[:, k] - low[:, k]) / edge).log() for k, edge in enumerate(edges)]
    return torch.stack(columns, 1)


class PartLocation(EncoderDecoder):
    """Encoder and decoder, and a linear head on the pooled bottleneck that predicts the part's location."""

    def __init__(self, encoder: Encoder, decoder: nn.Module) -> None:
        super().__init__(encoder, decoder)
        # The name that it had in checkpoints of earlier versions
        self.place = nn.Linear(encoder.channels[-1], 6)

    def forward(self, x: Tensor, locations: Tensor | None = None) -> Output:  # type: ignore[override]
        """(B, 1, d, h, w) -> volume of that size in [0, 1]; in training, given `locations` (B, 6), also the error of the
        predicted ones, (B, 6) float32. Validation compares volumes alone, whether locations are trained or not."""
        features = self.encoder(x)
        volume = torch.sigmoid(self.decoder(features).float())
        if locations is None or not self.training:
            return volume
        return volume, self.place(features[-1].float().mean((2, 3, 4))).float() - locations


class Parts2Whole(Pretext):
    """One part of each whole a step; the part's box is a function of (seed, epoch, id) alone."""

    summary = "a part -> its whole"
    groups: ClassVar = {"intensity": IntensityConfig, "position": PositionConfig}
    reconstructs = True
    capturable = True
    shows: Shows = "part"

    def __init__(
        self,
        config: PretextConfig,
        intensity: IntensityConfig | None = None,
        position: PositionConfig | None = None,
    ) -> None:
        self.config, self.intensity = config, intensity or IntensityConfig()
        self.location_weight = position.weight if position else 0.0

    def sample(self, batch_BDHW: Tensor, keys: SampleKeys, step: int = 0) -> Views:
        """Wholes, int16 HU (B, D, H, W) -> part and whole, (B, 1, d, h, w) in [0, 1]; with `position.weight` also the part's
        location (B, 6), as an extra input."""
        config = self.config
        shape = (batch_BDHW.shape[1], batch_BDHW.shape[2], batch_BDHW.shape[3])
        boxes = geometry.sample_boxes(keys, 0, shape, config.volume_fraction, config.max_aspect)
        part, whole = geometry.part_and_whole(
            batch_BDHW, boxes, config.size, window_hu=config.window_hu, antialias=config.antialias,
            real=keys.real,
        )  # fmt: skip
        locations = (part_locations(boxes, shape, keys.real),) if self.location_weight else ()
        return Views(intensity_transform(part, keys, 0, self.intensity), whole, extra_inputs=locations)

    def build(self, encoder: Encoder) -> Network:
        """Encoder, decoder (skips off unless asked), sigmoid; with `position.weight` also a head for the location."""
        check_size(self.config.size, encoder)
        kind = PartLocation if self.location_weight else EncoderDecoder
        return kind(encoder, build_decoder(encoder, self.config.skips))

    def loss(self, output: Output, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error between output and whole, in float32 (paper: Euclidean distance); plus the weighted
        mean squared error of the location, where it is trained."""
        volume, *location_errors = output if isinstance(output, tuple) else (output,)
        error = torch.nn.functional.mse_loss(volume.float(), views.target.float())
        if not location_errors:
            return error, {}
        location_error = location_errors[0].square().mean()
        loss = error + self.location_weight * location_error
        return loss, {"mse": error.detach(), "location": location_error.detach()}

    def image_columns(self, views: Views) -> dict[str, Tensor]:
        """Part and whole."""
        return {"part": views.input, "whole": views.target}


class Autoencoder(Parts2Whole):
    """The part is the whole, whatever `pretext.volume_fraction` says; with `intensity.strength` it restores intensities."""

    summary = "the whole -> the whole"
    shows: Shows = "whole"

    def __init__(self, config: PretextConfig, intensity: IntensityConfig, position: PositionConfig) -> None:
        if position.weight:
            raise UserError(
                f"position.weight={position.weight}: pretext.name=autoencoder shows no part, so there is no "
                "location to predict; pass --position.weight 0"
            )
        super().__init__(replace(config, volume_fraction=(1.0, 1.0)), intensity)

    def image_columns(self, views: Views) -> dict[str, Tensor]:
        """The changed whole and the whole."""
        return {"input": views.input, "whole": views.target}
