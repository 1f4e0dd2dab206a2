"""Statistics of trials and of test sets: t-tests, Holm's correction, confidence intervals, DeLong, Pearson's r.

Two sets of trials are compared by the paired t-test if trial i has the same seed in both, and so the same labels, order and
decoder; else by Welch's test, with the reason. That tests the very weights that the trials started from. Two methods of
pretraining are compared by `compare_pretrainings`: trials of one pretraining share its luck, so the pretraining is what is
repeated, and a method that was pretrained once has no test.

Intervals are of the metric of one trial over its test cases: of AUC by DeLong, DeLong and Clarke-Pearson (1988) on the logit
scale, where it stays within 0 and 1; of IoU, Dice and other ratios or means by the bootstrap. Cases of one patient are
correlated, so patients are resampled rather than cases, if they are given.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.05  # significance level: two means differ if p is below
Trials = Mapping[int, tuple[int, float]]  # index of the trial -> its seed, its metric


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation (n - 1 in the denominator) of n values; NaN where undefined."""

    mean: float
    sd: float
    n: int


@dataclass(frozen=True)
class Comparison:
    """A two-sided t-test of mean a against mean b: difference a - b, t, degrees of freedom, p; NaN where undefined.

    `n` counts the pairs, or the values of both; `why` says why the test is not the paired one. `low` and `high` are the 95 %
    interval of the difference, which is the size of the effect in the metric's own unit.
    """

    method: str
    difference: float
    t: float
    df: float
    p: float
    n: tuple[int, ...]
    why: str = ""
    low: float = math.nan
    high: float = math.nan


def summarise(values: Sequence[float]) -> Summary:
    """Mean and standard deviation of finite values; NaN for the deviation of one value, and for the mean of none."""
    mean = float(np.mean(values)) if len(values) else math.nan
    return Summary(mean, float(np.std(values, ddof=1)) if len(values) > 1 else math.nan, len(values))


def values(trials: Trials) -> list[float]:
    """The metric of every trial, by index."""
    return [trials[index][1] for index in sorted(trials)]


def compare(a: Trials, b: Trials) -> Comparison:
    """Paired t-test over the common trials; Welch's test when a seed differs or fewer than two trials are common."""
    common = sorted(a.keys() & b.keys())
    other = [index for index in common if a[index][0] != b[index][0]]
    if other:
        return welch(summarise(values(a)), summarise(values(b)), f"seeds of trial {other[0]} differ")
    if len(common) < 2:
        return welch(summarise(values(a)), summarise(values(b)), f"{len(common)} trials in common")
    return paired([a[index][1] for index in common], [b[index][1] for index in common])


def paired(a: Sequence[float], b: Sequence[float]) -> Comparison:
    """Paired t-test of a[i] against b[i].

    If all differences are equal, t is undefined and p is 1 when they are zero, else 0. Raises ValueError for lists of
    unequal length.
    """
    from scipy.stats import ttest_rel  # noqa: PLC0415  (a second of imports)

    apart = [one - two for one, two in zip(a, b, strict=True)]
    mean = float(np.mean(apart)) if apart else math.nan
    if len(apart) < 2:
        return Comparison("paired t-test", mean, math.nan, math.nan, math.nan, (len(apart),))
    if np.ptp(apart) <= 1e-12 * max(1.0, *map(abs, (*a, *b))):
        t, p = (0.0, 1.0) if abs(mean) <= 1e-12 else (math.copysign(math.inf, mean), 0.0)
    else:
        found = ttest_rel(a, b)
        t, p = float(found.statistic), float(found.pvalue)
    df, error = float(len(apart) - 1), float(np.std(apart, ddof=1)) / math.sqrt(len(apart))
    return Comparison("paired t-test", mean, t, df, p, (len(apart),), "", *_around(mean, error, df))


