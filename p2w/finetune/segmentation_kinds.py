"""Kinds of task that segment several classes: exclusive ones, and labels or regions that may overlap.

Shapes: B, D, H, W = batch, slice, row, column; K = classes that are judged (without background); N = samples.

Loss: cross-entropy and soft Dice, each with weight 1. Cross-entropy is the mean over voxels (and labels), soft Dice the mean
over classes of that over all voxels of the batch. Metrics, on the test samples, for each class (`dice:NAME`) and as the mean
over classes (`dice`):

    dice, iou                    voxels of all test samples pooled
    dice_patient, iou_patient    voxels pooled by patient, then the mean over patients
    hd95_mm                      95 % Hausdorff distance in mm, the mean by sample, then over patients
    surface_dice                 at 3 mm, the mean by sample, then over patients

Empty masks: see `p2w.finetune.metrics`.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from p2w import stats
from p2w.finetune import metrics
from p2w.finetune.task_interface import LateIntervals, LaterIntervals, Measures
from p2w.model import Encoder, Network
from p2w.model.decoder import Segmenter, build_decoder
from p2w.tasks.task import MULTI_CLASS_SEGMENTATION, MULTI_LABEL_SEGMENTATION
from p2w.world import World, all_reduce_sum

Floats = NDArray[np.float64]
SMOOTH = 1.0  # voxels, in soft Dice
SOFT, COUNTS = 3, 3  # columns a class: soft sums (hit, predicted, true), then counts of the same
SURFACES = 2  # further columns a class of a test sample: 95 % Hausdorff distance, surface Dice


class ClassSegmentation(LateIntervals):
    """What the two kinds have in common: cross-entropy with soft Dice, metrics by class."""

    compared = "dice"
    per_voxel = True

    @property
    @abstractmethod
    def judged(self) -> tuple[str, ...]:
        """The classes that are judged: all but background."""

    @abstractmethod
    def _entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """(B,): the mean cross-entropy over the voxels (and labels) of each sample."""

    @abstractmethod
    def _probabilities(self, logits: Tensor) -> Tensor:
        """(B, K, D, H, W): of each judged class."""

    @abstractmethod
    def _masks(self, target: Tensor) -> Tensor:
        """(B, K, D, H, W) bool: the true mask of each judged class."""

    @abstractmethod
    def _answers(self, logits: Tensor) -> Tensor:
        """(B, K, D, H, W) bool: the predicted mask of each judged class."""

    def network(self, encoder: Encoder, classes: Sequence[str] = (), skips: bool = True) -> Network:
        """A decoder with one logit a voxel for each class."""
        return Segmenter(encoder, build_decoder(encoder, skips, len(classes)))

    def problem_of_targets(self, targets: Floats) -> str:
        """Why these targets cannot be learned from: every class needs a voxel somewhere; "" if they have one."""
        lacks = [name for name, own in zip(self.judged, targets.T, strict=True) if not (own > 0).any()]
        return f"hold no voxel of {lacks[0]}" if lacks else ""

    def loss(self, logits: Tensor, target: Tensor, batch: int, world: World) -> Tensor:
        """Logits (B, outputs, D, H, W), masks (B, 1, D, H, W)."""
        logits = logits.float()
        soft = self._soft(self._probabilities(logits), self._masks(target))
        dice = soft_dice(all_reduce_sum(soft.sum(0), world))
        return self._entropy(logits, target).sum() * (world.size / batch) + dice

    def record(self, logits: Tensor, target: Tensor) -> Tensor:
        """(B, 1 + 6 K): cross-entropy, soft sums, counts of voxels hit, predicted and true, class after class."""
        logits = logits.float()
        true, answer = self._masks(target), self._answers(logits)
        counts = [(answer & true).sum((2, 3, 4)), answer.sum((2, 3, 4)), true.sum((2, 3, 4))]
        columns = [
            self._entropy(logits, target)[:, None].double(),
            self._soft(self._probabilities(logits), true).double().flatten(1),
            torch.stack(counts, 2).double().flatten(1),
        ]
        return torch.cat(columns, 1)

    def test_record(self, logits: Tensor, target: Tensor, spacing_mm: NDArray[np.floating]) -> Tensor:
        """(B, 1 + 8 K): `record`, then Hausdorff distance in mm and surface Dice of each class.

        Where one mask is empty the distance is the diagonal of the sample; NaN where both are.
        """
        true, answer = self._masks(target).cpu().numpy(), self._answers(logits.float()).cpu().numpy()
        found = np.empty((len(true), true.shape[1], SURFACES))
        for sample in range(len(true)):
            mm = spacing_mm[sample].astype(float)
            diagonal = float(np.linalg.norm(np.array(true.shape[2:]) * mm))
            for k in range(true.shape[1]):
                distance, near = metrics.surface_measures(answer[sample, k], true[sample, k], mm.tolist())
                found[sample, k] = np.nan if np.isnan(distance) else min(distance, diagonal), near
        record = self.record(logits, target)
        return torch.cat((record, torch.from_numpy(found.reshape(len(true), -1)).to(record.device)), 1)

    def loss_of(self, records: Tensor) -> float:
        """Mean cross-entropy of the samples, and soft Dice of the batch as a whole."""
        count = len(self.judged)
        soft = records[:, 1 : 1 + SOFT * count].sum(0).reshape(count, SOFT)
        return float(records[:, 0].mean() + soft_dice(soft))

    def metrics(self, records: Tensor, patients: list[str]) -> tuple[Measures, LaterIntervals]:
        """Dice and IoU, and of test records Hausdorff distance and surface Dice, by class and as their mean."""
        names, pooled = self._pooled(records, patients)
        found: Measures = {}
        sure: LaterIntervals = {}
        hit, predicted, true = pooled.transpose(2, 0, 1)  # (patients, K)
        ratios = {"dice": (2 * hit, predicted + true), "iou": (hit, predicted + true - hit)}
        for name, (above, below) in ratios.items():

            def of_all(weights: Floats, above: Floats = above, below: Floats = below) -> Floats:
                return metrics.overlap(weights @ above, weights @ below)

            every = of_all(np.ones(len(names)))
            found[name] = float(every.mean())

            def mean(weights: Floats, of_all: Callable[[Floats], Floats] = of_all) -> float:
                return float(of_all(weights).mean())

            sure[name] = partial(stats.bootstrap, mean, names)
            for k, of in enumerate(self.judged):
                found[f"{name}:{of}"] = float(every[k])
                sure[f"{name}:{of}"] = partial(stats.ratio_interval, above[:, k], below[:, k], names)
            self._add_means(found, sure, f"{name}_patient", metrics.overlap(above, below), names)
        surfaces = self._surfaces(records)
        for number, name in enumerate(("hd95_mm", "surface_dice") if surfaces.size else ()):
            columns = [metrics.patient_means(own, patients) for own in surfaces[:, :, number].T]
            self._add_means(found, sure, name, np.stack(columns, 1), names)
        return found, sure

    def _add_means(
        self, found: Measures, sure: LaterIntervals, name: str, each: Floats, names: list[str]
    ) -> None:
        """Add a metric of each patient (patients, K), its mean over those that have one."""
        sound = np.isfinite(each)
        by_class = [
            own[is_sound].mean() if is_sound.any() else np.nan
            for own, is_sound in zip(each.T, sound.T, strict=True)
        ]
        if not np.isfinite(by_class).any():
            return
        filled = np.where(sound, each, 0.0)

        def mean(weights: Floats) -> float:
            below = weights @ sound
            return float(np.mean((weights @ filled)[below > 0] / below[below > 0])) if below.any() else np.nan

        found[name], sure[name] = float(np.nanmean(by_class)), partial(stats.bootstrap, mean, names)
        for k, of in enumerate(self.judged):
            if np.isfinite(by_class[k]):
                found[f"{name}:{of}"] = float(by_class[k])
                own = filled[:, k], sound[:, k].astype(float), names
                sure[f"{name}:{of}"] = partial(stats.ratio_interval, *own)

    def picture(self, records: Tensor, patients: list[str]) -> bytes:
        """Dice of every patient and class."""
        pooled = self._pooled(records, patients)[1]
        hit, predicted, true = pooled.transpose(2, 0, 1)
        return metrics.by_patient(metrics.overlap(2 * hit, predicted + true), self.judged, "Dice")

    def _pooled(self, records: Tensor, patients: list[str]) -> tuple[list[str], Floats]:
        """The patients in the order of their first samples, and the sums of their counts (patients, K, 3)."""
        counts = self._counts(records).astype(np.float64)
        return list(dict.fromkeys(patients)), metrics.pooled_by_patient(counts, patients)

    def keep(self, records: Tensor) -> dict[str, NDArray[Any]]:
        """Counts (N, K, 3) of voxels hit, predicted and true; hd95_mm and surface_dice (N, K) of test records."""
        surfaces = self._surfaces(records)
        more = {"hd95_mm": surfaces[:, :, 0], "surface_dice": surfaces[:, :, 1]} if surfaces.size else {}
        return {"counts": self._counts(records), "classes": np.array(self.judged), **more}

    def _counts(self, records: Tensor) -> NDArray[np.int64]:
        count = len(self.judged)
        start = 1 + SOFT * count
        return records[:, start : start + COUNTS * count].reshape(-1, count, COUNTS).numpy().astype(np.int64)

    def _surfaces(self, records: Tensor) -> Floats:
        """(N, K, 2), or (N, 0) of records without them."""
        count = len(self.judged)
        rest = records[:, 1 + (SOFT + COUNTS) * count :].numpy()
        return rest.reshape(len(rest), count, SURFACES) if rest.shape[1] else rest

    def _soft(self, probability: Tensor, mask: Tensor) -> Tensor:
        """(B, K, 3): sums over voxels of probability x mask, probability, mask; float32."""
        own, true = probability.flatten(2), mask.flatten(2).float()
        return torch.stack(((own * true).sum(2), own.sum(2), true.sum(2)), 2)


def soft_dice(sums: Tensor) -> Tensor:
    """The mean over classes of 1 - (2 sum(p m) + 1) / (sum p + sum m + 1), of sums (K, 3) over all voxels of a batch."""
    return (1 - (2 * sums[:, 0] + SMOOTH) / (sums[:, 1] + sums[:, 2] + SMOOTH)).mean()


class MultiClassSegmentation(ClassSegmentation):
    """Every voxel is of one class or background: softmax over all of them."""

    name = MULTI_CLASS_SEGMENTATION
    by_threshold = False

    @property
    def judged(self) -> tuple[str, ...]:
        """All classes but the first, background."""
        return self.classes[1:]

    def _entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(logits, target[:, 0].long(), reduction="none").mean((1, 2, 3))

    def _probabilities(self, logits: Tensor) -> Tensor:
        return torch.softmax(logits, 1)[:, 1:]

    def _masks(self, target: Tensor) -> Tensor:
        numbers = torch.arange(1, len(self.classes), device=target.device)
        return target == numbers[:, None, None, None]

    def _answers(self, logits: Tensor) -> Tensor:
        return self._masks(logits.argmax(1, keepdim=True))

    def predict(self, logits: Tensor) -> Tensor:
        """(B, classes, D, H, W): probabilities, background first."""
        return torch.softmax(logits.float(), 1)

    def layers(self) -> tuple[str, ...]:
        """All classes."""
        return self.classes

    def to_mask(self, predicted: NDArray[np.float32], threshold: float) -> NDArray[Any]:
        """The most probable class, in the values of the mask files; of equal ones the first. The threshold is not used."""
        values = np.array([0, *self._values().values()], np.uint16)
        return values.astype(np.uint8 if values.max() < 256 else np.uint16)[predicted.argmax(0)]

    def _values(self) -> dict[str, int]:
        """The values of the judged classes in the set's mask files."""
        own = self.target.get("values") or [[number] for number in range(1, len(self.classes))]
        return {name: int(values[0]) for name, values in zip(self.judged, own, strict=True)}

    def mask_legend(self) -> dict[str, Any]:
        """Name -> value, as in nnU-Net's dataset.json."""
        return {"labels": {self.classes[0]: 0, **self._values()}}

    def mask_classes(self, mask: NDArray[Any]) -> dict[str, NDArray[np.bool_]]:
        """Where each judged class is."""
        return {name: mask == value for name, value in self._values().items()}


