"""Do two curves move together? Pearson's r with its confidence interval (paper, Fig. 2c: 0.93)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Correlation:
    """Pearson's r, its 95 % interval by Fisher's transform, two-sided p, number of points; NaN where undefined."""

    r: float
    low: float
    high: float
    p_value: float
    n: int


def pearson(x: Sequence[float], y: Sequence[float]) -> Correlation:
    """Of points (x_i, y_i); those with a value that is not finite are left out.

    Undefined for fewer than three points or where x or y does not vary; the interval takes four points.
    """
    from scipy.stats import pearsonr  # noqa: PLC0415  (a second of imports)

    pairs = np.array([(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)])
    if len(pairs) < 3 or not np.ptp(pairs, axis=0).all():
        return Correlation(math.nan, math.nan, math.nan, math.nan, len(pairs))
    found = pearsonr(pairs[:, 0], pairs[:, 1])
    low, high = found.confidence_interval(0.95) if len(pairs) > 3 else (math.nan, math.nan)
    return Correlation(float(found.statistic), float(low), float(high), float(found.pvalue), len(pairs))
