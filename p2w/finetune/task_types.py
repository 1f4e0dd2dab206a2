"""Types of target tasks: the loss, what is kept of a sample to judge it by, and the metrics over all samples.

A kind is picked by the set's `meta["kind"]`; the loop knows neither.
Shapes: B, C, D, H, W = batch, channel, slice, row, column.

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
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from p2w import stats
from p2w.errors import UserError
from p2w.world import World, all_reduce_sum

Floats = NDArray[np.float64]
Measures = dict[str, float]
Intervals = dict[str, stats.Interval]

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
        "iou": stats.ratio_interval(hits, union, names),
        "mean_iou": stats.bootstrap(lambda w: mean_iou(np.tensordot(w, per_patient, 1)), names),
        "dice": stats.ratio_interval(2 * hits, whole[:, PREDICTED] + whole[:, TRUE], names),
        "iou_sample": stats.mean_interval(iou(half), patients),
        "dice_sample": stats.mean_interval(dice(half), patients),
        "iou_patient": stats.mean_interval(iou(whole), names),
        "dice_patient": stats.mean_interval(dice(whole), names),
    }
    return found, sure


def classification(probability: Floats, label: Floats, patients: Sequence[str]) -> tuple[Measures, Intervals]:
    """Probabilities (N,) and labels (N,) of 0 and 1 -> metrics and their 95 % intervals, by patient.

    Where no patient is free of positives, or none has any, there is no `auc_patient`. Raises ValueError for one class alone.
    """
    from sklearn.metrics import roc_auc_score  # noqa: PLC0415  (a second of imports)

    score, truth = np.asarray(probability, np.float64), np.asarray(label) > 0.5
    found = {"auc": float(roc_auc_score(truth, score))}
    sure = {"auc": stats.auc_interval(score, truth, list(patients))}
    owner = _numbers(patients)
    highest, positive = np.full(owner.max() + 1, -np.inf), np.zeros(owner.max() + 1, bool)
    np.maximum.at(highest, owner, score)
    np.logical_or.at(positive, owner, truth)
    if positive.any() and not positive.all():
        found["auc_patient"] = float(roc_auc_score(positive, highest))
        sure["auc_patient"] = stats.auc_interval(highest, positive)
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


SMOOTH = 1.0  # of soft Dice (FACTS 4)


class TaskType(Protocol):
    """What the loop needs of a task."""

    name: str

    def loss(self, logits: Tensor, target: Tensor, batch: int, world: World) -> Tensor:
        """Of this rank's share of a batch of `batch` samples; the mean over ranks is the loss of the batch."""

    def record(self, logits: Tensor, target: Tensor) -> Tensor:
        """(B, …) float64 on the device: all that loss and metrics need of each sample."""

    def loss_of(self, records: Tensor) -> float:
        """The loss of a batch of records, as `loss` would give it."""

    def judge(self, records: Tensor, patients: list[str]) -> tuple[Measures, Intervals]:
        """Metrics and their 95 % intervals."""

    def keep(self, records: Tensor) -> dict[str, NDArray[Any]]:
        """Arrays for predictions.npz, one entry a sample."""


class Classification:
    """One answer a sample; binary cross-entropy."""

    name = "classification"

    def loss(self, logits: Tensor, target: Tensor, batch: int, world: World) -> Tensor:
        """Logits (B,), labels (B,)."""
        return binary_cross_entropy_with_logits(logits, target, reduction="sum") * (world.size / batch)

    def record(self, logits: Tensor, target: Tensor) -> Tensor:
        """(B, 2): logit, label."""
        return torch.stack((logits.double(), target.double()), 1)

    def loss_of(self, records: Tensor) -> float:
        """Mean over samples."""
        return float(binary_cross_entropy_with_logits(records[:, 0], records[:, 1]))

    def judge(self, records: Tensor, patients: list[str]) -> tuple[Measures, Intervals]:
        """By logits, which order as probabilities do and never tie where those round to 1."""
        return classification(records[:, 0].numpy(), records[:, 1].numpy(), patients)

    def keep(self, records: Tensor) -> dict[str, NDArray[Any]]:
        """Probability and label."""
        return {
            "probability": torch.sigmoid(records[:, 0]).numpy(),
            "label": records[:, 1].numpy().astype(np.int8),
        }


class Segmentation:
    """One answer a voxel; soft Dice over the flattened batch."""

    name = "segmentation"

    def loss(self, logits: Tensor, target: Tensor, batch: int, world: World) -> Tensor:
        """Logits (B, 1, D, H, W), masks of 0 and 1 of that shape."""
        return soft_dice(all_reduce_sum(_soft(logits, target).sum(0), world))

    def record(self, logits: Tensor, target: Tensor) -> Tensor:
        """(B, 3 + 4 T): soft sums, then counts at each threshold."""
        probability = torch.sigmoid(logits)
        mask = target > 0.5
        true = mask.sum((1, 2, 3, 4)).double()
        columns = [_soft(logits, target).double()]
        for threshold in THRESHOLDS:
            predicted = probability > threshold
            hit = (predicted & mask).sum((1, 2, 3, 4)).double()
            everything = torch.full_like(true, mask[0].numel())
            columns.append(torch.stack((hit, predicted.sum((1, 2, 3, 4)).double(), true, everything), 1))
        return torch.cat(columns, 1)

    def loss_of(self, records: Tensor) -> float:
        """Of the batch, not the mean over its samples."""
        return float(soft_dice(records[:, :3].sum(0)))

    def judge(self, records: Tensor, patients: list[str]) -> tuple[Measures, Intervals]:
        """From the counts."""
        return segmentation(self._counts(records), patients)

    def keep(self, records: Tensor) -> dict[str, NDArray[Any]]:
        """Counts (N, T, 4) and the thresholds."""
        return {"counts": self._counts(records), "thresholds": np.array(THRESHOLDS)}

    def _counts(self, records: Tensor) -> NDArray[np.int64]:
        return records[:, 3:].reshape(len(records), len(THRESHOLDS), 4).numpy().astype(np.int64)


def _soft(logits: Tensor, target: Tensor) -> Tensor:
    """(B, 3): sums over voxels of probability x mask, probability, mask; float32."""
    probability, mask = torch.sigmoid(logits.float()).flatten(1), target.flatten(1).float()
    return torch.stack(((probability * mask).sum(1), probability.sum(1), mask.sum(1)), 1)


def soft_dice(sums: Tensor) -> Tensor:
    """1 - (2 sum(p m) + 1) / (sum p + sum m + 1) of sums (3,) over all voxels of a batch (FACTS 4)."""
    return 1 - (2 * sums[0] + SMOOTH) / (sums[1] + sums[2] + SMOOTH)


TASK_TYPES: dict[str, TaskType] = {kind.name: kind for kind in (Classification(), Segmentation())}


def task_type(name: str) -> TaskType:
    """Raises UserError for a kind that there is not."""
    if name not in TASK_TYPES:
        raise UserError(f"a task of kind {name!r}: must be one of {', '.join(TASK_TYPES)}")
    return TASK_TYPES[name]
