"""Reads the folders of runs, of fine-tunings and of cross-validations for the report.

A missing, truncated or foreign file only loses its own information.
"""

import json
import math
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2w import config as settings
from p2w.errors import UserError
from p2w.log import read_metrics
from p2w.report.markup import several
from p2w.run_owner import run_state

MARKERS = ("config.json", "status.json", "run.json", "metrics.jsonl")
LARGEST_JSON = 64 << 20  # bytes; ours are a few kB
MANIFEST, RESULT, SUMMARY = "transfer.json", "result.json", "cross_validation.json"
LARGEST_ARRAYS = 256 << 20  # bytes of an unpacked predictions.npz that is drawn from

Record = dict[str, float]


@dataclass
class RunFacts:
    """The content of a run's files. `problems` has one line for each file that could not be read."""

    run: Path
    config: dict[str, Any] = field(default_factory=dict)  # "data.batch" -> 16
    status: dict[str, Any] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric, oldest first."""
        points = [(record["step"], record[name]) for record in self.records if name in record]
        return [step for step, _ in points], [value for _, value in points]

    def loss(self, of: str) -> str:
        """The metric to show for `of`, "train" or "val": the mean squared error, if it is one term of several."""
        return f"{of}/mse" if self.series("val/mse")[0] else f"{of}/loss"

    @property
    def state(self) -> str:
        """`running`, `finished`, `stopped early`, `told to stop`, `failed`; or `killed` if its process is gone."""
        return run_state(self.run, self.status)

    @property
    def last_start(self) -> dict[str, Any]:
        """Machine, data set and command of the newest start."""
        return self.starts[-1] if self.starts else {}

    def clocks(self) -> list[float]:
        """The times of all starts, in seconds since 1970."""
        return [clock for clock in map(_clock, self.starts) if not math.isnan(clock)]

    def training_seconds(self) -> float:
        """Seconds from each start to its last logged line, summed; NaN when unknown."""
        began = self.clocks()
        total = 0.0
        for first, following in pairwise([*began, math.inf]):
            # Times of records have milliseconds, times of starts only seconds.
            within = [r["time"] for r in self.records if first <= r.get("time", -1) < following]
            total += max(within, default=first) - first
        return total or math.nan


def read_run(run: Path) -> RunFacts:
    """Read everything that can be read. Raises UserError when the folder has no run."""
    if not any((run / name).exists() for name in MARKERS):
        found = "holds no run (no config.json, status.json, run.json, metrics.jsonl or transfer.json)"
        raise UserError(f"{run}: {found if run.is_dir() else 'no such folder'}; name a run folder")
    facts = RunFacts(run)
    tree = read_object(facts, "config.json")
    for group, values in tree.items():
        inner = settings.current_settings(group, values) if isinstance(values, dict) else {"": values}
        facts.config.update({f"{group}.{name}".rstrip("."): value for name, value in inner.items()})
    facts.status = read_object(facts, "status.json")
    starts = read_object(facts, "run.json").get("starts", [])
    facts.starts = [s for s in starts if isinstance(s, dict)] if isinstance(starts, list) else []
    facts.summary = read_object(facts, "analysis/summary.json")
    read_records(facts)
    return facts


def read_records(facts: RunFacts) -> None:
    """Fill `facts.records` from metrics.jsonl."""
    try:
        facts.records = [_numbers(record) for record in read_metrics(facts.run)]
    except (OSError, ValueError) as error:
        facts.problems.append(f"metrics.jsonl: not read ({_reason(error)})")


def defaults(facts: RunFacts) -> dict[str, Any]:
    """The default of every setting of the run, as JSON spells them."""
    changed = facts.last_start.get("changed_from")
    if isinstance(changed, dict):
        return facts.config | changed
    # A run of an earlier version did not write them down. Collecting them imports the pretexts' files, and so torch.
    flat: dict[str, Any] = json.loads(json.dumps(settings.flatten(settings.Config())))
    return flat


def number(value: object) -> float:
    """A JSON value as a float; NaN when it is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def floats(values: object) -> list[float]:
    """A JSON list as floats; empty when it is no list."""
    return [number(value) for value in values] if isinstance(values, list) else []


