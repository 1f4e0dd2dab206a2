"""The contrastive loss against the paper's formula, one term at a time in float64."""

import math

import numpy as np
import pytest
import torch

from p2w.analysis import similarity
from p2w.analysis.similarity import contrastive_losses, draw_tests
from p2w.errors import UserError


def naive(features, whole, drawn, temperature):
    """-log( exp(s+ / t) / (exp(s+ / t) + sum exp(s- / t)) ), averaged over the tests of one whole."""
    flat = features.reshape(-1, features.shape[2])

    def s(a, b):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))

    losses = []
    for anchor, positive, rows in zip(drawn.anchor, drawn.positive, drawn.negatives, strict=True):
        a = features[whole, anchor]
        top = math.exp(s(a, features[whole, positive]) / temperature)
        below = sum(math.exp(s(a, flat[row]) / temperature) for row in rows)
        losses.append(-math.log(top / (top + below)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("block", [similarity.BLOCK, 40, 200])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_against_the_formula(dtype, within, block, monkeypatch):
    monkeypatch.setattr(similarity, "BLOCK", block)  # of 20 parts: two rows at a time, or two wholes
    features = np.random.default_rng(0).normal(0.3, 1, (4, 5, 6))
    settings = {"tests": 7, "negatives": 30, "temperature": 0.7, "seed": 11}
    found = contrastive_losses(torch.from_numpy(features).to(dtype), **settings)
    expected = [naive(features, w, draw_tests(4, 5, w, 7, 30, 11), 0.7) for w in range(4)]
    np.testing.assert_allclose(found.numpy(), expected, atol=within, rtol=0)


def test_a_test_has_an_anchor_another_part_and_parts_of_all_other_wholes():
    drawn = draw_tests(wholes=3, parts=4, whole=1, tests=300, negatives=50, seed=0)
    assert (
        set(drawn.anchor) == set(drawn.positive) == set(range(4)) and (drawn.anchor != drawn.positive).all()
    )
    assert set(drawn.negatives.ravel()) == {0, 1, 2, 3, 8, 9, 10, 11}
    counts = np.bincount(drawn.negatives.ravel(), minlength=12)[[0, 1, 2, 3, 8, 9, 10, 11]]
    assert counts.min() > 0.9 * counts.mean()  # uniform: 1,875 each, standard deviation 40


def test_a_whole_has_its_value_whoever_computes_it():
    features = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(0))
    everything = contrastive_losses(features, tests=5, negatives=20)
    shared = [contrastive_losses(features, tests=5, negatives=20, wholes=range(r, 6, 2)) for r in range(2)]
    assert torch.equal(torch.stack(shared, 1).flatten(), everything)
    assert contrastive_losses(features, wholes=[]).shape == (0,)


def test_ends_of_the_scale():
    """Same answer for all: log(1 + K). One answer a whole, at right angles to the others: the formula by hand."""
    same = contrastive_losses(torch.ones(3, 2, 4), tests=4, negatives=100)
    np.testing.assert_allclose(same, math.log(101), rtol=1e-6)
    apart = contrastive_losses(torch.eye(3).repeat_interleave(2, 0).view(3, 2, 3), tests=4, negatives=100)
    np.testing.assert_allclose(apart, math.log(1 + 100 * math.exp(-1 / 0.7)), rtol=1e-6)


def test_a_low_temperature_is_no_overflow():
    """At t = 0.01 exp(1 / t) is no float32; 100 negatives at cosine 0 to one positive at 1, and the other way round."""
    eye = torch.eye(3).repeat_interleave(2, 0).view(3, 2, 3)
    assert (contrastive_losses(eye, tests=4, negatives=100, temperature=0.01) < 1e-30).all()
    crossed = eye.flatten(0, 1)[[0, 2, 0, 2, 0, 2]].view(3, 2, 3)  # both parts of a whole at right angles
    found = contrastive_losses(crossed, tests=4, negatives=100, temperature=0.01)
    assert ((found > 100 + math.log(25)) & (found < 100 + math.log(75))).all()


def test_one_whole_has_no_negatives():
    with pytest.raises(UserError, match=r"1 whole.* at least 2"):
        contrastive_losses(torch.ones(1, 4, 2))
