"""The interface of a kind of task: all that training, judging and predicting need to know of it.

Shapes: B, C, D, H, W = batch, channel, slice, row, column; K = classes; N = samples.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from p2w.model import Encoder, Network
from p2w.stats import Interval
from p2w.world import World

Measures = dict[str, float]
Intervals = dict[str, Interval]
LaterIntervals = dict[str, Callable[[], Interval]]  # intervals that are computed when they are called for


class TaskType(ABC):
    """A kind of task: all that training, judging and predicting need to know of it."""

    name: str
    """The kind's name in manifests and cards, a key of `p2w.tasks.task.SAMPLE_KINDS`."""
    compared: str
    """The metric that tables compare, unless a task names another."""
    per_voxel: bool
    """True: one answer a voxel. The network ends in a decoder, and what is predicted of a scan is a mask of its size, drawn
    over its slices. False: one answer a sample. The network pools its features, and what is predicted is a table with a row
    for each candidate."""
    by_threshold: bool = True
    """One answer a voxel: whether `to_mask` compares with a threshold."""
    needed_labels: tuple[int, ...] = ()
    """Labels that every fraction of the training data must hold."""
    classes: tuple[str, ...] = ()
    """What the set calls its classes; known of a copy that `for_set` made."""
    target: Mapping[str, Any] = {}
    """What the set, or the card of weights, says of its targets; known of a copy that `for_set` made."""

    def for_set(self, described: Mapping[str, Any], targets: NDArray[np.float64] | None = None) -> Self:
        """A copy that knows `classes` and `target` of a set's metadata, or of the task in a card.

        `targets` (N, K) are those of the training samples: a kind may take statistics of them into its `target`, which goes
        into the card.
        """
        own = copy.copy(self)
        own.classes = tuple(described.get("classes") or ())
        own.target = dict(described.get("target") or {})
        return own

    @abstractmethod
    def network(self, encoder: Encoder, classes: Sequence[str] = (), skips: bool = True) -> Network:
        """The encoder with a head for `classes`, whose weights draw from torch's generator.

        `skips`: whether a decoder joins the encoder's features at every level.
        """

    def problem_of(self, labels: NDArray[np.int8]) -> str:
        """Why nothing can be learned from samples of these labels, as the end of a sentence; "" where something can."""
        return ""

    def problem_of_targets(self, targets: NDArray[np.float64]) -> str:
        """As `problem_of`, for samples with these targets (N, K)."""
        return ""

    @abstractmethod
    def loss(self, logits: Tensor, target: Tensor, batch: int, world: World) -> Tensor:
        """The loss of this rank's share of a batch of `batch` samples; its mean over ranks is the loss of the batch."""

    @abstractmethod
    def record(self, logits: Tensor, target: Tensor) -> Tensor:
        """All that loss and metrics need of each sample, (B, …) float64 on the logits' device."""

    def test_record(self, logits: Tensor, target: Tensor, spacing_mm: NDArray[np.floating]) -> Tensor:
        """`record`, maybe with further columns that the test alone needs, since they are too slow for each validation.

        `spacing_mm` (B, 3): the edges of a sample's voxels, z, y, x.
        """
        return self.record(logits, target)

    @abstractmethod
    def loss_of(self, records: Tensor) -> float:
        """The loss of a batch of records, as `loss` would give it."""

    @abstractmethod
    def judge(self, records: Tensor, patients: list[str]) -> tuple[Measures, Intervals]:
        """Metrics and their 95 % intervals, by patient, of the records of all test samples.

        They lie in [0, 1], unless `p2w.finetune.results.UNITS` has the name's beginning.
        """

    def measure(self, records: Tensor, patients: list[str]) -> Measures:
        """The metrics of `judge` alone: a trial that stops on one needs them after every epoch, and no intervals."""
        return self.judge(records, patients)[0]

    @abstractmethod
    def keep(self, records: Tensor) -> dict[str, NDArray[Any]]:
        """Arrays for predictions.npz, with one entry a sample."""

    def picture(self, records: Tensor, patients: list[str]) -> bytes:
        """A PNG of how good the test samples' predictions are; b"": none is drawn."""
        return b""

    @abstractmethod
    def predict(self, logits: Tensor) -> Tensor:
        """The prediction for the user, float32. One answer a voxel: probabilities (B, D, H, W), or (B, K, D, H, W) of
        `layers`. Else (B, columns)."""

    def layers(self) -> tuple[str, ...]:
        """One answer a voxel: the names of the K volumes of `predict`; () where it gives one without a name."""
        return ()

    def columns(self, classes: Sequence[str]) -> tuple[str, ...]:
        """One answer a sample: what the columns of `predict` are called in a table."""
        return ("probability",)

    def to_mask(self, predicted: NDArray[np.float32], threshold: float) -> NDArray[Any]:
        """One answer a voxel: what `predict` gave for a slice (H, W) or (K, H, W), averaged over windows -> the values that
        are written into a mask (H, W)."""
        return (predicted > threshold).astype(np.uint8)

    def mask_legend(self) -> dict[str, Any]:
        """What a JSON file beside a mask says of its values; {} where 1 is all there is."""
        return {}

    def mask_classes(self, mask: NDArray[Any]) -> dict[str, NDArray[np.bool_]]:
        """Where each class is, of a mask of `to_mask` or a slice of it; "" is the name of a single one."""
        return {"": mask != 0}

    @property
    def separate_files(self) -> bool:
        """Whether each class gets a mask file of its own, since they may overlap."""
        return False

    def mask_files(self, mask: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """The files that a mask of `to_mask` is written as, by name; "" is the name of a single one."""
        return {"": mask}


class LateIntervals(TaskType):
    """A kind whose intervals take long, and are computed where they are asked for."""

    @abstractmethod
    def metrics(
        self, records: Tensor, patients: list[str]
    ) -> tuple[Measures, dict[str, Callable[[], Interval]]]:
        """Metrics, NaN where there is none, and for each a function that computes its interval."""

    def judge(self, records: Tensor, patients: list[str]) -> tuple[Measures, Intervals]:
        """The metrics that have a value, and their intervals."""
        found, later = self.metrics(records, patients)
        sound = {name: value for name, value in found.items() if math.isfinite(value)}
        return sound, {name: later[name]() for name in sound}

    def measure(self, records: Tensor, patients: list[str]) -> Measures:
        """The metrics that have a value."""
        found, _ = self.metrics(records, patients)
        return {name: value for name, value in found.items() if math.isfinite(value)}
