"""Ranks meet in a real store: a thousand of them, after an earlier attempt, on nodes whose clocks or ports differ."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import processes
import pytest
import torch.distributed as dist
from processes import REPO

from p2w import meeting
from p2w.errors import SharedError, UserError
from p2w.world import World


def serve(ranks: int) -> tuple[dist.TCPStore, list[dist.Store]]:
    """A store, and a connection to it for each rank; 64 at most, shared: the store looks each one's host name up by DNS."""
    assert not meeting.allow_open_files(64)
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=300)
    )

    def connect(_: int) -> dist.Store:
        return dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=300))

    with ThreadPoolExecutor(64) as pool:
        connections = list(pool.map(connect, range(min(ranks, 64))))
    return store, [connections[rank % 64] for rank in range(ranks)]


def together(ranks: int, work, seconds: float = 300):
    """What `work(rank)` gives on every rank, in threads."""
    found = [None] * ranks

    def one(rank):
        try:
            found[rank] = work(rank)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1024, 4096])
def test_a_thousand_ranks_meet_and_their_keys_stay_short(ranks):
    """With the words of all ranks in every key, the store hung up on 911 ranks and more. Their steps are taken in turns."""
    server, stores = serve(ranks)
    parts = {rank: meeting.Guest(stores[rank], rank, rank % 8 == 0) for rank in range(ranks - 1, 0, -1)}
    parts[0] = meeting.Host(stores[0], ranks)
    met, turns = {}, 0
    while len(met) < ranks and turns < 10:
        turns += 1
        met |= {rank: found for rank, part in parts.items() if rank not in met and (found := part.step())}
    assert len(met) == ranks
    assert len({one.prefix for one in met.values()}) == 1 and len(met[0].prefix) < 100
    assert all(one.leaders == list(range(0, ranks, 8)) for one in met.values())
    met[ranks - 1].store.set("key", "value")
    assert met[0].store.get("key") == b"value"
    del server


def test_what_an_earlier_attempt_left_is_nobodys():
    """The store lives on over a restart by torchrun; a rank may come before the new rank 0."""
    server, stores = serve(3)

    def meet(rank):
        time.sleep(0.2 * (rank == 0))
        return meeting.agree_on_prefix(stores[rank], rank, 3, rank == 0, time.monotonic() + 30)

    prefixes = []
    for _ in range(4):
        met = together(3, meet)
        assert len({one.prefix for one in met}) == 1
        prefixes.append(met[0].prefix)
    assert len(set(prefixes)) == 4
    del server


def test_ranks_that_do_not_come_are_waited_for_until_the_deadline():
    server, stores = serve(3)
    met = together(
        2, lambda rank: meeting.agree_on_prefix(stores[rank], rank, 3, True, time.monotonic() + 0.5)
    )
    assert met == [None, None]
    del server


def nodes(stores, monkeypatch, hosts=("a", "b", "c")):
    """`check_network` of so many nodes of one rank each."""
    met = together(
        len(hosts), lambda r: meeting.agree_on_prefix(stores[r], r, len(hosts), True, time.monotonic() + 30)
    )
    return together(len(hosts), lambda r: meeting.check_network(met[r], r, hosts[r], "127.0.0.1", 30), 60)


def test_nodes_that_reach_each_other(monkeypatch):
    server, stores = serve(3)
    found = nodes(stores, monkeypatch)
    assert all(one.address == "127.0.0.1" and one.apart_s == 0 for one in found), found
    assert "clocks of the nodes within" in found[0].clocks
    del server


def test_clocks_that_differ_are_said(monkeypatch):
    server, stores = serve(3)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 60 * (threading.current_thread().name == "node b"))
    send = meeting._compare_clocks

    def on_a_node(met, rank, host):
        threading.current_thread().name = f"node {host}"
        send(met, rank, host)

    monkeypatch.setattr(meeting, "_compare_clocks", on_a_node)
    found = nodes(stores, monkeypatch)
    assert 59 < found[0].apart_s < 61, found
    assert "the clock of b is 60.0 s ahead of that of a" in found[2].clocks
    del server


def test_a_closed_port_and_a_small_mtu_are_named_soon(monkeypatch):
    monkeypatch.setattr(meeting, "REACH_S", 1.0)
    server, stores = serve(3)
    accept = meeting._echo
    monkeypatch.setattr(meeting, "_echo", lambda server: server.accept()[0].recv(1) and time.sleep(5))
    found = nodes(stores, monkeypatch)
    assert all(isinstance(one, SharedError) and "MTUs differ" in str(one) for one in found), found
    monkeypatch.setattr(meeting, "_echo", accept)
    create = socket.create_server
    monkeypatch.setattr(socket, "create_server", lambda *a, **k: Closed(create(*a, **k)))
    found = nodes(stores, monkeypatch)
    assert all(isinstance(one, SharedError) for one in found), found
    assert "a cannot reach port " in str(found[0]) and " of b (127.0.0.1)" in str(found[0])
    del server


