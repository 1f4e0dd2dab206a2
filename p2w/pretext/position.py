"""Where in its whole a part lies, and how large it is, as something to answer beside the whole (`position.weight`)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from p2w.model.decoder import EncoderDecoder
from p2w.model.protocol import Encoder, Output


def places(boxes: Tensor, shape_dhw: Sequence[int]) -> Tensor:
    """Boxes (B, 6), voxels, of wholes of `shape_dhw` -> (B, 6): centres z, y, x from -1 to 1 (0: the middle of the whole),
    and natural logarithms of the edges as shares of the whole's."""
    low, high = boxes[:, :3], boxes[:, 3:]
    columns = [(low[:, k] + high[:, k]) / edge - 1 for k, edge in enumerate(shape_dhw)]
    columns += [((high[:, k] - low[:, k]) / edge).log() for k, edge in enumerate(shape_dhw)]
    return torch.stack(columns, 1)


class Placing(EncoderDecoder):
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
