"""Kinds of task with one answer for each sample: a class, several labels, or numbers. Samples are crops or whole scans.

Shapes: B, C, D, H, W = batch, channel, slice, row, column; K = classes, labels or numbers; N = samples.

Metrics, over the test samples, with intervals by patient:

    multi-class    auc: each class against the others, the mean over classes (of two classes: that of the second);
                   auc:NAME; balanced_accuracy: mean over classes of the share that is right; accuracy
    multi-label    auc: the mean over labels, auc:NAME; balanced_accuracy at probability 0.5, as the mean over labels
    regression     r2 and mae (in the unit of the table), as the mean over columns, and r2:NAME, mae:NAME of several

A class or label that is not told apart in the test samples (all known ones are alike) has no AUC. Unknown targets (NaN) take
no part in loss and metrics.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, smooth_l1_loss

from p2w import stats
from p2w.finetune import metrics
from p2w.finetune.task_interface import LateIntervals, LaterIntervals, Measures
from p2w.model import Encoder, Network
from p2w.model.decoder import Classifier
from p2w.tasks.task import MULTI_CLASS, MULTI_LABEL, REGRESSION
from p2w.world import World

Floats = NDArray[np.float64]


class Answer(LateIntervals):
    """What the three kinds have in common: pooled features, a hidden layer, K numbers."""

    per_voxel = False

    def network(self, encoder: Encoder, classes: Sequence[str] = (), skips: bool = True) -> Network:
        """Pooled features, a hidden layer, a number for each class."""
        return Classifier(encoder, len(classes))

    def columns(self, classes: Sequence[str]) -> tuple[str, ...]:
        """The classes' names."""
        return tuple(classes)


class MultiClass(Answer):
    """One of two or more classes: softmax, cross-entropy."""

    name = MULTI_CLASS
    compared = "auc"

    @property
    def needed_labels(self) -> tuple[int, ...]:  # type: ignore[override]  # known with the set
        """Every class."""
        return tuple(range(len(self.classes)))

    def problem_of(self, labels: NDArray[np.int8]) -> str:
        """Why these labels cannot be learned from: at least two classes have to occur; "" if they do."""
        found = np.unique(labels)
        if len(found) > 1:
            return ""
        return f"are all of class {self.classes[int(found[0])] if self.classes else found[0]}; two are needed"

    def loss(self, logits: Tensor, target: Tensor, batch: int, world: World) -> Tensor:
        """Logits (B, K), labels (B,)."""
        return cross_entropy(logits, target.long(), reduction="sum") * (world.size / batch)

    def record(self, logits: Tensor, target: Tensor) -> Tensor:
        """(B, K + 1): logits, label."""
        return torch.cat((logits.double(), target.double()[:, None]), 1)

    def loss_of(self, records: Tensor) -> float:
        """Mean cross-entropy over the samples."""
        return float(cross_entropy(records[:, :-1], records[:, -1].long()))

    def metrics(self, records: Tensor, patients: list[str]) -> tuple[Measures, LaterIntervals]:
        """The metrics at the top of the file."""
        score = torch.log_softmax(records[:, :-1], 1).numpy()
        label = records[:, -1].numpy().astype(int)
        right = (score.argmax(1) == label).astype(np.float64)
        truth = (label[:, None] == np.arange(score.shape[1])).astype(np.float64)
        found, sure = _auc(score, truth, self.classes, patients, two_sided=score.shape[1] > 2)
        found |= {
            "balanced_accuracy": metrics.balanced_accuracy(right, label),
            "accuracy": float(right.mean()),
        }
        balanced = partial(metrics.balanced_accuracy, right, label)
        sure["balanced_accuracy"] = partial(stats.bootstrap, balanced, patients)
        sure["accuracy"] = partial(stats.mean_interval, right, patients)
        return found, sure

    def picture(self, records: Tensor, patients: list[str]) -> bytes:
        """ROC curves."""
        score = torch.log_softmax(records[:, :-1], 1).numpy()
        truth = records[:, -1:].numpy() == np.arange(score.shape[1])
        return metrics.roc_curves(score, truth.astype(np.float64), self.classes)

    def keep(self, records: Tensor) -> dict[str, NDArray[Any]]:
        """Probabilities (N, K), label, and the classes' names."""
        return {
            "probability": torch.softmax(records[:, :-1], 1).numpy(),
            "label": records[:, -1].numpy().astype(np.int8),
            "classes": np.array(self.classes),
        }

    def predict(self, logits: Tensor) -> Tensor:
        """Probabilities (B, K)."""
        return torch.softmax(logits.float(), 1)