def welch(a: Summary, b: Summary, why: str = "") -> Comparison:
    """Welch's test from means and deviations alone, such as published ones. NaN with fewer than two values on a side."""
    from scipy.stats import ttest_ind_from_stats  # noqa: PLC0415

    difference, sizes = a.mean - b.mean, (a.n, b.n)
    if min(sizes) < 2 or not all(map(math.isfinite, (a.sd, b.sd, difference))):
        return Comparison("Welch's t-test", difference, math.nan, math.nan, math.nan, sizes, why)
    if a.sd == b.sd == 0:
        p = 0.0 if difference else 1.0
        t = math.copysign(math.inf, difference) if difference else 0.0
        return Comparison("Welch's t-test", difference, t, float(sum(sizes) - 2), p, sizes, why)
    found = ttest_ind_from_stats(a.mean, a.sd, a.n, b.mean, b.sd, b.n, equal_var=False)
    one, two = a.sd**2 / a.n, b.sd**2 / b.n
    df = (one + two) ** 2 / (one**2 / (a.n - 1) + two**2 / (b.n - 1))
    interval = _around(difference, math.sqrt(one + two), df)
    return Comparison(
        "Welch's t-test", difference, float(found.statistic), df, float(found.pvalue), sizes, why, *interval
    )


def _around(difference: float, error: float, df: float) -> tuple[float, float]:
    """The 95 % interval of a difference with its standard error, by Student's t."""
    from scipy.stats import t as student  # noqa: PLC0415

    half = float(student.ppf(0.975, df)) * error
    return difference - half, difference + half


Pretrainings = Mapping[Hashable, Trials]
"""Seed of each pretraining -> the trials that start from it. {None: trials}: nothing was pretrained, and each trial starts
from weights of its own."""


def compare_pretrainings(a: Pretrainings, b: Pretrainings) -> Comparison:
    """Test of one method of pretraining against another, or against none, with the pretraining as the replicate.

    Where all pretrainings have the same trials (index and seed), the differences a - b of pretraining s and trial t are
    analysed as two crossed random effects: the variance of their mean is that of pretrainings and that of trials (which
    holds what a common b adds to all of them), with Satterthwaite's (1946) degrees of freedom; as for readers and cases in
    studies of diagnosis. A pretraining of b is paired with that of a of the same seed. Elsewhere each pretraining counts as
    the mean of its trials: paired by seed, or Welch's test. NaN where one side was pretrained once: one is no replicate.
    """
    mean = _mean_of(a) - _mean_of(b)
    if any(len(side) < 2 and None not in side for side in (a, b)):
        sizes = len(a), len(b)
        return Comparison(
            "none", mean, math.nan, math.nan, math.nan, sizes, "one pretraining is no replicate"
        )
    if None in a and None in b:
        return compare(a[None], b[None])
    apart = _crossed(a, b)
    if apart is None:
        one, two = _units(a), _units(b)
        if one.keys() == two.keys():
            return paired([one[seed] for seed in one], [two[seed] for seed in one])
        return welch(
            summarise([*one.values()]), summarise([*two.values()]), "pretrainings or trials are not the same"
        )
    return _two_way(apart)


def _mean_of(side: Pretrainings) -> float:
    return float(np.mean([np.mean(values(trials)) for trials in side.values()]))


def _units(side: Pretrainings) -> dict[Hashable, float]:
    """The independent values of a side: the mean of a pretraining's trials, or each trial where nothing was pretrained."""
    if None in side:
        return {("trial", index): value for index, (_, value) in side[None].items()}
    return {seed: float(np.mean(values(trials))) for seed, trials in side.items()}


def _crossed(a: Pretrainings, b: Pretrainings) -> NDArray[np.float64] | None:
    """Differences (pretrainings, trials) of a and b; None where they are not the same on both sides, or too few."""
    every = [*a.values(), *b.values()]
    alike = {tuple((index, trials[index][0]) for index in sorted(trials)) for trials in every}
    seeds = [seed for seed in (b if None in a else a) if None in a or None in b or seed in b]
    if len(alike) > 1 or min(map(len, every)) < 2 or len(seeds) < 2:
        return None
    if None not in a and None not in b and a.keys() != b.keys():
        return None
    rows = [
        np.subtract(values(a.get(None, a.get(seed, {}))), values(b.get(None, b.get(seed, {}))))
        for seed in seeds
    ]
    return np.array(rows, np.float64)


