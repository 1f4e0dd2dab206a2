"""Contrastive objectives: against the batch, a queue, local features, or prototypes (SwAV, and DINO by a teacher)."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from p2w.model.encoder import Encoder
from p2w.pretext.contrastive.losses import (
    ContrastOutcome,
    all_gather,
    all_gather_with_gradient,
    average_outcomes,
    average_over_ranks,
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

    temperature: Annotated[float | None, Bounds(1e-3, 1e3)] = None
    """Divides cosines; None is the method's own: simclr, swav, dino 0.1 and moco, instdisc, pirl 0.07, as published;
    exemplar 0.07, amdim, parts2whole_contrast 0.1 [?]. The paper's 0.7 is for measuring features not trained so."""
    hidden: Annotated[int, Bounds(0, 65536)] = 256
    """Width of the hidden layer between pooled features and embedding [?]; 0: the features are the embedding."""
    dim: Annotated[int, Bounds(1, 65536)] = 128
    """Channels of the embedding [?]."""
    weight: Annotated[float, Bounds(0, 1e6)] = 0.01
    """parts2whole_contrast: weight of InfoNCE beside the mean squared error [?]."""
    both: bool = True
    """parts2whole_contrast: reconstruct the whole from both parts, not from the first alone [?]."""
    queue: Annotated[int, Bounds(1, 10**7)] = 4096
    """moco: how many parts the queue holds [?]."""
    momentum: Annotated[float, Bounds(0, 1)] = 0.99
    """moco, dino: share of its weights that the momentum encoder keeps at a step [?]; MoCo's 0.999 and DINO's 0.996 are
    for runs of 100,000 steps."""
    momentum_schedule: Literal["cosine", "constant"] = "cosine"
    """moco, dino: the momentum rises to 1 at the last step as half a cosine (MoCo v3), or stays."""
    teacher_norm: Literal["running", "batch"] = "running"
    """moco, dino: batch norm of the momentum encoder by running statistics that follow the encoder's (EMAN, Cai et al.
    2021), or by its batch, which has the wholes of the encoder's batch: then statistics tell which part belongs to which."""
    bank: Annotated[int, Bounds(2, 10**8)] = 32768
    """instdisc, pirl, exemplar: entries for wholes [?]; with fewer than the set has sub-scans, some share one."""
    bank_momentum: Annotated[float, Bounds(0, 1)] = 0.5
    """instdisc, pirl: share of its value that an entry keeps when its whole comes again [?]."""
    jigsaw: bool = True
    """pirl: its other view is a jigsaw of eight cubes, as published (there nine patches), or a mirrored part."""
    prototypes: Annotated[int, Bounds(2, 10**6)] = 128
    """swav, dino: number of prototypes [?]; DINO has 65,536 outputs."""
    swav_queue: Annotated[int, Bounds(0, 10**7)] = 512
    """swav: earlier parts that are assigned beside those of a batch, where a pass has fewer wholes than there are prototypes
    [?: 3,840 for 3,000 prototypes]."""
    small_parts: Annotated[int, Bounds(0, 64)] = 6
    """swav, dino: further parts of each whole, of a quarter of the volume and at half the edges, that predict the
    assignments of the two [P of SwAV: 6]."""
    teacher_temperature: Annotated[float, Bounds(1e-3, 1e3)] = 0.04
    """dino: divides what the teacher assigns, below `temperature` [P of DINO: 0.04, which rises to 0.07 in some runs]."""
    centre_momentum: Annotated[float, Bounds(0, 1)] = 0.9
    """dino: share of itself that the mean of what the teacher assigns keeps at a step [P of DINO]."""
    sinkhorn_iterations: Annotated[int, Bounds(1, 1000)] = 3
    """swav: iterations of the Sinkhorn algorithm, which balances the assignments [?]."""
    sinkhorn_epsilon: Annotated[float, Bounds(1e-3, 1e3)] = 0.05
    """swav: how soft assignments are; smaller is harder [?]."""


