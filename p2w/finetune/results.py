"""What fine-tuning left behind, read back: one folder a starting point on a task, one result a trial.

    DIR/transfer.json           what was run
    DIR/trial-00/result.json    one trial: its seed and its metrics on the test cases

A trial that is unfinished or damaged is named in `problems` and left out; so is a folder whose transfer.json is damaged.
"""

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from p2w.errors import UserError, first_line
from p2w.files import parse_json, type_mismatch
from p2w.finetune.recipe import MAY_CHANGE, current_names

RUN_MANIFEST, RESULT = "transfer.json", "result.json"
# Beginnings of the names of metrics that are no shares of 1: millimetres, the unit of a table, a value that may be below 0.
UNITS = ("hd95_mm", "mae", "r2")
LARGEST = 1 << 22  # bytes; ours are a few kB
MOST = 10**12

INIT = {"label": str, "source": str}
INIT_MAY = {  # what is known of the pretraining; null or absent where it is not
    "step": (int, None),
    "val_mse": (float, None),
    "volume_fraction": ([float], None),
    "skips": (bool, None),
}
SETTINGS = {
    "task": {"name": str, "fingerprint": str, "kind": str},
    "network": str,
    "fraction": float,
    "decoder": str,
    "trials": int,
}
TRIAL = {"trial": int, "seed": int, "state": str}


@dataclass(frozen=True)
class TrialResult:
    """One finished trial: its metrics on the test cases, in [0, 1], by name."""

    index: int
    seed: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class FineTuningResult:
    """A starting point fine-tuned on a task: settings, finished trials by index, how many were planned."""

    folder: Path
    task: str
    kind: str
    fingerprint: str
    label: str
    source: str
    network: str
    decoder: str
    fraction: float
    planned: int
    step: int | None = None
    val_mse: float | None = None
    volume_fraction: tuple[float, float] | None = None
    skips: bool | None = None
    fold: int | None = None
    folds: tuple[int, ...] = ()  # where runs of several folds were joined: which
    of_folds: int = 0  # how many the target set has
    width: int | None = None
    recipe: dict[str, Any] = field(default_factory=dict)  # what decides the outcome, where it is known
    trials: tuple[TrialResult, ...] = ()
    problems: tuple[str, ...] = field(default=(), compare=False)

    @property
    def test_set(self) -> str:
        """The name of what it was tested on: target set, and fold where there are folds."""
        if self.folds:
            return f"{self.fingerprint} folds {', '.join(map(str, self.folds))}"
        return self.fingerprint + ("" if self.fold is None else f" fold {self.fold}")

    @property
    def finished(self) -> bool:
        """Whether no trial is left to do."""
        return len(self.trials) == self.planned

    def metric(self, name: str) -> dict[int, tuple[int, float]]:
        """Seed and value of a metric by index of the trial; those that lack it are left out."""
        return {t.index: (t.seed, t.metrics[name]) for t in self.trials if name in t.metrics}


def find_fine_tunings(folders: Iterable[Path]) -> list[Path]:
    """Folders that hold a transfer.json, at or below the given ones. Raises UserError where a folder has none."""
    found: dict[Path, Path] = {}
    for top in folders:
        if not top.is_dir():
            raise UserError(f"{top}: no such folder; name folders that p2w finetune wrote")
        before = len(found)
        already = False
        for folder, inside, files in os.walk(top):
            if RUN_MANIFEST in files:
                already |= Path(folder).resolve() in found
                found.setdefault(Path(folder).resolve(), Path(folder))
                inside.clear()
            inside[:] = sorted(name for name in inside if not name.startswith("."))
        if len(found) == before and not already:
            raise UserError(f"{top}: no {RUN_MANIFEST} in it or below; name folders that p2w finetune wrote")
    return list(found.values())


def collect(folders: Iterable[Path]) -> tuple[list[FineTuningResult], list[str]]:
    """Every run of fine-tuning at or below `folders`, and one line for each that is damaged or has unfinished trials."""
    read_ones, problems = [], []
    for folder in find_fine_tunings(folders):
        try:
            one = read_fine_tuning(folder)
        except UserError as error:
            problems.append(str(error))
            continue
        read_ones.append(one)
        problems += one.problems
    return read_ones, problems


