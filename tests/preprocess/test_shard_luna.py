"""shard_luna.py end to end: what it writes, and how it refuses."""

import json
import os

import numpy as np
import pytest
from crc32c import crc32c
from ct_files import KEEP_ALL, SCANS, ct, write

from p2w.shards.manifest import read_manifest

NAME = "shard_luna"


def test_manifest_rows_lie_where_they_say(whole, luna):
    manifest = read_manifest(whole)
    rows = manifest.table.to_pylist()
    assert len(rows) == 8 + 1 + 1 + 1 + 1
    assert [(row["scan_uid"], row["z"], row["y"], row["x"]) for row in rows] == sorted(
        (row["scan_uid"], row["z"], row["y"], row["x"]) for row in rows
    )
    for row in rows:
        with open(whole / row["shard"], "rb") as file:
            raw = os.pread(file.fileno(), row["nbytes"], row["offset"])
        assert crc32c(raw) == row["crc32c"]
        number = list(SCANS).index(row["scan_uid"])
        shape = (SCANS[row["scan_uid"]][1], *((256, 256) if row["scan_uid"] == "1.3.1" else (128, 140)))
        hu = ct(shape, number).clip(-1000, 1000)
        if row["scan_uid"] == "1.3.3":
            hu = hu[::-1, ::-1]
        z, y, x = row["z"], row["y"], row["x"]
        part = hu[z : z + 64, y : y + 128, x : x + 128]
        np.testing.assert_array_equal(np.frombuffer(raw, "<i2").reshape(64, 128, 128), part)
        assert row["key"] == f"{row['scan_uid']}/z{z:04d}_y{y:04d}_x{x:04d}"
        assert row["subset"] == SCANS[row["scan_uid"]][0]
        np.testing.assert_allclose((row["spacing_z"], row["spacing_y"], row["spacing_x"]), (2.5, 0.8, 0.7))
        np.testing.assert_allclose((row["mean_hu"], row["std_hu"]), (part.mean(), part.std()), rtol=1e-5)
    meta = manifest.meta
    assert meta["tiling"] == {"tile": [64, 128, 128], "z_margin": 0, "min_std_hu": 0.0, "left_out": 0}
    assert meta["sources"][0]["file"] == "subset0/1.3.1.mhd"
    for shard in meta["shards"]:
        data = (whole / shard["name"]).read_bytes()
        assert (len(data), crc32c(data)) == (shard["nbytes"], shard["crc32c"])
    data = (luna / "subset0" / "1.3.2.mhd").read_bytes() + (luna / "subset0" / "1.3.2.raw").read_bytes()
    assert meta["sources"][1]["checksum"] == f"crc32c:{crc32c(data):08x}" and meta["sources"][1][
        "nbytes"
    ] == len(data)
    assert str(luna).encode() not in b"".join(
        path.read_bytes() for path in whole.rglob("*.*") if path.is_file()
    )


def test_split_is_by_scan(whole):
    manifest = read_manifest(whole)
    sides = {}
    for row in manifest.table.to_pylist():
        sides.setdefault(row["scan_uid"], set()).add(row["split"])
    assert all(len(side) == 1 for side in sides.values())
    assert (
        sorted(uid for uid, side in sides.items() if side == {"val"}) == manifest.meta["split"]["val_scans"]
    )
    assert len(manifest.meta["split"]["val_scans"]) == 1
    names = (whole / "train.txt").read_text().split() + (whole / "val.txt").read_text().split()
    assert sorted(names) == sorted(f"{uid}.tar" for uid in SCANS)