OtherViews = Literal["small parts", "jigsaw"] | None


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
    """What each whole is compared with. Called on all ranks, with two parts (B, 1, d, h, w) of each own whole, ids (B,), and
    further views (B, V, d', h', w') of each whole where `views` says so.

    `remembers`: it keeps embeddings of training wholes from earlier steps, so validation takes the objective of its own
    batch instead. `takes_small_parts`: its further views are the small parts of `contrast.small_parts`.
    `own_temperature`: where `contrast.temperature` leaves it open.
    """

    remembers: ClassVar[bool] = False
    takes_small_parts: ClassVar[bool] = False
    own_temperature: ClassVar[float] = 0.1

    @classmethod
    def views(cls, config: ContrastConfig) -> OtherViews:
        """Which further views of each whole it needs beside two parts."""
        return "small parts" if cls.takes_small_parts and config.small_parts else None

    @classmethod
    def mirrors(cls, config: ContrastConfig) -> bool:
        """Whether second parts are mirrored at random."""
        return False

    def __init__(self, config: ContrastConfig, encoder: Encoder, head: ProjectionHead) -> None:
        super().__init__()
        self.config = config
        self.temperature = self.own_temperature if config.temperature is None else config.temperature

    def forward(
        self, encoder: Encoder, head: ProjectionHead, part: Tensor, other: Tensor, ids: Tensor,
        more: Tensor | None = None,
    ) -> ContrastOutcome:  # fmt: skip
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
        self, encoder: Encoder, head: ProjectionHead, part: Tensor, other: Tensor, ids: Tensor,
        more: Tensor | None = None,
    ) -> ContrastOutcome:  # fmt: skip
        """One pass of the encoder over both parts; each part is the anchor once."""
        one, two = head(encoder.pooled(torch.cat((part, other)))).chunk(2)
        return in_batch_loss(one, two, ids, self.temperature)


class MomentumTeacher(ContrastiveObjective):
    """An objective with a copy of encoder and head that follows them as a moving average, which `update` advances.

    No batch statistics reach the copy (see contrast.teacher_norm), where MoCo shuffles its batch over GPUs: that needs
    several, and batch norm of each alone.
    """

    remembers = True

    def __init__(self, config: ContrastConfig, encoder: Encoder, head: ProjectionHead) -> None:
        super().__init__(config, encoder, head)
        self.slow_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.slow_head = copy.deepcopy(head).requires_grad_(False)
        self.train()  # a new module is in training mode without a call of it, which sets the copy's batch norm
        self.updates: Tensor
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def train(self, mode: bool = True) -> Self:
        """As for any module; but the copy's batch norm stays with running statistics, unless set otherwise."""
        super().train(mode)
        if self.config.teacher_norm == "running":
            self.slow_encoder.eval()
        return self

    @torch.no_grad()
    def update(self, encoder: Encoder, head: ProjectionHead, step: int = 0, steps: int = 0) -> None:
        """After step number `step` of `steps`: move the copy towards encoder and head by 1 - the momentum of that step."""
        rate = 1 - self.momentum(step, steps)
        slow, fast = self.copied(encoder, head)
        torch._foreach_lerp_(slow, fast, rate)
        if self.config.teacher_norm == "running":
            fast_stats, slow_stats = (
                [buffer for buffer in part.buffers() if buffer.is_floating_point()]
                for part in (encoder, self.slow_encoder)
            )
            # Each rank's batch norm may keep statistics of its own, and a checkpoint has rank 0's: what trains must not
            # depend on them.
            average_over_ranks(fast_stats)
            # The first steps count alike, because the initial statistics, 0 and 1, mean nothing
            if slow_stats:
                torch._foreach_lerp_(slow_stats, fast_stats, max(rate, 1 / (step + 1)))
        self.updates.add_(1)

    def copied(self, encoder: Encoder, head: ProjectionHead) -> tuple[list[Tensor], list[Tensor]]:
        """The copy's parameters, and those that they follow, in the same order."""
        slow = [*self.slow_encoder.parameters(), *self.slow_head.parameters()]
        return list(slow), [*encoder.parameters(), *head.parameters()]

    def momentum(self, step: int, steps: int) -> float:
        """The share of its weights that the copy keeps at a step."""
        start = self.config.momentum
        if self.config.momentum_schedule == "constant" or steps < 1:
            return start
        return 1 - (1 - start) * (1 + math.cos(math.pi * min(1.0, step / steps))) / 2


