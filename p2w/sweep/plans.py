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
from p2w.train.checkpoint import Checkpoints


@dataclass(frozen=True)
class Transfers:
    """What all fine-tunings of a sweep have in common."""

    launch: Path  # where transfer.py and train.py lie
    tasks: Mapping[str, Path]  # name -> folder of the target set
    out: Path
    trials: int
    fraction: Mapping[str, float]  # by task, "" for all
    width: int | None = None
    more: tuple[str, ...] = ()  # further arguments of launch/transfer.py

    def job(
        self,
        task: str,
        init: str,
        label: str,
        share: float,
        network: str = "",
        decoder: str = "",
        needs: str = "",
    ) -> Job:
        """One command of launch/transfer.py."""
        folder = self.out / task / slug(label)
        share = self.fraction.get(task, self.fraction.get("", share))
        flags: list[object] = [
            "--task",
            self.tasks[task],
            "--init",
            init,
            "--label",
            label,
            "--trials",
            self.trials,
        ]
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
        return Job(f"{task}-{folder.name}", folder, command, self.trials, needs=needs)


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


def tasks(texts: Sequence[str]) -> dict[str, Path]:
    """`NAME=DIR`, or `DIR` whose last part is the name. Raises UserError for a folder that is none."""
    found = {}
    for text in texts:
        name, equals, where = text.partition("=")
        folder = Path(where if equals else text)
        if not folder.is_dir():
            raise UserError(
                f"--tasks {text}: no folder {folder}; name sets that preprocess/prepare_target.py wrote"
            )
        found[(name if equals else folder.resolve().name).lower()] = folder
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
    return [common.job(task, row.init, row.label, 1.0, row.network) for task in common.tasks for row in rows]


def table2(common: Transfers, shards: str, recipe: str, ranks: int, more: Sequence[str]) -> list[Job]:
    """Six pretrainings, then each on every task; `w/ skips` fine-tunes the decoder too."""
    jobs = []
    for parts in paper.TABLE2:
        run = common.out / "pretrained" / slug(parts.label)
        start = ("torchrun", "--standalone", f"--nproc_per_node={ranks}") if ranks > 1 else ("python",)
        what = ["--pretext.volume-fraction", repr(parts.low), repr(float(parts.high))]
        what += ["--pretext.skips"] if parts.skips else []
        where = ("--shards", shards, "--run-dir", str(run))
        command = (*start, str(common.launch / "train.py"), recipe, *where, *what, *more)
        jobs.append(Job(f"pretrain-{run.name}", run, command, 1, pretrains=True))
    for task in common.tasks:
        for parts, before in zip(paper.TABLE2, list(jobs), strict=False):
            decoder = "pretrained" if parts.skips else ""
            share = paper.FRACTIONS.get(task, 1.0)
            jobs.append(common.job(task, str(before.folder), parts.label, share, "", decoder, before.name))
    return jobs


def fig3(common: Transfers, run: Path, count: int) -> list[Job]:
    """Checkpoints spread evenly over a pretraining, each on every task."""
    steps = spread(validated(run), count)
    return [
        common.job(task, f"{run}@{step}", f"step-{step:08d}", paper.FRACTIONS.get(task, 1.0))
        for task in common.tasks
        for step in steps
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
