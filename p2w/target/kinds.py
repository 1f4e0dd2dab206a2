"""The two kinds of target task: the loss, and what is kept of a sample to judge it by.

A kind is picked by the set's `meta["kind"]`; the loop knows neither.
Shapes: B, C, D, H, W = batch, channel, slice, row, column.
"""

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from p2w.errors import UserError
from p2w.target import metrics
from p2w.target.ranks import total
from p2w.world import World

SMOOTH = 1.0  # of soft Dice (FACTS 4)


class Kind(Protocol):
    """What the loop needs of a task."""

    name: str

    def loss(self, logits: Tensor, target: Tensor, batch: int, world: World) -> Tensor:
        """Of this rank's share of a batch of `batch` samples; the mean over ranks is the loss of the batch."""

    def record(self, logits: Tensor, target: Tensor) -> Tensor:
        """(B, …) float64 on the device: all that loss and metrics need of each sample."""

    def loss_of(self, records: Tensor) -> float:
        """The loss of a batch of records, as `loss` would give it."""

    def judge(self, records: Tensor, patients: list[str]) -> tuple[metrics.Measures, metrics.Intervals]:
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

    def judge(self, records: Tensor, patients: list[str]) -> tuple[metrics.Measures, metrics.Intervals]:
        """By logits, which order as probabilities do and never tie where those round to 1."""
        return metrics.classification(records[:, 0].numpy(), records[:, 1].numpy(), patients)

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
        return soft_dice(total(_soft(logits, target).sum(0), world))

    def record(self, logits: Tensor, target: Tensor) -> Tensor:
        """(B, 3 + 4 T): soft sums, then counts at each threshold."""
        probability = torch.sigmoid(logits)
        mask = target > 0.5
        true = mask.sum((1, 2, 3, 4)).double()
        columns = [_soft(logits, target).double()]
        for threshold in metrics.THRESHOLDS:
            predicted = probability > threshold
            hit = (predicted & mask).sum((1, 2, 3, 4)).double()
            everything = torch.full_like(true, mask[0].numel())
            columns.append(torch.stack((hit, predicted.sum((1, 2, 3, 4)).double(), true, everything), 1))
        return torch.cat(columns, 1)

    def loss_of(self, records: Tensor) -> float:
        """Of the batch, not the mean over its samples."""
        return float(soft_dice(records[:, :3].sum(0)))

    def judge(self, records: Tensor, patients: list[str]) -> tuple[metrics.Measures, metrics.Intervals]:
        """From the counts."""
        return metrics.segmentation(self._counts(records), patients)

    def keep(self, records: Tensor) -> dict[str, NDArray[Any]]:
        """Counts (N, T, 4) and the thresholds."""
        return {"counts": self._counts(records), "thresholds": np.array(metrics.THRESHOLDS)}

    def _counts(self, records: Tensor) -> NDArray[np.int64]:
        return records[:, 3:].reshape(len(records), len(metrics.THRESHOLDS), 4).numpy().astype(np.int64)


def _soft(logits: Tensor, target: Tensor) -> Tensor:
    """(B, 3): sums over voxels of probability x mask, probability, mask; float32."""
    probability, mask = torch.sigmoid(logits.float()).flatten(1), target.flatten(1).float()
    return torch.stack(((probability * mask).sum(1), probability.sum(1), mask.sum(1)), 1)


def soft_dice(sums: Tensor) -> Tensor:
    """1 - (2 sum(p m) + 1) / (sum p + sum m + 1) of sums (3,) over all voxels of a batch (FACTS 4)."""
    return 1 - (2 * sums[0] + SMOOTH) / (sums[1] + sums[2] + SMOOTH)


KINDS: dict[str, Kind] = {kind.name: kind for kind in (Classification(), Segmentation())}


def kind_of(name: str) -> Kind:
    """Raises UserError for a kind that there is not."""
    if name not in KINDS:
        raise UserError(f"a task of kind {name!r}: must be one of {', '.join(KINDS)}")
    return KINDS[name]