class MocoQueue(MomentumTeacher):
    """MoCo: against the last `contrast.queue` parts as a momentum teacher saw them.

    The queue begins as random directions of no whole. It is the same on all ranks: after each pass, what all of them
    have embedded goes in.
    """

    own_temperature = 0.07

    def __init__(self, config: ContrastConfig, encoder: Encoder, head: ProjectionHead) -> None:
        super().__init__(config, encoder, head)
        self.queue: Tensor
        self.ids: Tensor
        self.next: Tensor
        self.register_buffer("queue", l2_normalise(torch.randn(config.queue, head.channels)))
        self.register_buffer("ids", torch.full((config.queue,), -1))
        self.register_buffer("next", torch.zeros((), dtype=torch.int64))

    def forward(
        self, encoder: Encoder, head: ProjectionHead, part: Tensor, other: Tensor, ids: Tensor,
        more: Tensor | None = None,
    ) -> ContrastOutcome:  # fmt: skip
        """The first part through the encoder, the second through its copy; the latter's embeddings go into the queue."""
        anchor = head(encoder.pooled(part))
        with torch.no_grad():
            positive = self.slow_head(self.slow_encoder.pooled(other))
        allowed = ids[:, None] != self.ids[None, :]
        answer = info_nce(anchor, positive, self.queue.clone(), allowed, self.temperature)
        self._put(all_gather(positive), all_gather(ids))
        return answer

    @torch.no_grad()
    def _put(self, vectors: Tensor, ids: Tensor) -> None:
        """Overwrite the oldest entries."""
        slots = (self.next + torch.arange(len(ids), device=ids.device)) % len(self.queue)
        self.queue.index_copy_(0, slots, vectors)
        self.ids.index_copy_(0, slots, ids)
        self.next.add_(len(ids)).remainder_(len(self.queue))


class LocalGlobal(ContrastiveObjective):
    """AMDIM (Bachman et al. 2019): one part as a whole against every cell of the other's coarsest features, and the reverse.

    Negatives are the cells of all other wholes of all ranks, with gradients. The accuracy is the share of cells that
    are nearer than all negatives. What differs from the paper, and why: there, global features also predict a finer
    map, and cells predict cells, in an encoder made so that a cell sees little of the image; here the coarsest map
    alone is used, since every encoder has one, and its cells may see the whole part. There, scores are inner
    products, penalised by their square and clipped by a tanh; here they are cosines over a temperature, as in the
    rest of the family.
    """

    def __init__(self, config: ContrastConfig, encoder: Encoder, head: ProjectionHead) -> None:
        super().__init__(config, encoder, head)
        self.cell_head = ProjectionHead(encoder.channels[-1], config)

    def forward(
        self, encoder: Encoder, head: ProjectionHead, part: Tensor, other: Tensor, ids: Tensor,
        more: Tensor | None = None,
    ) -> ContrastOutcome:  # fmt: skip
        """One pass of the encoder over both parts."""
        features = encoder(torch.cat((part, other)))[-1].float().flatten(2)
        one, two = head(features.mean(2)).chunk(2)
        cells = torch.stack(self.cell_head(features.transpose(1, 2)).chunk(2), 1)
        everyone, allowed = all_gather_with_gradient(cells), negative_mask(ids, all_gather(ids))
        temperature = self.temperature
        return average_outcomes(
            local_global(one, cells[:, 1], everyone[:, 1], allowed, temperature),
            local_global(two, cells[:, 0], everyone[:, 0], allowed, temperature),
        )


def swapped_entropy(
    codes: Sequence[Tensor],
    logs: Sequence[Tensor],
    small: Tensor | None,
    prototypes: Tensor,
    temperature: float,
) -> Tensor:
    """(B,): cross-entropy of what each part, and each small one, predicts and what the other of the two is assigned.

    `codes` and `logs` are the assignments (B, P) of the two parts and the logarithms of what they predict; `small` are
    embeddings (B * V, C) of V small parts, which predict both assignments.
    """
    terms = codes[0] * logs[1] + codes[1] * logs[0]
    if small is not None:
        several = small.unflatten(0, (len(terms), -1))
        with full_precision(small):
            seen = (several @ prototypes.T / temperature).log_softmax(2).sum(1)
        terms = (terms + (codes[0] + codes[1]) * seen) / (1 + several.shape[1])
    return -terms.sum(1) / 2


