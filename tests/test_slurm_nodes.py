"""The nodes of a job reach the first one's port before torchrun starts, or the missing one is named. Real sockets."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from processes import REPO

NODE = """
import time, sys
now = time.time
time.time = lambda: now() + float(sys.argv[1])
from p2w import slurm_nodes
sys.exit(slurm_nodes.main(sys.argv[2:]))
"""


def start(*words, skew=0.0):
    """A node's process; its clock is `skew` seconds ahead."""
    return subprocess.Popen(
        [sys.executable, "-c", NODE, str(skew), *map(str, words)], cwd=REPO, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )  # fmt: skip


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_nodes_that_come_late_are_waited_for_and_clocks_are_compared():
    port = free_port()
    others = [
        start("other", "127.0.0.1", port, 60, "n2"),
        start("other", "127.0.0.1", port, 60, "n3", skew=61),
    ]
    first = start("first", "127.0.0.1", port, 60, "n1", "n2", "n3")
    said = first.communicate(timeout=90)[1]
    assert [one.wait(90) for one in (first, *others)] == [0, 0, 0], said
    assert said.count("\n") == 1 and "the clock of n3 is 61.0 s ahead of that of n1" in said
    with socket.create_server(("", port)):
        pass  # free for torchrun at once


@pytest.mark.slow
def test_a_node_that_does_not_come_is_named_with_the_port():
    port, closed = free_port(), free_port()
    first = start("first", "127.0.0.1", port, 3, "n1", "n2")
    other = start("other", "127.0.0.1", closed, 3, "n2")
    said, theirs = first.communicate(timeout=60)[1], other.communicate(timeout=60)[1]
    assert (first.returncode, other.returncode) == (44, 44)
    assert said.count("\n") == 1 and f"n2 did not reach port {port} of n1 in 3 s" in said
    assert (
        theirs.count("\n") == 1
        and f"n2 cannot reach port {closed} of 127.0.0.1 in 3 s (Connection refused)" in theirs
    )


GIVING_UP = """
set -uo pipefail
run=$1 job=7 before=$2 warned=0 cancelled=0
say() { echo "$*"; }
scontrol() { echo "scontrol $*"; }
date() { echo "$NOW"; }
"""


def requeue(run: Path, now: int, before: str = "", **env: str) -> str:
    """Exit code and words of the function `requeue` of slurm/pretrain.sbatch at this time in seconds; it does not wait."""
    text = (REPO / "slurm" / "pretrain.sbatch").read_text()
    functions = [
        re.search(rf"^{name}\(\) .*?^}}\n", text, re.M | re.S)[0] for name in ("newest", "lives", "requeue")
    ]
    script = GIVING_UP + "".join(functions) + 'pause() { echo "pause $1"; }\nrequeue "failed again" 1\n'
    done = subprocess.run(
        ["bash", "-c", script, "bash", str(run), before], env={**os.environ, "NOW": str(now), **env},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not done.stderr, done.stderr
    return f"{done.returncode}\n{done.stdout}"


def test_a_job_is_given_up_by_starts_in_vain_and_by_time(tmp_path):
    """A network that is away for three minutes cost three starts in 37 s, and the job was given up."""
    run = tmp_path / "run"
    for number, now in enumerate(
        (1000, 1010, 1020, 1060, 2700), 1
    ):  # more than three starts, and not half an hour
        said = requeue(run, now)
        assert said.startswith("0\n") and "scontrol requeue 7" in said, said
        assert f"pause {10 * 2 ** min(number, 5)}\n" in said  # longer each time
    said = requeue(run, 2801)
    assert (
        said.startswith("1\n")
        and "no checkpoint since the start in 6 starts and 30 minutes, so given up" in said
    )

    (run / "checkpoints" / "step-00000004").mkdir(parents=True)
    said = requeue(run, 9000)  # a checkpoint since: counted anew, and nothing to wait for
    assert said.startswith("0\n") and "pause" not in said and (run / ".lives").read_text() == "7 0 9000\n"
    for now in (9001, 9002, 9003):
        assert requeue(run, now, "00000004").startswith("0\n")
    assert requeue(run, 9004, "00000004", P2W_GIVE_UP_MINUTES="0").startswith("1\n")
