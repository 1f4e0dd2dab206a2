"""Batches from the device cache equal the streamed ones while the GPU lags behind, over epochs and a resume."""

import itertools

import numpy as np
import pytest
import torch
from devices import CPU_AND_GPU, settle
from stream_sets import write_set

from p2w.stream.prefetch import DeviceCache
from p2w.stream.stream import Stream, open_set


def take(stream, count, epoch=0, step=0, lag=False):
    """Batches copied by the device's own queue, which a GPU reaches late."""
    found = []
    for batch in itertools.islice(stream.batches(epoch, step), count):
        if lag and batch.voxels.is_cuda:
            torch.cuda._sleep(20_000_000)
        found.append((batch.epoch, batch.step, batch.ids.clone(), batch.voxels.clone(), len(batch.fresh)))
    settle(stream.device)
    stream.close()
    return found


@CPU_AND_GPU
@pytest.mark.parametrize("readers", [1, 2])
def test_batches_from_the_cache_are_the_streamed_ones(tmp_path, device, readers):
    write_set(tmp_path)
    shards = open_set(str(tmp_path))
    held = DeviceCache(shards, "train", device)
    streamed = take(Stream(shards, batch=4, seed=3, readers=2), 15)
    kept = Stream(shards, batch=4, seed=3, readers=readers, device=device, cache=held)
    got = take(kept, 10, lag=True) + take(kept, 5, *divmod(10, kept.steps_per_epoch), lag=True)
    for one, other in zip(streamed, got, strict=True):
        assert one[:2] == other[:2] and other[3].device.type == device.type
        np.testing.assert_array_equal(one[2], other[2].cpu())
        np.testing.assert_array_equal(one[3], other[3].cpu())
    assert sum(row[4] for row in got[10:]) <= len(held.ids) - 4 * 3
    # Of two threads, one may read for the next epoch what the other still reads for this one.
    if readers == 1:
        assert sum(row[4] for row in got) == held.filled.sum() <= len(held.ids)


@CPU_AND_GPU
def test_the_filled_cache_is_the_set(tmp_path, device):
    write_set(tmp_path)
    shards = open_set(str(tmp_path))
    held = DeviceCache(shards, "train", device)
    take(Stream(shards, batch=5, seed=1, readers=1, device=device, cache=held), 9)
    assert held.filled.all()
    voxels = np.empty(shards.shape, np.int16)
    for place, sub_scan in enumerate(held.ids):
        shards.read_into(int(sub_scan), voxels)
        np.testing.assert_array_equal(held.voxels[place].cpu(), voxels)
