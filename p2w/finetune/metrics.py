"""Metrics of masks and answers, in float64: surfaces in mm, AUC of several classes, errors of numbers; intervals by patient.

Empty masks:

    Dice, IoU, surface Dice    both empty: 1; one empty: 0
    Hausdorff distance         both empty: NaN, it takes no part in a mean; one empty: infinite (`hausdorff95`), which a mean
                               over samples counts as the diagonal of the sample's box

Distances come from SciPy's exact Euclidean distance transform with the voxels' edges in mm. The surface of a mask are its
voxels that have a neighbour across a face outside the mask, or lie at the border of the volume. This is also what
`monai.metrics` computes.
"""

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from p2w import stats

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
TOLERANCE_MM = 3.0  # of the surface Dice, as in TotalSegmentator's evaluation


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


def hausdorff95(predicted: Bools, reference: Bools, spacing_mm: Sequence[float]) -> float:
    """The 95 % Hausdorff distance in mm of two masks [z,y,x]."""
    return surface_measures(predicted, reference, spacing_mm)[0]


def surface_dice(
    predicted: Bools, reference: Bools, spacing_mm: Sequence[float], tolerance_mm: float = TOLERANCE_MM
) -> float:
    """The share of both surfaces that lies within `tolerance_mm` of the other one."""
    return surface_measures(predicted, reference, spacing_mm, tolerance_mm)[1]


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
    known: dict[Hashable, int] = {}
    owner = np.array([known.setdefault(patient, len(known)) for patient in patients], np.intp)
    sound = np.isfinite(values)
    count = np.bincount(owner[sound], minlength=len(known))
    total = np.bincount(owner[sound], values[sound], minlength=len(known))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
