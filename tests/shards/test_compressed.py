"""Sets cut with --compress zstd: the batches of a plain set, for stock pyarrow too; damage, lies and repair."""

import os
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from ct_files import ct, write
from cut_here import cut_here
from web import nginx

from p2w.errors import UserError
from p2w.shards import verify
from p2w.shards.manifest import DamagedManifest, manifest_bytes, open_manifest
from p2w.shards.manifest_schema import MANIFEST_NAME
from p2w.shards.scan_shards import ShardingSettings
from p2w.shards.tiling import Tiling
from p2w.shards.writer import dataset_card, unpack_voxels
from p2w.stream import local
from p2w.stream.local import DataError
from p2w.stream.stream import Stream, open_set

TILE = (8, 16, 32)
PLAIN = ShardingSettings(Tiling(TILE, min_std_hu=0), "arrow", val_fraction=0)
PACKED = replace(PLAIN, compress="zstd")


def smooth(shape, seed):
    """A scan with body, lung and air whose voxels compress as those of a CT."""
    hu = ct(shape).astype(np.int32) + np.random.default_rng(seed).integers(-9, 10, shape)
    return hu.astype(np.int16)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Folder with the scans, and the sets `plain` and `packed` cut from them."""
    folder = tmp_path_factory.mktemp("packed")
    (folder / "scans").mkdir()
    for number in range(2):
        write(folder / "scans" / f"scan{number}.mha", smooth((20, 40, 70), number))
    cut_here(folder / "scans", folder / "plain", PLAIN)
    cut_here(folder / "scans", folder / "packed", PACKED)
    return folder


def batches(where, readers=2):
    with Stream(open_set(str(where)), batch=3, seed=5, readers=readers) as stream:
        steps = zip(range(2 * stream.steps_per_epoch), stream.batches(), strict=False)
        return [(batch.ids.tolist(), batch.voxels.numpy().copy()) for _, batch in steps]


def same(found, expected):
    assert len(found) == len(expected) > 4
    for (ids, voxels), (other_ids, others) in zip(found, expected, strict=True):
        assert ids == other_ids
        np.testing.assert_array_equal(voxels, others)


def test_batches_are_those_of_the_plain_set(sets, monkeypatch):
    """Also where shards are too many to be mapped; each sub-scan takes less of the disk."""
    expected = batches(sets / "plain")
    same(batches(sets / "packed"), expected)
    monkeypatch.setattr(local, "_MAPS", 0)
    same(batches(sets / "packed", readers=0), expected)
    plain, packed = (open_manifest(sets / name).table for name in ("plain", "packed"))
    assert plain["crc32c"].equals(packed["crc32c"]) and plain["key"].equals(packed["key"])
    assert sum(packed["nbytes"].to_pylist()) < 0.8 * sum(plain["nbytes"].to_pylist())


def test_by_byte_ranges_too(sets, tmp_path):
    with nginx(tmp_path) as (folder, url, _):
        os.makedirs(folder, exist_ok=True)
        for file in (sets / "packed").iterdir():
            if file.is_file():
                (folder / file.name).write_bytes(file.read_bytes())
        same(batches(url), batches(sets / "plain"))


def test_stock_pyarrow_reads_them(sets):
    manifest, shards = open_manifest(sets / "packed"), open_set(str(sets / "plain"))
    out = np.empty(TILE, np.int16)
    for name in {shard["name"] for shard in manifest.meta["shards"]}:
        file = pa.ipc.open_file(pa.memory_map(str(sets / "packed" / name)))
        for number, row in enumerate(manifest.rows_of(name)):
            batch = file.get_batch(number)
            shards.read_into(int(row), out)
            np.testing.assert_array_equal(batch.column("voxels").to_numpy_ndarray()[0], out)
            assert batch.column("key")[0].as_py() == shards.key(int(row))
    assert "packed by zstd" in dataset_card(manifest.meta, {}).decode()


def test_damage_is_found_named_and_repaired(sets, tmp_path, capsys):
    where = tmp_path / "set"
    where.mkdir()
    for file in (sets / "packed").iterdir():
        if file.is_file():
            (where / file.name).write_bytes(file.read_bytes())
    manifest = open_manifest(where)
    row, other = manifest.table.to_pylist()[:2]
    path = where / row["shard"]
    whole = path.read_bytes()
    shards = open_set(str(where))
    for at in (*range(12), row["nbytes"] // 2, row["nbytes"] - 1):  # the size, the frame's header, its data
        data = bytearray(whole)
        data[row["offset"] + at] ^= 0x10
        path.write_bytes(data)
        assert verify.main([str(where)]) == 1
        said = capsys.readouterr().out
        assert row["shard"] in said and other["key"] not in said
        out = np.zeros(TILE, np.int16)
        if row["key"] in said:  # a flip in the header of a frame may change nothing that is unpacked
            with pytest.raises(DataError, match=r"packed voxels|checksum differs"):
                shards.read_into(0, out)
    assert row["key"] in said
    assert verify.main([str(where), "--repair", "--scans", str(sets / "scans"), "--workers", "1"]) == 0
    assert path.read_bytes() == whole


def test_a_manifest_that_lies_is_refused(sets, tmp_path):
    manifest = open_manifest(sets / "packed")
    rows, meta = manifest.table.to_pylist(), manifest.meta

    def refused(rows, meta):
        (tmp_path / MANIFEST_NAME).write_bytes(manifest_bytes(rows, meta))
        with pytest.raises(DamagedManifest) as error:
            open_manifest(tmp_path)
        return str(error.value)

    assert "packed by 'lz77'" in refused(rows, meta | {"compression": "lz77"})
    for nbytes in (rows[0]["nbytes"] + 4096, 3, 1 << 40):  # overlaps, is too short, is longer than the shard
        assert (
            rows[0]["key"] in refused([rows[0] | {"nbytes": nbytes}, *rows[1:]], meta)
            or nbytes == rows[0]["nbytes"] + 4096
        )
    with pytest.raises(ValueError, match="unpack to"):
        unpack_voxels((1 << 40).to_bytes(8, "little") + bytes(30), 64)
    with pytest.raises(ValueError, match="do not unpack"):
        unpack_voxels((64).to_bytes(8, "little") + bytes(30), 64)


@pytest.mark.parametrize("other", [{"format": "tar"}, {"store": "scans"}])
def test_what_cannot_be_packed_is_refused(other):
    with pytest.raises(UserError, match="--compress zstd"):
        replace(PACKED, **other)
    assert "compress" not in PLAIN.plain() and PACKED.plain()["compress"] == "zstd"
