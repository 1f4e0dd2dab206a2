"""Ranks over gloo in real processes, and one process without a group."""

import atexit
import json
import os
import socket
import subprocess

import pytest
import torch
from processes import call

from p2w.errors import UserError
from p2w.world import World


def one_rank(rank, size, port):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)
    world = World.start(60)
    found = {
        "place": (world.rank, world.size, world.is_main, world.device.type),
        "sum": world.sum(torch.tensor([rank + 1.0, 10.0 * rank])).tolist(),
        "gather": world.gather(torch.tensor([[rank, rank * rank]])).tolist(),
        "any": [world.any(rank == 1), world.any(False), world.any(True)],
        "describe": world.describe(),
    }
    world.barrier()
    print(json.dumps(found))
    world.close()


@pytest.mark.slow
def test_two_ranks_agree():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [call(one_rank, rank, 2, port, stdout=subprocess.PIPE) for rank in range(2)]
    try:
        found = [json.loads(process.communicate(timeout=60)[0]) for process in ranks]
        assert [process.returncode for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    for rank, one in enumerate(found):
        assert one["place"] == [rank, 2, rank == 0, "cpu"]
        assert one["sum"] == [3.0, 10.0]
        assert one["gather"] == [[0, 0], [1, 1]]
        assert one["any"] == [True, False, True]
        assert one["describe"].startswith("2 process(es) on 1 node(s), cpu")


def test_one_process_needs_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("P2W_DEVICE", "cpu")
    world = World.start()
    assert (world.rank, world.size, world.is_main, world.device_reason) == (0, 1, True, "P2W_DEVICE=cpu")
    assert world.sum(torch.tensor([2.0])).tolist() == [2.0]
    assert world.gather(torch.tensor([2])).tolist() == [2]
    assert [world.any(True), world.any(False)] == [True, False]
    world.barrier()
    world.close()
    assert not torch.distributed.is_initialized()
    assert world.machine()["world_size"] == 1


@pytest.mark.parametrize("asked", ["gpu", "cuda"])
def test_a_missing_device_is_refused(monkeypatch, asked):
    if asked == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has one")
    monkeypatch.setenv("P2W_DEVICE", asked)
    with pytest.raises(UserError, match=f"P2W_DEVICE={asked}: "):
        World.from_env()


@pytest.mark.slow
def test_leaving_flushes_and_finalises_nothing(capfd):
    """Output is flushed, but exit handlers of the interpreter do not run."""
    pid = os.fork()
    if pid == 0:
        atexit.register(print, "finalised", flush=True)
        print("printed")
        World.leave(3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    assert capfd.readouterr().out == "printed\n"
