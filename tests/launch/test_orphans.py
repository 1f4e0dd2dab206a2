"""Ranks that outlive their torchrun save and leave; a run whose end cannot be saved says so."""

import contextlib
import json
import os
import signal

import psutil
import pytest
from launch_runs import wait_for

FAST = [
    "--data.batch",
    "4",
    "--pretext.size",
    "8",
    "16",
    "16",
    "--model.width",
    "2",
    "--train.precision",
    "fp32",
]


def test_ranks_without_their_torchrun_save_and_leave(forge, tiny_set, tmp_path):
    run = tmp_path / "run"
    argv = ("demo", "--shards", tiny_set, "--run-dir", run, "--train.steps", 100_000, *FAST)
    agent = forge.torchrun(tmp_path, *argv, ranks=2)
    wait_for(
        lambda: (run / "metrics.jsonl").exists() and '"step": 20,' in (run / "metrics.jsonl").read_text(),
        "step 20",
    )
    ranks = agent.children(recursive=True)
    agent.kill()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive and forge.wait() == [-9]
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["why"]) == ("told to stop", "torchrun is gone")
    assert (run / "checkpoints" / f"step-{status['step']:08d}").is_dir()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_terminal_that_goes_saves_and_leaves(forge, tiny_set, tmp_path, ranks):
    """SIGHUP ended ranks at once: nothing was saved, and status.json said running."""
    run = tmp_path / "run"
    argv = ("demo", "--shards", tiny_set, "--run-dir", run, "--train.steps", 100_000, *FAST)
    pids = forge.start(tmp_path, *argv, ranks=ranks)
    wait_for(
        lambda: (run / "metrics.jsonl").exists() and '"step": 20,' in (run / "metrics.jsonl").read_text(),
        "step 20",
    )
    for pid in pids:
        os.kill(pid, signal.SIGHUP)
    assert forge.wait() == [0] * ranks, (tmp_path / "err.txt").read_text()
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["why"]) == ("told to stop", "SIGHUP")
    assert (run / "checkpoints" / f"step-{status['step']:08d}").is_dir()


def test_a_run_that_hangs_says_so_in_its_status(forge, tiny_set, tmp_path):
    run = tmp_path / "run"
    argv = (
        "demo",
        "--shards",
        tiny_set,
        "--run-dir",
        run,
        "--train.steps",
        100_000,
        *FAST,
        "--train.hang-minutes",
        "0.2",
    )
    pids = forge.start(tmp_path, *argv, ranks=2)
    wait_for((run / "metrics.jsonl").exists, "the first step")
    assert json.loads((run / "status.json").read_text())["pid"] == pids[0]
    os.kill(pids[1], signal.SIGSTOP)
    wait_for(lambda: "failed" in (run / "status.json").read_text(), "the status", 60)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pids[1], signal.SIGKILL)
    assert forge.wait()[0] == 1
    status = json.loads((run / "status.json").read_text())
    assert status["why"].startswith("hangs: rank 1 on ") and set(status) == {"state", "step", "why"}
