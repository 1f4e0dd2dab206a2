"""Starts a script of launch/ in forked copies of a process that has done its imports: 0.1 s a start instead of five.

What torchrun would set in the environment is set here; one rank that fails brings the others down, as there. Or torchrun
itself is forked, whose ranks are forked in their turn: all of it is torchrun's own but the start of an interpreter.
Reads a JSON line {script, argv, ranks, torchrun, out, err, spies} from stdin; answers with the ranks' process ids
(torchrun's own), and at the end with their exit codes.
"""

import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401  as do the pictures
import sklearn.metrics  # noqa: F401  as does the similarity check
import torch._dynamo
import torch.distributed.run
import torch.utils.tensorboard
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from tests.launch import spies


def write_to(request: dict) -> None:
    """A session of its own, and what it says in files."""
    os.setsid()
    for stream, name in ((1, "out"), (2, "err")):
        file = os.open(request[name], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(file, stream)


def become_rank(request: dict, rank: int, port: int) -> None:
    """Turn this forked process into a rank."""
    write_to(request)
    if request["ranks"] > 1:
        place = {"RANK": rank, "WORLD_SIZE": request["ranks"], "LOCAL_RANK": rank, "MASTER_PORT": port}
        place |= {"LOCAL_WORLD_SIZE": request["ranks"], "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({name: str(value) for name, value in place.items()})
    for name, *args in request["spies"]:
        getattr(spies, name)(rank, *args)
    sys.argv = [request["script"], *request["argv"]]
    runpy.run_path(request["script"], run_name="__main__")


class ForkedRank:
    """What torchrun asks of the `subprocess.Popen` of a rank."""

    def __init__(self, request: dict, args: tuple, env: dict[str, str]) -> None:
        self.args, self.returncode = args, None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                self.run(request, env)
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
            finally:  # nothing of torchrun's own, whose frames are below
                sys.stdout.flush()
                os._exit(code)

    def run(self, request: dict, env: dict[str, str]) -> None:
        os.setsid()
        os.closerange(3, 1 << 16)  # torchrun's store must end with torchrun
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(env)
        for name, *args in request["spies"]:
            getattr(spies, name)(int(env["RANK"]), *args)
        sys.argv = list(self.args[self.args.index(request["script"]) :])
        runpy.run_path(request["script"], run_name="__main__")

    def poll(self) -> int | None:
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if done else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.02)
        return self.returncode


def become_torchrun(request: dict) -> None:
    """Turn this forked process into torchrun."""
    write_to(request)
    SubprocessHandler._popen = lambda _, args, env: ForkedRank(request, args, env)
    torch.distributed.run.main(
        [
            "--standalone",
            f"--nproc_per_node={request['ranks']}",
            *request["torchrun"],
            request["script"],
            *request["argv"],
        ]
    )


def wait(pids: list[int]) -> list[int]:
    """Exit code of each, -9 for a SIGKILL; the first that fails ends the others, after ten seconds by force."""
    codes: dict[int, int] = {}
    deadline = None
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif deadline is not None and time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
        if deadline is None and any(codes.values()):
            deadline = time.monotonic() + 10
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
        for rank in range(1 if request["torchrun"] else request["ranks"]):
            pid = os.fork()
            if pid == 0:
                return become_torchrun(request) if request["torchrun"] else become_rank(request, rank, port)
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        print(json.dumps(wait(pids)), flush=True)


if __name__ == "__main__":
    main()
