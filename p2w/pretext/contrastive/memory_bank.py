"""Objectives with one vector for each whole: a memory bank of earlier embeddings, or learned vectors of classes."""

import copy

import torch
from torch import Tensor, nn

from p2w.model.encoder import Encoder
from p2w.pretext.contrastive.losses import (
    ContrastOutcome,
    all_gather,
    average_outcomes,
    first_of_each,
    full_precision,
    info_nce,
    l2_normalise,
)
from p2w.pretext.contrastive.objectives import (
    ContrastConfig,
    ContrastiveObjective,
    OtherViews,
    ProjectionHead,
)

CUBES = 8


class _Slots(ContrastiveObjective):
    """`contrast.bank` slots: whole `id` has slot `id % contrast.bank`; slots that no whole has filled yet are no negatives.

    In a set of more sub-scans than slots, wholes that share one count as the same whole.
    """

    remembers = True
    own_temperature = 0.07

    def __init__(self, config: ContrastConfig, encoder: Encoder, head: ProjectionHead) -> None:
        super().__init__(config, encoder, head)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(config.bank, dtype=torch.bool))

    def allowed(self, slots: Tensor) -> Tensor:
        """(B, bank) bool: the filled slots of other wholes, which are the negatives."""
        numbers = torch.arange(len(self.seen), device=slots.device)
        return self.seen[None, :] & (slots[:, None] != numbers[None, :])


class MemoryBank(_Slots):
    """Instance discrimination (Wu et al. 2018): a part against what earlier parts of its whole left in the bank.

    After each pass, vectors of all ranks go in: v <- unit(m v + (1 - m) f), m = `contrast.bank_momentum`. A whole met for
    the first time is its own positive, and enters as it is.
    """

    def __init__(self, config: ContrastConfig, encoder: Encoder, head: ProjectionHead) -> None:
        super().__init__(config, encoder, head)
        self.bank: Tensor
        self.register_buffer("bank", torch.zeros(config.bank, head.channels))

    def forward(
        self, encoder: Encoder, head: ProjectionHead, part: Tensor, other: Tensor, ids: Tensor,
        more: Tensor | None = None,
    ) -> ContrastOutcome:  # fmt: skip
        """One part a whole; the second is not used."""
        vectors, slots = head(encoder.pooled(part)), ids % len(self.seen)
        answer = self.against_bank(vectors, self.entries(vectors, slots), slots)
        self.put(all_gather(vectors), all_gather(slots))
        return answer

    def entries(self, vectors: Tensor, slots: Tensor) -> Tensor:
        """(B, C): the bank's entries of the wholes; their own vectors where it has none yet."""
        return torch.where(self.seen[slots][:, None], self.bank[slots], vectors.detach())

    def against_bank(self, vectors: Tensor, entries: Tensor, slots: Tensor) -> ContrastOutcome:
        """InfoNCE against a copy of the bank, so that later updates of the bank do not change the gradient."""
        return info_nce(vectors, entries, self.bank.clone(), self.allowed(slots), self.temperature)

    @torch.no_grad()
    def put(self, vectors: Tensor, slots: Tensor) -> None:
        """Update the bank's entries; of a whole that comes twice, the first vector counts."""
        vectors = vectors[first_of_each(slots)]
        momentum = self.config.bank_momentum
        mixed = l2_normalise(momentum * self.bank[slots] + (1 - momentum) * vectors)
        self.bank.index_copy_(0, slots, torch.where(self.seen[slots][:, None], mixed, vectors))
        self.seen.index_fill_(0, slots, True)


class PirlBank(MemoryBank):
    """PIRL (Misra and van der Maaten 2020): the bank's entry against the part, and against a jigsaw of another part.

    The jigsaw is eight cubes of a part, each less a rim, in random order (the paper has nine patches of an image). The
    encoder sees each by itself; a layer brings each to the embedding's size, another all of them to one embedding. The loss
    is the mean of the two comparisons, the paper's weight, and only the first part goes into the bank. Without
    `contrast.jigsaw` the other view is a mirrored part with a head of its own: a cheaper method, which is not the paper's.
    """

    @classmethod
    def views(cls, config: ContrastConfig) -> OtherViews:
        """The cubes of a jigsaw, if there is one."""
        return "jigsaw" if config.jigsaw else None

    @classmethod
    def mirrors(cls, config: ContrastConfig) -> bool:
        """Mirrored if there is no jigsaw."""
        return not config.jigsaw

    def __init__(self, config: ContrastConfig, encoder: Encoder, head: ProjectionHead) -> None:
        super().__init__(config, encoder, head)
        if config.jigsaw:
            self.of_cube = nn.Linear(encoder.channels[-1], head.channels)
            self.of_cubes = nn.Linear(CUBES * head.channels, head.channels)
        else:
            self.other_head = copy.deepcopy(head)

    def forward(
        self, encoder: Encoder, head: ProjectionHead, part: Tensor, other: Tensor, ids: Tensor,
        more: Tensor | None = None,
    ) -> ContrastOutcome:  # fmt: skip
        """A pass of the encoder over the part and one over the cubes `more` (B, 8, d', h', w'); or one over both parts."""
        if more is None:
            plain, moved = encoder.pooled(torch.cat((part, other))).chunk(2)
            vectors, view = head(plain), self.other_head(moved)
        else:
            vectors = head(encoder.pooled(part))
            view = self.jigsaw(encoder.pooled(more.flatten(0, 1)[:, None]))
        slots = ids % len(self.seen)
        entries = self.entries(vectors, slots)
        against = self.against_bank(view, entries, slots)
        answer = average_outcomes(against, self.against_bank(vectors, entries, slots))
        self.put(all_gather(vectors), all_gather(slots))
        return answer

    def jigsaw(self, cubes: Tensor) -> Tensor:
        """Features (B * 8, channels of the encoder) of the cubes of each whole -> embeddings (B, C) of unit length."""
        with full_precision(cubes):
            each = self.of_cube(cubes.float()).unflatten(0, (-1, CUBES))
            return l2_normalise(self.of_cubes(each.flatten(1)))


class InstanceClasses(_Slots):
    """Exemplar (Dosovitskiy et al. 2014): every whole is a class; a part against one learned vector a class.

    In the paper a linear layer gives the classes' logits; here they are cosines over a temperature, as in the rest of the
    family, so that wholes not met yet can be left out.
    """

    def __init__(self, config: ContrastConfig, encoder: Encoder, head: ProjectionHead) -> None:
        super().__init__(config, encoder, head)
        self.vectors = nn.Parameter(torch.randn(config.bank, head.channels) / head.channels**0.5)

    def forward(
        self, encoder: Encoder, head: ProjectionHead, part: Tensor, other: Tensor, ids: Tensor,
        more: Tensor | None = None,
    ) -> ContrastOutcome:  # fmt: skip
        """One part a whole; the second is not used."""
        classes, slots = l2_normalise(self.vectors), ids % len(self.seen)
        anchor = head(encoder.pooled(part))
        answer = info_nce(anchor, classes[slots], classes, self.allowed(slots), self.temperature)
        self.seen.index_fill_(0, all_gather(slots), True)
        return answer