def child(tree: object, *names: str) -> dict[str, Any]:
    """The object below `names` in a JSON tree; empty when there is none."""
    for name in names:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}


def ends(values: Sequence[float]) -> tuple[float, float]:
    """First and last; NaN twice when there are none."""
    return (values[0], values[-1]) if values else (math.nan, math.nan)


def _numbers(record: dict[str, Any]) -> Record:
    """The numbers of a record; other values are left out."""
    kept = {name: number(value) for name, value in record.items() if type(value) in (int, float)}
    return {**kept, "step": float(int(record["step"]))}


def read_object(facts: RunFacts, name: str) -> dict[str, Any]:
    """The object in a JSON file; empty, and a line in `problems`, when it cannot be read."""
    path = facts.run / name
    if not path.exists():
        return {}
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        tree = json.loads(path.read_bytes())
        if not isinstance(tree, dict):
            raise ValueError(f"a {type(tree).__name__}, not an object")
        return tree
    except (OSError, ValueError, RecursionError) as error:
        facts.problems.append(f"{name}: not read ({_reason(error)})")
        return {}


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error).partition("\n")[0]


def _clock(start: dict[str, Any]) -> float:
    """The time of a start, in seconds since 1970; NaN when unknown."""
    try:
        return datetime.strptime(str(start["time"]), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except (KeyError, ValueError, OverflowError):
        return math.nan


@dataclass
class Trial:
    """One trial: its folder with its curves, and its result, which is empty while it is unfinished."""

    name: str
    facts: RunFacts
    result: dict[str, Any]

    @property
    def finished(self) -> bool:
        """Whether its result is there."""
        return self.result.get("state") == "finished"

    def metric(self, name: str) -> float:
        """The value of a metric on the test samples; NaN where there is none."""
        return number(child(self.result, "metrics").get(name))

    def interval(self, name: str) -> tuple[float, float]:
        """Its 95 % interval by patient; NaN twice where there is none."""
        return ends(floats(child(self.result, "ci95").get(name)))


@dataclass
class FineTuningFacts:
    """A fine-tuning as its files say. `run` has the recipe as `config`, the first command as its start, and all problems."""

    run: RunFacts
    manifest: dict[str, Any]
    folds: list[Path]  # of a cross-validation; else empty
    planned: int
    trials: list[Trial] = field(default_factory=list)

    @property
    def finished(self) -> list[Trial]:
        """The trials that have a result."""
        return [trial for trial in self.trials if trial.finished]

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics in the order of the results; the first is the one that tables compare."""
        return list(dict.fromkeys(name for trial in self.finished for name in child(trial.result, "metrics")))

    @property
    def state(self) -> str:
        """`finished`, or how many trials are."""
        done = len(self.finished)
        return "finished" if done == self.planned else f"{done} of {several(self.planned, 'trial')} finished"


def folders_of(run: Path) -> list[Path]:
    """The folders with trials: the run itself, or the folds of a cross-validation in order; [] for other folders."""
    if (run / MANIFEST).exists():
        return [run]
    numbered = [(re.fullmatch(r"fold-(\d{1,9})", path.name), path) for path in run.glob("fold-*")]
    return [path for _, path in sorted((int(m[1]), p) for m, p in numbered if m and (p / MANIFEST).exists())]


def read_trials(run: Path) -> FineTuningFacts:
    """Read everything that can be read of the folders of `folders_of`, of which there is one at least."""
    folders, facts = folders_of(run), RunFacts(run)
    trees = [read_object(facts, str((folder / MANIFEST).relative_to(run))) for folder in folders]
    manifest = next((tree for tree in trees if tree), {})
    facts.config = child(manifest, "recipe")
    facts.starts = [started] if (started := child(manifest, "started")) else []
    cross = folders != [run]
    # Folds that are not begun have no folder; how many there are is in the manifest of each.
    count = max(int(whole(child(manifest, "task").get("folds"))), len(folders)) if cross else 1
    found = FineTuningFacts(
        facts, manifest, folders if cross else [], count * int(whole(manifest.get("trials")))
    )
    if cross:
        facts.summary = read_object(facts, SUMMARY)
    for folder in folders:
        numbered = [(re.fullmatch(r"trial-(\d{1,9})", path.name), path) for path in folder.glob("trial-*")]
        for index, path in sorted((int(m[1]), p) for m, p in numbered if m):
            own = RunFacts(path)
            read_records(own)
            result = read_object(own, RESULT)
            name = f"{folder.name.replace('-', ' ')}, trial {index}" if cross else f"trial {index}"
            facts.problems += [f"{path.relative_to(run)}/{problem}" for problem in own.problems]
            found.trials.append(Trial(name, own, result))
    found.planned = max(found.planned, len(found.finished))
    return found


def whole(value: object) -> float:
    """A count of a JSON file; 0 where it is none."""
    count = number(value)
    return count if 0 <= count < 1e9 else 0.0


METRICS = {
    "iou": "IoU", "mean_iou": "mean IoU over thresholds", "dice": "Dice", "auc": "AUC", "r2": "R\u00b2",
    "mae": "mean absolute error",
    "hd95_mm": "95 % Hausdorff distance (mm)", "surface_dice": "surface Dice at 3 mm",
    "balanced_accuracy": "balanced accuracy", "accuracy": "accuracy",
}  # fmt: skip
POOLED = {"patient": ", mean over patients", "sample": ", mean over samples"}


def metric_words(name: str) -> str:
    """A metric's name in words: `dice_patient:liver` is "Dice, mean over patients: liver"."""
    base, colon, of = name.partition(":")
    stem, _, pooled = base.rpartition("_")
    if pooled in POOLED and stem in METRICS:
        said = ("AUC by patient" if stem == "auc" else METRICS[stem] + POOLED[pooled])  # fmt: skip
    else:
        said = METRICS.get(base, base.replace("_", " "))
    return said + (f": {of}" if colon else "")


def over_trials(found: FineTuningFacts, name: str) -> tuple[float, float, float, float]:
    """Mean, standard deviation and 95 % interval by patient of a metric, the last as the mean over trials.

    Of a finished cross-validation the mean and interval are those of all test samples of all folds together.
    """
    values = [v for v in (trial.metric(name) for trial in found.finished) if math.isfinite(v)]
    own = [i for i in (trial.interval(name) for trial in found.finished) if math.isfinite(sum(i))]
    spread = stdev(values) if len(values) > 1 else math.nan
    together = child(found.run.summary, "metrics", name)
    if together:
        return (
            number(together.get("all")),
            number(together.get("sd_of_folds")),
            *ends(floats(together.get("ci95"))),
        )
    low, high = (fmean(side) for side in zip(*own, strict=True)) if own else (math.nan, math.nan)
    return (fmean(values) if values else math.nan), spread, low, high


def scores(trial: Trial) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Probability and truth (N,) of a classification with one probability; empty for other kinds and unreadable files."""
    path = trial.facts.run / "predictions.npz"
    nothing = np.zeros(0), np.zeros(0, bool)
    try:
        with zipfile.ZipFile(path) as listing:
            if sum(member.file_size for member in listing.infolist()) > LARGEST_ARRAYS:
                return nothing
        with np.load(path, allow_pickle=False) as file:
            if not {"probability", "label"} <= set(file.files):
                return nothing
            score, label = np.asarray(file["probability"], np.float64), np.asarray(file["label"])
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError):
        return nothing
    known = score.shape == label.shape and score.ndim == 1 and bool(np.isfinite(score).all())
    return (score, label > 0.5) if known else nothing
