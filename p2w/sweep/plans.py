"""Which commands make Table 1, Table 2 and Fig. 3 (FACTS 2 and 3), as plain lists of jobs."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from p2w.errors import UserError
from p2w.log import read_metrics
from p2w.sweep.job import Job
from p2w.target import paper
from p2w.target.dataset import open_target
from p2w.target.record import SEGMENTATION
from p2w.target.settled import fingerprint
from p2w.train.checkpoint import Checkpoints


@dataclass(frozen=True)
class Target:
    """A target set: its folder, the task's own name, and what decides how it is fine-tuned."""

    folder: Path
    task: str
    kind: str
    folds: int
    fingerprint: str


@dataclass(frozen=True)
class Transfers:
    """What all fine-tunings of a sweep have in common."""

    launch: Path  # where transfer.py and train.py lie
    tasks: Mapping[str, Target]  # by the name they have in this sweep
    out: Path
    trials: int
    fraction: Mapping[str, float]  # by task, "" for all
    width: int | None = None
    more: tuple[str, ...] = ()  # further arguments of launch/transfer.py
    folds: tuple[int, ...] = ()  # of sets that have folds: those to test on; () all

    def jobs(
        self, task: str, init: str, label: str, usual: Mapping[str, float], network: str = "", decoder: str = "",
        needs: str = "",
    ) -> list[Job]:  # fmt: skip
        """One command of launch/transfer.py for each fold; `usual` is the share of the training data by task."""
        target = self.tasks[task]
        chosen = sorted(set(self.folds)) or list(range(target.folds))
        if target.folds and not set(chosen) <= set(range(target.folds)):
            raise UserError(
                f"--folds {' '.join(map(str, chosen))}: {target.folder} has folds 0 to {target.folds - 1}"
            )
        folds: list[int] | list[None] = chosen if target.folds else [None]
        share = usual.get(target.task, 1.0)
        asked = (self.fraction.get(name) for name in (task, target.task, ""))
        share = next((one for one in asked if one is not None), share)
        return [self._job(task, init, label, share, network, decoder, needs, fold) for fold in folds]

    def _job(
        self, task: str, init: str, label: str, share: float, network: str, decoder: str, needs: str,
        fold: int | None,
    ) -> Job:  # fmt: skip
        target, folder = self.tasks[task], self.out / task / slug(label)
        name, test_set = f"{task}-{folder.name}", target.fingerprint
        flags: list[object] = ["--task", target.folder, "--init", init, "--label", label]
        flags += ["--trials", self.trials]
        if fold is not None:
            flags += ["--fold", fold]
            folder, name, test_set = folder / f"fold-{fold}", f"{name}-fold-{fold}", f"{test_set} fold {fold}"
        flags += ["--network", network] if network else []
        flags += ["--width", self.width] if self.width is not None else []
        flags += ["--fraction", f"{share:g}"] if share != 1 else []
        flags += ["--decoder", decoder] if decoder else []
        command = (
            "python",
            str(self.launch / "transfer.py"),
            *map(str, flags),
            "--run-dir",
            str(folder),
            *self.more,
        )
        return Job(name, folder, command, self.trials, False, needs, test_set, float(f"{share:g}"))


@dataclass(frozen=True)
class Start:
    """A row of Table 1: `LABEL=INIT` or `LABEL=INIT,NETWORK`."""

    label: str
    init: str
    network: str


def starts(texts: Sequence[str]) -> list[Start]:
    """Rows from the command line; `random` alone is Scratch. Raises UserError."""
    found = []
    for text in texts:
        label, equals, rest = text.partition("=")
        label, rest = (label, rest) if equals else ("Scratch" if text == "random" else Path(text).name, text)
        init, _, network = rest.partition(",")
        if not label or not init:
            raise UserError(
                f"--inits {text}: must be LABEL=INIT or LABEL=INIT,NETWORK, e.g. Parts2Whole=runs/paper"
            )
        found.append(Start(label, init, network))
    _distinct([start.label for start in found], "--inits")
    return found


