"""Parts2Whole: reconstruct the whole from one of its parts (paper, section 2).

Input: a random part, resized. Target: the whole it was cut from, resized to the same size. Loss: mean squared error.
"""

import torch
from torch import Tensor

from p2w import geometry
from p2w.config import PretextConfig
from p2w.errors import UserError
from p2w.geometry import Keys
from p2w.model.protocol import Encoder, Network
from p2w.model.unet3d import EncoderDecoder, UNet3dDecoder
from p2w.pretext.protocol import Views


class Parts2Whole:
    """One part a whole and step; the part's box is a function of (seed, epoch, id) alone."""

    def __init__(self, config: PretextConfig) -> None:
        if any(edge < 8 or edge % 8 for edge in config.size):
            raise UserError(
                f"pretext.size={config.size}: each edge must be a multiple of 8, the encoder's stride"
            )
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
        decoder = UNet3dDecoder(encoder.channels, encoder.strides, self.config.skips)
        return EncoderDecoder(encoder, decoder)

    def loss(self, output: Tensor, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error between output and whole, in float32 (paper: Euclidean distance)."""
        return torch.nn.functional.mse_loss(output.float(), views.target.float()), {}