class ByColumn(Answer):
    """Kinds that learn a number for each column of a table, some of which may be unknown."""

    @abstractmethod
    def _losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """(B, K): the loss of each column; of unknown ones any finite value."""

    def problem_of_targets(self, targets: Floats) -> str:
        """Why these targets cannot be learned from: every column has to have two different values; "" if they do."""
        for name, own in zip(self.classes, targets.T, strict=True):
            known = np.unique(own[np.isfinite(own)])
            if len(known) < 2:
                return f"have {f'{known[0]:g} alone' if len(known) else 'no value'} in column {name}; two values are needed"
        return ""

    def loss(self, logits: Tensor, target: Tensor, batch: int, world: World) -> Tensor:
        """Logits (B, K), or (B,) of one column; targets (B, K). An unknown target counts as a loss of 0."""
        return self._known(logits.reshape(target.shape), target).mean(1).sum() * (world.size / batch)

    def _known(self, logits: Tensor, target: Tensor) -> Tensor:
        known = torch.isfinite(target)
        return torch.where(known, self._losses(logits, torch.where(known, target, 0)), 0)

    def record(self, logits: Tensor, target: Tensor) -> Tensor:
        """(B, 2 K): logits, targets."""
        return torch.cat((logits.reshape(target.shape).double(), target.double()), 1)

    def loss_of(self, records: Tensor) -> float:
        """The mean over samples and columns."""
        logits, target = records.chunk(2, 1)
        return float(self._known(logits, target).mean())


