"""How well k nearest neighbours and a linear probe read a label from the features of a cohort."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray

from p2w import stats
from p2w.errors import UserError
from p2w.files import write_atomic
from p2w.inference.cohort import write_rows
from p2w.inference.embeddings import Features, read_embeddings, read_labels

USAGE = """What features tell about a label: k nearest neighbours and a linear probe, cross-validated by patient.

    p2w probe embeddings.parquet --labels labels.csv                     columns scan, label, and maybe patient
    p2w probe embeddings.parquet --labels clinic.csv --label kernel --folds 0    leave one patient out
    p2w probe embeddings.parquet --labels labels.csv --out probe.json --predictions probe.csv

Each scan is judged by a classifier that saw no scan of its patient; features are standardised on what that classifier saw.
Balanced accuracy (chance: one over the number of classes) and AUC over all scans, with 95 % intervals by patient.
"""
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class ProbeOptions:
    """Which features, which labels, and how they are divided."""

    embeddings: tyro.conf.Positional[Path]
    """The table of scans that p2w embed wrote."""
    labels: Path
    """CSV with a column `scan` (path below --scans of p2w embed, uid, name, identifier), one of labels, maybe patient."""
    label: str = "label"
    """The column of labels."""
    features: Features = "mean"
    """Which features of a scan; all: the three one after the other."""
    k: int = 5
    """Neighbours that vote; less where the rarest class has few scans to learn from."""
    strength: float = 1.0
    """Inverse weight of the linear probe's penalty (C of logistic regression)."""
    folds: int = 5
    """Parts of the cross-validation; at most as many as the rarest class has patients. 0: leave one patient out."""
    seed: int = 0
    """Seed of the division into folds."""
    salt: str = ""
    """The salt that p2w embed was given."""
    out: Path | None = None
    """Also write the figures as JSON."""
    predictions: Path | None = None
    """Also write a CSV with the probabilities of every scan."""


def main(argv: list[str]) -> int:
    """Parse, read, judge, print."""
    options = tyro.cli(ProbeOptions, args=argv, prog="p2w probe", description=USAGE)
    if options.k < 1 or options.strength <= 0 or options.folds < 0 or options.folds == 1:
        raise UserError(
            f"--k {options.k} --strength {options.strength} --folds {options.folds}: at least 1; above 0; 0 or from 2"
        )
    embeddings = read_embeddings(options.embeddings, options.features, options.salt)
    labels = read_labels(options.labels, options.label, embeddings, options.salt)
    values = embeddings.values[list(labels.rows)]
    classes = sorted(set(labels.labels))
    truth = np.array([classes.index(label) for label in labels.labels])
    splits, how = divide(truth, labels.patients, options.folds, options.seed, classes)
    counts = ", ".join(f"{label}: {int((truth == at).sum())}" for at, label in enumerate(classes))
    print(
        f"{len(truth)} scans of {len(set(labels.patients))} patients ({counts}); {values.shape[1]} features; {how}"
    )
    if not labels.known_patients:
        print(
            "patients are not known for all scans: scans without one count as one each (--groups, or a column patient)"
        )
    if labels.unknown:
        print(
            f"{len(labels.unknown)} scans of {options.labels} have no features, the first is {labels.unknown[0]}"
        )
    report: dict[str, Any] = {
        "classes": classes, "scans": len(truth), "patients": len(set(labels.patients)), "division": how,
        "features": options.features, "embeddings": embeddings.settings, "chance": 1 / len(classes),
    }  # fmt: skip
    found = {}
    for name, score in (
        (f"{options.k}-NN", nearest_scores(values, truth, splits, options.k)),
        ("linear", linear_scores(values, truth, splits, options.strength)),
    ):
        found[name] = score
        report[name] = judge(score, truth, labels.patients)
        print(f"{name:8} " + "   ".join(_said(kind, *of) for kind, of in report[name].items()))
    print(f"chance   balanced accuracy {1 / len(classes):.3f}, AUC 0.500")
    if options.out is not None:
        try:
            write_atomic(options.out, json.dumps(report, indent=2))
        except OSError as error:
            raise UserError(f"--out {options.out}: not written ({error.strerror}); name another") from error
    if options.predictions is not None:
        head = ["scan", "label", *(f"{name} {one}" for name in found for one in classes)]
        rows = (
            [
                embeddings.display_name(row),
                label,
                *(f"{value:.6f}" for score in found.values() for value in score[at]),
            ]
            for at, (row, label) in enumerate(zip(labels.rows, labels.labels, strict=True))
        )
        write_rows(options.predictions, head, rows)
    return 0


def _said(kind: str, value: float, low: float, high: float) -> str:
    return f"{kind} {value:.3f} [{low:.3f}, {high:.3f}]"


# Indices of the scans to learn from, and of those to test
Splits = list[tuple[NDArray[np.intp], NDArray[np.intp]]]


