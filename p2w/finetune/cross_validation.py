"""k-fold cross-validation by patient: every patient is tested once, by a network that never saw one of their scans.

    RUN/fold-0/ … fold-4/       a run each, as of a set with folds: transfer.json, trial-00 …
    RUN/cross_validation.json   the summary, written when all trials of all folds are finished

Folds are a function of the set and of their number: the same for every starting point, recipe and machine.
"""

import json
import math
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch

from p2w.errors import UserError
from p2w.files import write_atomic
from p2w.finetune.results import RUN_MANIFEST, read_fine_tuning
from p2w.finetune.task_types import TaskType
from p2w.finetune.trial import PREDICTIONS, folder_of
from p2w.tasks.reader import TargetSet
from p2w.tasks.task import assign_folds, check_folds

SUMMARY = "cross_validation.json"
VAL_FRACTION = 0.15  # of the patients who are not tested on: `p2w prepare`'s own default


def with_folds(source: TargetSet, folds: int) -> TargetSet:
    """The set with its patients dealt to folds, whatever split it was prepared with.

    Raises UserError for fewer patients than folds, and for a set that has another number of folds already.
    """
    check_folds(folds, VAL_FRACTION)
    if source.folds == folds:
        return source
    if source.folds:
        raise UserError(
            f"--folds {folds}: {source.where} has {source.folds} folds of its own; leave it out, or pass that"
        )
    patients = set(source.patient)
    if len(patients) < folds:
        raise UserError(f"--folds {folds}: {source.where} has {len(patients)} patients; pass fewer folds")
    seed = int(source.meta["split"].get("seed", 0))
    fold_of = assign_folds(patients, folds, seed)
    scans: dict[str, list[str]] = defaultdict(list)
    for uid, patient in dict(zip(source.scan_uid, source.patient, strict=True)).items():
        scans[str(fold_of[patient])].append(uid)
    rule = f"{folds} folds by patient, dealt in the order of sha256(seed:patient); val from the rest alike"
    split = {
        **source.meta["split"], "rule": rule, "seed": seed, "folds": folds, "val_fraction": VAL_FRACTION,
        "scans": dict(sorted(scans.items())),
    }  # fmt: skip
    fold = np.array([fold_of[patient] for patient in source.patient], np.int16)
    return replace(source, meta={**source.meta, "split": split}, fold=fold)


def fold_folder(run: Path, fold: int) -> Path:
    """The folder of a fold of a cross-validation."""
    return run / f"fold-{fold}"


def folds_of_run(run: Path) -> list[Path]:
    """The folders of the folds in a cross-validation's folder, in order; empty for any other folder."""
    found = [(path, re.fullmatch(r"fold-(\d+)", path.name)) for path in run.glob("fold-*")]
    numbered = [(int(name[1]), path) for path, name in found if name and (path / RUN_MANIFEST).is_file()]
    return [path for _, path in sorted(numbered)]


def summarise_folds(run: Path, folds: int, kind: TaskType) -> dict[str, Any] | None:
    """The summary of a cross-validation, as JSON writes it; None while trials are missing.

    Of each metric: its value over the test samples of all folds together with the 95 % interval by patient (`all`, `ci95`),
    and mean and standard deviation over the folds' own values. Of several trials, each of these is the mean over trials.
    Raises UserError for folds that are damaged, or of different settings.
    """
    found = [
        read_fine_tuning(fold_folder(run, fold)) for fold in range(folds) if fold_folder(run, fold).is_dir()
    ]
    if len(found) < folds or not all(one.finished for one in found):
        return None
    first = found[0]
    for one in found[1:]:
        alike = (
            "fingerprint", "source", "network", "width", "decoder", "fraction", "planned", "recipe",
            "of_folds",
        )  # fmt: skip
        wrong = [name for name in alike if getattr(one, name) != getattr(first, name)]
        if wrong:
            raise UserError(
                f"{one.folder}: its {wrong[0]} is not that of {first.folder}; repeat the command that began them"
            )
    metrics: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    tested: set[str] = set()
    for index in range(first.planned):
        parts = [_predictions(folder_of(one.folder, index) / PREDICTIONS) for one in found]
        records = torch.from_numpy(np.concatenate([part["records"] for part in parts]))
        patients = [str(name) for part in parts for name in part["patient"]]
        tested |= set(patients)
        together, intervals = kind.judge(records, patients)
        for name, value in together.items():
            each = [one.trials[index].metrics[name] for one in found if name in one.trials[index].metrics]
            row = metrics[name]
            row["all"].append(value)
            row["low"].append(intervals[name][0])
            row["high"].append(intervals[name][1])
            row["mean_of_folds"].append(fmean(each) if each else math.nan)
            row["sd_of_folds"].append(stdev(each) if len(each) > 1 else math.nan)
    summary = {}
    for name, row in metrics.items():
        mean = {key: _number(fmean(values)) for key, values in row.items()}
        low, high = mean.pop("low"), mean.pop("high")
        summary[name] = {**mean, "ci95": [low, high]}
    return {
        "task": first.task, "kind": first.kind, "label": first.label, "folds": folds, "trials": first.planned,
        "patients": len(tested), "metrics": summary,
    }  # fmt: skip


def _predictions(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {"records": arrays["records"], "patient": arrays["patient"]}
    except (OSError, ValueError, LookupError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); delete the trial's folder and repeat the command"
        ) from error


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def report_folds(run: Path, folds: int, kind: TaskType) -> None:
    """Write and print the summary of a cross-validation, or say which folds are missing."""
    summary = summarise_folds(run, folds, kind)
    if summary is None:
        missing = [fold for fold in range(folds) if not _is_done(fold_folder(run, fold))]
        print(
            f"{run}: folds {', '.join(map(str, missing))} are not finished; the summary comes with the last"
        )
        return
    try:
        write_atomic(run / SUMMARY, json.dumps(summary, indent=2))
    except OSError as error:
        raise UserError(f"{run / SUMMARY}: {error.strerror}; repeat the command") from error
    print(
        f"{folds} folds, {summary['patients']} patients, each tested once; {summary['trials']} trial(s) a fold"
    )
    for name, row in summary["metrics"].items():
        low, high = map(_figure, row["ci95"])
        spread = "" if row["sd_of_folds"] is None else f" +- {_figure(row['sd_of_folds'])}"
        mean = _figure(row["mean_of_folds"])
        print(f"{name:14} {_figure(row['all'])} ({low} to {high} by patient)   folds {mean}{spread}")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _is_done(folder: Path) -> bool:
    try:
        return read_fine_tuning(folder).finished
    except UserError:
        return False
