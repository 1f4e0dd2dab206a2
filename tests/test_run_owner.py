"""Who trains in a run folder, where locks do not say it: live and dead owners, stale ones, and readers of status.json."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from processes import REPO, Forked

from p2w import files, run_owner
from p2w.config import Config
from p2w.errors import UserError
from p2w.run_owner import Owner, run_state
from p2w.train import run_dir
from p2w.train.run_dir import RunDir

HOLDER = """
import fcntl, errno, os, sys, time
from pathlib import Path
from p2w import run_owner
from p2w.config import Config
from p2w.train import run_dir
from p2w.train.run_dir import RunDir
run_owner.BEAT_S = run_dir.BEAT_S = 0.2
run_owner.STALE_S = float(sys.argv[3])
if sys.argv[2] == "local":   # as on NFS without lockd: the lock of one node is unknown to the other
    fcntl.flock = lambda file, how: None
elif sys.argv[2] != "flock":
    def flock(file, how):
        raise OSError(int(sys.argv[2]), os.strerror(int(sys.argv[2])))
    fcntl.flock = flock
run_owner.boot_id = lambda: sys.argv[4]   # another node
folder = RunDir(Path(sys.argv[1]))
folder.open(Config(), "data", "shards", {})
def lost(why):
    print("lost: " + why, flush=True)
    os._exit(9)
folder.watch(lambda: 7, lambda line: print(line, flush=True), lost)
folder.write_status("running", 7)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def start():
    """Start a process that owns a folder: (folder, locks, seconds until it is stale, node)."""
    running = []

    def go(folder, locks="flock", stale=1.5, node="node-1"):
        process = Forked(
            [sys.executable, "-c", HOLDER, str(folder), str(locks), str(stale), node], text=True,
            env={**os.environ, "PYTHONPATH": str(REPO)}, stdout=subprocess.PIPE,
        )  # fmt: skip
        running.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield go
    for process in running:
        process.kill()
        process.wait()


def open_here(folder, monkeypatch, locks="flock", stale=1.5, node="node-2"):
    """Open a run folder as another node would."""
    monkeypatch.setattr(run_owner, "STALE_S", stale)
    monkeypatch.setattr(run_owner, "boot_id", lambda: node)

    def flock(file, how):
        if locks != "local":
            raise OSError(locks, os.strerror(locks))

    if locks != "flock":
        monkeypatch.setattr(fcntl, "flock", flock)
    files._warn.cache_clear()
    found = RunDir(folder)
    found.open(Config(), "data", "shards", {})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("locks", ["local", errno.ENOSYS, errno.ENOLCK])
def test_a_second_node_is_refused_by_name_while_the_first_one_lives(start, tmp_path, monkeypatch, locks):
    first = start(tmp_path / "run", locks)
    with pytest.raises(UserError, match=rf"another process trains in it \(.*, pid {first.pid}\)"):
        open_here(tmp_path / "run", monkeypatch, locks)


@pytest.mark.slow
def test_a_killed_owner_of_another_node_is_taken_over_once_it_is_stale(start, tmp_path, monkeypatch):
    first = start(tmp_path / "run", "local")
    first.kill()
    first.wait()
    began = time.monotonic()
    open_here(tmp_path / "run", monkeypatch, "local").close()
    assert time.monotonic() - began > 0.5  # it could not know at once
    began = time.monotonic()
    open_here(tmp_path / "run", monkeypatch, "local", stale=30, node="node-3").close()
    assert time.monotonic() - began < 10  # who leaves in peace says so


@pytest.mark.slow
def test_a_killed_owner_of_this_host_is_taken_over_at_once(start, tmp_path, monkeypatch):
    first = start(tmp_path / "run", "local", node="here")
    first.kill()
    first.wait()
    began = time.monotonic()
    open_here(tmp_path / "run", monkeypatch, "local", stale=60, node="here").close()
    assert time.monotonic() - began < 20


@pytest.mark.slow
@pytest.mark.parametrize("locks", ["flock", "local"])
def test_a_frozen_node_loses_the_folder_and_leaves_when_it_wakes(start, tmp_path, monkeypatch, locks):
    first = start(tmp_path / "run", locks)
    first.send_signal(signal.SIGSTOP)
    second = open_here(tmp_path / "run", monkeypatch, locks)
    second.check_owner()
    first.send_signal(signal.SIGCONT)
    line = first.stdout.readline()
    assert first.wait(20) == 9 and "has taken it over" in line and f"pid {os.getpid()}" in line
    second.check_owner()
    second.close()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["moved", "deleted"])
def test_a_folder_that_goes_is_said_and_made_anew(start, tmp_path, how):
    run = tmp_path / "run"
    first = start(run, "local")
    run.rename(tmp_path / "elsewhere")
    if how == "deleted":
        subprocess.run(["rm", "-r", str(tmp_path / "elsewhere")], check=True)
    line = first.stdout.readline()
    assert ("was deleted" if how == "deleted" else f"was moved to {tmp_path}/elsewhere") in line and str(
        run
    ) in line
    end = time.monotonic() + 20
    while not (run / ".owner").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert json.loads((run / ".owner").read_text())["pid"] == first.pid
    RunDir(run).check_may_continue(Config(), "data")  # settings and starts are there too


@pytest.mark.slow
def test_a_reader_tells_a_dead_run_from_a_live_one(start, tmp_path, monkeypatch):
    run = tmp_path / "run"
    first = start(run, "local")
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["pid"]) == ("running", 7, first.pid)
    assert status["host"] == os.uname().nodename and abs(status["heartbeat"] - time.time()) < 60
    monkeypatch.setattr(run_owner, "STALE_S", 1.5)
    assert run_state(run, status) == "running"
    first.kill()
    first.wait()
    time.sleep(1.6)
    assert run_state(run, status) == "killed"  # seen from another node
    monkeypatch.setattr(run_owner, "boot_id", lambda: "node-1")
    monkeypatch.setattr(run_owner, "STALE_S", 60)
    assert run_state(run, status) == "killed"  # on its own node, at once
    assert run_state(run, {"state": "finished"}) == "finished"


def test_a_checkpoint_is_not_published_after_a_take_over(tmp_path, monkeypatch):
    first = RunDir(tmp_path / "run")
    first.open(Config(), "data", "shards", {})
    Owner(tmp_path / "run").take()
    with pytest.raises(UserError, match="trains in it now"):
        first.check_owner()
    first.close()
    assert not Owner(tmp_path / "run").read().get("released")  # it is the other's


def test_a_final_status_is_not_overwritten_by_a_sign_of_life(tmp_path):
    folder = RunDir(tmp_path)
    folder.write_status("finished", 9)
    folder.write_status("running", 8)
    assert json.loads((tmp_path / "status.json").read_text()) == {"state": "finished", "step": 9, "why": ""}
    assert run_dir.BEAT_S * 4 < run_owner.STALE_S
