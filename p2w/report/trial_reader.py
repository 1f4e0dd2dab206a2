"""Reads a fine-tuning, or all folds of a cross-validation, for the report; what is missing or damaged costs only itself."""

import math
import re
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2w.report.markup import several
from p2w.report.run_reader import RunFacts, child, ends, floats, number, read_object, read_records

MANIFEST, RESULT, SUMMARY = "transfer.json", "result.json", "cross_validation.json"
LARGEST_ARRAYS = 256 << 20  # bytes of an unpacked predictions.npz that is drawn from


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