def test_bad_scans_are_named_and_the_run_goes_on(command, luna, tmp_path):
    root = tmp_path / "LUNA16"
    good = write(root / "subset0" / "1.3.1.mhd", ct((64, 128, 128)))
    assert good.exists()
    write(root / "subset0" / "short.mhd", ct((63, 128, 128)))
    write(root / "subset0" / "cut.mhd", ct((64, 128, 128)))
    os.truncate(root / "subset0" / "cut.raw", 1000)
    out = tmp_path / "shards"
    common = ("--luna", root, "--subsets", "0-1", "--out", out)
    code, said, _ = command.call(NAME, *common, "--dry-run")
    assert code == 1 and "bad scan: subset0/cut.mhd: truncated" in said and not out.exists()
    code, said, _ = command.call(NAME, *common)
    assert code == 1, said
    assert "warning:" in said and "has no subset1; going on without" in said
    assert "no validation scans: there is only one scan" in said
    report = json.loads((out / "report.json").read_text())
    assert [entry["where"] for entry in report["bad_scans"]] == ["subset0/cut.mhd", "subset0/short.mhd"]
    assert read_manifest(out).meta["bad_scans"] == report["bad_scans"]
    for entry in report["bad_scans"]:
        assert f"bad scan: {entry['where']}: {entry['why']}" in said
    code, _, err = command.call(
        NAME, "--luna", root, "--subsets", "0", "--out", tmp_path / "strict", "--strict"
    )
    assert code == 2 and err.startswith("error: bad scan: ") and err.count("\n") == 1
    assert not (tmp_path / "strict" / "manifest.parquet").exists()
    write(root / "subset0" / "cut.mhd", ct((64, 128, 128), 1))  # mended: the same command takes it up
    os.unlink(root / "subset0" / "short.mhd")
    os.unlink(root / "subset0" / "short.raw")
    code, _, err = command.call(NAME, *common)
    assert code == 2 and "holds the scan subset0/short.mhd, which is not among the 2 asked for" in err
    (out / "scans" / "short.json").unlink()
    code, said, _ = command.call(NAME, *common)
    assert code == 0 and "1 scans to cut (1 are finished)" in said and "2 sub-scans kept" in said


def test_min_std_leaves_out_air_and_says_so(command, tmp_path):
    hu = ct((64, 128, 256))
    hu[:, :, 128:] = -1000
    write(tmp_path / "LUNA16" / "subset0" / "a.mhd", hu)
    code, said, _ = command.call(
        NAME, "--luna", tmp_path / "LUNA16", "--subsets", "0", "--out", tmp_path / "shards"
    )
    assert code == 0 and "2 sub-scans, 1 left out (standard deviation < 50 HU), 1 sub-scans kept" in said
    meta = read_manifest(tmp_path / "shards").meta
    assert meta["tiling"]["left_out"] == 1 and meta["sources"][0]["left_out"] == 1


def test_dry_run(command, luna, tmp_path):
    code, said, _ = command.call(
        NAME, "--luna", luna, "--subsets", "0,2", "--out", tmp_path / "out", "--dry-run"
    )
    assert code == 0
    for text in (
        "scans          4, besides 0 bad ones",
        "sub-scans      11 of 64 x 128 x 128 voxels",
        "to write ",
        "free there ",
        "time  ",
        "time           about",
    ):
        assert text in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            (),
            r"LUNA16: no such folder; it should hold LUNA16's subset0 … subset9: name yours with --luna DIR",
        ),
        (("--subsets", "7-3"), "--subsets '7-3'"),
        (("--shard-of", "2/2"), "--shard-of '2/2': write i/n with i from 0 to n - 1"),
        (("--z-margin", "-1"), "--z-margin -1"),
        (("--min-std", "-1"), "--min-std -1"),
        (("--val-fraction", "1"), "--val-fraction 1"),
        (("--workers", "-2"), "--workers -2"),
        (("--formt", "tar"), "--formt"),
    ],
)
def test_wrong_arguments_are_one_line(command, tmp_path, arguments, says):
    code, _, err = command.call(NAME, *arguments, cwd=tmp_path)
    assert code == 2 and says in err
    if "--formt" not in arguments:
        assert err.startswith("error: ") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_other_settings_and_other_folders_are_refused(command, luna, whole, tmp_path):
    before = command.contents(whole)
    code, _, err = command.call(NAME, "--luna", luna, "--out", whole, "--z-margin", 5)
    assert (
        code == 2
        and "was cut with min_std_hu 0.0 and not 50.0, z_margin 0 and not 5: name another --out" in err
    )
    code, _, err = command.call(NAME, "--luna", luna, "--out", whole, "--subsets", "0", *KEEP_ALL)
    assert code == 2 and "holds the scan subset1/1.3.3.mhd, which is not among the 2 asked for" in err
    assert command.contents(whole) == before
    (tmp_path / "thesis.doc").write_text("mine")
    code, _, err = command.call(NAME, "--luna", luna, "--out", tmp_path)
    assert code == 2 and "holds other files (thesis.doc, …) and no settings.json" in err
    assert command.contents(tmp_path) == {"thesis.doc": b"mine"}
    code, _, err = command.call(NAME, "--luna", luna, "--out", "/proc/shards")
    assert code == 2 and err.startswith("error: /proc/shards") and err.count("\n") == 1
    code, _, err = command.call(NAME, "--luna", luna, "--out", tmp_path / "thesis.doc")
    assert code == 2 and err.count("\n") == 1
