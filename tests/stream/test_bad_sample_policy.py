"""With on_bad="skip" a substitute is read for a bad sub-scan: the same one for any ranks, reader threads and restarts."""

import os

import numpy as np
import pytest
from stream_sets import write_set
from test_stream import flip, same, take

from p2w.stream import prefetch
from p2w.stream.local import DataError
from p2w.stream.sampler import epoch_permutation
from p2w.stream.stream import Stream, open_set

BAD = (2, 6, 14)


def damaged_set(folder, form="tar", bad=BAD):
    """A set with flipped bits in these sub-scans; the voxels that were written."""
    wholes = write_set(folder, form)
    shards = open_set(os.fspath(folder))
    for sub_scan in bad:
        flip(folder, shards.shard(sub_scan), int(shards.offsets[sub_scan]) + 9)
    return wholes


@pytest.mark.parametrize("form", ["tar", "arrow"])
def test_the_same_substitutes_at_any_world_size_and_after_any_restart(tmp_path, capfd, form):
    wholes = damaged_set(tmp_path, form)

    def stream(**share):
        return Stream(open_set(os.fspath(tmp_path), on_bad="skip"), batch=4, seed=3, **share)

    with stream(readers=0) as one:
        alone = [
            (b.epoch, b.step, b.ids.tolist(), b.voxels.numpy().copy(), b.bad)
            for b, _ in zip(one.batches(), range(12), strict=False)
        ]
    said = capfd.readouterr().err
    replaced = 0
    for epoch, step, ids, voxels, bad in alone:
        meant = epoch_permutation(np.arange(15), 3, epoch)[step * 4 : step * 4 + 4].tolist()
        assert not set(ids) & set(BAD)
        assert [i for i, m in zip(ids, meant, strict=True) if m not in BAD] == [
            m for m in meant if m not in BAD
        ]
        assert bad == sum(m in BAD for m in meant)
        replaced += bad
        np.testing.assert_array_equal(voxels, np.stack([wholes[i] for i in ids]))
    assert replaced == 8 and len({i for _, _, ids, _, _ in alone for i in ids}) == 12
    shards = open_set(os.fspath(tmp_path))
    for sub_scan in BAD:  # once each, with shard, key and remedy
        (line,) = [line for line in said.splitlines() if f"key {shards.key(sub_scan)}" in line]
        assert line.startswith("warning: rank 0:") and shards.shard(sub_scan) in line and "p2w verify" in line
    for world, readers in ((1, 2), (2, 0), (2, 2), (4, 1)):
        parts = [take(stream(rank=r, world_size=world, readers=readers), 12) for r in range(world)]
        for step, whole in enumerate(alone):
            assert [i for part in parts for i in part[step][2]] == whole[2]
            np.testing.assert_array_equal(np.concatenate([part[step][3] for part in parts]), whole[3])
    for position in (1, 4, 7):
        same(take(stream(), 3, *divmod(position, 3)), [whole[:4] for whole in alone[position : position + 3]])


def test_validation_leaves_bad_sub_scans_out(tmp_path):
    damaged_set(tmp_path, bad=(16,))
    shards = open_set(os.fspath(tmp_path), on_bad="skip")
    for world in (1, 2):
        seen = []
        for rank in range(world):
            with Stream.validation(shards, batch=4, rank=rank, world_size=world) as stream:
                for batch in stream.batches():
                    seen += [i for i, w in zip(batch.ids.tolist(), batch.weight.tolist(), strict=True) if w]
        assert sorted(seen) == [15, 17, 18]


def test_a_shard_cut_short_under_a_running_job_is_replaced(tmp_path, capfd):
    wholes = write_set(tmp_path)
    with Stream(open_set(os.fspath(tmp_path), on_bad="skip"), batch=5) as stream:
        for batch in stream.batches():
            if (batch.epoch, batch.step) == (0, 0):
                os.truncate(tmp_path / "1.2.0001.tar", 100)
            if batch.epoch == 2:
                break
            np.testing.assert_array_equal(batch.voxels, np.stack([wholes[i] for i in batch.ids.tolist()]))
            assert batch.epoch == 0 or not set(batch.ids.tolist()) & {5, 6, 7}
    assert capfd.readouterr().err.count("the shard has 100 bytes of") == 3


def test_a_disk_that_fails_under_a_running_job_is_replaced(tmp_path, capfd):
    wholes = write_set(tmp_path)
    path = tmp_path / "1.2.0001.tar"
    with Stream(open_set(os.fspath(tmp_path), on_bad="skip"), batch=5) as stream:
        for batch in stream.batches():
            if (batch.epoch, batch.step) == (0, 0):
                path.unlink()
                path.symlink_to(path)  # to look at it is an error of the file system
            if batch.epoch == 2:
                break
            np.testing.assert_array_equal(batch.voxels, np.stack([wholes[i] for i in batch.ids.tolist()]))
    assert capfd.readouterr().err.count("key 1.2.0001/") == 3


def test_a_set_of_nothing_but_bad_sub_scans_stops(tmp_path):
    damaged_set(tmp_path, bad=range(15))
    with pytest.raises(DataError, match=f"{prefetch.SUBSTITUTE_TRIES} substitutes") as error:
        take(Stream(open_set(os.fspath(tmp_path), on_bad="skip"), batch=4), 1)
    assert "\n" not in str(error.value)
