"""Instead of negatives, prototypes."""

import torch
from torch import Tensor, nn

from p2w.model.protocol import Encoder
from p2w.pretext.contrast.head import Head
from p2w.pretext.contrast.losses import Answer, full_precision, sinkhorn, strangers, unit
from p2w.pretext.contrast.negatives import Negatives
from p2w.pretext.contrast.ranks import gather
from p2w.pretext_config import ContrastConfig


class Prototypes(Negatives):
    """SwAV (Caron et al. 2020): each part foretells to which of `contrast.prototypes` learned vectors the other is assigned.

    Assignments fill all prototypes alike over the batch of all ranks, so that it does not help to be all the same. `told`
    is the share of wholes whose two parts are assigned to the same one.
    """

    def __init__(self, config: ContrastConfig, encoder: Encoder, head: Head, passes: int) -> None:
        super().__init__(config, encoder, head, passes)
        self.prototypes = nn.Parameter(torch.randn(config.prototypes, head.channels) / head.channels**0.5)

    def forward(self, encoder: Encoder, head: Head, part: Tensor, other: Tensor, ids: Tensor) -> Answer:
        """One pass of the encoder over both parts; the loss is the mean of both cross-entropies."""
        vectors = head(encoder.pooled(torch.cat((part, other))))
        with full_precision(vectors):
            scores = (vectors @ unit(self.prototypes).T).chunk(2)
        codes = self._assign(scores, ids)
        logs = [(score / self.config.temperature).log_softmax(1) for score in scores]
        losses = -(codes[0] * logs[1] + codes[1] * logs[0]).sum(1) / 2
        one, two = vectors.detach().chunk(2)
        return losses, (one * two).sum(1), (codes[0].argmax(1) == codes[1].argmax(1)).float()

    def _assign(self, scores: tuple[Tensor, ...], ids: Tensor) -> list[Tensor]:
        """Codes (B, P) of this rank's wholes for each of the parts, from the scores of all ranks."""
        everyone, all_ids = gather(torch.cat(scores, 1)), gather(ids)
        nobody = torch.full_like(all_ids[:1], -1)
        counts = strangers(nobody, all_ids)[0]
        mine = (
            (all_ids[None, :] == ids[:, None]).int().argmax(1)
        )  # a whole that stands there twice: where first
        settings = self.config.sinkhorn_iterations, self.config.sinkhorn_epsilon
        return [sinkhorn(part, counts, *settings)[mine] for part in everyone.chunk(2, 1)]
