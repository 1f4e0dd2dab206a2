"""Sets that store whole scans: what is written, what is read of it, and that sets of sub-scans are what they were."""

import copy
import hashlib
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from ct_files import ct, write
from cut_here import cut_here

from p2w.commands import shard_scans
from p2w.ct.discover import ScanSource
from p2w.ct.scan import read_scan
from p2w.errors import UserError
from p2w.shards import verify
from p2w.shards.manifest import DamagedManifest, Manifest, data_fingerprint, manifest_bytes, open_manifest
from p2w.shards.manifest_schema import PADDED_SCHEMA
from p2w.shards.scan_shards import ShardingSettings
from p2w.shards.scan_store import ChunkGrid, chunk_shape, read_scan_store
from p2w.shards.tiling import Tiling

TILE = (32, 64, 64)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Three small scans, none of whose edges is a multiple of a chunk's."""
    root = tmp_path_factory.mktemp("scans")
    for number, shape in enumerate([(75, 150, 141), (70, 130, 128), (40, 64, 200)]):
        write(root / f"s{number}.mhd", ct(shape, number))
    return root


@pytest.fixture(scope="module")
def stored(scans, tmp_path_factory):
    """The set of these scans, in tar shards."""
    return cut_here(
        scans, tmp_path_factory.mktemp("set") / "a", ShardingSettings(Tiling(TILE), store="scans")
    )


def test_a_chunk_has_half_the_edges_of_a_tile_and_not_too_few_voxels():
    assert chunk_shape((64, 128, 128)) == (32, 64, 64)
    assert chunk_shape((33, 65, 64)) == (17, 33, 32)
    assert chunk_shape((16, 32, 32)) == (16, 32, 32)
    assert chunk_shape((1, 1, 1)) == (32, 32, 32)