def read_fine_tuning(folder: Path) -> FineTuningResult:
    """Read one run of fine-tuning. Raises UserError in one line when its transfer.json is missing or damaged."""
    path = folder / RUN_MANIFEST
    tree = _parse(path, SETTINGS | {"init": INIT})
    init, task = tree["init"], tree["task"]
    may = {key: form for key, form in INIT_MAY.items() if key in init}
    later = {"fold": (int, None), "width": (int, None), "recipe": ({}, None)}
    said = type_mismatch(init, may, "'init' of it") or type_mismatch(
        {"folds": task.get("folds", 0)} | {key: tree.get(key) for key in later}, later | {"folds": int}
    )
    if said:
        raise UserError(f"{path}: damaged ({said}); repeat the command that wrote it")
    limits = init.get("volume_fraction")
    sound = {
        "volume_fraction": limits is None or (len(limits) == 2 and 0 < limits[0] <= limits[1] <= 1),
        "val_mse": init.get("val_mse") is None or 0 <= init["val_mse"] < MOST,
        "step": init.get("step") is None or 0 <= init["step"] < MOST,
        "fraction": 0 < tree["fraction"] <= 1,
        "trials": 1 <= tree["trials"] <= 1000,
    }
    if wrong := next((name for name, good in sound.items() if not good), None):
        said = f"{wrong} is {str(init.get(wrong, tree.get(wrong)))[:40]}"
        raise UserError(f"{path}: damaged ({said}); repeat the command that wrote it")
    trials, problems = _trials(folder, tree["trials"])
    return FineTuningResult(
        folder, task["name"].lower(), task["kind"], task["fingerprint"], init["label"], init["source"],
        tree["network"], tree["decoder"], float(tree["fraction"]), tree["trials"], init.get("step"),
        init.get("val_mse"), None if limits is None else (float(limits[0]), float(limits[1])), init.get("skips"),
        tree.get("fold"), (), task.get("folds", 0), tree.get("width"), _kept(tree.get("recipe") or {}),
        tuple(trials), tuple(problems),
    )  # fmt: skip


def _kept(recipe: dict[str, Any]) -> dict[str, Any]:
    """The settings of a recipe that decide the outcome, as far as they are plain values."""
    plain = {
        name: value for name, value in current_names(recipe).items() if isinstance(value, str | int | float)
    }
    return {name: value for name, value in plain.items() if name not in MAY_CHANGE}


def _trials(folder: Path, planned: int) -> tuple[list[TrialResult], list[str]]:
    """The finished trials by index, and one line for each problem with the others."""
    numbers = [re.fullmatch(r"trial-(\d+)", path.name) for path in folder.glob("trial-*")]
    there = {int(name[1]): folder / name[0] for name in numbers if name}
    trials, problems, unfinished = [], [], [index for index in range(planned) if index not in there]
    for index, own in sorted(there.items()):
        try:
            trial = _trial(own / RESULT, index)
        except UserError as error:
            problems.append(str(error))
            continue
        if index >= planned:
            problems.append(f"{own}: beyond the {planned} trials of {RUN_MANIFEST}; left out")
        elif trial is None:
            unfinished.append(index)
        else:
            trials.append(trial)
    if unfinished:
        which = ", ".join(map(str, sorted(unfinished)))
        problems.append(f"{folder}: {len(trials)} of {planned} trials are finished; left out: {which}")
    seeds = [trial.seed for trial in trials]
    if len(set(seeds)) < len(seeds):
        twice = next(seed for seed in seeds if seeds.count(seed) > 1)
        problems.append(f"{folder}: trials share the seed {twice}; they are no independent trials")
    return trials, problems


def _trial(path: Path, index: int) -> TrialResult | None:
    """Read one trial; None while it is unfinished. Raises UserError when its file is damaged."""
    if not path.exists():
        return None
    tree = _parse(path, TRIAL)
    if tree["trial"] != index:
        raise UserError(f"{path}: damaged (it is of trial {tree['trial']}); delete it and repeat the command")
    if tree["state"] != "finished":
        return None
    metrics = tree.get("metrics")
    if not isinstance(metrics, dict) or not all(type_mismatch(v, float) is None for v in metrics.values()):
        raise UserError(f"{path}: damaged (metrics are no numbers by name); delete it and repeat the command")
    wrong = [
        name
        for name, value in metrics.items()
        if not math.isfinite(value) or (is_share(name) and not 0 <= value <= 1)
    ]
    if wrong:
        said = f"{wrong[0]} is {metrics[wrong[0]]}, not within 0 and 1"
        raise UserError(f"{path}: damaged ({said}); delete it and repeat the command")
    return TrialResult(index, tree["seed"], {name: float(value) for name, value in metrics.items()})


def is_share(metric: str) -> bool:
    """Whether a metric lies in [0, 1], by its name."""
    return metric.partition(":")[0] not in UNITS


def _parse(path: Path, form: dict[str, Any]) -> Any:
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        return parse_json(path.read_bytes(), form)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a folder that p2w finetune wrote") from error
    except ValueError as error:
        said = first_line(error)
        raise UserError(
            f"{path}: damaged ({said}); delete it and repeat the command that wrote it"
        ) from error
