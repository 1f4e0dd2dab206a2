"""A mixture of sets: its shares, its order, and that a run on it continues bit for bit."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from stream_sets import SHAPE, write_set

from p2w.errors import UserError
from p2w.shards.manifest import BETWEEN, candidate_data_paths, data_fingerprint, parse_mixture
from p2w.stream.prefetch import DeviceCache
from p2w.stream.stream import Stream, open_set


@pytest.fixture
def sets(tmp_path):
    """Sets of 60 and 20 sub-scans to train on; and the voxels of every id of the mixture."""
    wholes = write_set(tmp_path / "a", train=(30, 30), val=(4,)) + write_set(
        tmp_path / "b", "arrow", train=(20,), val=(3,)
    )
    return tmp_path, wholes


def mixed(folder, weights=(0.7, 0.3)):
    return open_set(
        BETWEEN.join(f"{folder}/{name}:{weight}" for name, weight in zip("ab", weights, strict=True))
    )


def take(stream, count, epoch=0, step=0):
    with stream:
        batches = itertools.islice(stream.batches(epoch, step), count)
        return [(b.epoch, b.step, b.ids.tolist(), b.voxels.numpy().copy()) for b in batches]


def same(one, two):
    for a, b in zip(one, two, strict=True):
        assert a[:3] == b[:3]
        np.testing.assert_array_equal(a[3], b[3])


def test_every_epoch_has_each_set_at_its_share_and_no_sub_scan_twice(sets):
    shards = mixed(sets[0])
    stream = Stream(shards, batch=4, seed=1)
    # b has 20 sub-scans, 0.3 of an epoch: 66 in all, 46 of them from a.
    assert shards.shares(shards.ids("train")) == [46, 20] and stream.steps_per_epoch == 16
    counts = np.zeros(len(shards), int)
    for epoch in range(60):
        ids = shards.train_order(shards.ids("train"), 4, 1, epoch).ravel()
        assert len(set(ids.tolist())) == 64 and set(ids.tolist()) <= set(shards.ids("train").tolist())
        assert 44 <= (ids < 64).sum() <= 46
        counts[ids] += 1
    seen = counts[shards.ids("train")]
    assert (
        seen.min() > 30 and abs(seen[:60].mean() - 60 * 46 / 60 * 64 / 66) < 2
    )  # all of a, though not in each epoch
    early = np.concatenate([shards.train_order(shards.ids("train"), 4, 1, e)[:8].ravel() for e in range(60)])
    assert abs((early >= 64).mean() - 20 / 66) < 0.05  # mixed within an epoch, not one set after the other


def test_the_order_by_index_has_the_same_shares(sets):
    shards = mixed(sets[0])
    train, counts, orders = shards.ids("train"), np.zeros(len(shards), int), []
    for epoch in range(60):
        ids = shards.ids_at(train, np.arange(66), 1, epoch)
        assert len(set(ids.tolist())) == 66 and set(ids.tolist()) <= set(train.tolist())
        assert (ids < 64).sum() == 46
        assert ids[17:19].tolist() == shards.ids_at(train, np.array([17, 18]), 1, epoch).tolist()
        counts[ids] += 1
        orders.append(ids)
    assert counts[train].min() > 30  # all of a, though not in each epoch
    early = np.stack(orders)[:, :32]
    assert abs((early >= 64).mean() - 20 / 66) < 0.05  # mixed within an epoch
    shards.order_version = 2
    stream = Stream(shards, batch=4, seed=1)
    got = [ids for _, _, ids, _ in take(stream, 20)]
    assert got == np.concatenate([orders[0][:64], orders[1][:16]]).reshape(-1, 4).tolist()


def test_batches_hold_the_right_voxels_whatever_ranks_and_threads(sets):
    folder, wholes = sets
    whole = take(Stream(mixed(folder), batch=4, seed=3), 20)
    for _, _, ids, voxels in whole:
        np.testing.assert_array_equal(voxels, np.stack([wholes[i] for i in ids]))
    same(whole, take(Stream(mixed(folder), batch=4, seed=3, readers=0), 20))
    for rank in range(2):
        mine = take(Stream(mixed(folder), batch=4, seed=3, rank=rank, world_size=2, readers=2), 20)
        for (epoch, step, ids, voxels), own in zip(whole, mine, strict=True):
            half = slice(2 * rank, 2 * rank + 2)
            assert own[:3] == (epoch, step, ids[half])
            np.testing.assert_array_equal(own[3], voxels[half])


def test_it_continues_at_any_position(sets):
    folder, _ = sets
    whole = take(Stream(mixed(folder), batch=4, seed=3), 40)
    for start in (1, 15, 16, 33):
        same(whole[start:], take(Stream(mixed(folder), batch=4, seed=3), 40 - start, *divmod(start, 16)))


def test_a_cache_on_the_device_gives_the_same_batches(sets):
    folder, _ = sets
    shards = mixed(folder)
    cache = DeviceCache(shards, "train", torch.device("cpu"))
    same(
        take(Stream(mixed(folder), batch=4, seed=3), 40),
        take(Stream(shards, batch=4, seed=3, cache=cache), 40),
    )
    assert cache.filled.sum() > 60  # of the 80 of both sets


def test_validation_has_all_of_all_sets_once(sets):
    folder, wholes = sets
    shards = mixed(folder)
    with Stream.validation(shards, batch=4) as stream:
        batches = [(b.ids.tolist(), b.weight.tolist(), b.voxels.numpy().copy()) for b in stream.batches()]
    ids = [i for ids, weights, _ in batches for i, weight in zip(ids, weights, strict=True) if weight]
    assert ids == shards.ids("val").tolist() == [60, 61, 62, 63, 84, 85, 86]
    np.testing.assert_array_equal(batches[1][2][0], wholes[84])
    assert shards.key(84).startswith("1.2.0001/") and shards.shard(84).endswith("b/1.2.0001.arrow")


def test_without_weights_sets_count_by_their_size(sets):
    folder, _ = sets
    shards = open_set(f"{folder}/a{BETWEEN}{folder}/b")
    assert shards.weights == [0.75, 0.25] and shards.shares(shards.ids("train")) == [60, 20]


def test_a_damaged_sub_scan_has_another_in_its_place(sets):
    folder, _ = sets
    shards = mixed(folder)
    path = folder / "b" / "1.2.0000.arrow"
    data = bytearray(path.read_bytes())
    at = int(shards.offsets[70])
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"b: shard 1\.2\.0000\.arrow, key .* checksum differs"):
        take(Stream(mixed(folder), batch=4, seed=3), 16)
    shards.on_bad = "skip"
    assert len(take(Stream(shards, batch=4, seed=3), 16)) == 16 and shards.reported_bad == {70}


def test_another_mixture_is_another_data_set(sets):
    folder, _ = sets
    prints = [data_fingerprint(mixed(folder, weights).meta) for weights in ((0.7, 0.3), (7, 3), (0.6, 0.4))]
    assert prints[0] == prints[1] != prints[2]
    alone = [data_fingerprint(open_set(f"{folder}/{name}").meta) for name in "ab"]
    assert len({*prints, *alone}) == 4


def test_filled_up_sub_scans_mix_with_full_ones(sets):
    shards = mixed(sets[0])
    assert shards.real is None and shards.real_voxels(np.array([0, 70])) is None
    first, second = shards.sets
    first.real = np.tile(np.array([[1, 4, 8]], np.int32), (len(first), 1))
    again = type(shards)([first, second], parse_mixture(shards.where))
    assert again.real_voxels(np.array([0, 70])).tolist() == [[1, 4, 8], list(SHAPE)]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("a:0.7 + b", "b has no weight and others have: write e.g"),
        ("a:0 + b:1", "the weight of a must be above 0"),
        ("a:nan + b:1", "the weight of a must be above 0"),
        ("a:1 + ./a:2", "names a set twice"),
    ],
)
def test_what_makes_no_mixture_is_one_line(where, message):
    with pytest.raises(UserError, match=message):
        parse_mixture(where)


def test_sets_that_do_not_go_together_are_refused(sets):
    folder, _ = sets
    write_set(folder / "c", shape=(4, 4, 4))
    with pytest.raises(UserError, match=r"sub-scans of 2 x 4 x 8 and 4 x 4 x 4 voxels"):
        open_set(f"{folder}/a:1{BETWEEN}{folder}/c:1")
    with pytest.raises(UserError, match="no such folder"):
        open_set(f"{folder}/a:1{BETWEEN}{folder}/gone:1")


def test_paths_with_colons_and_urls_are_read_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("odd:1").mkdir()
    parts = parse_mixture("odd:1 + b")
    assert [(part.where, part.weight) for part in parts] == [("odd:1", None), ("b", None)]
    parts = parse_mixture("https://h:80/x:0.5 + s/b:2e-1")
    assert [(part.where, part.weight) for part in parts] == [("https://h:80/x", 0.5), ("s/b", 0.2)]


def test_a_moved_run_finds_all_its_sets(sets, monkeypatch):
    folder, _ = sets
    start = {"shards": "a:0.7 + b:0.3", "cwd": os.fspath(folder)}
    (found,) = candidate_data_paths(folder / "runs" / "x", start)
    assert found == f"{folder}/a:0.7{BETWEEN}{folder}/b:0.3"
    assert data_fingerprint(open_set(found).meta) == data_fingerprint(mixed(folder).meta)
