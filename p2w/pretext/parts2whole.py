"""Parts2Whole: reconstruct the whole from one of its parts (paper, section 2).

Input: a random part, resized. Target: the whole it was cut from, resized to the same size. Loss: mean squared error.
Beyond the paper, and off by default: `intensity.strength` changes the part's intensities and not the whole's; with
`position.weight` the network also says where the part lies and how large it is.
"""

import torch
from torch import Tensor

from p2w import geometry
from p2w.config import PretextConfig
from p2w.geometry import Keys
from p2w.model.decoder import EncoderDecoder, build_decoder
from p2w.model.protocol import Encoder, Network, Output
from p2w.pretext.intensity import transform
from p2w.pretext.position import Placing, places
from p2w.pretext.protocol import Views, check_size
from p2w.pretext_config import IntensityConfig, PositionConfig


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

    def sample(self, batch_BDHW: Tensor, keys: Keys) -> Views:
        """Wholes, int16 HU (B, D, H, W) -> part and whole, (B, 1, d, h, w) in [0, 1]; beside them the part's place (B, 6),
        where it is asked for."""
        config = self.config
        shape = (batch_BDHW.shape[1], batch_BDHW.shape[2], batch_BDHW.shape[3])
        boxes = geometry.sample_boxes(keys, 0, shape, config.volume_fraction, config.aspect_range)
        part, whole = geometry.part_and_whole(
            batch_BDHW, boxes, config.size, window_hu=config.window_hu, antialias=config.antialias
        )
        beside = (places(boxes, shape),) if self.place_weight else ()
        return Views(transform(part, keys, 0, self.intensity), whole, beside=beside)

    def build(self, encoder: Encoder) -> Network:
        """Encoder, decoder (skips off unless asked), sigmoid; a head for the place, where it is asked for."""
        check_size(self.config.size, encoder)
        kind = Placing if self.place_weight else EncoderDecoder
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

    def panels(self, views: Views) -> dict[str, Tensor]:
        """Part and whole."""
        return {"part": views.input, "whole": views.target}
