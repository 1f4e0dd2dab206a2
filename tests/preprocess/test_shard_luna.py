"""shard_luna.py end to end: what it writes, how it is killed and repeated, and how it refuses."""

import json
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from crc32c import crc32c
from ct_files import ct, write

from p2w.data.shard import read_manifest

NAME = "shard_luna"
SCANS = {"1.3.1": (0, 130), "1.3.2": (0, 64), "1.3.3": (1, 70), "1.3.4": (2, 66), "1.3.5": (2, 64)}
KEEP_ALL = ("--min-std", "0")


def wait_until(true, seconds=60):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def luna(tmp_path_factory):
    """Five scans in three subsets, one of them stored upside down."""
    root = tmp_path_factory.mktemp("LUNA 16 ü")
    for number, (uid, (subset, slices)) in enumerate(SCANS.items()):
        turn = np.diag([1, -1, -1]) if uid == "1.3.3" else None
        shape = (slices, 256, 256) if uid == "1.3.1" else (slices, 128, 140)
        write(root / f"subset{subset}" / f"{uid}.mhd", ct(shape, number), direction=turn)
    return root


@pytest.fixture(scope="module")
def whole(command, luna, tmp_path_factory):
    """The set as one uninterrupted process with one worker writes it."""
    out = tmp_path_factory.mktemp("whole") / "shards"
    code, said, _ = command.call(NAME, "--luna", luna, "--out", out, "--workers", 1, *KEEP_ALL)
    assert code == 0, said
    return out


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


@pytest.mark.parametrize("form", ["tar", "arrow"])
def test_workers_and_shares_give_the_same_bytes(command, luna, whole, tmp_path, form):
    common = ("--luna", luna, "--format", form, *KEEP_ALL)
    shares = tmp_path / "shares"
    code, said, _ = command.call(NAME, "--out", shares, "--shard-of", "1/2", *common)
    assert code == 0 and "3 of 5 scans are not cut yet" in said and not (shares / "manifest.parquet").exists()
    if form == "tar":
        code, _, err = command.call(NAME, "--out", shares, "--merge", *common)
        assert code == 2 and "3 of 5 scans are not cut yet" in err and "without --merge" in err
    code, said, _ = command.call(NAME, "--out", shares, "--shard-of", "0/2", *common)
    assert code == 0 and "12 sub-scans kept" in said
    if form == "tar":
        two = whole
    else:
        two = tmp_path / "two"
        assert command.call(NAME, "--out", two, "--workers", 2, *common)[0] == 0
    assert command.contents(shares) == command.contents(two)
    if form == "tar":
        (shares / "manifest.parquet").unlink()
        assert command.call(NAME, "--out", shares, "--merge", *common)[0] == 0
        assert command.contents(shares) == command.contents(two)


