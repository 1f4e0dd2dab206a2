"""The order is a permutation, divided exactly among ranks, and never changes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2w.rng import hash64, splitmix64
from p2w.stream.sampler import (
    epoch_permutation,
    fixed_order,
    shuffled_order,
    streamed_fixed_order,
    streamed_order,
)

SEEDS = st.integers(-(2**63), 2**64)
EPOCHS = st.integers(0, 2**40)


def splitmix_oracle(word: int) -> int:
    """SplitMix64's finaliser in Python's own integers."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


@given(st.integers(0, 2**64 - 1))
def test_mix_against_plain_integers(word):
    signed = np.array([word], np.uint64).view(np.int64)
    mixed = splitmix64(signed)
    assert int(mixed.view(np.uint64)[0]) == splitmix_oracle(word)
    assert splitmix64(torch.from_numpy(signed)).tolist() == mixed.tolist()


def test_splitmix_reference_stream():
    """The first outputs of SplitMix64 from state 1234567, as its authors' reference code prints them."""
    state = (np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).astype(
        "u8"
    )
    mixed = splitmix64(state.view(np.int64)).view(np.uint64)
    assert mixed.tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@given(SEEDS, EPOCHS, st.integers(1, 300))
def test_permutation_keeps_every_id_once(seed, epoch, n):
    ids = np.arange(n) * 3 + 5
    order = epoch_permutation(ids, seed, epoch)
    assert sorted(order.tolist()) == ids.tolist()
    np.testing.assert_array_equal(order, epoch_permutation(ids, seed, epoch))


def test_golden_order():
    """Runs are resumed by this order: it must never change."""
    assert epoch_permutation(np.arange(10), 0, 0).tolist() == [1, 8, 9, 3, 6, 5, 0, 7, 4, 2]
    assert epoch_permutation(np.arange(10), 0, 1).tolist() == [5, 2, 8, 6, 9, 1, 7, 4, 0, 3]
    assert epoch_permutation(np.arange(10), 7, 0).tolist() == [4, 8, 2, 7, 5, 1, 0, 6, 9, 3]


def test_epochs_and_seeds_differ_and_places_are_uniform():
    ids, epochs = np.arange(50), 4000
    places = np.stack(
        [np.argsort(epoch_permutation(ids, seed, epoch)) for seed in (0, 1) for epoch in range(epochs // 2)]
    )
    assert len({tuple(order) for order in places.tolist()}) == epochs
    counts = np.stack([np.bincount(column, minlength=50) for column in places.T])  # (id, place)
    expected = epochs / 50
    chi2 = ((counts - expected) ** 2 / expected).sum(axis=1)  # 49 degrees of freedom each
    assert 49 - 5 < chi2.mean() < 49 + 5
    assert (
        abs(np.corrcoef(places[:-1].ravel(), places[1:].ravel())[0, 1]) < 0.02
    )  # one epoch tells nothing of the next


@given(st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=4), st.integers(1, 500))
def test_hashes_never_tie(key, n):
    assert len(np.unique(hash64(np.arange(n), *key))) == n


@given(SEEDS, EPOCHS, st.integers(1, 200), st.integers(1, 40))
def test_shuffled_is_the_front_of_the_permutation(seed, epoch, n, batch):
    ids = np.arange(n)
    order = shuffled_order(ids, batch, seed, epoch)
    assert order.shape == (n // batch, batch)
    np.testing.assert_array_equal(order.ravel(), epoch_permutation(ids, seed, epoch)[: n // batch * batch])


@given(st.integers(1, 200), st.integers(1, 40), st.booleans())
def test_validation_orders_hold_each_id_once_before_the_padding(n, batch, stream):
    ids = np.arange(n) + 11
    order = (streamed_fixed_order if stream else fixed_order)(ids, batch)
    assert order.shape == (-(-n // batch), batch)
    assert sorted(order.ravel()[:n].tolist()) == ids.tolist()  # places n and above have weight 0
    assert set(order.ravel().tolist()) == set(ids.tolist())


@given(
    SEEDS,
    EPOCHS,
    st.lists(st.integers(1, 20), min_size=1, max_size=12),
    st.integers(1, 16),
    st.integers(0, 30),
)
def test_streamed_order(seed, epoch, counts, batch, buffer):
    shards = np.repeat(np.arange(len(counts)), counts)
    ids = np.arange(len(shards)) + 3
    order = streamed_order(ids, shards, batch, seed=seed, epoch=epoch, buffer=buffer)
    steps = len(ids) // batch
    assert order.shape == (steps, batch)
    assert len(np.unique(order)) == order.size and np.isin(order, ids).all()
    opened = 0
    for slot in order.T:  # each slot reads whole shards front to back; how many samples wait at most?
        place = {}
        runs = sorted(
            {int(shards[i - 3]) for i in slot}, key=lambda s: int(hash64(np.array([s]), seed, epoch)[0])
        )
        opened += len(runs)
        for i in sorted(slot.tolist(), key=lambda i: (runs.index(int(shards[i - 3])), i)):
            place[i] = len(place)
        read, waiting = -1, 0
        for given_out, i in enumerate(slot.tolist()):
            read = max(read, place[i])
            waiting = max(waiting, read + 1 - given_out)
        assert waiting <= max(buffer, 1)
    assert opened <= len(counts) + batch  # a shard is opened once, or by two slots where they meet


@pytest.mark.parametrize("buffer", [0, 1])
def test_no_buffer_is_the_order_of_the_shards(buffer):
    order = streamed_order(np.arange(12), np.repeat([0, 1, 2], 4), 3, seed=0, epoch=0, buffer=buffer)
    for slot in order.T:
        np.testing.assert_array_equal(np.diff(slot), 1)
