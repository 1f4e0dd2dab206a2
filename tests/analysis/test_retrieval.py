"""Ranks and scores of retrieval against sorting by hand."""

import numpy as np
import pytest
import torch

from p2w.analysis.similarity import among_parts, among_wholes, retrieval_ranks, retrieval_scores


def rank_naive(query, gallery, own):
    """1 + how many others are at least as similar."""
    similar = [float(query @ entry / np.linalg.norm(query) / np.linalg.norm(entry)) for entry in gallery]
    return 1 + sum(value >= similar[own] for index, value in enumerate(similar) if index != own)


def test_ranks_against_loops():
    rng = np.random.default_rng(0)
    parts, wholes = rng.normal(size=(9, 3, 4)), rng.normal(size=(9, 4))
    parts += 0.8 * wholes[:, None]
    found = among_wholes(torch.from_numpy(parts), torch.from_numpy(wholes)).numpy()
    expected = [[rank_naive(parts[w, p], wholes, w) for w in range(9)] for p in range(3)]
    np.testing.assert_array_equal(found, expected)
    found = among_parts(torch.from_numpy(parts)).numpy()
    expected = [[rank_naive(parts[w, p], parts[:, (p + 1) % 3], w) for w in range(9)] for p in range(3)]
    np.testing.assert_array_equal(found, expected)


def test_scores_against_loops():
    found = retrieval_scores(torch.tensor([[1, 2, 5], [6, 1, 8]]), 10)
    assert found["top1"] == pytest.approx(2 / 6) and found["top5"] == pytest.approx(4 / 6)
    assert found["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 5 + 1 / 6 + 1 + 1 / 8) / 6)
    assert found["chance_top1"] == 0.1 and found["chance_top5"] == 0.5
    assert found["chance_mrr"] == pytest.approx(sum(1 / k for k in range(1, 11)) / 10)
    assert (found["n_queries"], found["gallery"]) == (6, 10)


def test_chance_is_what_features_of_noise_reach():
    generator = torch.Generator().manual_seed(0)
    parts, wholes = torch.randn(40, 50, 16, generator=generator), torch.randn(40, 16, generator=generator)
    found = retrieval_scores(among_wholes(parts, wholes), 40)
    for name in ("top1", "top5", "mrr"):
        assert found[name] == pytest.approx(found[f"chance_{name}"], abs=0.03)


def test_the_same_answer_for_all_comes_last():
    assert retrieval_ranks(torch.full((7, 3), 0.3), torch.full((7, 3), 0.1)).tolist() == [7] * 7
