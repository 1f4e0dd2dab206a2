"""Run jobs, several at a time; the same call again does only what is left.

    FOLDER/logs/NAME.txt     what a job said
    FOLDER/logs/NAME.lock    held by its process, however this one ended: no second sweep starts it beside

Told to stop, every job is told once and leaves. One that fails is named, and the others go on.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from p2w.data.progress import Progress, say
from p2w.errors import UserError
from p2w.file_lock import FileLock
from p2w.resources import usable_cores
from p2w.sweep.job import Job
from p2w.world import variables

TICK_S = 0.2
COUNT_EVERY_S = 2.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Machine:
    """How much runs side by side: jobs, threads a job (0: its share of the cores), GPUs to go round (0: not chosen)."""

    jobs: int = 1
    threads: int = 0
    gpus: int = 0

    def environment(self, slot: int) -> dict[str, str]:
        """Of the job in a slot."""
        cores = usable_cores()
        place = {"LOCAL_RANK": str(slot % self.gpus)} if self.gpus else {}
        return variables(OMP_NUM_THREADS=str(self.threads or max(1, cores // self.jobs)), **place)


@dataclass
class Running:
    """A job's process, its slot, and how much of it was done when last counted."""

    job: Job
    process: subprocess.Popen[bytes]
    slot: int
    seen: int


class Sweep:
    """The jobs of one stage."""

    def __init__(self, jobs: Sequence[Job], folder: Path, machine: Machine) -> None:
        self.waiting = [job for job in jobs if not job.done]
        self.logs, self.machine = folder / "logs", machine
        self.running: list[Running] = []
        self.failed: list[str] = []
        self.stopped = 0  # the number of the signal
        self._said_busy: set[str] = set()

    def run(self, what: str) -> list[str]:
        """Until nothing is left; names of the jobs that failed. Leaves by SystemExit when told to stop."""
        if not self.waiting:
            return []
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.logs}: {error.strerror}; name another folder with --out") from error
        total = sum(job.units - job.count() for job in self.waiting)
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        counted = 0.0
        try:
            with Progress(total, what) as progress:
                while self.running or (self.waiting and not self.stopped):
                    self._start()
                    time.sleep(TICK_S)
                    if time.monotonic() - counted > COUNT_EVERY_S:
                        counted = time.monotonic()
                        for one in self.running:
                            self._count(one, progress)
                    self._end(progress)
                    progress.tick()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.stopped:
            say(f"stopped: {signal.Signals(self.stopped).name}; the same command goes on")
            sys.exit(128 + self.stopped)
        return self.failed

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stopped = self.stopped or number
        for one in self.running:
            if one.process.poll() is None:
                one.process.terminate()

    def _start(self) -> None:
        """Fill the free slots. A job that another process holds is left for later."""
        for job in list(self.waiting):
            free = set(range(self.machine.jobs)) - {one.slot for one in self.running}
            if not free or self.stopped:
                return
            lock = self._take(job)
            if lock is None:
                if job.name not in self._said_busy:
                    self._said_busy.add(job.name)
                    say(f"{job.name}: another process does it; waits for that")
                continue
            try:
                self.waiting.remove(job)
                if not job.done:
                    slot = min(free)
                    self.running.append(Running(job, self._begin(job, slot, lock), slot, job.count()))
            finally:
                lock.release()

    def _take(self, job: Job) -> FileLock | None:
        lock = FileLock(self.logs / f"{job.name}.lock")
        return lock if lock.acquire() else None

    def _begin(self, job: Job, slot: int, lock: FileLock) -> subprocess.Popen[bytes]:
        """Its process, in a session of its own, so that a Ctrl-C reaches it once; it inherits the lock."""
        program = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
        command = [*program[job.command[0]], *job.command[1:]]
        with open(self.logs / f"{job.name}.txt", "ab") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.machine.environment(slot),
                start_new_session=True, pass_fds=(lock.fileno(),),
            )  # fmt: skip

    def _count(self, one: Running, progress: Progress) -> None:
        now = one.job.count()
        for _ in range(now - one.seen):
            progress.step(one.job.name)
        one.seen = max(one.seen, now)

    def _end(self, progress: Progress) -> None:
        """Take leave of processes that ended."""
        for one in [one for one in self.running if one.process.poll() is not None]:
            self.running.remove(one)
            self._count(one, progress)
            if one.job.done or self.stopped:
                continue
            self.failed.append(one.job.name)
            log = self.logs / f"{one.job.name}.txt"
            last = log.read_bytes()[-2000:].decode(errors="replace").strip().splitlines()[-1:]
            code = one.process.returncode
            told = f"ended with code {code}" if code else "ended, but is not finished"
            say(f"{one.job.name}: {told}: {last[0] if last else 'it said nothing'}; see {log}")
