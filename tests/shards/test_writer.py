"""Both formats against stock readers and against raw reads through the manifest."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from crc32c import crc32c

from p2w.errors import UserError
from p2w.files import write_published
from p2w.shards.manifest import manifest_bytes, read_manifest
from p2w.shards.manifest_schema import MANIFEST_NAME, MANIFEST_VERSION
from p2w.shards.writer import open_shard

SHAPE = (4, 8, 8)
UIDS = ["1.3.6.1.4.1.14519.5.2.1.6279.6001." + "9" * 30, "a"]


def write(folder, form, shape=SHAPE, uid=UIDS[0], count=5):
    rng = np.random.default_rng(7)
    shard = open_shard(str(folder / f"{uid}.{form}"), shape)
    rows, tiles = [], []
    for i in range(count):
        voxels = rng.integers(-1000, 1001, shape).astype("<i2")
        row = {"key": f"{uid}/z{i:04d}_y0000_x0128", "scan_uid": uid, "subset": 3, "z": i, "y": 0, "x": 128}
        row |= {"spacing_z": 1.25, "spacing_y": 0.75, "spacing_x": 0.75, "mean_hu": 1.5, "std_hu": 2.5}
        rows.append(shard.add(row, voxels))
        tiles.append(voxels)
    return rows, tiles, shard.close()


def data_set(folder, form):
    rows, tiles, done = write(folder, form)
    name = f"{UIDS[0]}.{form}"
    rows = [row | {"split": "train", "shard": name} for row in rows]
    shards = [{"name": name, "nbytes": done.nbytes, "crc32c": done.crc32c}]
    meta = {"schema": MANIFEST_VERSION, "shape": list(SHAPE), "shards": shards}
    write_published(str(folder / MANIFEST_NAME), manifest_bytes(rows[::-1], meta), str(folder / "aside"))
    return tiles


@pytest.mark.parametrize("form", ["tar", "arrow"])
@pytest.mark.parametrize("uid", UIDS)
@pytest.mark.parametrize("shape", [SHAPE, (64, 128, 128), (3, 5, 7)])
def test_voxels_lie_where_the_row_says(tmp_path, form, uid, shape):
    rows, tiles, done = write(tmp_path, form, shape, uid, count=3)
    data = (tmp_path / f"{uid}.{form}").read_bytes()
    assert (len(data), crc32c(data)) == (done.nbytes, done.crc32c)
    for row, voxels in zip(rows, tiles, strict=True):
        assert row["offset"] % 64 == 0
        raw = data[row["offset"] : row["offset"] + row["nbytes"]]
        assert crc32c(raw) == row["crc32c"]
        np.testing.assert_array_equal(np.frombuffer(raw, "<i2").reshape(shape), voxels)


@pytest.mark.parametrize("form", ["tar", "arrow"])
def test_same_content_same_bytes(tmp_path, form):
    digests = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, form)
        digests.append(hashlib.sha256((tmp_path / name / f"{UIDS[0]}.{form}").read_bytes()).hexdigest())
    assert digests[0] == digests[1]


def test_stock_webdataset_reads_the_tar(tmp_path):
    import webdataset

    rows, tiles, _ = write(tmp_path, "tar", (64, 128, 128), count=2)
    path = str(tmp_path / f"{UIDS[0]}.tar")
    samples = list(webdataset.WebDataset([path], shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [row["key"] for row in rows]
    for sample, row, voxels in zip(samples, rows, tiles, strict=True):
        np.testing.assert_array_equal(sample["npy"], voxels)
        assert sample["npy"].dtype == np.int16
        assert sample["json"] == {k: v for k, v in row.items() if k not in ("offset", "nbytes")}


def test_stock_pyarrow_reads_the_arrow_file(tmp_path):
    rows, tiles, _ = write(tmp_path, "arrow")
    with pa.memory_map(str(tmp_path / f"{UIDS[0]}.arrow")) as source:
        reader = pa.ipc.open_file(source)
        assert reader.num_record_batches == len(rows)
        table = reader.read_all()
    assert table.column("key").to_pylist() == [row["key"] for row in rows]
    assert isinstance(table.schema.field("voxels").type, pa.FixedShapeTensorType)
    for chunk, voxels in zip(table.column("voxels").chunks, tiles, strict=True):
        np.testing.assert_array_equal(chunk.to_numpy_ndarray()[0], voxels)
    assert table.column("std_hu").to_pylist() == [2.5] * len(rows)


@pytest.mark.parametrize("form", ["tar", "arrow"])
def test_manifest_is_sorted_and_names_the_bytes(tmp_path, form):
    tiles = data_set(tmp_path, form)
    for where in (tmp_path, tmp_path / MANIFEST_NAME, str(tmp_path)):
        manifest = read_manifest(where)
        assert manifest.root == str(tmp_path)
        assert manifest.table.column("z").to_pylist() == list(range(5))
        assert manifest.meta["shape"] == list(SHAPE)
    for row, voxels in zip(manifest.table.to_pylist(), tiles, strict=True):
        with open(tmp_path / row["shard"], "rb") as file:
            raw = os.pread(file.fileno(), row["nbytes"], row["offset"])
        assert crc32c(raw) == row["crc32c"] and raw == voxels.tobytes()
    assert read_manifest((tmp_path / MANIFEST_NAME).read_bytes()).root == ""


def test_a_folder_that_is_no_data_set_is_one_line(tmp_path):
    with pytest.raises(
        UserError, match=r"no manifest\.parquet there.*p2w shard-luna --out shards, or p2w shard"
    ):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST_NAME).write_bytes(b"PAR1 of another kind")
    with pytest.raises(UserError, match="not a parquet file"):
        read_manifest(tmp_path)
    pa.parquet.write_table(pa.table({"a": [1]}), tmp_path / MANIFEST_NAME)
    with pytest.raises(UserError, match="not a p2w manifest"):
        read_manifest(tmp_path)


def test_missing_or_short_shards_are_named(tmp_path):
    data_set(tmp_path, "tar")
    shard = tmp_path / f"{UIDS[0]}.tar"
    os.truncate(shard, 1000)
    with pytest.raises(UserError, match=r"\.tar has 1,000 bytes"):
        read_manifest(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=r"\.tar is missing"):
        read_manifest(tmp_path)


def test_tar_json_is_plain_json(tmp_path):
    import tarfile

    write(tmp_path, "tar")
    with tarfile.open(tmp_path / f"{UIDS[0]}.tar") as tar:
        members = tar.getmembers()
        assert [m.name.rsplit(".", 1)[1] for m in members] == ["npy", "json"] * 5
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in members} == {(0, 0, 0, "")}
        assert json.load(tar.extractfile(members[1]))["spacing_z"] == 1.25


@pytest.mark.slow
def test_reading_a_manifest_starts_no_thread_that_could_abort_python_at_its_end(tmp_path):
    """Arrow's pool held the file's bytes when Python ended: one exit in six was 134 in place of the command's own code."""
    data_set(tmp_path, "tar")
    code = (
        "import os, sys; from p2w.shards.manifest import read_manifest; count = lambda: len(os.listdir('/proc/self/task'));"
        "before = count(); read_manifest(sys.argv[1]); print(before, count())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    before, after = ran.stdout.split()
    assert before == after
