"""Two hosts with addresses of their own, as network namespaces: their own names are loopback addresses, as on Debian."""

import os
import subprocess
import sys

import pytest
from launch_runs import REPO
from network_hosts import Hosts

pytestmark = pytest.mark.slow

RANK = """
import os, sys, torch
from p2w.world import World
os.environ.update(RANK=sys.argv[1], WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", P2W_DEVICE="cpu")
os.environ.update(MASTER_ADDR=sys.argv[2], MASTER_PORT="26111")
world = World.start(60, 60)
print(world.sum(torch.ones(1)).item(), os.environ.get("GLOO_SOCKET_IFNAME"), world.describe(), flush=True)
world.close()
world.leave(0)
"""


@pytest.fixture
def hosts():
    """Two hosts, or a skip."""
    try:
        made = Hosts()
    except RuntimeError as error:
        pytest.skip(f"{error}")
    yield made
    made.close()


def test_hosts_whose_own_names_are_loopback_find_the_interface_between_them(hosts):
    env = {k: v for k, v in os.environ.items() if not k.endswith("SOCKET_IFNAME")} | {"PYTHONPATH": str(REPO)}
    ranks = [
        subprocess.Popen(
            [*hosts.inside(rank), sys.executable, "-c", RANK, str(rank), hosts.addresses[0]],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for rank, link in zip(ranks, hosts.links, strict=True):
            out, err = rank.communicate(timeout=150)
            assert rank.returncode == 0 and out.startswith(f"2.0 {link} 2 process(es) on 2 node(s)"), (
                out + err
            )
            assert f"interface {link}; clocks of the nodes within" in out
    finally:
        for rank in ranks:
            rank.kill()
