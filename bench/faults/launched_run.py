"""One start of a run: the ranks of launch/train.py, through torchrun as users start it, or forked (0.1 s, not 10 s)."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import psutil
from network_hosts import Hosts

REPO = Path(__file__).resolve().parents[2]
ENV = {"PYTHONPATH": os.pathsep.join(map(str, (REPO, REPO / "bench")))}
ENV |= {"OMP_NUM_THREADS": "1", "P2W_DEVICE": "cpu", "COLUMNS": "200"}


def send(number: int, pids: Iterable[int]) -> None:
    """Signal processes, some of which may be gone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def alive(process: psutil.Process) -> bool:
    """Whether a process runs; a zombie does not, and another one that has got its id is not it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Torchrun:
    """A run that torchrun started, and its ranks."""

    traits = frozenset({"torchrun"})

    def __init__(
        self, folder: Path, argv: list[str], ranks: int, restarts: int, script: str = "launch/train.py"
    ) -> None:
        self.count, self.seen = ranks, set[psutil.Process]()
        self.script = script
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += [f"--max-restarts={restarts}", script, *argv]
        with open(folder / "out.txt", "ab") as out, open(folder / "err.txt", "ab") as err:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=err, env={**os.environ, **ENV}, cwd=REPO, start_new_session=True
            )

    @property
    def agent(self) -> int | None:
        """Process id of torchrun."""
        return self.process.pid

    def ranks(self) -> list[int]:
        """Process ids of the current ranks."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in psutil.Process(self.process.pid).children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    found += [one] if self.script in one.cmdline() else []
        self.seen.update(found)
        return sorted(one.pid for one in found)

    def running(self) -> bool:
        """Whether torchrun or one of its ranks still runs."""
        return self.process.poll() is None or any(map(alive, self.seen))

    def codes(self) -> list[int]:
        """Exit code of torchrun."""
        return [self.process.wait()]

    def kill(self) -> None:
        """End all of it by force."""
        self.ranks()
        for one in self.seen:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self.process.kill()
        self.process.wait()


class Forge:
    """The process that forks ranks, for one start at a time; it numbers them, and so does each of its answers."""

    def __init__(self, popen: type["subprocess.Popen[bytes]"] = subprocess.Popen) -> None:
        self.number, self.pids, self.ended = 0, list[int](), dict[int, list[int]]()
        self.process = popen(
            [sys.executable, REPO / "bench" / "faults" / "fault_hooks.py"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, cwd=REPO, env={**os.environ, **ENV},
            start_new_session=True,
        )  # fmt: skip

    def start(self, request: dict) -> tuple[int, list[int]]:
        """Fork the ranks of a request, once those of the one before are gone; its number and their process ids."""
        self.end()
        self.number += 1
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"number": self.number, **request}).encode() + b"\n")
        self.pids = self._answer("pids")
        return self.number, self.pids

    def codes(self, number: int, wait: bool) -> list[int] | None:
        """Exit codes of the ranks of a start, -9 for a SIGKILL; None while one of them runs, unless it is waited for."""
        if number not in self.ended and (wait or select.select([self.process.stdout], [], [], 0)[0]):
            self.ended[self.number] = self._answer("codes")
        return self.ended.get(number)

    def _answer(self, what: str) -> list[int]:
        assert self.process.stdout
        line = self.process.stdout.readline()  # without a buffer, in which select would see no line
        answer = json.loads(line) if line else {}
        if answer.get("number") != self.number or what not in answer:
            raise RuntimeError(f"start {self.number}: the forge answers {line!r} instead of {what}")
        return answer[what]

    def end(self) -> None:
        """Kill the ranks that still run, also of a start that nobody waits for any more, and wait until they are gone."""
        if self.number and self.codes(self.number, wait=False) is None:
            send(signal.SIGKILL, self.pids)
            self.codes(self.number, wait=True)

    def close(self) -> None:
        """End the forge and its ranks."""
        with contextlib.suppress(RuntimeError):  # it is gone
            self.end()
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(20)


class Forked:
    """Ranks forked by the forge."""

    agent = None

    def __init__(
        self, forge: Forge, folder: Path, argv: list[str], ranks: int, poison: Iterable[int] = (),
        argvs: dict[str, list[str]] | None = None, hosts: Hosts | None = None, skew: dict[str, float] | None = None,
        locks: int = 0, script: str = "launch/train.py",
    ) -> None:  # fmt: skip
        """On one host, or half of the ranks on each of two; `skew` and `locks` as in fault_hooks.py."""
        self.traits = frozenset({"forked", *(["hosts"] if hosts else [])})
        self.hosts, self.locks = hosts, locks
        self.forge, self.count = forge, ranks
        request = {
            "argv": argv, "argvs": argvs or {}, "ranks": ranks, "poison": sorted(poison), "script": script,
            "hosts": hosts.names if hosts else [], "address": hosts.addresses[0] if hosts else "127.0.0.1",
            "skew": skew or {}, "locks": locks,
        }  # fmt: skip
        request |= {"traps": str(folder), "out": str(folder / "out.txt"), "err": str(folder / "err.txt")}
        self._number, self._pids = forge.start(request)

    def ranks(self) -> list[int]:
        """Process ids of all ranks, also of those that have ended."""
        return self._pids

    def running(self) -> bool:
        """Whether a rank still runs."""
        return self.forge.codes(self._number, wait=False) is None

    def codes(self) -> list[int]:
        """Exit codes of the ranks, -9 for a SIGKILL."""
        codes = self.forge.codes(self._number, wait=True)
        assert codes is not None
        return codes

    def kill(self) -> None:
        """End all of it by force."""
        if self.running():
            self.forge.end()


LaunchedRun = Torchrun | Forked
