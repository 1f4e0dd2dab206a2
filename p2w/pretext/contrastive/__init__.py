"""Contrastive learning on the parts that Parts2Whole shows: one design, whose setting is where negatives come from.

    SimClr     parts of the other wholes of the batch, over all ranks, with gradients       objectives.InBatch
    Moco       a queue of what a slowly following copy of the encoder made of them          objectives.MocoQueue
    InstDisc   a memory bank with one entry a whole, which is also the positive             memory_bank.MemoryBank
    Pirl       the same bank; a jigsaw of the second part is compared with it too           memory_bank.PirlBank
    Exemplar   a learned vector for each whole: every whole is a class                      memory_bank.InstanceClasses
    Swav       no negatives: prototypes, to which a batch is assigned in equal shares       objectives.Prototypes
    Dino       no negatives: what a slowly following copy of the encoder assigns       objectives.SelfDistillation
    Amdim      cells of one part's features against all of another part                     objectives.LocalGlobal

Batch norm in an encoder averages over a rank's own parts: that, and nothing else here, differs with the number of ranks.
The paper names these methods in its first section, as what its own replaces. Temperatures are those of the methods' own
papers; the 0.7 of its third section is for measuring features that were trained without a contrastive loss: with it,
exemplar's loss among 28,144 classes could not fall below 8.8 of 10.2 nats.
"""

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from p2w.model.encoder import Encoder, Network
from p2w.pretext.contrastive.contrastive_pretext import ContrastiveNetwork, ContrastivePretext
from p2w.pretext.contrastive.memory_bank import InstanceClasses, MemoryBank, PirlBank
from p2w.pretext.contrastive.objectives import (
    InBatch,
    LocalGlobal,
    MocoQueue,
    MomentumTeacher,
    Prototypes,
    SelfDistillation,
)


class SimClr(ContrastivePretext):
    """SimCLR (Chen et al. 2020)."""

    summary = "two parts of a whole -> alike, unlike those of other wholes of the batch"
    kind = InBatch


class MomentumPretext(ContrastivePretext):
    """Those whose objective has a momentum teacher, which follows after each step."""

    kind: ClassVar[type[MomentumTeacher]]

    def after_step(self, network: nn.Module, step: int) -> None:
        """Update the momentum encoder."""
        network = cast(ContrastiveNetwork, network)
        teacher = cast(MomentumTeacher, network.negatives)
        teacher.update(network.encoder, network.head, step, self.config.train.steps)


class Moco(MomentumPretext):
    """MoCo (He et al. 2020)."""

    summary = "two parts of a whole -> alike, unlike those of a queue that a momentum encoder made"
    kind = MocoQueue

    def build(self, encoder: Encoder) -> Network:
        """As for all of the family; the network also takes checkpoints of earlier versions."""
        network = super().build(encoder)
        network.register_load_state_dict_pre_hook(_update_copy_of_earlier_version)
        return network


class Dino(MomentumPretext):
    """Self-distillation (Caron et al. 2021)."""

    summary = "parts of a whole -> assigned as a momentum teacher assigns two of them"
    kind = SelfDistillation


class InstDisc(ContrastivePretext):
    """Instance discrimination (Wu et al. 2018)."""

    summary = "a part -> like earlier parts of its whole in a memory bank, unlike the others there"
    knows_wholes = True
    kind = MemoryBank


class Pirl(ContrastivePretext):
    """PIRL (Misra and van der Maaten 2020)."""

    summary = "a part, and a jigsaw -> like earlier parts of their whole in a memory bank"
    knows_wholes = True
    kind = PirlBank


class Exemplar(ContrastivePretext):
    """Exemplar (Dosovitskiy et al. 2014)."""

    summary = "a part -> which whole it is of, every whole a class"
    knows_wholes = True
    kind = InstanceClasses


class Swav(ContrastivePretext):
    """SwAV (Caron et al. 2020)."""

    summary = "two parts of a whole -> assigned alike to learned prototypes"
    kind = Prototypes


class Amdim(ContrastivePretext):
    """AMDIM (Bachman et al. 2019)."""

    summary = "a part -> like the local features of another part of its whole"
    kind = LocalGlobal


def _update_copy_of_earlier_version(
    network: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any
) -> None:
    """Earlier versions updated MoCo's momentum encoder as the next step began: make up for that in what they saved."""
    own = f"{prefix}negatives."
    if f"{own}updates" in state or f"{own}next" not in state:
        return
    state[f"{own}updates"] = torch.zeros((), dtype=torch.int64)
    queue = cast(MocoQueue, network.negatives)
    rate = 1 - queue.config.momentum
    for name, _ in queue.named_parameters():
        source = name.removeprefix("slow_")
        state[own + name] = state[own + name].lerp(state[prefix + source], rate)
