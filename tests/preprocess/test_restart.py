"""Sharding that is shared, stopped, killed, starved and repeated ends in the same bytes."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
from ct_files import KEEP_ALL, ct, write

from p2w.shards.build_folder import JobShare
from p2w.shards.manifest import read_manifest
from p2w.shards.scan_shards import ScanFolder, ShardingSettings
from p2w.shards.tiling import Tiling

NAME = "shard_luna"


def wait_until(true, seconds=60):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


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


@pytest.mark.parametrize("finished", [1, 4])
def test_killed_and_repeated_gives_the_same_bytes(command, many, many_whole, tmp_path, finished):
    out = tmp_path / "shards"
    arguments = (NAME, "--luna", many, "--out", out, "--workers", 2, *KEEP_ALL)
    for more in (0, 3):
        process = command.start(*arguments, new_interpreter=finished == 1 and not more)
        wait_until(lambda enough=finished + more: len(list((out / "scans").glob("*.json"))) >= enough)
        process.kill()
        process.communicate()
        assert not (out / "manifest.parquet").exists()
    code, said, err = command.call(*arguments)
    assert code == 0, said + err
    assert command.contents(out) == command.contents(many_whole)


@pytest.fixture
def heeds_interrupts():
    """A shell starts what it runs in the background with SIGINT ignored, and so would be whatever this process starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_interrupts")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_at_once(command, many, many_whole, tmp_path, number):
    out = tmp_path / "shards"
    arguments = (NAME, "--luna", many, "--out", out, "--workers", 1, *KEEP_ALL)
    process = command.start(*arguments, start_new_session=True, new_interpreter=True)
    wait_until(lambda: any((out / "scans").glob("*.json")))  # the first of twelve scans is cut
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    began = time.monotonic()
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - began < 5
    assert process.returncode == 128 + number and "Traceback" not in err and err.startswith("stopped: "), err
    assert not (out / ".run").exists()
    wait_until(lambda: subprocess.run(["pgrep", "-g", str(process.pid)], check=False).returncode == 1)
    assert command.call(*arguments)[0] == 0
    assert command.contents(out) == command.contents(many_whole)


def test_finished_scans_are_not_cut_again(command, luna, whole):
    before = {path: path.stat().st_mtime_ns for path in whole.glob("*.tar")}
    code, said, _ = command.call(NAME, "--luna", luna, "--out", whole, *KEEP_ALL)
    assert code == 0 and "all 5 scans are cut already" in said
    assert {path: path.stat().st_mtime_ns for path in whole.glob("*.tar")} == before


def test_a_damaged_folder_is_repaired_by_the_same_command(command, luna, whole, tmp_path):
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


def test_two_processes_on_one_folder(command, luna, whole, tmp_path):
    out = tmp_path / "shards"
    arguments = (NAME, "--luna", luna, "--out", out, "--workers", 1, *KEEP_ALL)
    processes = [command.start(*arguments), command.start(*arguments)]
    ends = [(process.communicate(timeout=120), process.returncode) for process in processes]
    codes = sorted(code for _, code in ends)
    assert codes in ([0, 2], [0, 0]), ends  # [0, 0]: one began when the other was done
    assert all("another process cuts the same scans" in err for (_, err), code in ends if code == 2)
    assert command.contents(out) == command.contents(whole)


def test_a_worker_that_is_killed_is_reported(command, luna, tmp_path):
    import psutil

    arguments = ("--luna", luna, "--out", tmp_path / "shards", "--workers", 1, *KEEP_ALL)
    process = command.start(NAME, *arguments, new_interpreter=True)
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


def test_a_folder_in_which_nothing_was_cut_takes_other_settings(command, luna, whole, tmp_path):
    out = tmp_path / "shards"
    code, _, err = command.call(NAME, "--luna", luna, "--out", out, "--z-margin", 1000, *KEEP_ALL)
    assert code == 2 and "not one sub-scan" in err and not (out / "manifest.parquet").exists()
    assert command.call(NAME, "--luna", luna, "--out", out, *KEEP_ALL)[0] == 0
    assert command.contents(out) == command.contents(whole)


def test_a_share_with_other_settings_is_refused_before_the_first_shard_is_there(
    command, luna, whole, tmp_path
):
    """Share 0 has begun and written nothing: share 1 must not make the folder its own, and the manifest a lie."""
    out = tmp_path / "shards"
    arguments = (NAME, "--luna", luna, "--out", out, *KEEP_ALL)
    first, share = (
        ScanFolder(str(out), ShardingSettings(Tiling(z_margin=25, min_std_hu=0.0))),
        JobShare(0, 2),
    )
    with first.share_lock(share):
        first.prepare(share)
        code, _, err = command.call(*arguments, "--shard-of", "1/2", "--z-margin", 0)
        assert code == 2 and "share 0-of-2 cuts it with" in err and "z_margin 25 and not 0" in err, err
        assert json.loads((out / "settings.json").read_text())["tiling"]["z_margin"] == 25
    code, _, err = command.call(*arguments)  # share 0 has ended, and nothing was cut with its settings
    assert code == 0 and command.contents(out) == command.contents(whole), err
