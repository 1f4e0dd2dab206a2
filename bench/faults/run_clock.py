"""Time as the processes of a soak have it: without what they spend ready to run while other work has the cores.

A bound on a run is kept by this clock, so that a machine which others fill makes the soak slow, and not wrong.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

MARK = "SOAK_PID"  # in the environment of all that a soak starts, also of what outlives its parent
SAMPLE_S = 0.5  # a look takes some milliseconds


def mark_children() -> None:
    """Let `marked` find what this process starts from now on."""
    os.environ[MARK] = str(os.getpid())


def marked(proc: Path = Path("/proc")) -> list[int]:
    """This process and all with the mark of `mark_children`: ranks, torchrun, Slurm's daemons and jobs, forks of all."""
    if (mark := os.environ.get(MARK)) is None:
        return [os.getpid()]
    line, found = f"{MARK}={mark}".encode(), [int(mark)]
    for folder in proc.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if line in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


class RunClock:
    """Seconds since it began, less those in which one of the processes was ready to run and other work had the cores.

    Between two looks the thread counts that waited longest, of all processes: any of them may be the one on which the
    others wait. A call takes a look, at most every SAMPLE_S, so a clock must be asked often.
    """

    def __init__(
        self,
        processes: Callable[[], Iterable[int]] = marked,
        proc: Path = Path("/proc"),
        every: float = SAMPLE_S,
    ) -> None:
        """Of these processes, which may come and go. `waited` are the seconds without a core."""
        self.processes, self.proc, self.every = processes, proc, every
        self._delays: dict[tuple[int, str], float] | None = None
        self._looked = time.monotonic()
        self.restart()

    def restart(self) -> None:
        """Begin again at 0; a wait since the last look counts for the new time."""
        self.began = time.monotonic()
        self.waited = self._reached = 0.0

    def _read(self) -> dict[tuple[int, str], float]:
        """By process and thread: the seconds for which it was ready to run without a core (Linux, schedstat)."""
        found = {}
        for pid in self.processes():
            for file in (self.proc / str(pid) / "task").glob("*/schedstat"):
                with contextlib.suppress(OSError, ValueError, IndexError):
                    found[pid, file.parent.name] = int(file.read_text().split()[1]) / 1e9
        return found

    def seconds(self) -> float:
        """The time by this clock; it never goes back."""
        now = time.monotonic()
        if now - self._looked >= self.every:
            delays, before = self._read(), self._delays
            if before is not None:  # else this is the first look, with which waits begin to count
                waits = (delay - before.get(key, 0.0) for key, delay in delays.items())
                self.waited += max(waits, default=0.0)
            self._delays, self._looked = delays, now
        self._reached = max(self._reached, now - self.began - self.waited)
        return self._reached
