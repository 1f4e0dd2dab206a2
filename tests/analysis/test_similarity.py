"""Pairs, cosines and AUC against naive float64."""

import functools
import itertools

import numpy as np
import pytest
import torch

from p2w.analysis.similarity import Similarity, auc, pair_cosines, similarity_file
from p2w.config import PretextConfig
from p2w.data.local import LocalSet
from p2w.data.manifest import read_manifest
from p2w.data.order import streamed_fixed
from p2w.data.stream import Stream, open_set
from p2w.log import Log
from p2w.model import build_encoder
from p2w.world import World


def cosine(a, b):
    return float(
        sum(x * y for x, y in zip(a, b, strict=True)) / np.sqrt((a**2).sum()) / np.sqrt((b**2).sum())
    )


def auc_naive(positive, negative):
    wins = [1.0 if p > n else 0.5 if p == n else 0.0 for p in positive for n in negative]
    return sum(wins) / len(wins)


@pytest.mark.parametrize(("wholes", "parts"), [(2, 2), (3, 6), (7, 4)])
def test_pairs_are_all_within_and_as_many_across(wholes, parts):
    features = np.random.default_rng(wholes).normal(size=(wholes, parts, 5))
    positive, negative = pair_cosines(features)
    within = [
        cosine(features[w, i], features[w, j])
        for w in range(wholes)
        for i, j in itertools.combinations(range(parts), 2)
    ]
    np.testing.assert_allclose(np.sort(positive), np.sort(within), atol=1e-12)
    across = [
        cosine(features[v, i], features[w, j])
        for v, w in itertools.permutations(range(wholes), 2)
        for i, j in itertools.combinations(range(parts), 2)
    ]
    assert len(negative) == len(positive)
    for value in negative:  # each of them is a pair of two different wholes
        assert np.abs(np.array(across) - value).min() < 1e-12


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


def test_a_network_that_is_lost_yields_nothing_and_the_run_goes_on(tiny_set, tmp_path):
    """Features that are not finite: no cosine, no file for the histogram, no error; validation says that it is lost."""
    world = World(0, 1, 0, 1, "here", torch.device("cpu"), "test")
    shards, encoder = open_set(str(tiny_set)), build_encoder("unet3d", 2).eval()
    config, log = PretextConfig(size=(8, 16, 16)), Log(tmp_path, True, 1)
    look = Similarity(config, encoder, lambda: Stream.validation(shards, 4, readers=0), world, log, parts=2)
    with torch.no_grad():
        assert [name for name, _ in look(0)] == [
            f"similarity/{kind}" for kind in ("positive", "negative", "auc")
        ]
        encoder.down_tr512.ops[1].conv1.bias.fill_(float("nan"))
        assert list(look(1)) == []
    assert similarity_file(tmp_path, 0).exists() and not similarity_file(tmp_path, 1).exists()


class InAnotherOrder(LocalSet):
    """A local set read in the order of a streamed one; several ranks bring yet others together."""

    def fixed_order(self, ids, batch):
        return streamed_fixed(ids, batch)


def test_the_pairs_do_not_depend_on_the_order_of_the_wholes(tiny_set, tmp_path):
    world = World(0, 1, 0, 1, "here", torch.device("cpu"), "test")
    torch.manual_seed(0)
    encoder, config = build_encoder("unet3d", 2).eval(), PretextConfig(size=(8, 16, 16))
    found = []
    for kind in (LocalSet, InAnotherOrder):
        shards = kind(read_manifest(tiny_set))
        stream = functools.partial(Stream.validation, shards, 3, readers=0)
        orders = [batch.ids.tolist() for batch in stream().batches()]
        log = Log(tmp_path / kind.__name__, True, 1)
        look = Similarity(config, encoder, stream, world, log, parts=2)
        with torch.no_grad():
            found.append((dict(look(0)), orders))
    (one, ordered), (two, other) = found
    assert ordered != other
    assert one == pytest.approx(two, abs=1e-6)  # features may differ in a bit with their place in a batch
