"""Pairs of parts: which are drawn, and cosine, AUC and d' against loops in float64."""

import math

import numpy as np
import pytest

from p2w.analysis.similarity import cosines, d_prime, draw_pairs, separability
from p2w.errors import UserError


def cosine(a, b):
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(float(x) ** 2 for x in a)) / math.sqrt(sum(float(x) ** 2 for x in b))


def test_pairs_are_what_they_are_called():
    pairs = draw_pairs(wholes=5, parts=16, count=100, seed=3)
    assert pairs.positive.shape == (5, 100, 2) and pairs.negative.shape == (5, 100, 3)
    for whole in range(5):
        alike = {tuple(sorted(pair)) for pair in pairs.positive[whole].tolist()}
        assert len(alike) == 100 and all(a != b for a, b in alike)  # 100 distinct ones of 120
        assert set(pairs.negative[whole, :, 1]) == set(range(5)) - {whole}
        assert set(pairs.negative[whole, :, 0]) == set(pairs.negative[whole, :, 2]) == set(range(16))


def test_the_draw_depends_on_the_seed_and_not_on_how_many_wholes_come_after():
    one, two, other = (draw_pairs(4, 8, 20, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.negative, two.negative)
    assert (one.positive != other.positive).any() and (one.negative != other.negative).any()
    np.testing.assert_array_equal(draw_pairs(9, 8, 20, 0).positive[:4], one.positive)


def test_few_parts_are_drawn_with_replacement():
    pairs = draw_pairs(2, 2, 7, 0)
    assert {tuple(pair) for pair in pairs.positive.reshape(-1, 2).tolist()} == {(0, 1)}


@pytest.mark.parametrize(("wholes", "parts", "says"), [(1, 8, "at least 2"), (3, 1, "at least 2")])
def test_nothing_to_compare_is_said(wholes, parts, says):
    with pytest.raises(UserError, match=says):
        draw_pairs(wholes, parts, 10, 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cosines_against_loops(dtype):
    features = np.random.default_rng(1).normal(size=(4, 5, 7)).astype(dtype)
    pairs = draw_pairs(4, 5, 9, 2)
    positive, negative = cosines(features, pairs)
    for whole in range(4):
        for k, (i, j) in enumerate(pairs.positive[whole]):
            assert positive[whole, k] == pytest.approx(
                cosine(features[whole, i], features[whole, j]), abs=1e-12
            )
        for k, (i, other, j) in enumerate(pairs.negative[whole]):
            expected = cosine(features[whole, i], features[other, j])
            assert negative[whole, k] == pytest.approx(expected, abs=1e-12)


def test_separability_against_loops():
    rng = np.random.default_rng(5)
    positive, negative = rng.normal(0.7, 0.2, (6, 10)), rng.normal(0.4, 0.1, (6, 10))
    found = separability(positive, negative)
    a, b = positive.ravel().tolist(), negative.ravel().tolist()
    mean_a, mean_b = sum(a) / 60, sum(b) / 60
    var_a, var_b = sum((x - mean_a) ** 2 for x in a) / 60, sum((x - mean_b) ** 2 for x in b) / 60
    wins = sum(x > y for x in a for y in b) / 3600
    expected = {"auc": wins, "d_prime": (mean_a - mean_b) / math.sqrt((var_a + var_b) / 2)}
    expected |= {"positive_mean": mean_a, "negative_mean": mean_b, "n_pairs": 60}
    assert found == pytest.approx(expected, abs=1e-9)


def test_no_spread_has_no_d_prime():
    assert math.isnan(d_prime(np.ones(4), np.ones(4)))
