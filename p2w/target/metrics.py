"""What a trial is judged by, from one record a sample, so that ranks need gather no volume. NumPy; float64.

Segmentation, all of the test set's voxels *pooled* unless the name says otherwise (FACTS 3, "Which IoU"):

    iou            foreground: intersection / union of mask and probability > 0.5      (compared for LCS, BMS)
    mean_iou       mean of background and foreground IoU, averaged over thresholds 0.50, 0.55 … 0.95   (compared for NCS)
    dice           2 x intersection / (predicted + true), probability > 0.5
    iou_sample, dice_sample      mean over samples; where mask and prediction are both empty it is 1
    iou_patient, dice_patient    voxels pooled by patient, then the mean over patients

Classification:

    auc            area under the ROC curve over samples
    auc_patient    over patients: the highest probability of a patient's samples, against whether any is positive
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from p2w.target import intervals

Floats = NDArray[np.float64]
Measures = dict[str, float]
Intervals = dict[str, intervals.Interval]

THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
HIT, PREDICTED, TRUE, VOXELS = range(4)  # columns of a sample's counts


def segmentation(counts: NDArray[np.int64], patients: Sequence[str]) -> tuple[Measures, Intervals]:
    """Counts (N, T, 4) a sample and threshold: voxels hit, predicted, true, all -> metrics and their 95 % intervals."""
    table = np.asarray(counts, np.float64)
    per_patient = _pooled(table, patients)
    half, whole = table[:, 0], per_patient[:, 0]
    found = {
        "iou": float(iou(half.sum(0))),
        "mean_iou": mean_iou(table.sum(0)),
        "dice": float(dice(half.sum(0))),
        "iou_sample": float(iou(half).mean()),
        "dice_sample": float(dice(half).mean()),
        "iou_patient": float(iou(whole).mean()),
        "dice_patient": float(dice(whole).mean()),
    }
    # Voxels of a patient are drawn together, so that one row a patient gives the very intervals, sooner.
    names = list(dict.fromkeys(patients))
    hits, union = whole[:, HIT], whole[:, PREDICTED] + whole[:, TRUE] - whole[:, HIT]
    sure = {
        "iou": intervals.ratio_interval(hits, union, names),
        "mean_iou": intervals.bootstrap(lambda w: mean_iou(np.tensordot(w, per_patient, 1)), names),
        "dice": intervals.ratio_interval(2 * hits, whole[:, PREDICTED] + whole[:, TRUE], names),
        "iou_sample": intervals.mean_interval(iou(half), patients),
        "dice_sample": intervals.mean_interval(dice(half), patients),
        "iou_patient": intervals.mean_interval(iou(whole), names),
        "dice_patient": intervals.mean_interval(dice(whole), names),
    }
    return found, sure


def classification(probability: Floats, label: Floats, patients: Sequence[str]) -> tuple[Measures, Intervals]:
    """Probabilities (N,) and labels (N,) of 0 and 1 -> metrics and their 95 % intervals, by patient.

    Where no patient is free of positives, or none has any, there is no `auc_patient`. Raises ValueError for one class alone.
    """
    from sklearn.metrics import roc_auc_score  # noqa: PLC0415  (a second of imports)

    score, truth = np.asarray(probability, np.float64), np.asarray(label) > 0.5
    found = {"auc": float(roc_auc_score(truth, score))}
    sure = {"auc": intervals.auc_interval(score, truth, list(patients))}
    owner = _numbers(patients)
    highest, positive = np.full(owner.max() + 1, -np.inf), np.zeros(owner.max() + 1, bool)
    np.maximum.at(highest, owner, score)
    np.logical_or.at(positive, owner, truth)
    if positive.any() and not positive.all():
        found["auc_patient"] = float(roc_auc_score(positive, highest))
        sure["auc_patient"] = intervals.auc_interval(highest, positive)
    return found, sure


def iou(counts: Floats) -> Floats:
    """Foreground IoU of counts (…, 4) -> (…); 1 where there is nothing and nothing is predicted."""
    return _ratio(counts[..., HIT], counts[..., PREDICTED] + counts[..., TRUE] - counts[..., HIT])


def dice(counts: Floats) -> Floats:
    """Dice of counts (…, 4) -> (…); 1 where there is nothing and nothing is predicted."""
    return _ratio(2 * counts[..., HIT], counts[..., PREDICTED] + counts[..., TRUE])


def mean_iou(counts: Floats) -> float:
    """Mean over thresholds of the mean of foreground and background IoU, counts (T, 4)."""
    missed = counts[..., TRUE] - counts[..., HIT]
    false = counts[..., PREDICTED] - counts[..., HIT]
    clear = counts[..., VOXELS] - counts[..., HIT] - missed - false  # background in both
    return float((iou(counts) + _ratio(clear, clear + missed + false)).mean() / 2)


def _ratio(above: Floats, below: Floats) -> Floats:
    return np.where(below > 0, above / np.maximum(below, 1), 1.0)


def _pooled(table: Floats, patients: Sequence[str]) -> Floats:
    """One row a patient, in the order of their first samples."""
    owner = _numbers(patients)
    pooled = np.zeros((owner.max() + 1, *table.shape[1:]))
    np.add.at(pooled, owner, table)
    return pooled


def _numbers(patients: Sequence[str]) -> NDArray[np.intp]:
    """A number for every patient, in the order of their first samples."""
    known: dict[str, int] = {}
    return np.array([known.setdefault(patient, len(known)) for patient in patients], np.intp)