@pytest.mark.parametrize("delay", [0.5, 1.2])
def test_killed_and_repeated_gives_the_same_bytes(command, luna, whole, tmp_path, delay):
    out = tmp_path / "shards"
    arguments = (NAME, "--luna", luna, "--out", out, "--workers", 2, *KEEP_ALL)
    for extra in (0, 0.25):
        process = command.start(*arguments)
        wait_until((out / "settings.json").exists)  # time runs from the first sign of work
        time.sleep(delay + extra)
        process.kill()
        process.communicate()
        if (out / "manifest.parquet").exists():
            read_manifest(out)
    code, said, err = command.call(*arguments)
    assert code == 0, said + err
    assert command.contents(out) == command.contents(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_at_once(command, luna, whole, tmp_path, number):
    out = tmp_path / "shards"
    arguments = (NAME, "--luna", luna, "--out", out, "--workers", 1, *KEEP_ALL)
    process = command.start(*arguments, start_new_session=True)
    wait_until((out / ".run").exists)
    time.sleep(0.5)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    began = time.monotonic()
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - began < 5
    assert process.returncode == 128 + number and "Traceback" not in err and err.startswith("stopped: "), err
    assert not (out / ".run").exists()
    wait_until(lambda: subprocess.run(["pgrep", "-g", str(process.pid)], check=False).returncode == 1)
    assert command.call(*arguments)[0] == 0
    assert command.contents(out) == command.contents(whole)


def test_finished_scans_are_not_cut_again(command, luna, whole):
    before = {path: path.stat().st_mtime_ns for path in whole.glob("*.tar")}
    code, said, _ = command.call(NAME, "--luna", luna, "--out", whole, *KEEP_ALL)
    assert code == 0 and "all 5 scans are cut already" in said
    assert {path: path.stat().st_mtime_ns for path in whole.glob("*.tar")} == before


def test_a_damaged_folder_is_mended(command, luna, whole, tmp_path):
    out = tmp_path / "shards"
    shutil.copytree(whole, out)
    (out / "scans" / "1.3.2.json").write_bytes(b"")
    (out / "1.3.3.tar").unlink()
    os.truncate(out / "1.3.4.tar", 1000)
    (out / ".run").mkdir()
    (out / ".run" / "1.3.1.77.0-of-1.part").mkdir()
    (out / ".run" / "manifest.parquet.77.merge.part").write_bytes(b"half")
    (out / ".run" / "1-of-3.lock").touch()
    code, said, err = command.call(NAME, "--luna", luna, "--out", out, *KEEP_ALL)
    assert code == 0 and "3 scans to cut (2 are finished)" in said, err
    assert command.contents(out) == command.contents(whole)


def test_a_changed_source_is_cut_again(command, tmp_path):
    root, out = tmp_path / "LUNA16", tmp_path / "shards"
    arguments = (NAME, "--luna", root, "--subsets", "0", "--out", out, *KEEP_ALL)
    for slices, kept in ((64, 1), (130, 2)):
        write(root / "subset0" / "a.mhd", ct((slices, 128, 128)))
        code, said, _ = command.call(*arguments)
        assert code == 0 and f"{kept} sub-scans kept" in said
        assert read_manifest(out).table.num_rows == kept


def test_two_at_once_on_one_folder(command, luna, whole, tmp_path):
    out = tmp_path / "shards"
    arguments = (NAME, "--luna", luna, "--out", out, "--workers", 1, *KEEP_ALL)
    processes = [command.start(*arguments), command.start(*arguments)]
    ends = [(process.communicate(timeout=120), process.returncode) for process in processes]
    codes = sorted(code for _, code in ends)
    assert codes in ([0, 2], [0, 0]), ends  # [0, 0]: one began when the other was done
    assert all("another process cuts the same scans" in err for (_, err), code in ends if code == 2)
    assert command.contents(out) == command.contents(whole)


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
    assert code == 0 and "2 tiles, 1 left out (standard deviation < 50 HU), 1 sub-scans kept" in said
    meta = read_manifest(tmp_path / "shards").meta
    assert meta["tiling"]["left_out"] == 1 and meta["sources"][0]["left_out"] == 1


def test_dry_run(command, luna, tmp_path):
    code, said, _ = command.call(
        NAME, "--luna", luna, "--subsets", "0,2", "--out", tmp_path / "out", "--dry-run"
    )
    assert code == 0
    for text in (
        "scans          4 (0 bad)",
        "sub-scans      11 tiles",
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


def test_a_worker_that_is_killed_is_reported(command, luna, tmp_path):
    import psutil

    process = command.start(NAME, "--luna", luna, "--out", tmp_path / "shards", "--workers", 1, *KEEP_ALL)
    workers = []
    while not workers and process.poll() is None:
        children = psutil.Process(process.pid).children()
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        time.sleep(0.01)
    workers[0].kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "a worker was killed while it cut" in err and err.count("\n") == 1, err


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_disk_stops_it_cleanly(command, luna, whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("may not mount")
    try:
        arguments = (NAME, "--luna", luna, "--out", disk / "shards", "--workers", 1, *KEEP_ALL)
        (disk / "other").write_bytes(bytes(12 << 20))
        code, _, err = command.call(*arguments)
        assert code == 2 and "GiB free, the shards take at least 0.02 GiB: make room" in err, err
        (disk / "other").unlink()
        process = command.start(*arguments)
        wait_until(lambda: process.poll() is not None or list((disk / "shards" / ".run").glob("*.part")))
        (disk / "other").write_bytes(bytes(12 << 20))  # someone else's, after the check
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2 and "the disk is full" in err and err.count("\n") == 1, err
        assert not (disk / "shards" / "manifest.parquet").exists() and not (disk / "shards" / ".run").exists()
        (disk / "other").unlink()
        assert command.call(*arguments)[0] == 0
        assert command.contents(disk / "shards") == command.contents(whole)
    finally:
        subprocess.run(["umount", disk], check=True)
