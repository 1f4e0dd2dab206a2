"""Batch norm's running statistics, computed anew on training wholes before a network's features are judged.

Monitors, analyses and everything that reads features of a run judge the network that `TrainingWholes.recalibrate` gives, so
that its weights are judged: running statistics as training left them are those of its last steps, and those of an untrained
network are mean 0 and variance 1.

The network sees what its pretext shows in training, of WHOLES training wholes spread evenly over the set, in BATCHES
batches of ROWS. These are functions of the data set alone: the same at every step, in every run on it, and for any number
of ranks.
"""

import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from p2w.analysis.monitors import VALIDATION_SEED, read_sub_scans, spread_ids
from p2w.errors import UserError
from p2w.model.norm import recalibrated
from p2w.pretext.protocol import Pretext
from p2w.rng import SampleKeys
from p2w.stream.local import DataError, ShardSet
from p2w.world import World, gather_rows

WHOLES, BATCHES, ROWS = 64, 8, 16
IDENTITY = ["batch norm recalibrated", WHOLES, BATCHES, ROWS]  # part of the key of cached features
SEED = VALIDATION_SEED + 0xBA7C4
YOUNG = 0.01  # share of the first running statistics, mean 0 and variance 1, in those of a checkpoint
MOMENTUM = 0.1  # weight of a batch in the running statistics, in every network here

Module = TypeVar("Module", bound=nn.Module)


class TrainingWholes:
    """The wholes that batch norm is recalibrated on. Each rank reads those of its own batches, when they are first needed.

    The inputs that were cut from them for the last pretext stay in the host's memory, since a monitor needs them again and
    again. A whole that cannot be read is left out; training reports it when it reads it.
    """

    def __init__(self, shards: ShardSet, world: World) -> None:
        self.shards, self.world = shards, world
        ids = shards.ids("train")
        groups = max(1, min(WHOLES, len(ids)) // ROWS)
        chosen = spread_ids(ids, min(len(ids), groups * ROWS))
        self.groups = [chosen[group::groups] for group in range(groups)]  # each spread over all scans
        self._pretext: Pretext | None = None
        self._cut: dict[int, Tensor] = {}  # by the number of the batch

    def recalibrate(
        self, network: Module, pretext: Pretext, before_batch: Callable[[], None] = lambda: None
    ) -> Module:
        """A copy of a network or encoder with statistics of these wholes, in evaluation mode; the network stays as it is.

        A collective. `before_batch` is called equally often on all ranks, and may raise to interrupt. Raises UserError where
        there is batch norm and no training whole, and DataError where none of a batch can be read.
        """
        return recalibrated(
            network, self._inputs(pretext, before_batch), lambda rows: gather_rows(rows, self.world, BATCHES)
        )

    def _inputs(self, pretext: Pretext, before_batch: Callable[[], None]) -> Iterator[Tensor]:
        """This rank's batches (ROWS, 1, d, h, w): those numbered rank, rank + ranks, …"""
        if not len(self.groups[0]):
            raise UserError(
                f"{self.shards.where}: no sub-scan in split 'train', and batch norm is recalibrated on training wholes; cut "
                "the set with a smaller --val-fraction"
            )
        if pretext is not self._pretext:
            self._pretext, self._cut = pretext, {}
        for first in range(0, BATCHES, self.world.size):
            before_batch()
            number = first + self.world.rank
            if number < BATCHES:
                if number not in self._cut:
                    self._cut_group(pretext, number % len(self.groups))
                yield self._cut[number].to(self.world.device)

    def _cut_group(self, pretext: Pretext, group: int) -> None:
        """This rank's batches of a group: one view of each of its wholes, or as many as fill ROWS where they are fewer."""
        voxels, good = read_sub_scans(self.shards, self.groups[group], tolerant=True)
        if not good.any():
            raise DataError(
                f"{self.shards.where}: none of {len(good)} training sub-scans can be read; run p2w verify on it"
            )
        device, kept = self.world.device, torch.from_numpy(np.flatnonzero(good))
        voxels, chosen = voxels[kept].to(device), self.groups[group][good]
        ids, real = torch.from_numpy(chosen).to(device), self.shards.real_voxels(chosen, device)
        times = math.ceil(ROWS / len(self.groups[group]))
        for number in range(group, BATCHES, len(self.groups)):
            if number % self.world.size == self.world.rank:
                epoch = number // len(self.groups) * times
                views = [
                    pretext.sample(voxels, SampleKeys(SEED, epoch + time, ids, real)).input
                    for time in range(times)
                ]
                self._cut[number] = torch.cat(views).cpu()


def is_early(step: int, passes: int = 1) -> bool:
    """Whether stored running statistics still hold more than YOUNG of what they began with after `step` steps.

    The losses that were logged until then were computed with them. `passes`: of a step, see optim.accumulate.
    """
    return bool((1 - MOMENTUM) ** (step * passes) > YOUNG)
