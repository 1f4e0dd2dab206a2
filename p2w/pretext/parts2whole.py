"""Parts2Whole: reconstruct the whole from one of its parts (paper, section 2).

Input: a random part, resized. Target: the whole it was cut from, resized to the same size. Loss: mean squared error.
"""

from typing import cast

import torch
from torch import Tensor

from p2w import geometry
from p2w.config import PretextConfig
from p2w.geometry import Keys
from p2w.model.decoder import EncoderDecoder, build_decoder
from p2w.model.protocol import Encoder, Network, Output
from p2w.pretext.protocol import Views, check_size


class Parts2Whole:
    """One part a whole and step; the part's box is a function of (seed, epoch, id) alone."""

    reconstructs = True

    def __init__(self, config: PretextConfig) -> None:
        self.config = config

    def sample(self, batch_BDHW: Tensor, keys: Keys) -> Views:
        """Wholes, int16 HU (B, D, H, W) -> part and whole, (B, 1, d, h, w) in [0, 1]."""
        config = self.config
        shape = (batch_BDHW.shape[1], batch_BDHW.shape[2], batch_BDHW.shape[3])
        boxes = geometry.sample_boxes(keys, 0, shape, config.volume_fraction, config.aspect_range)
        part, whole = geometry.part_and_whole(
            batch_BDHW, boxes, config.size, window_hu=config.window_hu, antialias=config.antialias
        )
        return Views(part, whole)

    def build(self, encoder: Encoder) -> Network:
        """Encoder, decoder (skips off unless asked), sigmoid."""
        check_size(self.config.size, encoder)
        return EncoderDecoder(encoder, build_decoder(encoder, self.config.skips))

    def loss(self, output: Output, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error between output and whole, in float32 (paper: Euclidean distance)."""
        return torch.nn.functional.mse_loss(cast(Tensor, output).float(), views.target.float()), {}

    def panels(self, views: Views) -> dict[str, Tensor]:
        """Part and whole."""
        return {"part": views.input, "whole": views.target}
