"""The nodes of a job reach the first one's port before torchrun starts, or the missing one is named. Real sockets."""

import os
import socket
import subprocess
import sys

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