def tasks(texts: Sequence[str]) -> dict[str, Target]:
    """`NAME=DIR`, or `DIR` whose last part is the name. Raises UserError for a folder that is no target set."""
    found = {}
    for text in texts:
        name, equals, where = text.partition("=")
        folder = Path(where if equals else text)
        if not folder.is_dir():
            raise UserError(
                f"--tasks {text}: no folder {folder}; name sets that preprocess/prepare_target.py wrote"
            )
        meta = open_target(folder).meta
        own = str(meta["task"]).lower(), str(meta["kind"]), int(meta["split"]["folds"]), fingerprint(meta)
        found[(name if equals else folder.resolve().name).lower()] = Target(folder, *own)
    if len(found) < max(1, len(texts)):
        raise UserError(
            f"--tasks {' '.join(texts)}: at least one, each name once; NAME=DIR gives a set a name"
        )
    return found


def slug(label: str) -> str:
    """A label as the name of a folder: `[1/16,1/4]` -> `1of16-1of4`."""
    plain = re.sub(r"[^a-z0-9.]+", "-", label.lower().replace("w/", "").replace("/", "of")).strip("-.")
    return plain or "run"


def _distinct(labels: Sequence[str], flag: str) -> None:
    names = [slug(label) for label in labels]
    twice = next((label for label, name in zip(labels, names, strict=True) if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{flag}: {twice} names the same folder twice; give every row a LABEL of its own")


def table1(common: Transfers, rows: Sequence[Start]) -> list[Job]:
    """Every starting point on every task, with all training data."""
    return [
        job
        for task in common.tasks
        for row in rows
        for job in common.jobs(task, row.init, row.label, {}, row.network)
    ]


def table2(common: Transfers, shards: str, recipe: str, ranks: int, more: Sequence[str]) -> list[Job]:
    """Six pretrainings, then each on every task; `w/ skips` fine-tunes the decoder too, where there is one."""
    jobs = []
    for parts in paper.TABLE2:
        run = common.out / "pretrained" / slug(parts.label)
        start = ("torchrun", "--standalone", f"--nproc_per_node={ranks}") if ranks > 1 else ("python",)
        what = ["--pretext.volume-fraction", repr(parts.low), repr(float(parts.high))]
        what += ["--pretext.skips"] if parts.skips else []
        where = ("--shards", shards, "--run-dir", str(run))
        command = (*start, str(common.launch / "train.py"), recipe, *where, *what, *more)
        jobs.append(Job(f"pretrain-{run.name}", run, command, 1, pretrains=True))
    pretrained = list(jobs)
    for task, target in common.tasks.items():
        for parts, before in zip(paper.TABLE2, pretrained, strict=True):
            decoder = "pretrained" if parts.skips and target.kind == SEGMENTATION else ""
            jobs += common.jobs(
                task, str(before.folder), parts.label, paper.FRACTIONS, decoder=decoder, needs=before.name
            )
    return jobs


def fig3(common: Transfers, run: Path, count: int) -> list[Job]:
    """Checkpoints spread evenly over a pretraining, each on every task."""
    steps = spread(validated(run), count)
    return [
        job
        for task in common.tasks
        for step in steps
        for job in common.jobs(task, f"{run}@{step}", f"step-{step:08d}", paper.FRACTIONS)
    ]


def validated(run: Path) -> list[int]:
    """Steps of the checkpoints of a run whose validation loss is logged. Raises UserError when there are fewer than two."""
    if not (run / "checkpoints").is_dir():
        raise UserError(f"{run}: holds no checkpoints; name the folder of a run with --pretrained")
    losses = {int(record["step"]) for record in read_metrics(run) if "val/loss" in record}
    kept = Checkpoints(run / "checkpoints").steps()
    both = [step for step in kept if step in losses]
    if len(both) < 2:
        raise UserError(
            f"{run}: {len(kept)} checkpoints, {len(both)} of them validated, and a correlation takes more; pretrain with "
            "--train.keep-every 1759, the steps between validations"
        )
    return both


def spread(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of `steps`, ascending: those nearest to evenly spaced places from the first to the last."""
    if len(steps) <= count:
        return list(steps)
    there = np.array(steps)
    left = np.ones(len(there), bool)
    for place in np.linspace(there[0], there[-1], count):
        left[np.argmin(np.where(left, np.abs(there - place), np.inf))] = False
    return [int(step) for step in there[~left]]
