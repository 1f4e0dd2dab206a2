"""95 % intervals of one trial's metric over its test cases: what another test set of this size could have given.

AUC by DeLong, DeLong and Clarke-Pearson (1988), on the logit scale, where it stays within 0 and 1; IoU, Dice and whatever is
a ratio or a mean by the bootstrap. Cases of one patient are alike: where patients are given, these are drawn, not cases.
"""

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Interval = tuple[float, float]
RESAMPLES, SEED = 2000, 0
SURE = 0.025  # probability beyond either end
UNDEFINED: Interval = (math.nan, math.nan)


def auc_interval(scores: ArrayLike, truth: ArrayLike, patients: Sequence[Hashable] | None = None) -> Interval:
    """Of the area under the ROC curve of `scores` (N,) against `truth` (N,) of 0 and 1; NaN without both classes.

    A perfect ranking has no variance to go by: its lower end is that of n successes in n, n the rarer class (Clopper and
    Pearson), which is wide rather than narrow.
    """
    score, positive = np.asarray(scores, np.float64), np.asarray(truth).astype(bool)
    if score.shape != positive.shape or score.ndim != 1:
        raise ValueError(f"scores {score.shape} and truth {positive.shape}: must be two lists of one length")
    rarer = int(min(positive.sum(), (~positive).sum()))
    if rarer == 0:
        return UNDEFINED
    area, variance = delong(score, positive)
    if area in (0.0, 1.0):
        bound = SURE ** (1 / rarer)
        return (bound, 1.0) if area else (0.0, 1 - bound)
    if patients is not None:
        return bootstrap(_weighted_auc(score, positive), patients)
    if rarer < 2:
        return UNDEFINED
    reach = 1.959963984540054 * math.sqrt(variance) / (area * (1 - area))
    middle = math.log(area / (1 - area))
    return 1 / (1 + math.exp(reach - middle)), 1 / (1 + math.exp(-reach - middle))


def delong(score: Floats, positive: NDArray[np.bool_]) -> tuple[float, float]:
    """AUC and its variance by midranks (Sun and Xu 2014: n log n); the variance is NaN with one case of a class."""
    from scipy.stats import rankdata  # noqa: PLC0415  (a second of imports)

    ours, theirs = score[positive], score[~positive]
    m, n = len(ours), len(theirs)
    ranks = rankdata(score)
    above = (ranks[positive] - rankdata(ours)) / n  # share of negatives below each positive, ties half
    below = 1 - (ranks[~positive] - rankdata(theirs)) / m  # share of positives above each negative
    if min(m, n) < 2:
        return float(above.mean()), math.nan
    return float(above.mean()), float(above.var(ddof=1) / m + below.var(ddof=1) / n)


def _weighted_auc(score: Floats, positive: NDArray[np.bool_]) -> Callable[[Floats], float]:
    """AUC as a function of how often each case was drawn: the sort is done once for all resamples."""
    order = np.argsort(score, kind="stable")
    ours = positive[order]
    starts = np.flatnonzero(np.concatenate(([True], np.diff(score[order]) > 0)))  # of runs of equal scores

    def auc(weights: Floats) -> float:
        drawn = weights[order]
        plus = np.add.reduceat(np.where(ours, drawn, 0.0), starts)
        minus = np.add.reduceat(np.where(ours, 0.0, drawn), starts)
        pairs = plus.sum() * minus.sum()
        return float(plus @ (np.cumsum(minus) - minus / 2) / pairs) if pairs else math.nan

    return auc


def mean_interval(values: ArrayLike, patients: Sequence[Hashable] | None = None) -> Interval:
    """Of the mean of `values` (N,), one a case."""
    return ratio_interval(values, np.ones(np.shape(values)), patients)


def ratio_interval(
    above: ArrayLike, below: ArrayLike, patients: Sequence[Hashable] | None = None
) -> Interval:
    """Of sum(above) / sum(below), one pair a case: a pooled IoU is the sum of intersections over that of unions."""
    top, bottom = np.asarray(above, np.float64), np.asarray(below, np.float64)
    if top.shape != bottom.shape or top.ndim != 1:
        raise ValueError(
            f"numerators {top.shape} and denominators {bottom.shape}: must be two lists of one length"
        )

    def ratio(weights: Floats) -> float:
        total = float(weights @ bottom)
        return float(weights @ top) / total if total else math.nan

    return bootstrap(ratio, range(len(top)) if patients is None else patients)


def bootstrap(statistic: Callable[[Floats], float], patients: Sequence[Hashable]) -> Interval:
    """Percentile interval of `statistic(weights)` over resampled patients; `weights` (N,) says how often a case was drawn.

    `patients` (N,) names each case's. The same every time: the seed is fixed. NaN for fewer than two patients, and where
    fewer than half of the resamples have a value.
    """
    numbers: dict[Hashable, int] = {}
    owner = np.array([numbers.setdefault(patient, len(numbers)) for patient in patients], np.intp)
    count = len(numbers)
    if count < 2:
        return UNDEFINED
    rng = np.random.default_rng(SEED)
    even = np.full(count, 1 / count)
    found = [statistic(rng.multinomial(count, even).astype(np.float64)[owner]) for _ in range(RESAMPLES)]
    sound = [value for value in found if math.isfinite(value)]
    if len(sound) < RESAMPLES / 2:
        return UNDEFINED
    low, high = np.quantile(sound, (SURE, 1 - SURE))
    return float(low), float(high)
