"""Two hosts with addresses of their own, as network namespaces: their own names are loopback addresses, as on Debian."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch_runs import REPO

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
    """The names of two namespaces that reach each other as 10.77.0.1 and 10.77.0.2, or a skip."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("needs root and iproute2 to make network namespaces")
    names = [f"p2w{os.getpid()}{side}" for side in "ab"]
    folders = [Path("/etc/netns") / name for name in names]

    def ip(*words):
        return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)

    try:
        for name, folder in zip(names, folders, strict=True):
            if ip("netns", "add", name).returncode:
                pytest.skip("network namespaces cannot be made here")
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {os.uname().nodename}\n")
            (folder / "resolv.conf").write_text("")
        links = [f"{name[-13:]}v" for name in names]
        ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for number, (name, link) in enumerate(zip(names, links, strict=True), 1):
            ip("link", "set", link, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", link)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", link, "up")
        yield names, links
    finally:
        for name, folder in zip(names, folders, strict=True):
            ip("netns", "del", name)
            shutil.rmtree(folder, ignore_errors=True)


def test_hosts_whose_own_names_are_loopback_find_the_interface_between_them(hosts):
    names, links = hosts
    env = {k: v for k, v in os.environ.items() if not k.endswith("SOCKET_IFNAME")} | {"PYTHONPATH": str(REPO)}
    ranks = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-c", RANK, str(rank), "10.77.0.1"],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank, name in enumerate(names)
    ]  # fmt: skip
    try:
        for rank, link in zip(ranks, links, strict=True):
            out, err = rank.communicate(timeout=150)
            assert rank.returncode == 0 and out.startswith(f"2.0 {link} 2 process(es) on 2 node(s)"), (
                out + err
            )
            assert f"interface {link}; clocks of the nodes within" in out
    finally:
        for rank in ranks:
            rank.kill()
