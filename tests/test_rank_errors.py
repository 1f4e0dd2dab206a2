"""Which rank prints an error, and how long the others take to leave. Ranks are real processes with a real store."""

import os
import re
import socket
import subprocess
import sys
import time

import processes
import pytest
import torch
from processes import REPO, Forked

from p2w.errors import UserError
from p2w.rank_errors import lost_peer_line, refuse
from p2w.world import World


def world(rank=0, size=1, local_rank=0):
    return World(rank, size, local_rank, size, "node7", torch.device("cpu"), "test")


def test_a_single_process_prints_refusals_whatever_its_local_rank():
    """A sweep numbers its slots by LOCAL_RANK; each job has a log of its own, and no other process prints for it."""
    for one in (world(), world(local_rank=3), world(0, 4, 0), world(8, 16, 0)):
        assert one.speaks
        with pytest.raises(UserError, match="no such folder"):
            refuse(one, UserError("x: no such folder"))
    assert not world(3, 4, 3).speaks


@pytest.mark.slow
def test_a_refused_job_of_a_sweeps_second_slot_is_not_silent():
    command = [
        sys.executable,
        "launch/finetune.py",
        "--task",
        "nowhere",
        "--init",
        "random",
        "--run-dir",
        "x",
    ]
    env = {**os.environ, "PYTHONPATH": str(REPO), "LOCAL_RANK": "1", "P2W_DEVICE": "cpu"}
    ended = processes.run(command, env=env, cwd=REPO, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("error: nowhere"), ended.stderr


def test_a_lost_peer_is_reported_without_torchs_source_line():
    gloo = RuntimeError(
        "[/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.1.2.3]:5. This may indicate a crash"
    )
    assert (
        "node7: lost contact with another rank (Connection closed by peer [10.1.2.3]:5): "
        in lost_peer_line(world(1, 2, 1), gloo)
    )


RANK = """
import os, sys, time
rank, port, how = sys.argv[1:]
os.environ.update(RANK=rank, WORLD_SIZE="2", LOCAL_RANK=rank, LOCAL_WORLD_SIZE="2", P2W_DEVICE="cpu")
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
from p2w.errors import SharedError
from p2w.rank_errors import leave
from p2w.train.watchdog import Watchdog
from p2w.world import World
world = World.start(60)
try:
    with Watchdog(world):
        world.barrier()
        time.sleep(1.5 if (how, rank) in (("gone", "1"), ("late", "0")) else 0)
        print(time.time(), flush=True)
        raise SharedError("x: too many")
except SharedError as error:
    if (how, rank) == ("gone", "0"):
        os._exit(9)
    leave(world, error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["together", "late", "gone"])
def test_rank_0_prints_a_shared_error_and_all_ranks_exit(how, tmp_path):
    """Late: rank 0 raises the error last. Gone: it dies, and the store with it, before it has printed anything."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    ranks = [
        Forked(
            [sys.executable, "-c", RANK, str(rank), port, how], cwd=tmp_path, text=True,
            env=env | {"TORCHELASTIC_ERROR_FILE": str(tmp_path / f"{rank}.json")},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    (out_0, err_0), (out_1, err_1) = (rank.communicate(timeout=60) for rank in ranks)
    err_0, err_1 = (
        re.sub(r"^\[W.*\n", "", err, flags=re.MULTILINE) for err in (err_0, err_1)
    )  # torch's warnings
    took = time.time() - max(map(float, (out_0, out_1)))
    assert "error:" not in err_1 and '"error: x: too many"' in (tmp_path / "1.json").read_text()
    assert (err_0, ranks[1].returncode, ranks[0].returncode) == (
        ("", 2, 9) if how == "gone" else ("error: x: too many\n", 2, 2)
    ), err_0 + err_1
    assert took < 4  # seconds; ten before torchrun, or a test, ends what is left by force
