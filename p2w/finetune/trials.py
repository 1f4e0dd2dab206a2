"""A starting point fine-tuned on a target task, in trials: what is fixed for all of them, and one after the other.

RUN/
    transfer.json   what is run: task, starting point, network, fraction, recipe
    trial-00/ …     see trial.py

Processes share the trials of a folder: each takes the next one that is neither finished nor held by another.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from p2w import __version__
from p2w.errors import UserError
from p2w.finetune.init import InitRecord, network_of
from p2w.finetune.recipe import FineTuneRecipe
from p2w.finetune.samples import Rows, Samples, data_fraction, fixed_batches
from p2w.finetune.task_types import TaskType, task_type
from p2w.finetune.trainer import FineTuner
from p2w.finetune.trial import TrialLock, TrialRun, folder_of, is_finished
from p2w.log import Log
from p2w.model import Encoder, Network
from p2w.tasks.reader import TargetSet
from p2w.train.optim import Precision
from p2w.weights.start import StartingPoint, load_start
from p2w.world import World

StopCheck = Callable[[], bool]


@dataclass(frozen=True)
class FineTuning:
    """All that the trials of a run have in common."""

    source: TargetSet
    origin: InitRecord
    label: str
    network: str | None
    width: int | None
    trials: int
    fraction: float
    pretrained_decoder: bool
    fold: int | None
    recipe: FineTuneRecipe
    folder: Path
    held: dict[str, Samples] = field(default_factory=dict, repr=False, compare=False)

    @property
    def kind(self) -> TaskType:
        """Of the task."""
        return task_type(self.source.kind)

    @cached_property
    def rows(self) -> dict[str, Rows]:
        """Row numbers by split; train is whole. Raises UserError for a fold that there is not."""
        return {split: self.source.rows(split, self.fold) for split in ("train", "val", "test")}

    def seed(self, index: int) -> int:
        """Of a trial."""
        return self.recipe.seed + index

    def training_rows(self, index: int) -> Rows:
        """The fraction of the training samples that a trial sees."""
        chooser = self.seed(index) if self.recipe.subset == "by-trial" else self.recipe.seed
        return data_fraction(
            self.rows["train"], self.source.patient, self.fraction, chooser, self.source.label,
            self.kind.needed_labels,
        )  # fmt: skip

    def start(self) -> StartingPoint:
        """The encoder with its values, read anew; a random one draws from torch's generator."""
        return load_start(self.origin.source, self.network, self.width, self.source.channels)

    def build(self, index: int) -> tuple[Network, StartingPoint]:
        """The network as a trial begins. What is new behind the encoder is the same for every starting point."""
        seed = self.seed(index)
        torch.manual_seed(2 * seed)
        start = self.start()
        torch.manual_seed(2 * seed + 1)
        classes = self.source.meta["classes"]
        return network_of(self.kind, start, classes, self.pretrained_decoder), start

    def samples(self, split: str, rows: Rows, world: World) -> Samples:
        """Decoded once for all trials of this process that see the same rows."""
        if split not in self.held or not np.array_equal(self.held[split].rows, rows):
            self.held.pop(split, None)  # before others take its place in memory
            self.held[split] = Samples(self.source, rows, world.device, self.recipe.cache_gib * 2**30)
        return self.held[split]


