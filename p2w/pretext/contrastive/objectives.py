"""Contrastive objectives: against the batch, a queue, local features, or prototypes."""

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from p2w.model.encoder import Encoder
from p2w.pretext.contrastive.losses import (
    ContrastOutcome,
    all_gather,
    all_gather_with_gradient,
    average_outcomes,
    full_precision,
    info_nce,
    l2_normalise,
    local_global,
    negative_mask,
    sinkhorn,
)
from p2w.pretext.settings import Bounds


@dataclass(frozen=True)
class ContrastConfig:
    """Settings of the contrastive pretexts and of parts2whole_contrast; each setting names those that use it."""

    temperature: Annotated[float, Bounds(1e-3, 1e3)] = 0.7
    """Divides cosines [P: of its contrastive loss]."""
    hidden: Annotated[int, Bounds(0, 65536)] = 256
    """Width of the hidden layer between pooled features and embedding [?]; 0: the features are the embedding."""
    dim: Annotated[int, Bounds(1, 65536)] = 128
    """Channels of the embedding [?]."""
    weight: Annotated[float, Bounds(0, 1e6)] = 0.01
    """parts2whole_contrast: of InfoNCE beside mean squared error [?]."""
    both: bool = True
    """parts2whole_contrast: reconstruct the whole from both parts, not from the first alone [?]."""
    queue: Annotated[int, Bounds(1, 10**7)] = 4096
    """moco: parts remembered [?]."""
    momentum: Annotated[float, Bounds(0, 1)] = 0.99
    """moco: share of itself that the momentum encoder keeps at a step [?]; MoCo's 0.999 is for runs of 100,000 steps."""
    bank: Annotated[int, Bounds(2, 10**8)] = 32768
    """instdisc, pirl, exemplar: entries for wholes [?]; with fewer than the set has sub-scans, some share one."""
    bank_momentum: Annotated[float, Bounds(0, 1)] = 0.5
    """instdisc, pirl: share of itself that an entry keeps when its whole comes again [?]."""
    prototypes: Annotated[int, Bounds(2, 10**6)] = 128
    """swav: prototypes [?]."""
    sinkhorn_iterations: Annotated[int, Bounds(1, 1000)] = 3
    """swav: how often assignments are balanced [?]."""
    sinkhorn_epsilon: Annotated[float, Bounds(1e-3, 1e3)] = 0.05
    """swav: how soft assignments are; smaller is harder [?]."""


class ProjectionHead(nn.Module):
    """Linear, ReLU, linear, then unit length: (…, encoder's channels) -> (…, `channels`). hidden = 0: unit length alone.

    No batch norm: its statistics, which are a rank's own, would leak which parts are of one batch, and differ with the
    number of ranks.
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
            return l2_normalise(self.layers(features.float()))


class ContrastiveObjective(nn.Module):
    """What each whole is compared with. Called on all ranks, with two parts (B, 1, d, h, w) of each own whole, and ids (B,).

    `remembers`: it keeps embeddings of training wholes from earlier steps, so validation takes the objective of its own
    batch instead. `mirrors`: its second parts are mirrored at random.
    """

    remembers = mirrors = False

    def __init__(self, config: ContrastConfig, encoder: Encoder, head: ProjectionHead) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, encoder: Encoder, head: ProjectionHead, part: Tensor, other: Tensor, ids: Tensor
    ) -> ContrastOutcome:
        """Loss, cosine of the positive pair, and whether it is nearer than all negatives, (B,) each."""
        raise NotImplementedError


def in_batch_loss(one: Tensor, two: Tensor, ids: Tensor, temperature: float) -> ContrastOutcome:
    """Embeddings (B, C) of two parts of each whole, against each other and both parts of all other wholes of all ranks."""
    everyone = all_gather_with_gradient(torch.cat((one, two), 1))
    others = torch.cat(everyone.chunk(2, 1))
    allowed = negative_mask(ids, all_gather(ids)).repeat(1, 2)
    return average_outcomes(
        info_nce(one, two, others, allowed, temperature), info_nce(two, one, others, allowed, temperature)
    )


class InBatch(ContrastiveObjective):
    """SimCLR: negatives are the other wholes of the pass, of all ranks, with gradients."""

    def forward(
        self, encoder: Encoder, head: ProjectionHead, part: Tensor, other: Tensor, ids: Tensor
    ) -> ContrastOutcome:
        """One pass of the encoder over both parts; each part is the anchor once."""
        one, two = head(encoder.pooled(torch.cat((part, other)))).chunk(2)
        return in_batch_loss(one, two, ids, self.config.temperature)


class MocoQueue(ContrastiveObjective):
    """MoCo: the last `contrast.queue` parts as a copy of encoder and head saw them, a moving average that `update` advances.

    The queue begins as random directions of no whole. It is the same on all ranks: after each pass, what all of them
    have embedded goes in.
    """

    remembers = True

    def __init__(self, config: ContrastConfig, encoder: Encoder, head: ProjectionHead) -> None:
        super().__init__(config, encoder, head)
        self.slow_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.slow_head = copy.deepcopy(head).requires_grad_(False)
        self.queue: Tensor
        self.ids: Tensor
        self.next: Tensor
        self.updates: Tensor
        self.register_buffer("queue", l2_normalise(torch.randn(config.queue, head.channels)))
        self.register_buffer("ids", torch.full((config.queue,), -1))
        self.register_buffer("next", torch.zeros((), dtype=torch.int64))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(
        self, encoder: Encoder, head: ProjectionHead, part: Tensor, other: Tensor, ids: Tensor
    ) -> ContrastOutcome:
        """The first part through the encoder, the second through its copy; the latter's embeddings go into the queue."""
        anchor = head(encoder.pooled(part))
        with torch.no_grad():
            positive = self.slow_head(self.slow_encoder.pooled(other))
        allowed = ids[:, None] != self.ids[None, :]
        answer = info_nce(anchor, positive, self.queue.clone(), allowed, self.config.temperature)
        self._put(all_gather(positive), all_gather(ids))
        return answer

    @torch.no_grad()
    def update(self, encoder: Encoder, head: ProjectionHead) -> None:
        """After a step: move the copy towards encoder and head by 1 - `contrast.momentum`."""
        slow: list[Tensor] = [*self.slow_encoder.parameters(), *self.slow_head.parameters()]
        torch._foreach_lerp_(slow, [*encoder.parameters(), *head.parameters()], 1 - self.config.momentum)
        self.updates.add_(1)

    @torch.no_grad()
    def _put(self, vectors: Tensor, ids: Tensor) -> None:
        """Overwrite the oldest entries."""
        slots = (self.next + torch.arange(len(ids), device=ids.device)) % len(self.queue)
        self.queue.index_copy_(0, slots, vectors)
        self.ids.index_copy_(0, slots, ids)
        self.next.add_(len(ids)).remainder_(len(self.queue))


