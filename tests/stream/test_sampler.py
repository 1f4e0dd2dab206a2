"""The order is a permutation, divided exactly among ranks, and never changes."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2w.rng import hash64, splitmix64
from p2w.stream.sampler import (
    Sampler,
    epoch_permutation,
    fixed_order,
    permuted_indices,
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


def test_permutation_by_index_is_one_for_every_small_count():
    for count in range(1, 700):
        places = np.arange(count)
        for seed, epoch in ((0, 0), (7, 3)):
            found = permuted_indices(places, count, seed, epoch)
            assert np.array_equal(np.sort(found), places), (count, seed, epoch)


@given(st.integers(1, 10**12), SEEDS, EPOCHS, st.data())
def test_permutation_by_index_asks_for_nothing_but_the_place(count, seed, epoch, data):
    places = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=20, unique=True)))
    found = permuted_indices(places, count, seed, epoch)
    assert len(set(found.tolist())) == len(places) and found.min() >= 0 and found.max() < count
    assert permuted_indices(places[-1:], count, seed, epoch)[0] == found[-1]
    assert permuted_indices(places[::-1].reshape(-1, 1), count, seed, epoch)[-1, 0] == found[0]


def test_golden_order_of_version_2():
    """Runs are resumed by this order: it must never change."""
    assert permuted_indices(np.arange(10), 10, 0, 0).tolist() == [5, 4, 3, 7, 6, 9, 2, 1, 0, 8]
    assert permuted_indices(np.arange(10), 10, 7, 1).tolist() == [0, 5, 9, 7, 4, 2, 1, 8, 6, 3]
    assert permuted_indices(np.array([0, 1, 9_999_999]), 10**7, 0, 0).tolist() == [9074703, 7971980, 8076041]


def feistel_oracle(place, count, seed, epoch):
    """The same permutation in Python's own integers."""
    wide = int((count - 1) ** 0.5) + 1
    sizes = (wide, -(-count // wide))
    keys = [int(hash64(np.zeros(1, np.int64), seed, epoch, 4, number)[0]) for number in range(6)]
    while True:
        halves = list(divmod(place, sizes[1]))
        for number, key in enumerate(keys):
            one = number % 2
            add = (splitmix_oracle(halves[1 - one] ^ key) >> 32) * sizes[one] >> 32
            halves[one] = (halves[one] + add) % sizes[one]
        place = halves[0] * sizes[1] + halves[1]
        if place < count:
            return place


@given(st.integers(1, 10**7), SEEDS, EPOCHS, st.data())
def test_permutation_by_index_against_plain_integers(count, seed, epoch, data):
    place = data.draw(st.integers(0, count - 1))
    assert permuted_indices(np.array([place]), count, seed, epoch)[0] == feistel_oracle(
        place, count, seed, epoch
    )


@pytest.mark.parametrize("count", [50, 64, 97])
def test_places_of_the_permutation_by_index_are_uniform(count):
    epochs = 4000
    places = np.stack(
        [permuted_indices(np.arange(count), count, e % 2, e // 2) for e in range(epochs)]
    )  # (epoch, place): sub-scan
    counts = np.stack([np.bincount(column, minlength=count) for column in places.T])
    chi2 = ((counts - epochs / count) ** 2 / (epochs / count)).sum(
        axis=1
    )  # count - 1 degrees of freedom each
    assert abs(chi2.mean() - (count - 1)) < 5 * np.sqrt(2 * (count - 1) / count)
    assert chi2.max() < count - 1 + 6 * np.sqrt(2 * (count - 1))
    steps = np.diff(places.astype(int), axis=1) % count  # neighbours in an epoch: no difference is preferred
    found = np.bincount(steps.ravel(), minlength=count)[1:]
    expected = steps.size / (count - 1)
    assert ((found - expected) ** 2 / expected).sum() < count - 2 + 6 * np.sqrt(2 * (count - 2))


def test_epochs_of_the_permutation_by_index_do_not_resemble_each_other():
    count = 20_011
    orders = [permuted_indices(np.arange(count), count, 0, epoch) for epoch in range(12)]
    orders += [permuted_indices(np.arange(count), count, seed, 0) for seed in range(1, 6)]
    bound = 5 / np.sqrt(count)
    for at, one in enumerate(orders):
        assert abs(np.corrcoef(one, np.arange(count))[0, 1]) < bound
        assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < bound
        for other in orders[:at]:
            assert abs(np.corrcoef(one, other)[0, 1]) < bound
            assert (one == other).sum() < 12  # of which one is expected


class PlainSet:
    """A set of `count` sub-scans without files."""

    def __init__(self, count, version):
        self.count, self.order_version, self.order, self.where, self.computed = (
            count,
            version,
            "shuffled",
            "it",
            0,
        )

    def ids(self, split):
        return np.arange(self.count) + 3

    def samples_per_epoch(self, ids):
        return len(ids)

    def train_order(self, ids, batch, seed, epoch):
        self.computed += 1
        return shuffled_order(ids, batch, seed, epoch)

    def ids_at(self, ids, places, seed, epoch):
        return ids[permuted_indices(places, len(ids), seed, epoch)]


@pytest.mark.parametrize("version", [1, 2])
def test_steps_of_both_versions_are_the_rows_of_the_epoch(version):
    sampler = Sampler(PlainSet(103, version), "train", 8, 5, 1, 2, training=True)
    for epoch in (0, 4):
        rows = np.stack([sampler.step_ids(epoch, step) for step in range(sampler.steps)])
        np.testing.assert_array_equal(rows, sampler.epoch_order(epoch))
        assert len(np.unique(rows)) == rows.size == 96 and rows.min() >= 3
        np.testing.assert_array_equal(sampler.ids_from(epoch, 5, 2), rows[5:, 6])
    expected = epoch_permutation(np.arange(103) + 3, 5, 4) if version == 1 else None
    if expected is not None:
        np.testing.assert_array_equal(rows.ravel(), expected[:96])


def test_the_version_of_a_new_run_follows_from_the_size():
    for count, version in ((999_999, 1), (1_000_000, 2)):
        assert Sampler(PlainSet(count, 0), "train", 8, 5, 0, 1, training=True).order_version == version
    assert Sampler(PlainSet(1_000_000, 1), "train", 8, 5, 0, 1, training=True).order_version == 1


def test_threads_compute_an_epoch_once():
    shards = PlainSet(50_000, 1)
    sampler = Sampler(shards, "train", 8, 5, 0, 1, training=True)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: sampler.step_ids(2, 1), range(64)))
    assert shards.computed == 1
