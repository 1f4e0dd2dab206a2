"""What a pretext is. Shapes: B, C, D, H, W = batch, channel, slice, row, column; all axes z, y, x."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from p2w.geometry import Keys
from p2w.model.protocol import Encoder, Network


@dataclass(frozen=True)
class Views:
    """What one batch of wholes became: `input` to the network, `target` of the loss, both (B, C, d, h, w) in [0, 1]."""

    input: Tensor
    target: Tensor
    mask: Tensor | None = None


class Pretext(Protocol):
    """A proxy task. All randomness comes from the keys, so a batch can be replayed."""

    def sample(self, batch_BDHW: Tensor, keys: Keys) -> Views:
        """Wholes, int16 HU on the device -> views on the same device."""

    def build(self, encoder: Encoder) -> Network:
        """Put the decoder or head of this task behind the encoder."""

    def loss(self, output: Tensor, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise (mean over this rank's batch) and further scalars worth logging."""
