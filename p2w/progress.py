"""Progress of a command: a bar on a terminal, elsewhere a line every 15 seconds."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

EVERY = 15.0  # seconds between lines off a terminal
_console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)


def say(line: str) -> None:
    """Print one line for the user; above the bar, while there is one."""
    _console.print(line)
    sys.stdout.flush()


def duration(seconds: float) -> str:
    """Seconds in words such as 1:02:03 h, 4:05 min or 9 s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d} h"
    return f"{whole // 60}:{whole % 60:02d} min" if whole >= 60 else f"{max(1, whole)} s"


class Progress:
    """Count and show progress over `total` items, named `what` in the plural, with rate and time left."""

    def __init__(self, total: int, what: str) -> None:
        """Prepare; nothing is shown before the `with` block."""
        self.total, self.what, self.done, self.note = total, what, 0, ""
        self.start = self.last = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Bar(*columns, TextColumn("{task.fields[note]}"), console=_console, transient=True)
        self.task = self.bar.add_task(what, total=total, note="")

    def __enter__(self) -> "Progress":
        """Show the bar, on a terminal."""
        if _console.is_terminal:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar, or print the last line."""
        if _console.is_terminal:
            self.bar.stop()
        elif kind is None:
            say(self.line())

    def step(self, note: str) -> None:
        """Count one more item; `note` is shown beside the count."""
        self.done += 1
        self.note = note
        self.bar.update(self.task, advance=1, note=f"{self.rate():.2f} {self.what}/s · {note}")

    def tick(self) -> None:
        """Print a line if there is no terminal and 15 seconds have passed; the last one is printed at the end."""
        now = time.monotonic()
        if not _console.is_terminal and self.done < self.total and now - self.last > EVERY:
            self.last = now
            say(self.line())

    def rate(self) -> float:
        """Items per second since the start."""
        return self.done / max(1e-9, time.monotonic() - self.start)

    def line(self) -> str:
        """Count, note, rate and time left as one line."""
        rate = self.rate()
        left = f", {duration((self.total - self.done) / rate)} left" if 0 < self.done < self.total else ""
        return (
            f"{self.done}/{self.total} {self.what}, {self.note or 'none yet'}, {rate:.2f} {self.what}/s{left}"
        )
