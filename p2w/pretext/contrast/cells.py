"""Local features against global ones."""

import torch
from torch import Tensor

from p2w.model.protocol import Encoder
from p2w.pretext.contrast.head import Head
from p2w.pretext.contrast.losses import Answer, both, local_global, strangers
from p2w.pretext.contrast.negatives import Negatives
from p2w.pretext.contrast.ranks import gather, gather_with_gradient
from p2w.pretext_config import ContrastConfig


class Cells(Negatives):
    """AMDIM (Bachman et al. 2019): one part as a whole against every cell of the other's coarsest features, and the reverse.

    Negatives are the cells of all other wholes of all ranks, with gradients. `told` is the share of cells that are nearer
    than all negatives.
    """

    def __init__(self, config: ContrastConfig, encoder: Encoder, head: Head, passes: int) -> None:
        super().__init__(config, encoder, head, passes)
        self.cell_head = Head(encoder.channels[-1], config)

    def forward(self, encoder: Encoder, head: Head, part: Tensor, other: Tensor, ids: Tensor) -> Answer:
        """One pass of the encoder over both parts."""
        features = encoder(torch.cat((part, other)))[-1].float().flatten(2)
        one, two = head(features.mean(2)).chunk(2)
        cells = torch.stack(self.cell_head(features.transpose(1, 2)).chunk(2), 1)
        everyone, allowed = gather_with_gradient(cells), strangers(ids, gather(ids))
        temperature = self.config.temperature
        return both(
            local_global(one, cells[:, 1], everyone[:, 1], allowed, temperature),
            local_global(two, cells[:, 0], everyone[:, 0], allowed, temperature),
        )