class LocalGlobal(ContrastiveObjective):
    """AMDIM (Bachman et al. 2019): one part as a whole against every cell of the other's coarsest features, and the reverse.

    Negatives are the cells of all other wholes of all ranks, with gradients. The accuracy is the share of cells that are
    nearer than all negatives.
    """

    def __init__(self, config: ContrastConfig, encoder: Encoder, head: ProjectionHead) -> None:
        super().__init__(config, encoder, head)
        self.cell_head = ProjectionHead(encoder.channels[-1], config)

    def forward(
        self, encoder: Encoder, head: ProjectionHead, part: Tensor, other: Tensor, ids: Tensor
    ) -> ContrastOutcome:
        """One pass of the encoder over both parts."""
        features = encoder(torch.cat((part, other)))[-1].float().flatten(2)
        one, two = head(features.mean(2)).chunk(2)
        cells = torch.stack(self.cell_head(features.transpose(1, 2)).chunk(2), 1)
        everyone, allowed = all_gather_with_gradient(cells), negative_mask(ids, all_gather(ids))
        temperature = self.config.temperature
        return average_outcomes(
            local_global(one, cells[:, 1], everyone[:, 1], allowed, temperature),
            local_global(two, cells[:, 0], everyone[:, 0], allowed, temperature),
        )


class Prototypes(ContrastiveObjective):
    """SwAV (Caron et al. 2020): each part predicts to which of `contrast.prototypes` learned vectors the other is assigned.

    Assignments fill all prototypes alike over the batch of all ranks, so that equal embeddings of all wholes are no
    solution. The accuracy is the share of wholes whose two parts are assigned to the same one.
    """

    def __init__(self, config: ContrastConfig, encoder: Encoder, head: ProjectionHead) -> None:
        super().__init__(config, encoder, head)
        self.prototypes = nn.Parameter(torch.randn(config.prototypes, head.channels) / head.channels**0.5)

    def forward(
        self, encoder: Encoder, head: ProjectionHead, part: Tensor, other: Tensor, ids: Tensor
    ) -> ContrastOutcome:
        """One pass of the encoder over both parts; the loss is the mean of both cross-entropies."""
        vectors = head(encoder.pooled(torch.cat((part, other))))
        with full_precision(vectors):
            scores = (vectors @ l2_normalise(self.prototypes).T).chunk(2)
        codes = self._assign(scores, ids)
        logs = [(score / self.config.temperature).log_softmax(1) for score in scores]
        losses = -(codes[0] * logs[1] + codes[1] * logs[0]).sum(1) / 2
        one, two = vectors.detach().chunk(2)
        return losses, (one * two).sum(1), (codes[0].argmax(1) == codes[1].argmax(1)).float()

    def _assign(self, scores: tuple[Tensor, ...], ids: Tensor) -> list[Tensor]:
        """Codes (B, P) of this rank's wholes for each of the parts, from the scores of all ranks."""
        everyone, all_ids = all_gather(torch.cat(scores, 1)), all_gather(ids)
        nobody = torch.full_like(all_ids[:1], -1)
        counts = negative_mask(nobody, all_ids)[0]
        mine = (all_ids[None, :] == ids[:, None]).int().argmax(1)  # a whole that comes twice: its first index
        settings = self.config.sinkhorn_iterations, self.config.sinkhorn_epsilon
        return [sinkhorn(part, counts, *settings)[mine] for part in everyone.chunk(2, 1)]