def check_data(transfer: FineTuning, ranks: int) -> None:
    """Everything about data that can be refused before anything is trained. Raises UserError."""
    where, rows = transfer.source.where, transfer.rows
    for split, found in rows.items():
        if not len(found):
            raise UserError(
                f"{where}: no sample to {'train' if split == 'train' else split}; prepare the set again with other splits, "
                "or name another --fold"
            )
    for split in ("train", "test"):
        if said := transfer.kind.problem_of(transfer.source.label[rows[split]]):
            raise UserError(f"{where}: the samples to {split} {said}")
    if transfer.pretrained_decoder and not transfer.kind.per_voxel:
        task, kind = transfer.source.meta["task"], transfer.kind.name
        raise UserError(f"--decoder pretrained: {task} is {kind}, which has no decoder; leave it out")
    smallest = min(len(rows["val"]), len(rows["test"]))
    for index in range(transfer.trials):
        count = len(transfer.training_rows(index))
        smallest = min(smallest, count // len(fixed_batches(count, transfer.recipe.batch)))
    if ranks > smallest:
        raise UserError(
            f"{ranks} ranks: a batch or a split has {smallest} sample(s), and every rank needs one; start at most "
            f"{smallest} processes, or trials side by side with --workers"
        )


def check_crop_size(transfer: FineTuning, encoder: Encoder) -> None:
    """Raise UserError where the samples of the set are of no size that the network takes."""
    size, by = transfer.source.size_zyx, encoder.divisor
    fits = [max(stride, round(edge / stride) * stride) for edge, stride in zip(size, by, strict=True)]
    least = encoder.least_voxels
    while math.prod(edge // stride for edge, stride in zip(fits, by, strict=True)) < least:
        fits[2] += by[2]
    if tuple(fits) != tuple(size):
        raise UserError(
            f"{transfer.source.where}: samples of {size} voxels (z, y, x), and the network takes multiples of {by}; prepare "
            f"the set with --size {' '.join(map(str, fits))}, or name another --network"
        )


def run_trials(
    transfer: FineTuning, indices: list[int], world: World, precision: Precision, stop_requested: StopCheck
) -> dict[int, str]:
    """The trials that are not finished, one after the other; every rank calls it. Index -> finished, already, or busy.

    Raises StopRequested on all ranks when told to stop.
    """
    outcome: dict[int, str] = {}
    for index in indices:
        place = TrialLock(folder_of(transfer.folder, index))
        state = 0
        if world.is_main:
            state = 2 if is_finished(place.folder) else 0 if place.take() else 1
            if state == 0 and is_finished(place.folder):  # another process has just done it
                state = 2
        state = int(world.sum(torch.tensor([state]))[0])
        try:
            if state == 0:
                result = one_trial(transfer, index, world, precision, stop_requested).run()
                _report(transfer, index, result, world)
        finally:
            place.release()
        outcome[index] = ("finished", "busy", "already")[state]
    return outcome


def one_trial(
    transfer: FineTuning, index: int, world: World, precision: Precision, stop_requested: StopCheck
) -> TrialRun:
    """Build a trial on this rank."""
    folder, seed = folder_of(transfer.folder, index), transfer.seed(index)
    log = Log(folder, world.is_main, transfer.recipe.max_epochs)
    network, start = transfer.build(index)
    rows = transfer.rows | {"train": transfer.training_rows(index)}
    train, val, test = (transfer.samples(split, rows[split], world) for split in ("train", "val", "test"))
    tuner = FineTuner(network, transfer.kind, transfer.recipe, precision, world, seed, stop_requested)
    if world.is_main:
        log.line(
            f"trial {index}  seed {seed}  {len(train)} samples to train, {len(val)} to validate, {len(test)} to test"
        )
    return TrialRun(
        index, seed, folder, tuner, transfer.kind, train, val, test,
        [transfer.source.key[row] for row in rows["test"]],
        [transfer.source.patient[row] for row in rows["test"]],
        trial_card(transfer, index, network, start), log, world,
    )  # fmt: skip


def trial_card(transfer: FineTuning, index: int, network: Network, start: StartingPoint) -> dict[str, Any]:
    """What the weights' file says of itself: all that `p2w predict` needs."""
    meta = transfer.source.meta
    return {
        "p2w": __version__,
        "holds": "fine-tuned",
        "kind": transfer.kind.name,
        "encoder": {
            "name": start.network,
            "width": start.width,
            "in_channels": network.encoder.in_channels,
            "feeding": network.encoder.feeding,
        },
        "skips": bool(getattr(getattr(network, "decoder", None), "skips", False)),
        "task": {
            key: meta.get(key)
            for key in ("task", "channels", "channel_names", "size_zyx", "window", "spacing_mm", "classes", "settings")
        },
        "init": transfer.label,
        "trial": index,
        "seed": transfer.seed(index),
    }  # fmt: skip


def _report(transfer: FineTuning, index: int, result: dict[str, Any], world: World) -> None:
    """One line a trial."""
    said = "  ".join(f"{name} {value:.4f}" for name, value in result["metrics"].items() if "_" not in name)
    text = f"trial {index}  {result['epochs']} epochs in {result['seconds']:.0f} s  {said}"
    Log(transfer.folder, world.is_main, 0).line(text)
