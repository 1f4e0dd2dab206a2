"""Self-distillation: a momentum teacher assigns parts to learned vectors, and the network predicts how (DINO)."""

import torch
from torch import Tensor, nn

from p2w.model.encoder import Encoder
from p2w.pretext.contrastive.losses import (
    ContrastOutcome,
    average_over_ranks,
    full_precision,
    l2_normalise,
)
from p2w.pretext.contrastive.objectives import (
    ContrastConfig,
    MomentumTeacher,
    OtherViews,
    ProjectionHead,
)


class SelfDistillation(MomentumTeacher):
    """DINO (Caron et al. 2021): cross-entropy between the assignments of the teacher and of the network, softmaxes over
    `contrast.prototypes` cosines.

    The teacher sees the two parts of a whole; the network sees these and `contrast.small_parts` further ones, and predicts
    from each what the teacher assigns each other of the two. The teacher's assignments are sharpened by a temperature of
    its own, and a moving mean of its cosines, over the batches of all ranks, is taken off before: without the first all
    assignments would become even, without the second all of them one vector. The accuracy is the share of wholes whose two
    parts the teacher assigns to the same vector. Validation compares the wholes of a batch, as SimCLR does, so that losses
    of steps compare.

    What differs from the paper: the learned vectors do train in the first epoch, the teacher's temperature stays, and the
    head has two layers, as in the rest of the family, with many fewer outputs.
    """

    @classmethod
    def views(cls, config: ContrastConfig) -> OtherViews:
        """Small parts, where there are any."""
        return "small parts" if config.small_parts else None

    def __init__(self, config: ContrastConfig, encoder: Encoder, head: ProjectionHead) -> None:
        super().__init__(config, encoder, head)
        self.prototypes = nn.Parameter(torch.randn(config.prototypes, head.channels) / head.channels**0.5)
        self.slow_prototypes = nn.Parameter(self.prototypes.detach().clone(), requires_grad=False)
        self.centre: Tensor
        self.register_buffer("centre", torch.zeros(config.prototypes))

    def forward(
        self, encoder: Encoder, head: ProjectionHead, part: Tensor, other: Tensor, ids: Tensor,
        more: Tensor | None = None,
    ) -> ContrastOutcome:  # fmt: skip
        """A pass of the network over both parts, one over small ones, and one of the teacher over both."""
        both = torch.cat((part, other))
        with torch.no_grad():
            taught = self.slow_head(self.slow_encoder.pooled(both))
            with full_precision(taught):
                cosines = taught @ l2_normalise(self.slow_prototypes).T
            codes = ((cosines - self.centre) / self.config.teacher_temperature).softmax(1).chunk(2)
        vectors = head(encoder.pooled(both))
        with full_precision(vectors):
            prototypes = l2_normalise(self.prototypes)
            logs = (vectors @ prototypes.T / self.temperature).log_softmax(1).chunk(2)
        told = codes[0] * logs[1] + codes[1] * logs[0]
        if more is not None:
            small = head(encoder.pooled(more.flatten(0, 1)[:, None])).unflatten(0, more.shape[:2])
            with full_precision(small):
                seen = (small @ prototypes.T / self.temperature).log_softmax(2).sum(1)
            told = (told + (codes[0] + codes[1]) * seen) / (1 + more.shape[1])
        self._follow(cosines)
        one, two = vectors.detach().chunk(2)
        return -told.sum(1) / 2, (one * two).sum(1), (codes[0].argmax(1) == codes[1].argmax(1)).float()

    @torch.no_grad()
    def _follow(self, cosines: Tensor) -> None:
        """Move the centre towards the mean over the parts (2 B, P) of all ranks."""
        mean = cosines.mean(0)
        average_over_ranks([mean])
        self.centre.lerp_(mean, 1 - self.config.centre_momentum)

    def copied(self, encoder: Encoder, head: ProjectionHead) -> tuple[list[Tensor], list[Tensor]]:
        """The learned vectors follow too."""
        slow, fast = super().copied(encoder, head)
        return [*slow, self.slow_prototypes], [*fast, self.prototypes]
