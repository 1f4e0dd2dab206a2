"""What a target task puts behind an encoder: networks of [0, 1] volumes that answer with logits.

Shapes: B, C, D, H, W = batch, channel, slice, row, column.
"""

from torch import Tensor, nn

from p2w.model.feeding import feed
from p2w.model.protocol import Encoder, Network

HIDDEN = 1024  # units between pooled features and the answer (FACTS 4, Models Genesis' protocol)


class Classifier(Network):
    """Encoder, global average pool of its coarsest features, 1024 units with ReLU, one logit."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        encoder.only_pooled()
        self.head = nn.Sequential(
            nn.Linear(encoder.channels[-1], HIDDEN), nn.ReLU(inplace=True), nn.Linear(HIDDEN, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) in [0, 1] -> logits (B,), float32 whatever the AMP dtype."""
        features = self.encoder.pooled(feed(x, self.encoder.feeding, self.encoder.in_channels))
        return self.head(features).float()[:, 0]


class Segmenter(Network):
    """Encoder and decoder, one logit a voxel."""

    def __init__(self, encoder: Encoder, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) in [0, 1] -> logits (B, 1, D, H, W), float32 whatever the AMP dtype."""
        return self.decoder(self.encoder(feed(x, self.encoder.feeding, self.encoder.in_channels))).float()