class Closed:
    """A server whose port a firewall has closed."""

    def __init__(self, server):
        self.address = server.getsockname()
        server.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def settimeout(self, _):
        pass

    def getsockname(self):
        return self.address

    def accept(self):
        raise OSError("closed")


def test_the_interface_of_an_address():
    assert meeting.interface_of("127.0.0.1") == "lo" and meeting.interface_of("203.0.113.9") == ""
    assert (
        meeting.address_towards("127.0.0.1") == "127.0.0.1" and meeting.address_towards("no such host") == ""
    )


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"P2W_NODES": "2", "P2W_NODE_NAMES": "n1 n2", "SLURMD_NODENAME": "n1"}, "n1: .* 2 nodes and 1 met, without n2"),
        ({"P2W_NODES": "1", "GROUP_WORLD_SIZE": "2"}, "asked for 1 nodes and 2 met"),
        ({"PET_NNODES": "2:4"}, "asked for 2:4 nodes and 1 met"),
        ({"PET_NNODES": "1:4"}, ""), ({"P2W_NODES": "1"}, ""), ({}, ""),
    ],
)  # fmt: skip
def test_the_world_that_met_is_the_one_asked_for(monkeypatch, variables, says):
    for name in ("P2W_NODES", "PET_NNODES", "GROUP_WORLD_SIZE", "SLURMD_NODENAME", "P2W_NODE_NAMES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    world = World.from_env()
    if not says:
        world.check_asked()
        return
    with pytest.raises(UserError, match=says):
        world.check_asked()


@pytest.mark.parametrize("form", [["--nnodes", "2"], ["--nnodes=2"]])
def test_torchrun_says_how_many_nodes_it_was_asked_for(form, tmp_path, monkeypatch):
    """A stub of torchrun, which waits for its stdin, is the parent of this process."""
    for name, value in {
        "TORCHELASTIC_RUN_ID": "x",
        "GROUP_WORLD_SIZE": "1",
        "RANK": "0",
        "WORLD_SIZE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    script = tmp_path / "torchrun"
    script.write_text("print('here', flush=True); input()")
    command = [sys.executable, script, *form, "launch/train.py"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as agent:
        assert (
            agent.stdout is not None and agent.stdout.readline() == "here\n"
        )  # its command line can be read
        monkeypatch.setattr(os, "getppid", lambda: agent.pid)
        with pytest.raises(UserError, match="asked for 2 nodes and 1 met"):
            World.from_env().check_asked()
        agent.communicate("\n")


@pytest.mark.slow
def test_a_rank_ends_where_torchrun_was_asked_for_more_nodes(tmp_path):
    """As with clocks 60 s apart: torchrun is asked for two nodes, and its world has one. A stub that finds nobody."""
    script = tmp_path / "torchrun"
    script.write_text(
        "import os, subprocess, sys\n"
        "os.environ.update(TORCHELASTIC_RUN_ID='x', GROUP_WORLD_SIZE='1', RANK='0', WORLD_SIZE='1', P2W_DEVICE='cpu')\n"
        "sys.exit(subprocess.run([sys.executable, 'launch/train.py', 'demo', '--shards', '/nowhere']).returncode)\n"
    )
    done = subprocess.run(
        [sys.executable, script, "--nnodes", "2", "launch/train.py"], cwd=REPO, check=False,
        env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "asked for 2 nodes and 1 met" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "foo"),
        ("WORLD_SIZE", ""),
        ("WORLD_SIZE", "0"),
        ("LOCAL_RANK", "-1"),
        ("LOCAL_WORLD_SIZE", "x"),
    ],
)
def test_a_variable_that_is_no_number_is_one_line(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name}={value}: must be an integer") as error:
        World.from_env()
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_limit_of_open_files_is_raised_or_said():
    code = (
        "import json, resource; from p2w import meeting;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 2000));"
        "said = [meeting.allow_open_files(8), meeting.allow_open_files(2000)];"
        "print(json.dumps([*said, resource.getrlimit(resource.RLIMIT_NOFILE)]))"
    )
    out = processes.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True, timeout=60
    )
    first, second, limit = json.loads(out.stdout)
    assert first == "" and "2000 ranks need 6,512 open files" in second and limit == [2000, 2000]
