"""Metrics of masks and answers, in float64: surfaces in mm, AUC of several classes, errors of numbers; intervals by patient.

Below them the pictures of a trial's test samples, as PNG: ROC curves, predicted over true numbers, a measure by patient.

Empty masks:

    Dice, IoU, surface Dice    both empty: 1; one empty: 0
    Hausdorff distance         both empty: NaN, it takes no part in a mean; one empty: infinite, which a mean
                               over samples counts as the diagonal of the sample's box

Distances come from SciPy's exact Euclidean distance transform with the voxels' edges in mm. The surface of a mask is
those of its voxels that have a neighbour across a face outside the mask, or lie at the border of the volume. This is also
what `monai.metrics` computes.
"""

import io
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2w import stats

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
TOLERANCE_MM = 3.0  # of the surface Dice, as in TotalSegmentator's evaluation
MOST = 12  # classes that are drawn


def surface_distances(one: Bools, other: Bools, spacing_mm: Sequence[float]) -> tuple[Floats, Floats]:
    """Distance in mm of each surface voxel of `one` to the surface of `other`, and the other way round.

    Both masks have a voxel [z,y,x]. Computed in the box that holds both, which changes nothing.
    """
    from scipy import ndimage  # noqa: PLC0415  (slow to import)

    box = ndimage.find_objects((one | other).astype(np.uint8))[0]
    edges = [own[box] & ~ndimage.binary_erosion(own[box]) for own in (one, other)]
    away = [ndimage.distance_transform_edt(~edge, sampling=tuple(spacing_mm)) for edge in edges]
    return away[1][edges[0]], away[0][edges[1]]


def surface_measures(
    predicted: Bools, reference: Bools, spacing_mm: Sequence[float], tolerance_mm: float = TOLERANCE_MM
) -> tuple[float, float]:
    """95 % Hausdorff distance in mm (the larger of the two directions), and surface Dice at a tolerance.

    `spacing_mm` are the edges of a voxel z, y, x. For empty masks see the top of the file.
    """
    there = bool(predicted.any()), bool(reference.any())
    if not all(there):
        return (math.inf, 0.0) if any(there) else (math.nan, 1.0)
    found = surface_distances(predicted, reference, spacing_mm)
    near = sum(int((own <= tolerance_mm).sum()) for own in found)
    return max(float(np.percentile(own, 95)) for own in found), near / sum(map(len, found))


def overlap(above: Floats, below: Floats) -> Floats:
    """Dice or IoU as a ratio of counts; 1 where there is nothing and nothing is predicted."""
    return np.where(below > 0, above / np.maximum(below, 1), 1.0)


def pooled_by_patient(table: NDArray, patients: Sequence[Hashable]) -> Floats:
    """The sums over each patient's rows of a table (N, …), patients in the order of their first rows."""
    owner, names = stats.numbered(patients)
    pooled = np.zeros((len(names), *table.shape[1:]))
    np.add.at(pooled, owner, table)
    return pooled


def macro_auc(score: Floats, truth: Floats) -> tuple[float, list[float]]:
    """The mean of the AUC of each class against all others, and each; scores (N, K), truth (N, K) of 0, 1, or NaN: unknown.

    A class of which the known cases are all alike has none (NaN), and takes no part in the mean; NaN if none has one.
    """
    each = []
    for own, is_it in zip(score.T, truth.T, strict=True):
        known = np.isfinite(is_it)
        positive = is_it[known] > 0.5
        each.append(
            stats.delong(own[known], positive)[0] if positive.any() and not positive.all() else math.nan
        )
    sound = [value for value in each if math.isfinite(value)]
    return (float(np.mean(sound)) if sound else math.nan), each


def macro_auc_interval(score: Floats, truth: Floats, patients: Sequence[Hashable]) -> stats.Interval:
    """95 % interval of `macro_auc`, over resampled patients.

    A perfect ranking has no variance: as in `stats.auc_interval`, its lower end is that of n of n, n the size of the rarest
    class.
    """
    parts: list[tuple[Bools, Callable[[Floats], float]]] = []
    rarest, areas = len(truth), []
    for own, is_it in zip(score.T, truth.T, strict=True):
        known = np.isfinite(is_it)
        positive = is_it[known] > 0.5
        if positive.any() and not positive.all():
            parts.append((known, stats.weighted_auc(own[known], positive)))
            areas.append(stats.delong(own[known], positive)[0])
            rarest = min(rarest, int(positive.sum()), int((~positive).sum()))
    if not parts:
        return stats.UNDEFINED
    if all(area == 1.0 for area in areas):
        return stats.TAIL ** (1 / rarest), 1.0

    def statistic(weights: Floats) -> float:
        found = [auc(weights[known]) for known, auc in parts]
        sound = [value for value in found if math.isfinite(value)]
        return float(np.mean(sound)) if sound else math.nan

    return stats.bootstrap(statistic, patients)