def _two_way(apart: NDArray[np.float64]) -> Comparison:
    """Test of the mean of (S, T) values against 0, rows and columns being random effects."""
    from scipy.stats import t as student  # noqa: PLC0415

    (s, t), mean = apart.shape, float(apart.mean())
    rows, columns = apart.mean(1) - mean, apart.mean(0) - mean
    rest = apart - mean - rows[:, None] - columns[None, :]
    squares = t * float((rows**2).sum()) / (s - 1), s * float((columns**2).sum()) / (t - 1)
    left = float((rest**2).sum()) / ((s - 1) * (t - 1))
    method, sizes = "pretrainings and trials as crossed random effects", (s, t)
    total = max(sum(squares) - left, *squares)  # a component of variance is not below 0
    if total <= 1e-24 * max(1.0, float((apart**2).max())):
        value, p = (math.copysign(math.inf, mean), 0.0) if abs(mean) > 1e-12 else (0.0, 1.0)
        return Comparison(method, mean, value, float(s - 1), p, sizes, "", mean, mean)
    spread = squares[0] ** 2 / (s - 1) + squares[1] ** 2 / (t - 1) + left**2 / ((s - 1) * (t - 1))
    df = max(total**2 / spread, float(min(s, t) - 1))
    error = math.sqrt(total / (s * t))
    value = mean / error
    p = 2 * float(student.sf(abs(value), df))
    return Comparison(method, mean, value, df, p, sizes, "", *_around(mean, error, df))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of one family, adjusted by Holm's step-down rule; NaN stays NaN and does not count."""
    order = sorted((p, at) for at, p in enumerate(p_values) if not math.isnan(p))
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, (p, at) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[at] = largest
    return adjusted


Floats = NDArray[np.float64]
Interval = tuple[float, float]
RESAMPLES, SEED = 2000, 0
TAIL = 0.025  # probability beyond either end of an interval
UNDEFINED: Interval = (math.nan, math.nan)


def auc_interval(scores: ArrayLike, truth: ArrayLike, patients: Sequence[Hashable] | None = None) -> Interval:
    """95 % interval of the area under the ROC curve of `scores` (N,) against `truth` (N,) of 0 and 1.

    NaN unless there are both classes. A perfect ranking has no variance: its lower end is that of n successes in n trials, n
    the size of the smaller class (Clopper and Pearson), which is conservative. Raises ValueError for unequal lengths.
    """
    score, positive = np.asarray(scores, np.float64), np.asarray(truth).astype(bool)
    if score.shape != positive.shape or score.ndim != 1:
        raise ValueError(f"scores {score.shape} and truth {positive.shape}: must be two lists of one length")
    rarer = int(min(positive.sum(), (~positive).sum()))
    if rarer == 0:
        return UNDEFINED
    area, variance = delong(score, positive)
    if area in (0.0, 1.0):
        bound = TAIL ** (1 / rarer)
        return (bound, 1.0) if area else (0.0, 1 - bound)
    if patients is not None:
        return bootstrap(weighted_auc(score, positive), patients)
    if rarer < 2:
        return UNDEFINED
    half_width = 1.959963984540054 * math.sqrt(variance) / (area * (1 - area))
    middle = math.log(area / (1 - area))
    return 1 / (1 + math.exp(half_width - middle)), 1 / (1 + math.exp(-half_width - middle))


def delong(score: Floats, positive: NDArray[np.bool_]) -> tuple[float, float]:
    """AUC and its variance by midranks (Sun and Xu 2014: n log n); the variance is NaN with one case of a class."""
    from scipy.stats import rankdata  # noqa: PLC0415  (a second of imports)

    positives, negatives = score[positive], score[~positive]
    m, n = len(positives), len(negatives)
    ranks = rankdata(score)
    above = (ranks[positive] - rankdata(positives)) / n  # share of negatives below each positive, ties half
    below = 1 - (ranks[~positive] - rankdata(negatives)) / m  # share of positives above each negative
    if min(m, n) < 2:
        return float(above.mean()), math.nan
    return float(above.mean()), float(above.var(ddof=1) / m + below.var(ddof=1) / n)


