"""Kinds of target tasks, one class each: network, loss, metrics, and what a prediction is; here the paper's two.

Those of several classes are in `segmentation_kinds.py` and `answer_kinds.py`, the interface in `task_interface.py`. A set's
`meta["kind"]` names the class. Whatever trains, judges or predicts asks it, and knows no kind by name. What the samples of a
kind hold is declared in `p2w.tasks.task.SAMPLE_KINDS`, which needs no torch. The recipe for another kind is
docs/add_a_task.md.

Shapes: B, C, D, H, W = batch, channel, slice, row, column.

Metrics of segmentation. Voxels of the whole test set are pooled unless the name says otherwise (docs/paper.md says which IoU
the paper reports):

    iou            foreground: intersection / union of mask and probability > 0.5      (compared for LCS, BMS)
    mean_iou       mean of background and foreground IoU, averaged over thresholds 0.50, 0.55 … 0.95   (compared for NCS)
    dice           2 x intersection / (predicted + true), probability > 0.5
    iou_sample, dice_sample      mean over samples; where mask and prediction are both empty it is 1
    iou_patient, dice_patient    voxels pooled by patient, then the mean over patients

Metrics of classification:

    auc            area under the ROC curve over samples
    auc_patient    over patients: the highest probability of a patient's samples, against whether any is positive
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from p2w import stats
from p2w.errors import UserError
from p2w.finetune import metrics
from p2w.finetune.answer_kinds import MultiClass, MultiLabel, Regression
from p2w.finetune.segmentation_kinds import MultiClassSegmentation, MultiLabelSegmentation
from p2w.finetune.task_interface import Intervals, Measures, TaskType
from p2w.model import Encoder, Network
from p2w.model.decoder import Classifier, Segmenter, build_decoder
from p2w.tasks.task import CLASSIFICATION, SAMPLE_KINDS, SEGMENTATION
from p2w.world import World, all_reduce_sum

Floats = NDArray[np.float64]

THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
HIT, PREDICTED, TRUE, VOXELS = range(4)  # columns of a sample's counts


def segmentation(counts: NDArray[np.int64], patients: Sequence[str]) -> tuple[Measures, Intervals]:
    """Counts (N, T, 4) a sample and threshold: voxels hit, predicted, true, all -> metrics and their 95 % intervals."""
    table = np.asarray(counts, np.float64)
    per_patient = metrics.pooled_by_patient(table, patients)
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
    owner, _ = stats.numbered(patients)
    highest, positive = np.full(owner.max() + 1, -np.inf), np.zeros(owner.max() + 1, bool)
    np.maximum.at(highest, owner, score)
    np.logical_or.at(positive, owner, truth)
    if positive.any() and not positive.all():
        found["auc_patient"] = float(roc_auc_score(positive, highest))
        sure["auc_patient"] = stats.auc_interval(highest, positive)
    return found, sure


def iou(counts: Floats) -> Floats:
    """Foreground IoU of counts (…, 4) -> (…); 1 where there is nothing and nothing is predicted."""
    return metrics.overlap(counts[..., HIT], counts[..., PREDICTED] + counts[..., TRUE] - counts[..., HIT])


def dice(counts: Floats) -> Floats:
    """Dice of counts (…, 4) -> (…); 1 where there is nothing and nothing is predicted."""
    return metrics.overlap(2 * counts[..., HIT], counts[..., PREDICTED] + counts[..., TRUE])


def mean_iou(counts: Floats) -> float:
    """Mean over thresholds of the mean of foreground and background IoU, counts (T, 4)."""
    missed = counts[..., TRUE] - counts[..., HIT]
    false = counts[..., PREDICTED] - counts[..., HIT]
    clear = counts[..., VOXELS] - counts[..., HIT] - missed - false  # background in both
    return float((iou(counts) + metrics.overlap(clear, clear + missed + false)).mean() / 2)


SMOOTH = 1.0  # of soft Dice, as in Models Genesis' code (docs/paper.md)


class Classification(TaskType):
    """Is it one, or not: one probability a sample, binary cross-entropy, AUC."""

    name = CLASSIFICATION
    compared = "auc"
    per_voxel = False
    needed_labels = SAMPLE_KINDS[CLASSIFICATION].labels_of(2)

    def network(self, encoder: Encoder, classes: Sequence[str] = (), skips: bool = True) -> Network:
        """Pooled features, a hidden layer, one logit."""
        return Classifier(encoder)

    def problem_of(self, labels: NDArray[np.int8]) -> str:
        """There is nothing to tell apart in samples of one class."""
        found = np.unique(labels)
        return f"are all of class {found[0]}; both are needed" if len(found) < 2 else ""

    def loss(self, logits: Tensor, target: Tensor, batch: int, world: World) -> Tensor:
        """Logits (B,), labels (B,)."""
        return binary_cross_entropy_with_logits(logits, target, reduction="sum") * (world.size / batch)

    def record(self, logits: Tensor, target: Tensor) -> Tensor:
        """(B, 2): logit, label."""
        return torch.stack((logits.double(), target.double()), 1)

    def loss_of(self, records: Tensor) -> float:
        """Mean cross-entropy over the samples."""
        return float(binary_cross_entropy_with_logits(records[:, 0], records[:, 1]))

    def judge(self, records: Tensor, patients: list[str]) -> tuple[Measures, Intervals]:
        """AUC from logits: they order samples as probabilities do, and do not tie where probabilities round to 1."""
        return classification(records[:, 0].numpy(), records[:, 1].numpy(), patients)

    def keep(self, records: Tensor) -> dict[str, NDArray[Any]]:
        """Probability and label."""
        return {
            "probability": torch.sigmoid(records[:, 0]).numpy(),
            "label": records[:, 1].numpy().astype(np.int8),
        }

    def predict(self, logits: Tensor) -> Tensor:
        """Probability of the second class, (B, 1)."""
        return torch.sigmoid(logits.float())[:, None]


class Segmentation(TaskType):
    """Where is it: one probability a voxel, soft Dice over all voxels of a batch, IoU and Dice."""

    name = SEGMENTATION
    compared = "iou"
    per_voxel = True

    def network(self, encoder: Encoder, classes: Sequence[str] = (), skips: bool = True) -> Network:
        """A decoder with one logit a voxel."""
        return Segmenter(encoder, build_decoder(encoder, skips))

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
        """Soft Dice of the batch as a whole, not the mean over its samples."""
        return float(soft_dice(records[:, :3].sum(0)))

    def judge(self, records: Tensor, patients: list[str]) -> tuple[Measures, Intervals]:
        """IoU and Dice from the counts of voxels."""
        return segmentation(self._counts(records), patients)

    def keep(self, records: Tensor) -> dict[str, NDArray[Any]]:
        """Counts (N, T, 4) and the thresholds."""
        return {"counts": self._counts(records), "thresholds": np.array(THRESHOLDS)}

    def predict(self, logits: Tensor) -> Tensor:
        """Probability of foreground."""
        return torch.sigmoid(logits.float())[:, 0]

    def _counts(self, records: Tensor) -> NDArray[np.int64]:
        return records[:, 3:].reshape(len(records), len(THRESHOLDS), 4).numpy().astype(np.int64)


def _soft(logits: Tensor, target: Tensor) -> Tensor:
    """(B, 3): sums over voxels of probability x mask, probability, mask; float32."""
    probability, mask = torch.sigmoid(logits.float()).flatten(1), target.flatten(1).float()
    return torch.stack(((probability * mask).sum(1), probability.sum(1), mask.sum(1)), 1)


def soft_dice(sums: Tensor) -> Tensor:
    """1 - (2 sum(p m) + 1) / (sum p + sum m + 1) of sums (3,) over all voxels of a batch."""
    return 1 - (2 * sums[0] + SMOOTH) / (sums[1] + sums[2] + SMOOTH)


_KINDS = (
    Classification,
    Segmentation,
    MultiClassSegmentation,
    MultiLabelSegmentation,
    MultiClass,
    MultiLabel,
    Regression,
)
TASK_TYPES: dict[str, TaskType] = {kind.name: kind() for kind in _KINDS}


def task_type(name: str) -> TaskType:
    """The kind of that name; `for_set` gives the one of a set. Raises UserError when there is none."""
    if name not in TASK_TYPES:
        raise UserError(f"a task of kind {name!r}: must be one of {', '.join(TASK_TYPES)}")
    return TASK_TYPES[name]