def test_chunks_per_whole_are_as_the_arithmetic_says():
    """Over all offsets to the grid, by counting: 26.4 reads of 1/8 of a whole each, 3.3 times its bytes."""
    grid = ChunkGrid((0, 0, 0), (128, 256, 256), (32, 64, 64))
    touched = [
        np.mean([(first + edge - 1) // step - first // step + 1 for first in range(step)])
        for edge, step in zip((64, 128, 128), grid.chunk, strict=True)
    ]
    assert np.prod(touched) == pytest.approx(26.4, abs=0.05)
    assert np.prod(touched) / 8 == pytest.approx(3.305, abs=0.01)


@pytest.mark.parametrize("form", ["tar", "arrow"])
def test_the_chunks_of_a_scan_put_together_are_the_scan(scans, tmp_path, form):
    tiling = Tiling(TILE, z_margin=3)
    found = cut_here(scans, tmp_path / "a", ShardingSettings(tiling, form, store="scans"))
    assert found.meta["store"] == "scans" and found.meta["chunk"] == [16, 32, 32]
    assert found.meta["shape"] == list(TILE) and found.meta["window_hu"] == [-1000, 1000]
    for source in found.meta["sources"]:
        uid = source["uid"]
        scan = read_scan(ScanSource(uid, f"{uid}.mhd", (str(scans / f"{uid}.mhd"),))).voxels.clip(-1000, 1000)
        assert source["shape"] == list(scan.shape)
        whole = np.full(scan.shape, 9999, np.int16)
        for row in found.table.to_pylist():
            if row["scan_uid"] != uid:
                continue
            data = (tmp_path / "a" / row["shard"]).read_bytes()
            assert row["offset"] % 64 == 0 and row["nbytes"] == 2 * 16 * 32 * 32
            voxels = np.frombuffer(data, "<i2", row["nbytes"] // 2, row["offset"]).reshape(16, 32, 32)
            z, y, x, depth, height, width = (
                row[name] for name in ("z", "y", "x", "real_z", "real_y", "real_x")
            )
            own = voxels[:depth, :height, :width]
            assert (whole[z : z + depth, y : y + height, x : x + width] == 9999).all()
            whole[z : z + depth, y : y + height, x : x + width] = own
            assert np.count_nonzero(voxels != -1000) == np.count_nonzero(own != -1000)
            assert row["mean_hu"] == pytest.approx(own.mean(dtype=np.float64), rel=1e-6)
        np.testing.assert_array_equal(whole[3:-3], scan[3:-3])
        assert (whole[:3] == 9999).all() and (whole[-3:] == 9999).all()
    if form == "arrow":
        table = pa.ipc.open_file(tmp_path / "a" / "s1.arrow").read_all()
        assert table["voxels"].type.shape == [16, 32, 32]


def test_a_card_says_what_a_sample_is(stored):
    card = Path(stored.root, "README.md").read_text()
    assert card.count("# Whole scans of a p2w data set") == 1
    assert "int16 16 x 32 x 32" in card and "A shard is one scan, and a sample of it is a chunk" in card


def test_sets_of_sub_scans_have_the_bytes_that_they_always_had(tmp_path):
    """Checksums taken before there was --store."""
    write(tmp_path / "scans" / "a.mhd", ct((40, 70, 64)))
    write(tmp_path / "scans" / "b.mhd", ct((34, 64, 96), 1))
    tilings = {
        Tiling((16, 32, 32)): "5b4c967b4d62ae22907cdb5fb503991bb6f603924219382b2349ca1bcf41448f",
        Tiling((16, 32, 40), 2, stride=(9, 32, 24), short="pad", body_only=True): (
            "4c78aaff3799ad714744bf1de5a28c413afa05e5f12081ae560888c04509b85f"
        ),
    }
    for number, (tiling, expected) in enumerate(tilings.items()):
        out = tmp_path / str(number)
        meta = cut_here(tmp_path / "scans", out, ShardingSettings(tiling)).meta
        assert "store" not in meta and "chunk" not in meta
        found = hashlib.sha256()
        for name in ("a.tar", "b.tar", "settings.json"):
            found.update(name.encode() + (out / name).read_bytes())
        assert found.hexdigest() == expected


def test_a_box_is_kept_as_a_sub_scan_would_be():
    rng, tiling = np.random.default_rng(0), Tiling((16, 32, 32), min_std_hu=50.0, body_only=True)
    answers = []
    for spread in np.geomspace(2, 4000, 60):
        some = rng.normal(-900, spread, (16, 32, 32)).clip(-1000, 1000).astype(np.int16)
        some[rng.integers(16)] += rng.integers(0, 400)
        wide = some.astype(np.float64)
        expected = wide.std() >= 50 and (some > -900).sum() >= 0.1 * some.size
        answers.append(tiling.keeps(some))
        assert answers[-1] == expected
    assert 10 < sum(answers) < 50


def test_other_settings_are_another_set(scans, stored):
    with pytest.raises(UserError, match=r"was cut with .*store"):
        cut_here(scans, Path(stored.root), ShardingSettings(Tiling(TILE)))


def test_a_dry_run_says_what_comes_of_it(scans, tmp_path, capsys):
    options = ["--scans", str(scans), "--out", str(tmp_path / "out"), "--tile", "32", "64", "64"]
    assert shard_scans.main([*options, "--store", "scans", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert (
        "sub-scans      19 of 32 x 64 x 64 voxels (z, y, x), z margin 0, cut at random places in each epoch"
        in said
    )
    # 5 * 5 * 5 + 5 * 5 * 4 + 3 * 2 * 7 chunks
    assert "whole scans in 267 chunks of 16 x 32 x 32 voxels" in said
    assert shard_scans.main([*options, "--store", "scans", "--list"]) == 0
    assert "stored whole, 8 an epoch" in capsys.readouterr().out


def change(manifest: Manifest, meta=None, rows=None) -> bytes:
    """The bytes of a manifest of which something was changed, sealed anew."""
    found = copy.deepcopy(manifest.meta)
    if meta:
        meta(found)
    table = manifest.table.to_pylist()
    if rows:
        rows(table)
    return manifest_bytes(table, found, PADDED_SCHEMA)


def set_in(name, value):
    return lambda meta: meta.update({name: value})


def set_in_source(name, value):
    return lambda meta: meta["sources"][0].update({name: value})


@pytest.mark.parametrize(
    ("meta", "rows", "said"),
    [
        (set_in("store", "other"), None, "stores 'other'"),
        (set_in("chunk", [16, 32]), None, "chunks are"),
        (set_in("chunk", [16, 32, 0]), None, "chunks are"),
        (set_in("chunk", "16"), None, "chunk"),
        (set_in("chunk", [32, 32, 16]), None, "real_x is 32"),
        (set_in("shape", [16, 32, 32]), None, "its tiles are"),
        (lambda meta: meta.pop("tiling"), None, "tiling"),
        (lambda meta: meta.pop("sources"), None, "sources"),
        (lambda meta: meta["sources"].pop(0), None, "s0 lacks 'uid'"),
        (set_in_source("shape", [1 << 15, 1 << 15, 1 << 15]), None, "chunks, its shape has"),
        (set_in_source("shape", [75, 150, 142]), None, "do not end where the scan does"),
        (set_in_source("shape", [75, 0, 142]), None, "no size in voxels"),
        (set_in_source("sub_scans", 7), None, "7 sub-scans, but"),
        (set_in_source("tiles_left_out", [3, 3]), None, "sub-scans, but"),
        (set_in_source("tiles_left_out", [-1]), None, "sub-scans, but"),
        (set_in_source("tiles_left_out", [1 << 70]), None, "too large"),
        (set_in_source("shape", [1 << 70, 64, 1 << 70]), None, "chunks, its shape has"),
        (lambda meta: meta["tiling"].update(z_margin=1), None, "side by side"),
        (None, lambda rows: rows[3].update(x=rows[3]["x"] + 1), "side by side"),
        (None, lambda rows: rows.pop(5), "chunks, its shape has"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(stored, meta, rows, said):
    with pytest.raises(DamagedManifest, match=said):
        read_scan_store(open_manifest(change(stored, meta, rows)))


def test_a_tiny_stride_is_refused_before_it_fills_the_memory(stored):
    for stride in ((8, 8, 16), (16, 32, 1), (1, 1, 1)):  # 16 sub-scans a chunk, and more
        assert ShardingSettings(Tiling(TILE, stride=stride)).store == "subscans"
        if stride == (8, 8, 16):
            ShardingSettings(Tiling(TILE, stride=stride), store="scans")
            continue
        with pytest.raises(UserError, match=r"--stride .*16 sub-scans at most.*leave it out"):
            ShardingSettings(Tiling(TILE, stride=stride), store="scans")
        if stride == (1, 1, 1):
            data = change(stored, lambda meta: meta["tiling"].update(stride=[1, 1, 1]))
            with pytest.raises(DamagedManifest, match="more than 16 sub-scans a chunk"):
                read_scan_store(open_manifest(data))


def test_a_set_of_sub_scans_and_one_of_scans_are_two_data_sets(scans, stored, tmp_path):
    other = cut_here(scans, tmp_path / "a", ShardingSettings(Tiling(TILE)))
    assert data_fingerprint(other.meta) != data_fingerprint(stored.meta)
    again = cut_here(scans, tmp_path / "b", ShardingSettings(Tiling(TILE), store="scans"))
    assert data_fingerprint(again.meta) == data_fingerprint(stored.meta)


@pytest.mark.slow
def test_a_damaged_chunk_is_named_and_its_scan_stored_again(scans, tmp_path, capsys):
    (tmp_path / "scans").mkdir()
    for name in ("s2.mhd", "s2.raw"):
        (tmp_path / "scans" / name).write_bytes((scans / name).read_bytes())
    scans, tiling = tmp_path / "scans", Tiling(TILE, spacing=(2.0, 0.7, 0.9))
    found = cut_here(scans, tmp_path / "a", ShardingSettings(tiling, store="scans"))
    assert verify.main([found.root]) == 0
    said = capsys.readouterr().out
    assert f"{found.table.num_rows:,} chunks" in said and "sub-scan" not in said.splitlines()[-1]
    row = found.table.to_pylist()[7]
    path = Path(found.root, row["shard"])
    whole = bytearray(path.read_bytes())
    whole[row["offset"] + 100] ^= 1
    path.write_bytes(whole)
    assert verify.main([found.root]) == 1
    assert f"1 chunk: {row['key']}" in capsys.readouterr().out
    assert verify.main([found.root, "--repair", "--scans", os.fspath(scans), "--workers", "1"]) == 0
    assert verify.main([found.root]) == 0


def test_a_manifest_with_tables_says_the_same(stored):
    """Version 2, as very large sets have it."""
    old = stored
    meta = {key: value for key, value in old.meta.items() if key != "seal"}
    new = open_manifest(manifest_bytes(old.table.to_pylist(), meta, PADDED_SCHEMA, version=2))
    assert new.meta["schema"] == 2 and "key" not in new.table.column_names
    assert data_fingerprint(new.meta) == data_fingerprint(old.meta)
    one, other = read_scan_store(old), read_scan_store(new)
    unknown = ["mean_hu", "std_hu"]  # NaN
    assert one.wholes.drop_columns(unknown).equals(other.wholes.drop_columns(unknown))
    for name in ("scan", "origin"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
