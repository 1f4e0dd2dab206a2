"""Ranks that outlive their torchrun save and leave; a run whose end cannot be saved says so."""

import json

import psutil
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
