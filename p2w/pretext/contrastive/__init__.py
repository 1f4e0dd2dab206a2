"""Contrastive learning on the parts that Parts2Whole shows: one design, whose setting is where negatives come from.

    simclr     parts of the other wholes of the batch, over all ranks, with gradients     negatives.Batch
    moco       a queue of what a slowly following copy of the encoder made of them        negatives.Queue
    instdisc   a memory bank with one entry a whole, which is also the positive           bank.Bank
    pirl       the same bank; a mirrored second part is held against it too               bank.TransformedBank
    exemplar   a learned vector for each whole: every whole is a class                    bank.Classes
    swav       no negatives: prototypes, to which a batch is assigned in equal shares     clusters.Prototypes
    amdim      cells of one part's features against the whole of another part's           cells.Cells

Batch norm in an encoder averages over a rank's own parts: that, and nothing else here, differs with the number of ranks.
FACTS: paper, section 1 (what its method replaces); temperature 0.7, section 3.
"""

from p2w.pretext.contrastive.contrastive_pretext import ContrastivePretext
from p2w.pretext.contrastive.memory_bank import InstanceClasses, MemoryBank, PirlBank
from p2w.pretext.contrastive.objectives import InBatch, LocalGlobal, MocoQueue, Prototypes

__all__ = [
    "ContrastivePretext",
    "InBatch",
    "InstanceClasses",
    "LocalGlobal",
    "MemoryBank",
    "MocoQueue",
    "PirlBank",
    "Prototypes",
]
