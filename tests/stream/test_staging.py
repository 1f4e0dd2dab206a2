"""Copies of a set on a node's own disk: the same sub-scans in the same order, and what is wrong is said."""

import shutil

import numpy as np
import pytest
from stream_sets import write_set
from web import nginx

from p2w.errors import UserError
from p2w.shards.manifest import data_fingerprint
from p2w.stream import staging
from p2w.stream.local import DataError
from p2w.stream.sampler import Sampler
from p2w.stream.staging import StagedCopy
from p2w.stream.stream import open_set


def same(one, other, count=40):
    """Both sets have the same ids in the same order, and the first sub-scans are the same."""
    orders = [Sampler(shards, "train", 4, 7, 0, 2, training=True).epoch_order(3) for shards in (one, other)]
    assert np.array_equal(*orders)
    found = [np.empty(one.shape, np.int16) for _ in range(2)]
    for sub_scan in range(min(count, len(one))):
        one.read_into(sub_scan, found[0])
        other.read_into(sub_scan, found[1])
        assert np.array_equal(*found)


def test_a_copy_has_the_same_sub_scans_in_the_same_order(tiny_set, tmp_path):
    source = open_set(str(tiny_set))
    source.order = "streamed"  # as a run has begun whose server gave no byte ranges
    copies, told = StagedCopy(source, tmp_path), []
    copies.copy(lambda *numbers: told.append(numbers))
    found = copies.open()
    (place,) = copies.folders()
    assert place.name == f"p2w-{data_fingerprint(source.meta)}" and found.where == str(place)
    assert max(done for done, *_ in told) == told[0][1] == sum(source.shard_sizes)
    same(source, found)
    again = StagedCopy(source, tmp_path)  # a second job on the node
    again.copy(lambda *numbers: pytest.fail("copied again"))
    assert not copies.remove() and place.exists()  # the second job reads it
    assert again.remove() and not place.exists()


def test_a_mixture_is_copied_with_its_weights(tmp_path):
    write_set(tmp_path / "a", train=(30, 30), val=(4,))
    write_set(tmp_path / "b", "arrow", train=(20,), val=(3,))
    source = open_set(f"{tmp_path / 'a'}:0.7123456789 + {tmp_path / 'b'}:0.3")
    copies = StagedCopy(source, tmp_path / "node")
    copies.copy()
    found = copies.open()
    assert data_fingerprint(found.meta) == data_fingerprint(source.meta) and found.weights == source.weights
    assert len(list((tmp_path / "node").iterdir())) == 2
    same(source, found)


def test_an_interrupted_copy_goes_on(tiny_set, tmp_path, monkeypatch):
    source = open_set(str(tiny_set))
    copies = StagedCopy(source, tmp_path)
    monkeypatch.setattr(staging, "THREADS", 1)

    def interrupted(done, total, there):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copies.copy(interrupted)
    (place,) = copies.folders()
    done = [path for path in place.iterdir() if not path.name.startswith(".")]
    assert 0 < len(done) < len(source.shard_names) and not (place / "manifest.parquet").exists()
    before, told = {path: path.stat().st_mtime_ns for path in done}, []
    copies = StagedCopy(source, tmp_path)
    copies.copy(lambda *numbers: told.append(numbers))
    assert {path: path.stat().st_mtime_ns for path in done} == before
    assert told[-1][2] == sum(path.stat().st_size for path in done)
    same(source, copies.open())


def test_what_is_wrong_is_one_line(tiny_set, tmp_path, monkeypatch):
    shutil.copytree(tiny_set, tmp_path / "set")
    source = open_set(str(tmp_path / "set"))
    shard = tmp_path / "set" / source.shard_names[1]
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    with pytest.raises(
        DataError, match=f"{shard.name}: .* bytes with crc32c .* the manifest says .*p2w verify"
    ):
        StagedCopy(source, tmp_path / "node").copy()
    (place,) = StagedCopy(source, tmp_path / "node").folders()
    assert not (place / shard.name).exists() and not (place / "manifest.parquet").exists()

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 50, 1 << 20))
    with pytest.raises(
        UserError, match=r"0\.00 GiB free, and what is left to copy of .* takes .*: make room"
    ):
        StagedCopy(source, tmp_path / "full").copy()
    monkeypatch.undo()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written .*--stage-to"):
        StagedCopy(source, tmp_path / "file").copy()


def test_a_damaged_copy_is_to_be_deleted(tiny_set, tmp_path):
    copies = StagedCopy(open_set(str(tiny_set)), tmp_path)
    copies.copy()
    found = copies.open()
    path = copies.folders()[0] / found.shard(0)
    data = bytearray(path.read_bytes())
    data[int(found.offsets[0])] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        DataError, match=f"copy of that in {tiny_set}: delete it, and the next start copies it"
    ):
        found.read_into(0, np.empty(found.shape, np.int16))


@pytest.mark.slow
def test_a_set_on_a_server_is_fetched_once(tiny_set, tmp_path):
    with nginx(tmp_path) as (folder, url, asked):
        for path in tiny_set.iterdir():
            shutil.copy(path, folder)
        source = open_set(url)
        copies = StagedCopy(source, tmp_path / "node")
        copies.copy()
        same(open_set(str(tiny_set)), copies.open())
        shards = [name for name in asked() if name.endswith(".tar")]
        assert sorted(shards) == sorted(source.shard_names)
