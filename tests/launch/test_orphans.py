"""Ranks that outlive their torchrun save and leave; a run whose end cannot be saved says so."""

import json
import os
import signal
import time

import psutil
from processes import torchrun

FAST = ["--data.batch", "4", "--pretext.size", "8", "16", "16", "--model.width", "2", "--train.amp", "fp32"]


def wait_for(true, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ranks_without_their_torchrun_save_and_leave(start, tiny_set, tmp_path):
    run = tmp_path / "run"
    command = torchrun(2, "demo", "--shards", tiny_set, "--run-dir", run, "--max-steps", 100_000, *FAST)
    process = start(command, tmp_path)
    wait_for(
        lambda: (run / "metrics.jsonl").exists() and '"step": 20,' in (run / "metrics.jsonl").read_text()
    )
    (agent,) = psutil.Process(process.pid).children()
    ranks = agent.children(recursive=True)
    os.kill(agent.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["why"]) == ("told to stop", "torchrun is gone")
    assert (run / "checkpoints" / f"step-{status['step']:08d}").is_dir()
