"""From pooled features to an embedding of unit length."""

from torch import Tensor, nn

from p2w.pretext.contrast.losses import full_precision, unit
from p2w.pretext_config import ContrastConfig


class Head(nn.Module):
    """Linear, ReLU, linear, then unit length: (…, encoder's channels) -> (…, `channels`). hidden = 0: unit length alone.

    No batch norm: whose statistics, a rank's own, would tell parts of one batch apart, and differ with the number of ranks.
    """

    def __init__(self, channels: int, config: ContrastConfig) -> None:
        super().__init__()
        self.channels, self.layers = channels, nn.Sequential()
        if config.hidden:
            self.channels = config.dim
            self.layers.extend(
                [nn.Linear(channels, config.hidden), nn.ReLU(), nn.Linear(config.hidden, config.dim)]
            )

    def forward(self, features: Tensor) -> Tensor:
        """In float32, whatever the precision of the encoder."""
        with full_precision(features):
            return unit(self.layers(features.float()))