def weighted_auc(score: Floats, positive: NDArray[np.bool_]) -> Callable[[Floats], float]:
    """A function that gives the AUC from how often each case was drawn, NaN where a class was not; for `bootstrap`.

    The cases are sorted once for all resamples.
    """
    order = np.argsort(score, kind="stable")
    is_positive = positive[order]
    starts = np.flatnonzero(np.concatenate(([True], np.diff(score[order]) > 0)))  # of runs of equal scores

    def auc(weights: Floats) -> float:
        drawn = weights[order]
        plus = np.add.reduceat(np.where(is_positive, drawn, 0.0), starts)
        minus = np.add.reduceat(np.where(is_positive, 0.0, drawn), starts)
        pairs = plus.sum() * minus.sum()
        return float(plus @ (np.cumsum(minus) - minus / 2) / pairs) if pairs else math.nan

    return auc


def mean_interval(values: ArrayLike, patients: Sequence[Hashable] | None = None) -> Interval:
    """95 % interval of the mean of `values` (N,), one per case."""
    return ratio_interval(values, np.ones(np.shape(values)), patients)


def ratio_interval(
    above: ArrayLike, below: ArrayLike, patients: Sequence[Hashable] | None = None
) -> Interval:
    """95 % interval of sum(above) / sum(below), one pair per case, such as a pooled IoU of intersections and unions."""
    top, bottom = np.asarray(above, np.float64), np.asarray(below, np.float64)
    if top.shape != bottom.shape or top.ndim != 1:
        raise ValueError(
            f"numerators {top.shape} and denominators {bottom.shape}: must be two lists of one length"
        )

    def ratio(weights: Floats) -> float:
        total = float(weights @ bottom)
        return float(weights @ top) / total if total else math.nan

    return bootstrap(ratio, range(len(top)) if patients is None else patients)


def numbered(names: Sequence[Hashable]) -> tuple[NDArray[np.intp], list[Hashable]]:
    """The number (N,) of each name, counted in the order in which names come first, and the names in that order."""
    numbers: dict[Hashable, int] = {}
    own = np.array([numbers.setdefault(name, len(numbers)) for name in names], np.intp)
    return own, list(numbers)


def bootstrap(statistic: Callable[[Floats], float], patients: Sequence[Hashable]) -> Interval:
    """95 % percentile interval of `statistic(weights)` over resampled patients.

    `weights` (N,) is how often each case was drawn, `patients` (N,) names the patient of each case. The seed is fixed, so
    results are reproducible. NaN for fewer than two patients, or if fewer than half of the resamples have a value.
    """
    owner, names = numbered(patients)
    count = len(names)
    if count < 2:
        return UNDEFINED
    rng = np.random.default_rng(SEED)
    even = np.full(count, 1 / count)
    found = [statistic(rng.multinomial(count, even).astype(np.float64)[owner]) for _ in range(RESAMPLES)]
    sound = [value for value in found if math.isfinite(value)]
    if len(sound) < RESAMPLES / 2:
        return UNDEFINED
    low, high = np.quantile(sound, (TAIL, 1 - TAIL))
    return float(low), float(high)


@dataclass(frozen=True)
class Correlation:
    """Pearson's r, its 95 % interval by Fisher's transform, two-sided p, number of points; NaN where undefined."""

    r: float
    low: float
    high: float
    p_value: float
    n: int


def pearson(x: Sequence[float], y: Sequence[float]) -> Correlation:
    """Correlation of the points (x_i, y_i), without those that have a value that is not finite.

    NaN for fewer than three points, or where x or y does not vary; the interval needs four points.
    """
    from scipy.stats import pearsonr  # noqa: PLC0415  (a second of imports)

    pairs = np.array([(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)])
    if len(pairs) < 3 or not np.ptp(pairs, axis=0).all():
        return Correlation(math.nan, math.nan, math.nan, math.nan, len(pairs))
    found = pearsonr(pairs[:, 0], pairs[:, 1])
    low, high = found.confidence_interval(0.95) if len(pairs) > 3 else (math.nan, math.nan)
    return Correlation(float(found.statistic), float(low), float(high), float(found.pvalue), len(pairs))
