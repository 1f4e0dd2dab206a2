"""Locks between real processes, and file systems that have none, in all code that locks."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import REPO

from p2w.config import Config
from p2w.errors import UserError
from p2w.files import FileLock, _warn, is_held
from p2w.finetune.trial import TrialLock
from p2w.reproduce.sweep_jobs import Sweep, SweepJob, SweepSlots
from p2w.shards.build_folder import JobShare
from p2w.shards.scan_shards import ScanFolder, ShardingSettings
from p2w.train.run_dir import RunDir

HOLDER = """
import sys
from p2w.files import FileLock
lock = FileLock(sys.argv[1])
assert lock.acquire()
lock.write("node7, pid 1")
print("held", flush=True)
sys.stdin.read()
"""


def test_a_lock_ends_with_its_process_whatever_ends_it(tmp_path):
    path = tmp_path / "lock"
    assert not is_held(path)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], env={**os.environ, "PYTHONPATH": str(REPO)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert other.stdout.readline() == "held\n"
    lock = FileLock(path)
    assert not lock.acquire() and is_held(path) and lock.note() == "node7, pid 1"
    other.kill()
    other.wait()
    assert not is_held(path) and lock.acquire() and is_held(path)
    lock.release()
    assert not is_held(path)


def train(top: Path) -> None:
    """A training run takes its folder."""
    RunDir(top / "run").open(Config(), "data", "shards", {})


def fine_tune(top: Path) -> None:
    """A process takes a trial."""
    assert TrialLock(top / "trial-00").take()


def sweep(top: Path) -> None:
    """A sweep takes a job and runs it."""
    (top / "logs").mkdir()
    (top / "job.py").write_text("")
    job = SweepJob("one", top / "one", ("python", str(top / "job.py")), 1, pretrains=True)
    work = Sweep([job], top, SweepSlots())
    work._start()
    assert [one.process.wait() for one in work.running] == [0]


def cut(top: Path) -> None:
    """A share of a data set is cut and merged."""
    folder = ScanFolder(str(top / "set"), ShardingSettings())
    with folder.share_lock(JobShare()):
        folder.prepare(JobShare())
        with folder.merge_lock():
            folder.remove_run_folder()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
@pytest.mark.parametrize("place", [train, fine_tune, sweep, cut])
def test_a_file_system_without_locks_is_not_taken_for_a_locked_file(
    place, number, tmp_path, monkeypatch, capfd
):
    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    _warn.cache_clear()
    place(tmp_path)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert (
        len(lines) == 1
        and "has no locks" in lines[0]
        and os.strerror(number) in lines[0]
        and "-o flock" in lines[0]
    )


def test_other_failures_of_locking_are_reported(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"lock: cannot be locked \(Input/output error\)"):
        FileLock(tmp_path / "lock").acquire()
