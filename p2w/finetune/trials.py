"""Fine-tuning of a starting point on a target task: what its trials have in common, and running them one after the other.

RUN/
    transfer.json   what is run: task, starting point, network, fraction, recipe
    trial-00/ …     see trial.py

Processes share the trials of a folder: each takes the next trial that is neither finished nor locked by another process.
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
from p2w.files import last_part
from p2w.finetune.init import InitRecord, network_of
from p2w.finetune.recipe import FineTuneRecipe, plain_recipe
from p2w.finetune.samples import Rows, Samples, data_fraction, fixed_batches
from p2w.finetune.task_types import TaskType, task_type
from p2w.finetune.trainer import FineTuner
from p2w.finetune.trial import TrialLock, TrialRun, folder_of, is_finished
from p2w.log import Log
from p2w.model import Encoder, Network
from p2w.tasks.reader import TargetSet
from p2w.trackers import LogConfig
from p2w.train.optim import Precision
from p2w.weights.start import StartingPoint, load_start
from p2w.world import World

StopCheck = Callable[[], bool]


@dataclass(frozen=True)
class FineTuning:
    """All that the trials of a run have in common: data, starting point, network, fraction, recipe."""

    source: TargetSet
    init: InitRecord
    label: str
    network: str | None
    width: int | None
    trials: int
    fraction: float
    pretrained_decoder: bool
    fold: int | None
    recipe: FineTuneRecipe
    folder: Path
    log: LogConfig = field(default=LogConfig(to="none"), compare=False)
    up_path: bool = False  # of the pretrained decoder, into one with skips
    cached: dict[str, Samples] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def kind(self) -> TaskType:
        """The kind of the task, which knows the set's classes."""
        return task_type(self.source.kind).for_set(self.source.meta)

    def trial_kind(self, index: int) -> TaskType:
        """The kind, which knows the training targets of a trial too."""
        return task_type(self.source.kind).for_set(
            self.source.meta, self.source.targets[self.training_rows(index)]
        )

    @cached_property
    def rows(self) -> dict[str, Rows]:
        """Row numbers by split; "train" has all training samples, whatever the fraction.

        Raises UserError for a fold that the set does not have.
        """
        return {split: self.source.rows(split, self.fold) for split in ("train", "val", "test")}

    def seed(self, index: int) -> int:
        """The seed of a trial."""
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
        return load_start(self.init.source, self.network, self.width, self.source.channels)

    def build(self, index: int) -> tuple[Network, StartingPoint]:
        """The network as a trial begins. What is new behind the encoder is the same for every starting point."""
        seed = self.seed(index)
        torch.manual_seed(2 * seed)
        start = self.start()
        torch.manual_seed(2 * seed + 1)
        classes = self.source.meta["classes"]
        return network_of(self.kind, start, classes, self.pretrained_decoder, self.up_path), start

    @property
    def decoder(self) -> str:
        """Where the decoder is from, as `--decoder` says it."""
        return "up-path" if self.up_path else "pretrained" if self.pretrained_decoder else "scratch"

    def samples(self, split: str, rows: Rows, world: World) -> Samples:
        """The samples of a split, decoded once for all trials of this process that see the same rows."""
        if split not in self.cached or not np.array_equal(self.cached[split].rows, rows):
            self.cached.pop(split, None)  # frees the memory before the next samples need it
            self.cached[split] = Samples(self.source, rows, world.device, self.recipe.cache_gib * 2**30)
        return self.cached[split]


