"""Pairs, cosines and AUC against naive float64."""

import itertools

import numpy as np
import pytest

from p2w.analysis.similarity import auc, effective_rank, pair_cosines


def cosine(a, b):
    return float(
        sum(x * y for x, y in zip(a, b, strict=True)) / np.sqrt((a**2).sum()) / np.sqrt((b**2).sum())
    )


def auc_naive(positive, negative):
    wins = [1.0 if p > n else 0.5 if p == n else 0.0 for p in positive for n in negative]
    return sum(wins) / len(wins)


@pytest.mark.parametrize(("wholes", "parts"), [(2, 2), (3, 6), (7, 4)])
def test_pairs_are_all_within_and_all_across(wholes, parts):
    features = np.random.default_rng(wholes).normal(size=(wholes, parts, 5))
    positive, negative = pair_cosines(features)
    every = list(itertools.combinations(itertools.product(range(wholes), range(parts)), 2))
    within = [cosine(features[one], features[two]) for one, two in every if one[0] == two[0]]
    across = [cosine(features[one], features[two]) for one, two in every if one[0] != two[0]]
    np.testing.assert_allclose(np.sort(positive), np.sort(within), atol=1e-12)
    np.testing.assert_allclose(np.sort(negative), np.sort(across), atol=1e-12)


def test_a_network_that_answers_the_same_for_all_tells_nothing_apart():
    positive, negative = pair_cosines(np.ones((4, 3, 2)))
    assert auc(positive, negative) == 0.5
    zero = pair_cosines(np.zeros((4, 3, 2)))
    assert all(np.isfinite(values).all() for values in zero)


def test_parts_that_name_their_whole_are_told_apart_fully():
    features = np.repeat(np.eye(5)[:, None], 4, axis=1)
    assert auc(*pair_cosines(features)) == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_auc_against_counting_all_pairs_with_ties(seed):
    rng = np.random.default_rng(seed)
    positive, negative = rng.integers(0, 6, 30) / 5, rng.integers(0, 5, 17) / 5
    assert auc(positive, negative) == pytest.approx(auc_naive(positive, negative), abs=1e-12)


def test_the_rank_of_features_is_the_number_of_directions_they_fill_alike():
    corners = np.concatenate((np.eye(6), -np.eye(6)))  # six directions about their mean, all alike
    for count in (1, 3, 6):
        some = corners[np.r_[:count, 6 : 6 + count]]
        assert effective_rank(some + 7.0) == pytest.approx(count)
    assert effective_rank(corners * [9, 1, 1, 1, 1, 1]) < 6
    assert np.isnan(effective_rank(np.ones((4, 3))))