class MultiLabel(ByColumn):
    """Several labels, each there or not: a sigmoid for each, binary cross-entropy."""

    name = MULTI_LABEL
    compared = "auc"

    def _losses(self, logits: Tensor, target: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(logits, target, reduction="none")

    def metrics(self, records: Tensor, patients: list[str]) -> tuple[Measures, LaterIntervals]:
        """The metrics at the top of the file."""
        logits, target = (part.numpy() for part in records.chunk(2, 1))
        found, sure = _auc(logits, target, self.classes, patients)

        def accuracy(weights: Floats) -> float:
            each = []
            for own, true in zip(logits.T, target.T, strict=True):
                known = np.isfinite(true)
                right = ((own[known] > 0) == (true[known] > 0.5)).astype(np.float64)
                each.append(metrics.balanced_accuracy(right, (true[known] > 0.5).astype(int), weights[known]))
            sound = [value for value in each if math.isfinite(value)]
            return float(np.mean(sound)) if sound else math.nan

        found["balanced_accuracy"] = accuracy(np.ones(len(records)))
        sure["balanced_accuracy"] = partial(stats.bootstrap, accuracy, patients)
        return found, sure

    def picture(self, records: Tensor, patients: list[str]) -> bytes:
        """ROC curves."""
        logits, target = (part.numpy() for part in records.chunk(2, 1))
        return metrics.roc_curves(logits, target, self.classes)

    def keep(self, records: Tensor) -> dict[str, NDArray[Any]]:
        """Probabilities and targets (N, K), NaN where unknown, and the labels' names."""
        logits, target = records.chunk(2, 1)
        return {
            "probability": torch.sigmoid(logits).numpy(),
            "target": target.numpy(),
            "classes": np.array(self.classes),
        }

    def predict(self, logits: Tensor) -> Tensor:
        """Probabilities (B, K)."""
        return torch.sigmoid(logits.float()).reshape(len(logits), -1)


class Regression(ByColumn):
    """Numbers: the network gives them in standard deviations from the mean of the training samples; smooth L1 loss."""

    name = REGRESSION
    compared = "r2"

    def for_set(self, described: Mapping[str, Any], targets: Floats | None = None) -> Self:
        """As `TaskType.for_set`; mean and standard deviation of each column's known values go into `target`."""
        own = super().for_set(described, targets)
        if targets is not None:
            mean, deviation = np.nanmean(targets, 0), np.nanstd(targets, 0)
            scale = {"mean": mean.tolist(), "sd": np.where(deviation > 0, deviation, 1.0).tolist()}
            own.target = {**own.target, **scale}
        return own

    def _scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, (K,)."""
        count = len(self.classes)
        mean, sd = self.target.get("mean", [0.0] * count), self.target.get("sd", [1.0] * count)
        return like.new_tensor(mean), like.new_tensor(sd)

    def _losses(self, logits: Tensor, target: Tensor) -> Tensor:
        mean, sd = self._scale(logits)
        return smooth_l1_loss(logits, (target - mean) / sd, reduction="none")

    def record(self, logits: Tensor, target: Tensor) -> Tensor:
        """(B, 2 K): predicted values and targets in the unit of the table.

        So records of the folds of a cross-validation, each with a scale of its own, can be judged together.
        """
        return torch.cat((self._values(logits.reshape(target.shape).double()), target.double()), 1)

    def loss_of(self, records: Tensor) -> float:
        """The mean over samples and columns."""
        predicted, target = records.chunk(2, 1)
        mean, sd = self._scale(predicted)
        return float(self._known((predicted - mean) / sd, target).mean())

    def metrics(self, records: Tensor, patients: list[str]) -> tuple[Measures, LaterIntervals]:
        """The metrics at the top of the file."""
        predicted, target = (part.numpy() for part in records.chunk(2, 1))
        found: Measures = {}
        sure: LaterIntervals = {}

        def each(weights: Floats) -> Floats:
            """(2, K): error and R2 of each column."""
            columns = []
            for own, true in zip(predicted.T, target.T, strict=True):
                known = np.isfinite(true)
                columns.append(metrics.errors(own[known], true[known], weights[known]))
            return np.array(columns).T

        for number, name in ((1, "r2"), (0, "mae")):
            own = each(np.ones(len(records)))[number]
            if np.isfinite(own).any():
                found[name] = float(np.nanmean(own))

                def mean(weights: Floats, number: int = number) -> float:
                    values = each(weights)[number]
                    return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan

                sure[name] = partial(stats.bootstrap, mean, patients)
            for k, of in enumerate(self.classes if len(self.classes) > 1 else ()):
                found[f"{name}:{of}"] = float(own[k])

                def one(weights: Floats, number: int = number, k: int = k) -> float:
                    return float(each(weights)[number, k])

                sure[f"{name}:{of}"] = partial(stats.bootstrap, one, patients)
        return found, sure

    def _values(self, logits: Tensor) -> Tensor:
        mean, sd = self._scale(logits)
        return logits * sd + mean

    def picture(self, records: Tensor, patients: list[str]) -> bytes:
        """Predicted numbers over the true ones."""
        predicted, target = (part.numpy() for part in records.chunk(2, 1))
        return metrics.agreement(predicted, target, self.classes)

    def keep(self, records: Tensor) -> dict[str, NDArray[Any]]:
        """Predicted values and targets (N, K), NaN where unknown, and the columns' names."""
        predicted, target = (part.numpy() for part in records.chunk(2, 1))
        return {"value": predicted, "target": target, "classes": np.array(self.classes)}

    def predict(self, logits: Tensor) -> Tensor:
        """Values (B, K), in the unit of the table."""
        return self._values(logits.float().reshape(len(logits), -1))


def _auc(
    score: Floats, truth: Floats, classes: Sequence[str], patients: list[str], two_sided: bool = True
) -> tuple[Measures, LaterIntervals]:
    """`auc` and `auc:NAME`; of two classes that exclude each other (not `two_sided`), `auc` of the second alone."""
    score, truth = (score, truth) if two_sided else (score[:, 1:] - score[:, :1], truth[:, 1:])
    area, each = metrics.macro_auc(score, truth)
    found: Measures = {"auc": area}
    sure: LaterIntervals = {"auc": partial(metrics.macro_auc_interval, score, truth, patients)}
    for k, of in enumerate(classes if two_sided else ()):
        found[f"auc:{of}"] = each[k]
        own = score[:, k : k + 1], truth[:, k : k + 1], patients
        sure[f"auc:{of}"] = partial(metrics.macro_auc_interval, *own)
    return found, sure