def check_data(fine_tuning: FineTuning, ranks: int) -> None:
    """Raise UserError for whatever in the data can be refused before anything is trained."""
    where, rows = fine_tuning.source.where, fine_tuning.rows
    for split, found in rows.items():
        if not len(found):
            raise UserError(
                f"{where}: no sample to {'train' if split == 'train' else split}; prepare the set again with other splits, "
                "or name another --fold"
            )
    judged = ("val",) if fine_tuning.recipe.stop_on == "metric" else ()
    for split in ("train", *judged, "test"):
        said = fine_tuning.kind.problem_of(fine_tuning.source.label[rows[split]])
        if split == "train":
            said = said or fine_tuning.kind.problem_of_targets(fine_tuning.source.targets[rows[split]])
        if said:
            option = "; --recipe.stop-on loss does without" if split == "val" else ""
            raise UserError(f"{where}: the samples to {split} {said}{option}")
    if fine_tuning.decoder != "scratch" and not fine_tuning.kind.per_voxel:
        task, kind = fine_tuning.source.meta["task"], fine_tuning.kind.name
        raise UserError(
            f"--decoder {fine_tuning.decoder}: {task} is {kind}, which has no decoder; leave it out"
        )
    smallest = min(len(rows["val"]), len(rows["test"]))
    for index in range(fine_tuning.trials):
        count = len(fine_tuning.training_rows(index))
        smallest = min(smallest, count // len(fixed_batches(count, fine_tuning.recipe.batch)))
    if ranks > smallest:
        raise UserError(
            f"{ranks} ranks: a batch or a split has {smallest} sample(s), and every rank needs one; start at most "
            f"{smallest} processes, or trials side by side with --workers"
        )


def check_crop_size(fine_tuning: FineTuning, encoder: Encoder) -> None:
    """Raise UserError when the network cannot take samples of the set's size."""
    size, by = fine_tuning.source.size_zyx, encoder.divisor
    fits = [max(stride, round(edge / stride) * stride) for edge, stride in zip(size, by, strict=True)]
    least = encoder.least_voxels
    while math.prod(edge // stride for edge, stride in zip(fits, by, strict=True)) < least:
        fits[2] += by[2]
    if tuple(fits) != tuple(size):
        raise UserError(
            f"{fine_tuning.source.where}: samples of {size} voxels (z, y, x), and the network takes multiples of {by}; "
            f"prepare the set with --size {' '.join(map(str, fits))}, or name another --network"
        )


def run_trials(
    fine_tuning: FineTuning, indices: list[int], world: World, precision: Precision, stop_requested: StopCheck
) -> dict[int, str]:
    """Run the trials that are not finished, one after the other, on every rank. Returns index -> finished, already, or busy:
    another process has it.

    Raises StopRequested on all ranks at a stop request.
    """
    outcome: dict[int, str] = {}
    for index in indices:
        lock = TrialLock(folder_of(fine_tuning.folder, index))
        state = 0
        if world.is_main:
            state = 2 if is_finished(lock.folder) else 0 if lock.take() else 1
            if state == 0 and is_finished(lock.folder):  # another process has just done it
                state = 2
        state = int(world.sum(torch.tensor([state]))[0])
        try:
            if state == 0:
                result = one_trial(fine_tuning, index, world, precision, stop_requested).run()
                _report(fine_tuning, index, result, world)
        finally:
            lock.release()
        outcome[index] = ("finished", "busy", "already")[state]
    return outcome


def one_trial(
    fine_tuning: FineTuning, index: int, world: World, precision: Precision, stop_requested: StopCheck
) -> TrialRun:
    """Build a trial on this rank."""
    folder, seed = folder_of(fine_tuning.folder, index), fine_tuning.seed(index)
    log = Log(folder, world.is_main, fine_tuning.recipe.max_epochs, fine_tuning.log)
    log.describe(f"{fine_tuning.folder.absolute().name}/{folder.name}", tracked_settings(fine_tuning, index))
    network, start = fine_tuning.build(index)
    rows = fine_tuning.rows | {"train": fine_tuning.training_rows(index)}
    train, val, test = (fine_tuning.samples(split, rows[split], world) for split in ("train", "val", "test"))
    kind = fine_tuning.trial_kind(index)
    tuner = FineTuner(network, kind, fine_tuning.recipe, precision, world, seed, stop_requested)
    if fine_tuning.recipe.freeze and fine_tuning.recipe.recalibrate:
        tuner.recalibrate(train)
    if world.is_main:
        log.line(
            f"trial {index}  seed {seed}  {len(train)} samples to train, {len(val)} to validate, {len(test)} to test"
        )
    return TrialRun(
        index, seed, folder, tuner, kind, train, val, test,
        [fine_tuning.source.key[row] for row in rows["test"]],
        [fine_tuning.source.patient[row] for row in rows["test"]],
        trial_card(fine_tuning, index, network, start), log, world, fine_tuning.fold is not None,
    )  # fmt: skip


def tracked_settings(fine_tuning: FineTuning, index: int) -> dict[str, Any]:
    """The settings of a trial that trackers show."""
    recipe = {f"recipe.{name}": value for name, value in plain_recipe(fine_tuning.recipe).items()}
    return recipe | {
        "task": str(fine_tuning.source.meta["task"]),
        "init": fine_tuning.label,
        "fraction": fine_tuning.fraction,
        "fold": fine_tuning.fold,
        "trial": index,
        "seed": fine_tuning.seed(index),
        "p2w": __version__,
        "torch": torch.__version__,
    }


def trial_card(fine_tuning: FineTuning, index: int, network: Network, start: StartingPoint) -> dict[str, Any]:
    """The card in the file of a trial's weights: all that `p2w predict` needs to know."""
    meta = fine_tuning.source.meta
    return {
        "p2w": __version__,
        "holds": "fine-tuned",
        "kind": fine_tuning.kind.name,
        "encoder": {
            "name": start.network,
            "width": start.width,
            "in_channels": network.encoder.in_channels,
            "feeding": network.encoder.input_norm,
        },
        "skips": bool(getattr(getattr(network, "decoder", None), "skips", False)),
        "task": {
            key: meta.get(key)
            for key in ("task", "channels", "channel_names", "size_zyx", "window", "spacing_mm", "classes")
        }
        | {"settings": _without_absolute_paths(meta.get("settings"))}
        | ({"target": dict(target)} if (target := fine_tuning.trial_kind(index).target) else {}),
        "init": fine_tuning.label,
        "trial": index,
        "seed": fine_tuning.seed(index),
    }  # fmt: skip


def _without_absolute_paths(value: Any) -> Any:
    """Settings of a task as the file of weights may tell them; a pattern such as `*/ct.nii` is no path of this machine."""
    if isinstance(value, dict):
        return {name: _without_absolute_paths(one) for name, one in value.items()}
    return last_part(value) if isinstance(value, str) and (value[:1] == "/" or "://" in value) else value


def _report(fine_tuning: FineTuning, index: int, result: dict[str, Any], world: World) -> None:
    """Log one line on a finished trial."""
    said = "  ".join(
        f"{name} {value:.4f}" for name, value in result["metrics"].items() if not set("_:") & set(name)
    )
    text = f"trial {index}  {result['epochs']} epochs in {result['seconds']:.0f} s  {said}"
    Log(fine_tuning.folder, world.is_main, 0).line(text)
