"""Scans as hospitals have them, 30 slices of 5 mm: cut at another size or spacing, repaired, and learned from."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import processes
import pyarrow as pa
import pytest
from ct_files import ct, write
from processes import REPO, torchrun

from p2w.ct.discover import ScanSource
from p2w.ct.resample import resample
from p2w.ct.scan import read_scan
from p2w.shards.manifest import read_manifest
from p2w.stream.stream import open_set

NAME = "shard_scans"
REAL = os.environ.get("P2W_REAL_DATA")
TINY = """--data.batch 4 --data.reader-threads 1 --pretext.size 8 16 16 --model.width 2 --train.precision fp32
--train.steps 4 --train.validate-every 2 --train.log-every 1 --train.probe-every 2""".split()  # noqa: SIM905


def run(*command: object, spies: tuple = ()) -> str:
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "P2W_DEVICE": "cpu"}
    words = [str(word) for word in command]
    done = processes.run(words, cwd=REPO, env=env, capture_output=True, text=True, timeout=220, spies=spies)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    """Six scans of 30 slices of 5 mm, and one of 40 of which two are stored from the head down."""
    root = tmp_path_factory.mktemp("hospital")
    for number in range(6):
        turn = np.diag([1, 1, -1]) if number == 2 else None
        shape = (30, 200, 160) if number else (40, 200, 160)
        write(root / f"p{number}.nii.gz", ct(shape, number), spacing=(0.8, 0.7, 5.0), direction=turn)
    return root


def pretrain_two_ways(shards: Path, folder: Path, draws: bool) -> None:
    """A short run on two ranks with validation, and pictures if it draws; and what it says of its data."""
    spies = (("recalibrate_on_few",), *(() if draws else (("draw_nothing",),)))
    run(*torchrun(2, "demo", "--shards", shards, "--run-dir", folder, *TINY), spies=spies)
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [record["val/loss"] for record in records if "val/loss" in record]
    assert len(losses) == 3 and all(np.isfinite(losses))


def test_short_scans_are_refused_with_the_ways_out(command, hospital, tmp_path):
    code, said, err = command.call(NAME, "--scans", hospital, "--out", tmp_path / "out")
    assert code == 2 and "not one sub-scan" in err
    assert "smaller than a sub-scan: 30 x 200 x 160 voxels (z, y, x)" in said
    assert "--short pad" in said and "--tile" in said and "--spacing" in said


@pytest.mark.parametrize("form", ["tar", "arrow"])
def test_short_scans_are_filled_up_with_air_and_learned_from(command, hospital, tmp_path, form):
    out = tmp_path / "out"
    options = ("--scans", hospital, "--out", out, "--short", "pad", "--format", form, "--val-fraction", "0.3")
    code, said, err = command.call(NAME, *options)
    assert code == 0, said + err
    manifest = read_manifest(out)
    assert manifest.meta["tiling"]["short"] == "pad"
    rows = manifest.table.to_pylist()
    assert len(rows) == 6 and {row["real_z"] for row in rows} == {30, 40}
    assert {(row["real_y"], row["real_x"]) for row in rows} == {(128, 128)}
    shards = open_set(str(out))
    for number, row in enumerate(rows):
        voxels = np.empty(shards.shape, np.int16)
        shards.read_into(number, voxels)
        name = f"{row['scan_uid']}.nii.gz"
        scan = read_scan(ScanSource(row["scan_uid"], name, (str(hospital / name),))).voxels.clip(-1000, 1000)
        real = row["real_z"]
        np.testing.assert_array_equal(voxels[:real], scan[:, :128, :128])
        assert (voxels[real:] == -1000).all()
    assert shards.real_voxels(np.array([0, 1])).tolist() == [[40, 128, 128], [30, 128, 128]]
    if form == "arrow":
        table = pa.ipc.open_file(out / "p0.arrow").read_all()
        assert table["real_z"].to_pylist() == [40]
        return
    pretrain_two_ways(out, tmp_path / "run", draws=True)
    damaged = out / "p1.tar"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:5000] + b"\1" + whole[5001:])
    assert "1 of 1 damaged shards are repaired" in run(
        sys.executable, "-m", "p2w", "verify", out, "--repair", "--scans", hospital
    )
    assert damaged.read_bytes() == whole


def test_short_scans_are_resampled_and_learned_from(command, hospital, tmp_path):
    out = tmp_path / "out"
    options = ("--scans", hospital, "--out", out, "--spacing", "1.5", "1", "1", "--val-fraction", "0.3")
    code, plan, err = command.call(NAME, *options, "--min-std", 0, "--tile", 64, 96, 96, "--dry-run")
    assert code == 0 and "12 of 64 x 96 x 96" not in plan and "7 of 64 x 96 x 96 voxels" in plan, plan + err
    code, said, err = command.call(NAME, *options, "--min-std", 0, "--tile", 64, 96, 96)
    assert code == 0 and "7 sub-scans kept" in said, said + err
    manifest = read_manifest(out)
    assert manifest.meta["tiling"]["spacing_mm"] == [1.5, 1.0, 1.0]
    source = {one["uid"]: one for one in manifest.meta["sources"]}["p2"]
    assert source["stored"] == {"shape": [30, 200, 160], "spacing_mm": pytest.approx([5.0, 0.7, 0.8])}
    assert source["shape"] == [100, 140, 128] and source["spacing_mm"] == [1.5, 1.0, 1.0]
    rows = manifest.table.to_pylist()
    assert {(row["spacing_z"], row["spacing_y"], row["spacing_x"]) for row in rows} == {(1.5, 1.0, 1.0)}
    shards = open_set(str(out))
    for number, row in enumerate(rows):
        voxels = np.empty(shards.shape, np.int16)
        shards.read_into(number, voxels)
        name = f"{row['scan_uid']}.nii.gz"
        scan = read_scan(ScanSource(row["scan_uid"], name, (str(hospital / name),)))
        whole, _ = resample(scan.voxels, scan.grid, (1.5, 1.0, 1.0), (-1000, 1000))
        z, y, x = row["z"], row["y"], row["x"]
        np.testing.assert_array_equal(voxels, whole[z : z + 64, y : y + 96, x : x + 96])
    pretrain_two_ways(out, tmp_path / "run", draws=False)
    damaged = out / "p2.tar"
    whole = damaged.read_bytes()
    damaged.unlink()
    run(sys.executable, "-m", "p2w", "verify", out, "--repair", "--scans", hospital)
    assert damaged.read_bytes() == whole


def test_default_tiles_give_the_manifest_that_they_always_gave(command, tmp_path):
    write(tmp_path / "scans" / "a.nii.gz", ct((64, 128, 128)))
    write(tmp_path / "scans" / "b.nii.gz", ct((64, 128, 128), 1))
    plain, said = tmp_path / "plain", tmp_path / "said"
    command.call(NAME, "--scans", tmp_path / "scans", "--out", plain)
    spelled = ("--tile", 64, 128, 128, "--stride", 64, 128, 128, "--short", "skip")
    code, text, err = command.call(NAME, "--scans", tmp_path / "scans", "--out", said, *spelled)
    assert code == 0, text + err
    assert command.contents(plain) == command.contents(said)
    settings = json.loads((plain / "settings.json").read_text())
    assert sorted(settings) == [
        "allow_gaps", "format", "sample_version", "schema", "split_seed", "tiling", "val_fraction", "window_hu",
    ]  # fmt: skip
    assert sorted(settings["tiling"]) == ["min_std_hu", "tile", "z_margin"]


@pytest.mark.skipif(not REAL, reason="P2W_REAL_DATA names no folder of real scans")
def test_small_tiles_give_eight_times_as_many_sub_scans_of_real_chests(command, tmp_path):
    chest, out = Path(REAL) / "chest", tmp_path / "out"
    code, said, err = command.call(NAME, "--scans", chest, "--out", out, "--tile", 32, 64, 64)
    assert code == 0, said + err
    kept = read_manifest(out).table.num_rows
    assert kept > 8 * 76
    code, said, err = command.call(
        NAME, "--scans", chest, "--out", tmp_path / "body", "--tile", 32, 64, 64, "--body-only"
    )
    assert code == 0 and "less than 10% above -900 HU" in said, said + err
    assert kept / 2 < read_manifest(tmp_path / "body").table.num_rows < kept
