"""One start of a run: the ranks of launch/train.py, through torchrun as users start it, or forked (0.1 s, not 10 s)."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
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


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def waited_for_core_s(pid: int) -> float:
    """Seconds that the main thread of a process was ready to run and other work had the cores; 0 for one that is gone."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


class Torchrun:
    """A run that torchrun started, and its ranks."""

    traits = frozenset({"torchrun"})

    def __init__(
        self, folder: Path, argv: list[str], ranks: int, restarts: int, script: str = "launch/train.py"
    ) -> None:
        self.count, self.began, self.seen = ranks, time.monotonic(), set[int]()
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
        try:
            found = [
                one.pid for one in psutil.Process(self.process.pid).children() if self.script in one.cmdline()
            ]
        except psutil.NoSuchProcess:
            found = []
        self.seen.update(found)
        return sorted(found)

    def running(self) -> bool:
        """Whether torchrun or one of its ranks still runs."""
        return self.process.poll() is None or any(map(alive, self.seen))

    def codes(self) -> list[int]:
        """Exit code of torchrun."""
        return [self.process.wait()]

    def kill(self) -> None:
        """End all of it by force."""
        send(signal.SIGKILL, [*self.ranks(), *self.seen, self.process.pid])
        self.process.wait()


class Forge:
    """The process that forks ranks, for one run at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, REPO / "bench" / "faults" / "fault_hooks.py"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, cwd=REPO, env={**os.environ, **ENV},
            start_new_session=True,
        )  # fmt: skip

    def ask(self, request: dict) -> None:
        """Send it a line."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self, seconds: float | None = None) -> list[int] | None:
        """Its next line; None after the time-out. Lines are far apart, so Python's buffer is empty afterwards."""
        assert self.process.stdout
        if seconds is not None and not select.select([self.process.stdout], [], [], seconds)[0]:
            return None
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """End the forge."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(20)


class Forked:
    """Ranks forked by the forge."""

    agent = None

    def __init__(
        self, forge: Forge, folder: Path, argv: list[str], ranks: int, poison: Iterable[int] = (),
        argvs: dict[str, list[str]] | None = None, hosts: Hosts | None = None, skew: dict[str, float] | None = None,
        locks: int = 0,
    ) -> None:  # fmt: skip
        """On one host, or half of the ranks on each of two; `skew` and `locks` as in fault_hooks.py."""
        self.traits = frozenset({"forked", *(["hosts"] if hosts else [])})
        self.hosts, self.locks = hosts, locks
        self.forge, self.count, self.began = forge, ranks, time.monotonic()
        self._codes: list[int] | None = None
        request = {
            "argv": argv,
            "argvs": argvs or {},
            "ranks": ranks,
            "poison": sorted(poison),
            "script": "launch/train.py",
            "hosts": hosts.names if hosts else [],
            "address": hosts.addresses[0] if hosts else "127.0.0.1",
            "skew": skew or {},
            "locks": locks,
        }
        request |= {"traps": str(folder), "out": str(folder / "out.txt"), "err": str(folder / "err.txt")}
        forge.ask(request)
        self._pids = forge.answer() or []

    def ranks(self) -> list[int]:
        """Process ids of all ranks, also of those that have ended."""
        return self._pids

    def running(self) -> bool:
        """Whether a rank still runs."""
        if self._codes is None:
            self._codes = self.forge.answer(0)
        return self._codes is None

    def codes(self) -> list[int]:
        """Exit codes of the ranks, -9 for a SIGKILL."""
        if self._codes is None:
            self._codes = self.forge.answer()
        assert self._codes is not None
        return self._codes

    def kill(self) -> None:
        """End all of it by force."""
        if self.running():
            send(signal.SIGKILL, self._pids)
            self.codes()


LaunchedRun = Torchrun | Forked