def divide(
    truth: NDArray[np.intp], patients: Sequence[str], folds: int, seed: int, classes: Sequence[str]
) -> tuple[Splits, str]:
    """Divide into folds of whole patients, each with about the same share of classes; the folds, and the rule in words.

    Raises UserError unless there are two classes of two patients each.
    """
    from sklearn.model_selection import LeaveOneGroupOut, StratifiedGroupKFold  # noqa: PLC0415  (2 s of imports)

    owners = np.array([list(dict.fromkeys(patients)).index(patient) for patient in patients])
    of_class = [len(set(owners[truth == at])) for at in range(len(classes))]
    if len(classes) < 2 or min(of_class) < 2:
        scarce = classes[int(np.argmin(of_class))]
        raise UserError(
            f"label {scarce!r} is that of {min(of_class)} patient(s), of {len(classes)} class(es): two classes of two "
            "patients each are the least; merge classes, or leave rare ones empty in the table"
        )
    if folds == 0:
        splits = list(LeaveOneGroupOut().split(truth, truth, owners))
        how = "leave one patient out"
    else:
        count = min(folds, *of_class)
        splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
        splits = list(splitter.split(truth, truth, owners))
        how = f"{count} folds by patient" + (
            f" (--folds {folds}: the rarest class has {count})" if count < folds else ""
        )
    for learn, judged in splits:
        if len(set(truth[learn])) < len(classes):
            lost = next(one for at, one in enumerate(classes) if at not in truth[learn])
            raise UserError(
                f"no scan of label {lost!r} is left to learn from beside {len(judged)} that are judged; pass another "
                "--seed, fewer --folds, or --folds 0"
            )
    return splits, how


def nearest_scores(values: Doubles, truth: NDArray[np.intp], splits: Splits, k: int) -> Doubles:
    """Probabilities (N, classes) by the k nearest scans, by the cosine of standardised features.

    Every class counts alike, however many scans it has: a neighbour's vote is divided by the share of its class. Where the
    rarest class has r scans to learn from, at most 2 r - 1 neighbours vote: among more, its own could never be the majority.
    """
    from sklearn.neighbors import NearestNeighbors  # noqa: PLC0415

    classes = int(truth.max()) + 1
    scores = np.zeros((len(truth), classes))
    for learn, judged in splits:
        known, asked = _standardised(values, learn, judged)
        count = min(k, 2 * int(np.bincount(truth[learn], minlength=classes).min()) - 1)
        near = NearestNeighbors(n_neighbors=count, metric="cosine").fit(known)
        found = truth[learn][near.kneighbors(asked, return_distance=False)]
        share = np.bincount(truth[learn], minlength=classes) / len(learn)
        votes = np.stack([(found == at).sum(1) for at in range(classes)], 1) / share
        scores[judged] = votes / votes.sum(1, keepdims=True)
    return scores


def linear_scores(values: Doubles, truth: NDArray[np.intp], splits: Splits, strength: float) -> Doubles:
    """Probabilities (N, classes) by logistic regression on standardised features, classes weighted alike."""
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415

    scores = np.zeros((len(truth), int(truth.max()) + 1))
    for learn, judged in splits:
        known, asked = _standardised(values, learn, judged)
        model = LogisticRegression(C=strength, class_weight="balanced", max_iter=5000)
        scores[judged] = model.fit(known, truth[learn]).predict_proba(asked)
    return scores


def _standardised(
    values: Doubles, learn: NDArray[np.intp], judged: NDArray[np.intp]
) -> tuple[Doubles, Doubles]:
    """Mean 0 and deviation 1 of every feature over the scans to learn from; features without spread become 0."""
    known = values[learn]
    mean, spread = known.mean(0), known.std(0)
    spread = np.where(spread > 1e-12 * np.abs(known).max(initial=1e-300), spread, np.inf)
    return (known - mean) / spread, (values[judged] - mean) / spread


Figure = tuple[float, float, float]  # value, and the ends of its 95 % interval


def judge(scores: Doubles, truth: NDArray[np.intp], patients: Sequence[str]) -> dict[str, Figure]:
    """Balanced accuracy, and of two classes the AUC of the second; of more the mean AUC of each against the others.

    Intervals are by patient. Where every scan is right, resampling finds no spread: the lower end is then that of n
    successes in n trials, where n is the number of patients of the rarest class. One AUC compares scores of all folds.
    """
    hit = (scores.argmax(1) == truth).astype(np.float64)
    members = [(truth == at).astype(np.float64) for at in range(scores.shape[1])]

    def balanced(weights: Doubles) -> float:
        totals = np.array([weights @ of for of in members])
        return float(np.mean([weights @ (of * hit) for of in members] / totals)) if totals.all() else math.nan

    positives = range(1, 2) if len(members) == 2 else range(len(members))
    areas = [stats.weighted_auc(scores[:, at], truth == at) for at in positives]

    def auc(weights: Doubles) -> float:
        return float(np.mean([area(weights) for area in areas]))

    rarest = min(len({patients[int(row)] for row in np.flatnonzero(of)}) for of in members)

    def with_interval(statistic: Callable[[Doubles], float]) -> Figure:
        value = statistic(np.ones(len(truth)))
        if value >= 1:
            return 1.0, stats.TAIL ** (1 / rarest), 1.0
        return value, *stats.bootstrap(statistic, patients)

    return {"balanced accuracy": with_interval(balanced), "AUC": with_interval(auc)}