class MultiLabelSegmentation(ClassSegmentation):
    """A voxel is of any number of labels or regions: a sigmoid for each. Masks hold a bit for each."""

    name = MULTI_LABEL_SEGMENTATION

    @property
    def judged(self) -> tuple[str, ...]:
        """All labels."""
        return self.classes

    def _entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        true = self._masks(target).float()
        return binary_cross_entropy_with_logits(logits, true, reduction="none").flatten(1).mean(1)

    def _probabilities(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits)

    def _masks(self, target: Tensor) -> Tensor:
        bits = torch.arange(len(self.classes), device=target.device)
        return ((target.int() >> bits[:, None, None, None]) & 1).bool()

    def _answers(self, logits: Tensor) -> Tensor:
        return logits > 0

    def predict(self, logits: Tensor) -> Tensor:
        """(B, K, D, H, W): probabilities."""
        return torch.sigmoid(logits.float())

    def layers(self) -> tuple[str, ...]:
        """All labels."""
        return self.classes

    def to_mask(self, predicted: NDArray[np.float32], threshold: float) -> NDArray[Any]:
        """Of regions with an order, a label map: each region's value where it is more probable than `threshold`, later ones
        over earlier ones, as nnU-Net writes them. Else a bit for each label."""
        order = self.target.get("order")
        out = np.zeros(predicted.shape[1:], np.uint16)
        for number, own in enumerate(predicted > threshold):
            if order:
                out[own] = order[number]
            else:
                out |= own.astype(np.uint16) << number
        return out.astype(np.uint8) if order and max(order) < 256 else out

    def mask_legend(self) -> dict[str, Any]:
        """As in nnU-Net's dataset.json; or the names, where each has a file of its own."""
        order = self.target.get("order")
        if not order:
            return {"structures": list(self.classes)}
        regions = zip(self.classes, self.target["values"], strict=True)
        labels = {"background": 0, **{name: [int(value) for value in own] for name, own in regions}}
        return {"labels": labels, "regions_class_order": [int(value) for value in order]}

    def mask_classes(self, mask: NDArray[Any]) -> dict[str, NDArray[np.bool_]]:
        """Where each label or region is."""
        if self.target.get("order"):
            regions = zip(self.classes, self.target["values"], strict=True)
            return {name: np.isin(mask, list(own)) for name, own in regions}
        return {name: (mask >> bit) & 1 == 1 for bit, name in enumerate(self.classes)}

    @property
    def separate_files(self) -> bool:
        """Whether each label has a mask file of its own; regions with an order are all in one label map."""
        return not self.target.get("order")

    def mask_files(self, mask: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """One label map of regions with an order; else a mask for each label, since they may overlap."""
        if not self.separate_files:
            return {"": mask}
        return {name: ((mask >> bit) & 1).astype(np.uint8) for bit, name in enumerate(self.classes)}
