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


def rank_naive(features):
    """By its definition: means over all ordered fours of different samples, for each part number; (W, P, C)."""
    over, under = [], []
    for part in range(features.shape[1]):
        for i, j, k, m in itertools.permutations(features[:, part], 4):
            over.append((i - j) @ (i - j) / 2 * ((k - m) @ (k - m)) / 2)  # E = (tr S)^2
            under.append(((i - j) @ (k - m) / 2) ** 2)  # E = tr S^2
    return np.mean(over) / np.mean(under)


@pytest.mark.parametrize("shape", [(8, 1, 30), (7, 2, 20), (9, 3, 40), (9, 1, 2)])
def test_the_rank_of_features_against_all_fours_of_samples(shape):
    features = np.random.default_rng(shape).exponential(size=shape) ** 2 + 5
    assert effective_rank(features) == pytest.approx(np.clip(rank_naive(features), 1, shape[2]), rel=1e-9)
    if shape[1] == 1:
        assert effective_rank(features[:, 0]) == effective_rank(features)


@pytest.mark.parametrize(("wholes", "parts", "within"), [(32, 3, 0.12), (96, 1, 0.06), (600, 1, 0.01)])
def test_white_noise_in_512_channels_has_a_rank_of_512(wholes, parts, within):
    """Also where there are far fewer samples than channels: 96 features had a rank of 93 by singular values."""
    noise = np.random.default_rng(5).normal(size=(wholes, parts, 512))
    assert effective_rank(noise + 3) == pytest.approx(512, rel=within)
    assert effective_rank(noise[:, 0]) == pytest.approx(512, rel=0.12)


def test_the_rank_of_features_is_the_number_of_directions_they_fill_alike():
    """Six directions about their mean, drawn often; parts that repeat those of their whole change nothing."""
    corners = np.concatenate((np.eye(6), -np.eye(6)))
    drawn = np.random.default_rng(0).integers(0, 6, 4000)
    for count in (1, 3, 6):
        some = corners[np.r_[:count, 6 : 6 + count]][drawn % (2 * count)] * [5, 5, 5, 5, 5, 5]
        some = some * np.random.default_rng(1).choice([-1, 1], (4000, 1))
        assert effective_rank(some + 7.0) == pytest.approx(count, rel=0.02)
        assert effective_rank(np.stack([some, some], 1)) == pytest.approx(effective_rank(some))
    assert effective_rank(corners[drawn] * [9, 1, 1, 1, 1, 1]) < 2
    assert np.isnan(effective_rank(np.ones((4, 3)))) and np.isnan(effective_rank(np.eye(3)))
    assert np.isnan(effective_rank(np.full((9, 2, 5), 0.1)))
