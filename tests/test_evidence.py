"""bench/evidence: what its numbers say of features with a known answer, and that its page keeps what people wrote."""

import sys

import numpy as np
import pytest
import torch
from processes import REPO

from p2w.analysis.similarity import auc, pair_cosines

sys.path.insert(0, str(REPO / "bench" / "evidence"))
import page
import shortcuts


def test_separability_is_that_of_all_pairs_and_kinds_are_told_apart():
    rng = np.random.default_rng(0)
    scan, tile = np.arange(12) // 3, np.arange(12) % 3
    of_scan, of_tile = rng.normal(size=(4, 6)), rng.normal(size=(3, 6))
    noise = 0.1 * rng.normal(size=(12, 4, 12))
    features = np.concatenate((of_scan[scan], of_tile[tile]), 1)[:, None] + noise
    found = shortcuts.separability(features, scan, tile)
    assert found["all"] == pytest.approx(auc(*pair_cosines(features)), abs=1e-9)
    only_tile = np.pad(of_tile[tile], ((0, 0), (0, 6)))[:, None] + noise  # knows the tile and not the scan
    told = shortcuts.separability(only_tile, scan, tile)
    assert told["one_scan"] > 0.95 and 0.3 < told["one_tile"] < 0.7
    assert shortcuts.separability(features, np.arange(12), tile)["one_scan"] is None


def test_what_is_in_the_features_can_be_read_from_wholes_that_were_not_fitted():
    rng = np.random.default_rng(1)
    features = rng.normal(size=(20, 6, 5))
    place = features[..., :2] @ np.array([[1.0, 0.5], [0.0, 1.0]])
    chance = rng.normal(size=(20, 6, 1))
    read = shortcuts.readable(features, np.concatenate((place, chance), 2))
    assert min(read[:2]) > 0.99 and read[2] < 0.1


def test_changes_take_away_what_they_say():
    parts = torch.rand(3, 1, 4, 8, 8) * 0.2 + torch.tensor([0.1, 0.3, 0.5]).view(3, 1, 1, 1, 1)
    even = shortcuts.standardised(parts).flatten(1)
    assert (even.mean(1) - even.mean()).abs().max() < 0.01 and (even.std(1) - even.std()).abs().max() < 0.01
    bent = shortcuts.RandomGamma()(parts)
    assert torch.equal(bent, shortcuts.RandomGamma()(parts)) and not torch.equal(bent, parts)
    flat, curved = parts.flatten(1).argsort(1), bent.flatten(1).argsort(1)
    assert torch.equal(flat, curved)


def test_a_page_keeps_the_words_between_its_blocks():
    text = "why\n<!-- real networks -->\nold\n<!-- /real networks -->\nbecause"
    assert page.fill(text, "real networks", "new") == text.replace("old", "new")
    with pytest.raises(SystemExit, match="0 blocks <!-- real times -->"):
        page.fill(text, "real times", "new")
