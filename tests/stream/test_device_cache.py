"""The device cache gives the same stream and reads each sub-scan once; here the device is the CPU."""

import itertools
import os

import numpy as np
import pytest
import torch
from stream_sets import SHAPE, write_set

from p2w.errors import UserError
from p2w.stream.prefetch import CacheSchedule, DeviceCache, free_bytes
from p2w.stream.stream import Stream, open_set

CPU = torch.device("cpu")


def take(stream, count, epoch=0, step=0):
    batches = itertools.islice(stream.batches(epoch, step), count)
    return [
        (b.epoch, b.step, b.ids.tolist(), b.weight.tolist(), b.bad, b.voxels.numpy().copy()) for b in batches
    ]


def same(one, two):
    for a, b in zip(one, two, strict=True):
        assert a[:5] == b[:5]
        np.testing.assert_array_equal(a[5], b[5])


def counted(shards):
    """A list to which every id is added that is read from now on."""
    read, whole = [], shards.read_into
    shards.read_into = lambda sub_scan, out: (read.append(sub_scan), whole(sub_scan, out))
    return read


@pytest.mark.parametrize("readers", [0, 1, 2, 5])
@pytest.mark.parametrize("form", ["tar", "arrow"])
def test_same_batches_and_every_sub_scan_is_read_once(tmp_path, form, readers):
    write_set(tmp_path, form)
    shards = open_set(os.fspath(tmp_path))
    plain = take(Stream(shards, batch=4, seed=3, readers=readers), 24)
    read = counted(shards)
    held = DeviceCache(shards, "train", CPU)
    with Stream(shards, batch=4, seed=3, readers=readers, cache=held) as stream:
        same(take(stream, 24), plain)
        same(
            take(stream, 5, 7, 2), plain[23:24] + take(Stream(shards, batch=4, seed=3), 4, 8)
        )  # and from elsewhere
    own = read[: len(read)]
    assert held.filled.all()
    # Twice only where an id ends one epoch and begins the next, closer together than the readers are ahead.
    assert set(own) >= set(shards.ids("train").tolist())


def test_after_the_first_epochs_nothing_is_read(tmp_path):
    write_set(tmp_path, train=(8, 8))
    shards = open_set(os.fspath(tmp_path))
    held, read = DeviceCache(shards, "train", CPU), counted(shards)
    with Stream(shards, batch=4, readers=2, cache=held) as stream:
        batches = stream.batches()
        fresh = [batch.fresh for batch in itertools.islice(batches, 12)]
    assert [len(rows) for rows in fresh[:4]] == [4, 4, 4, 4]
    assert fresh[6:] == [()] * 6
    assert len(read) <= 16 + 8  # readers two batches ahead of the first epoch's end may read again


@pytest.mark.parametrize("world", [2, 4])
def test_the_cache_of_each_rank_has_the_sub_scans_that_it_read(tmp_path, world):
    write_set(tmp_path)
    shards = open_set(os.fspath(tmp_path))
    for rank in range(world):
        share = {"batch": 4, "rank": rank, "world_size": world, "readers": 1}
        held = DeviceCache(shards, "train", CPU)
        with Stream(shards, cache=held, **share) as stream, Stream(shards, **share) as plain:
            same(take(stream, 60), take(plain, 60))
        assert held.filled.all()


def test_a_thread_ahead_does_not_fill_the_cache_for_one_behind(tmp_path):
    """A sub-scan that ends an epoch and begins the next may be read for the later batch first."""
    write_set(tmp_path)
    shards = open_set(os.fspath(tmp_path))
    schedule = CacheSchedule(DeviceCache(shards, "train", CPU), steps=3)
    schedule.add(np.array([5]), 1, 0)
    assert schedule.missing(np.array([5, 6]), 0, 2).tolist() == [True, True]
    assert schedule.missing(np.array([5, 6]), 1, 0).tolist() == [False, True]
    schedule.add(np.array([5]), 0, 2)
    assert schedule.missing(np.array([5, 6]), 0, 2).tolist() == [False, True]


@pytest.mark.parametrize("readers", [0, 2])
def test_a_damaged_sub_scan_gets_the_same_substitute_as_without_cache(tmp_path, readers):
    write_set(tmp_path)
    shards = open_set(os.fspath(tmp_path), on_bad="skip")
    path, at = tmp_path / shards.shard(3), int(shards.offsets[3])
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(b"\xff" * 8)
    shards = open_set(os.fspath(tmp_path), on_bad="skip")
    plain = take(Stream(shards, batch=4, seed=1, readers=readers), 18)
    assert sum(batch[4] for batch in plain) > 2
    held = DeviceCache(shards, "train", CPU)
    with Stream(shards, batch=4, seed=1, readers=readers, cache=held) as stream:
        same(take(stream, 18), plain)
    assert not held.filled[3] and held.filled.sum() == 14


def test_a_set_that_does_not_fit_is_one_line(tmp_path):
    write_set(tmp_path)
    shards = open_set(os.fspath(tmp_path))
    for more in ({"reserve": 1 << 60}, {"sharers": free_bytes(CPU) // shards.nbytes}):
        with pytest.raises(
            UserError, match=r"data\.cache_on_device: 15 sub-scans take .* free .*--data\.no-cache-on-device"
        ) as error:
            DeviceCache(shards, "train", CPU, **more)
        assert "\n" not in str(error.value)


def test_a_batch_is_not_overwritten_by_the_next_one(tmp_path):
    """A batch is a copy of what the cache has, since a pretext may write into its batch."""
    write_set(tmp_path, train=(8,))
    shards = open_set(os.fspath(tmp_path))
    with Stream(shards, batch=4, cache=DeviceCache(shards, "train", CPU)) as stream:
        for batch in itertools.islice(stream.batches(), 8):
            plain = torch.empty(4, *SHAPE, dtype=torch.int16)
            for row, sub_scan in zip(plain, batch.ids.tolist(), strict=True):
                shards.read_into(sub_scan, row)
            assert torch.equal(batch.voxels, plain)
            batch.voxels.zero_()
