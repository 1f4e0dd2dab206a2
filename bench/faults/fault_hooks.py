"""Ranks of launch/train.py as forks of this process, which has its imports done: 0.1 s a start instead of five.

With fault hooks: trap files that make a rank raise or its clock jump, and NaN targets. What torchrun would set in the
environment is set here; one rank that fails brings the others down, as there. Most starts of the soak are forked here; a
stated share goes through torchrun, which runs launch/train.py unchanged. Reads JSON lines {number, script, argv, argvs,
ranks, traps, poison, hosts, address, skew, locks, out, err} from stdin; answers {number, pids} with the ranks' process ids,
and at the end {number, codes} with their exit codes. `hosts` are network namespaces, which share the ranks; `address` is
that of the first one; `skew` are seconds by which the clocks of these ranks differ; `locks` is the errno with which flock
fails, as on some file systems.
"""

import ctypes
import fcntl
import gc
import json
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401  as do the pictures
import sklearn.metrics  # noqa: F401  as does the similarity check
import torch._dynamo
import torch.utils.tensorboard  # noqa: F401  as does the log

from faults.run_clock import RunClock
from p2w import pretrain, run_owner  # noqa: F401  as does the command
from p2w.train import run_dir
from p2w.train.step import Stepper

JUMP_S = -3600.0
END_S = 10.0  # for which the others of a rank that has failed may run on
NETWORK, MOUNTS, HOST_NAME = 0x40000000, 0x20000, 0x4000000  # CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWUTS
PRIVATE, BIND = 0x44000, 0x1000  # MS_REC | MS_PRIVATE, MS_BIND
run_owner.BEAT_S = run_dir.BEAT_S = 0.5  # a whole run here takes as long as ten beats of a real one


def triggered(trap: Path) -> bool:
    """Whether the trap file existed; it is deleted, so that a trap is triggered once."""
    try:
        os.unlink(trap)
    except FileNotFoundError:
        return False
    return True


def set_traps(folder: Path, poison: list[int], rank: int, ranks: int) -> None:
    """Check for trap files before every step of this rank."""
    step_of, clock = Stepper.step, time.time

    def step(self, views, number, *rest, **named):
        if triggered(folder / f"raise-{rank}"):
            raise RuntimeError(f"injected at step {number}: rank {rank} raises")
        if triggered(folder / f"clock-{rank}"):
            time.time = lambda: clock() + JUMP_S
        if number in poison and rank == number % ranks:
            views.target.fill_(float("nan"))
        return step_of(self, views, number, *rest, **named)

    Stepper.step = step


def move_to(host: str) -> None:
    """Take this process to a host of `network_hosts`, as `ip netns exec` would, with the host's own name."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *arguments: object) -> None:
        if getattr(libc, name)(*arguments):
            error = ctypes.get_errno()
            raise OSError(error, f"{name}: {os.strerror(error)}")

    namespace = os.open(f"/var/run/netns/{host}", os.O_RDONLY)
    call("setns", namespace, NETWORK)
    os.close(namespace)
    call("unshare", MOUNTS | HOST_NAME)
    socket.sethostname(host)
    call("mount", None, b"/", None, ctypes.c_ulong(PRIVATE), None)
    for name in ("hosts", "resolv.conf"):
        own = f"/etc/netns/{host}/{name}".encode()
        call("mount", own, f"/etc/{name}".encode(), None, ctypes.c_ulong(BIND), None)


def set_surroundings(request: dict, rank: int) -> None:
    """Give this rank the clock, the locks and the host that the request says."""
    if skew := request["skew"].get(str(rank)):
        clock = time.time
        time.time = lambda: clock() + skew
    if number := request["locks"]:

        def flock(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        fcntl.flock = flock
    if hosts := request["hosts"]:
        move_to(hosts[rank * len(hosts) // request["ranks"]])


def become_rank(request: dict, rank: int, port: int) -> None:
    """Turn this forked process into a rank, in a session of its own, with the traps set and what it says in files."""
    os.setsid()
    for stream, name in ((1, "out"), (2, "err")):
        file = os.open(request[name], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(file, stream)
    if request["ranks"] > 1:
        on_a_host = request["ranks"] // max(1, len(request["hosts"]))
        place = {
            "RANK": rank,
            "WORLD_SIZE": request["ranks"],
            "LOCAL_RANK": rank % on_a_host,
            "MASTER_PORT": port,
        }
        place |= {"LOCAL_WORLD_SIZE": on_a_host, "MASTER_ADDR": request["address"]}
        os.environ.update({name: str(value) for name, value in place.items()})
    set_surroundings(request, rank)
    set_traps(Path(request["traps"]), request["poison"], rank, request["ranks"])
    sys.argv = [request["script"], *request["argvs"].get(str(rank), request["argv"])]
    runpy.run_path(request["script"], run_name="__main__")


def wait(pids: list[int]) -> list[int]:
    """Exit code of each, -9 for a SIGKILL; the first that fails ends the others, after END_S by force."""
    codes: dict[int, int] = {}
    clock: RunClock | None = None
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif clock is not None and clock.seconds() > END_S:
                os.kill(pid, signal.SIGKILL)
        if clock is None and any(codes.values()):
            clock = RunClock(lambda: set(pids) - set(codes))
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGTERM)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def main() -> None:
    """Serve until stdin ends."""
    gc.freeze()  # else each rank's collections walk through, and copy, all that was imported here
    for line in sys.stdin:
        request = json.loads(line)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pids = []
        for rank in range(request["ranks"]):
            pid = os.fork()
            if pid == 0:
                return become_rank(request, rank, port)
            pids.append(pid)
        print(json.dumps({"number": request["number"], "pids": pids}), flush=True)
        print(json.dumps({"number": request["number"], "codes": wait(pids)}), flush=True)


if __name__ == "__main__":
    main()