class Prototypes(ContrastiveObjective):
    """SwAV (Caron et al. 2020): each part predicts to which of `contrast.prototypes` learned vectors the other is assigned.

    Assignments fill all prototypes alike over the batch of all ranks, so that equal embeddings of all wholes are no
    solution; where the batch is small, also over the last `contrast.swav_queue` parts before it. `contrast.small_parts`
    further parts of a whole predict both assignments. Validation uses no queue. The accuracy is the share of wholes whose
    two parts are assigned to the same prototype. In the paper the queue begins to count after 15 epochs, here at once, as
    far as it is filled; and there prototypes stand still in the first epoch, which is not done here.
    """

    takes_small_parts = True

    def __init__(self, config: ContrastConfig, encoder: Encoder, head: ProjectionHead) -> None:
        super().__init__(config, encoder, head)
        self.prototypes = nn.Parameter(torch.randn(config.prototypes, head.channels) / head.channels**0.5)
        self.queue: Tensor
        self.entries: Tensor
        if config.swav_queue:  # first parts, then second ones
            self.register_buffer("queue", torch.zeros(2, config.swav_queue, head.channels))
            # Parts that have ever come in
            self.register_buffer("entries", torch.zeros((), dtype=torch.int64))

    def forward(
        self, encoder: Encoder, head: ProjectionHead, part: Tensor, other: Tensor, ids: Tensor,
        more: Tensor | None = None,
    ) -> ContrastOutcome:  # fmt: skip
        """One pass of the encoder over both parts, another over small ones; the loss is the mean cross-entropy of all."""
        vectors = head(encoder.pooled(torch.cat((part, other))))
        with full_precision(vectors):
            prototypes = l2_normalise(self.prototypes)
            scores = (vectors @ prototypes.T).chunk(2)
        codes = self._assign(scores, ids, prototypes.detach())
        logs = [(score / self.temperature).log_softmax(1) for score in scores]
        small = None if more is None else head(encoder.pooled(more.flatten(0, 1)[:, None]))
        losses = swapped_entropy(codes, logs, small, prototypes, self.temperature)
        one, two = vectors.detach().chunk(2)
        if self.training and self.config.swav_queue:
            self._put(all_gather(one), all_gather(two))
        return losses, (one * two).sum(1), (codes[0].argmax(1) == codes[1].argmax(1)).float()

    def _assign(self, scores: tuple[Tensor, ...], ids: Tensor, prototypes: Tensor) -> list[Tensor]:
        """Codes (B, P) of this rank's wholes for each of the parts, from the scores of all ranks."""
        everyone, all_ids = all_gather(torch.cat(scores, 1)), all_gather(ids)
        nobody = torch.full_like(all_ids[:1], -1)
        counts = negative_mask(nobody, all_ids)[0]
        mine = (all_ids[None, :] == ids[:, None]).int().argmax(1)  # a whole that comes twice: its first index
        settings = self.config.sinkhorn_iterations, self.config.sinkhorn_epsilon
        parts = list(everyone.chunk(2, 1))
        if self.training and self.config.swav_queue:
            with full_precision(prototypes):
                earlier = self.queue @ prototypes.T
            filled = torch.arange(earlier.shape[1], device=ids.device) < self.entries
            counts = torch.cat((counts, filled))
            parts = [torch.cat(both) for both in zip(parts, earlier, strict=True)]
        return [sinkhorn(part, counts, *settings)[mine] for part in parts]

    @torch.no_grad()
    def _put(self, one: Tensor, two: Tensor) -> None:
        """Overwrite the oldest entries; of a batch larger than the queue, the last remain."""
        size = self.queue.shape[1]
        latest = torch.stack((one, two))[:, -size:]
        slots = (self.entries + torch.arange(latest.shape[1], device=one.device)) % size
        self.queue.index_copy_(1, slots, latest)
        self.entries.add_(latest.shape[1])


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

    takes_small_parts = True

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
        small = None if more is None else head(encoder.pooled(more.flatten(0, 1)[:, None]))
        losses = swapped_entropy(codes, logs, small, prototypes, self.temperature)
        self._follow(cosines)
        one, two = vectors.detach().chunk(2)
        return losses, (one * two).sum(1), (codes[0].argmax(1) == codes[1].argmax(1)).float()

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
