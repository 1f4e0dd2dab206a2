"""Mean and deviation of trials, and whether two of them differ; by scipy (paper, Table 1: ten trials, paired t-test).

Two sets of trials are paired where trial i of both had the same seed, and so the same labels, order and decoder; else
Welch's test compares them, and says why. Intervals of one trial's metric over its test cases: intervals.py.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.05  # below it two means differ
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

    `n` counts the pairs, or the values of both; `why` says why the test is not the paired one.
    """

    method: str
    difference: float
    t: float
    df: float
    p: float
    n: tuple[int, ...]
    why: str = ""


def summarise(values: Sequence[float]) -> Summary:
    """Of finite values; one of them has no deviation, none of them no mean."""
    mean = float(np.mean(values)) if len(values) else math.nan
    return Summary(mean, float(np.std(values, ddof=1)) if len(values) > 1 else math.nan, len(values))


def values(trials: Trials) -> list[float]:
    """The metric of every trial, by index."""
    return [trials[index][1] for index in sorted(trials)]


def compare(a: Trials, b: Trials) -> Comparison:
    """Paired t-test over the trials that both have; Welch's when a seed differs or fewer than two are common."""
    common = sorted(a.keys() & b.keys())
    other = [index for index in common if a[index][0] != b[index][0]]
    if other:
        return welch(summarise(values(a)), summarise(values(b)), f"seeds of trial {other[0]} differ")
    if len(common) < 2:
        return welch(summarise(values(a)), summarise(values(b)), f"{len(common)} trials in common")
    return paired([a[index][1] for index in common], [b[index][1] for index in common])


def paired(a: Sequence[float], b: Sequence[float]) -> Comparison:
    """Paired t-test of values that belong together one by one.

    Differences that are all alike leave t undefined: p is 1 when they are zero, else 0. Raises ValueError for lists of
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
    return Comparison("paired t-test", mean, t, float(len(apart) - 1), p, (len(apart),))


def welch(a: Summary, b: Summary, why: str = "") -> Comparison:
    """Welch's test from means and deviations alone, as of published numbers. Undefined below two values a side."""
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
    return Comparison(
        "Welch's t-test", difference, float(found.statistic), df, float(found.pvalue), sizes, why
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of one family, adjusted by Holm's step-down rule; NaN stays NaN and does not count."""
    order = sorted((p, at) for at, p in enumerate(p_values) if not math.isnan(p))
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, (p, at) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[at] = largest
    return adjusted
