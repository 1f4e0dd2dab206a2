"""Pearson's r, its interval and its p against the formulas written out."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from p2w.stats import pearson


def by_hand(x, y):
    n, mean_x, mean_y = len(x), sum(x) / len(x), sum(y) / len(y)
    cov = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    r = cov / math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))
    reach = NormalDist().inv_cdf(0.975) / math.sqrt(n - 3)
    return r, math.tanh(math.atanh(r) - reach), math.tanh(math.atanh(r) + reach)


@pytest.mark.parametrize("n", [4, 12, 60])
def test_against_the_formulas(n):
    rng = np.random.default_rng(n)
    x = rng.normal(size=n)
    y = 0.7 * x + rng.normal(size=n)
    found = pearson(x.tolist(), y.tolist())
    assert (found.r, found.low, found.high) == pytest.approx(by_hand(x.tolist(), y.tolist()), abs=1e-9)
    assert found.n == n and 0 <= found.p_value <= 1


def test_p_value_against_a_permutation_test():
    rng = np.random.default_rng(0)
    x = rng.normal(size=15)
    y = 0.5 * x + rng.normal(size=15)
    reached = [abs(by_hand(x, rng.permutation(y))[0]) for _ in range(4000)]
    found = pearson(x.tolist(), y.tolist())
    assert np.mean(np.array(reached) >= abs(found.r)) == pytest.approx(found.p_value, abs=0.02)


def test_values_that_are_not_finite_are_left_out_and_undefined_results_are_nan():
    whole = pearson([1, 2, 3, 4, 5], [1, 2, 2, 4, 3])
    assert pearson([1, 2, math.nan, 3, 4, 5], [1, 2, 9, 2, 4, 3]) == whole
    for x, y in (([1, 2], [1, 2]), ([1, 1, 1, 1], [1, 2, 3, 4]), ([], [])):
        found = pearson(x, y)
        assert math.isnan(found.r) and math.isnan(found.low) and found.n == len(x)
    three = pearson([1, 2, 3], [1, 2, 4])
    assert three.r > 0.9 and math.isnan(three.low)