def balanced_accuracy(right: Floats, truth: NDArray[np.integer], weights: Floats | None = None) -> float:
    """The mean over the classes in `truth` (N,) of the share that is right; `right` (N,) of 0 and 1, `weights` of cases."""
    own = np.ones(len(truth)) if weights is None else weights
    total = np.bincount(truth, own)
    hit = np.bincount(truth, own * right)
    there = total > 0
    return float((hit[there] / total[there]).mean()) if there.any() else math.nan


def errors(predicted: Floats, truth: Floats, weights: Floats | None = None) -> tuple[float, float]:
    """Mean absolute error and coefficient of determination R2 of known values (N,); NaN where the truth does not vary."""
    own = np.ones(len(truth)) if weights is None else weights
    total = own.sum()
    if not total:
        return math.nan, math.nan
    mean = (own @ truth) / total
    spread = own @ (truth - mean) ** 2
    absolute = float(own @ np.abs(predicted - truth) / total)
    return absolute, float(1 - own @ (predicted - truth) ** 2 / spread) if spread > 0 else math.nan


def patient_means(values: Floats, patients: Sequence[Hashable]) -> Floats:
    """The mean of each patient's values that are not NaN, patients in the order of their first; NaN where there is none."""
    owner, known = stats.numbered(patients)
    sound = np.isfinite(values)
    count = np.bincount(owner[sound], minlength=len(known))
    total = np.bincount(owner[sound], values[sound], minlength=len(known))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def roc_curves(score: Floats, truth: Floats, names: Sequence[str]) -> bytes:
    """The ROC curve of each class against all others; scores (N, K), truth (N, K) of 0, 1, or NaN: unknown."""
    from sklearn.metrics import roc_curve  # noqa: PLC0415  (a second of imports)

    figure, axes = _figure()
    for k, name in list(enumerate(names))[:MOST]:
        known = np.isfinite(truth[:, k])
        positive = truth[known, k] > 0.5
        if positive.any() and not positive.all():
            false, true, _ = roc_curve(positive, score[known, k])
            axes.plot(false, true, label=f"{name} ({positive.sum()} of {len(positive)})")
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, zorder=0)
    axes.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    return _png(figure, axes)


def agreement(predicted: Floats, truth: Floats, names: Sequence[str]) -> bytes:
    """Predicted numbers (N, K) over the true ones, NaN: unknown; a column beside another."""
    count = min(len(names), MOST)
    figure, grid = _figure(count)
    for k, axes in zip(range(count), np.atleast_1d(grid), strict=True):
        known = np.isfinite(truth[:, k])
        axes.scatter(truth[known, k], predicted[known, k], s=12)
        ends = [*truth[known, k], *predicted[known, k]] or [0.0, 1.0]
        axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color="0.7", linewidth=0.8, zorder=0)
        axes.set(xlabel=f"{names[k]}, true", ylabel="predicted")
    return _png(figure, None)


def by_patient(values: Floats, names: Sequence[str], measure: str) -> bytes:
    """A dot for every patient's value in [0, 1] of each class, (patients, K), and a line at their mean."""
    figure, axes = _figure()
    for k in range(min(len(names), MOST)):
        own = values[np.isfinite(values[:, k]), k]
        across = k + np.linspace(-0.2, 0.2, len(own)) if len(own) > 1 else np.full(len(own), float(k))
        axes.scatter(across, np.sort(own), s=12)
        if len(own):
            axes.plot([k - 0.3, k + 0.3], [own.mean()] * 2, color="0.3", linewidth=1)
    axes.set(ylim=(-0.02, 1.02), ylabel=f"{measure}, a dot a patient")
    axes.set_xticks(
        range(min(len(names), MOST)), [name[:24] for name in names[:MOST]], rotation=30, ha="right"
    )
    return _png(figure, None)


def _figure(columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(5 * columns, 4.5), layout="constrained")
    return figure, figure.subplots(1, columns)


def _png(figure: Any, legend: Any) -> bytes:
    if legend is not None and legend.get_legend_handles_labels()[1]:
        legend.legend(fontsize=8)
    packed = io.BytesIO()
    figure.savefig(packed, dpi=100, format="png")
    return packed.getvalue()
