"""Log of a run: lines and progress on the console, `metrics.jsonl`, TensorBoard and other trackers. Only rank 0 writes.

On a terminal there is a progress bar with rate and time left; without one, a line every ten seconds.
"""

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import rich.progress as rp
from rich.console import Console

from p2w.files import append, write_atomic
from p2w.trackers import PROCESSES, TENSORBOARD, LogConfig, TrackerProcess, one_line

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


LINE_EVERY_S = 10.0


class TolerantStream:
    """A text stream that drops what it cannot write: a full disk or a terminal that is gone does not end a run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or do nothing."""
        with contextlib.suppress(OSError):
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or do nothing."""
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Log:
    """Console, `metrics.jsonl` and trackers of a run folder. On ranks other than 0 every method does nothing."""

    def __init__(self, run: Path, speaks: bool, total_steps: int, settings: LogConfig | None = None) -> None:
        self.run, self.speaks, self.total = run, speaks, total_steps
        self.settings = settings or LogConfig()
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._writer: Any = None
        self._board = TENSORBOARD in self.settings.trackers()  # and its files can be written
        self._hooks: tuple[Callable[..., Any], Callable[..., Any]] | None = None
        self._trackers: list[TrackerProcess] = []
        self._bar: rp.Progress | None = None
        self._task: rp.TaskID | None = None
        self._last_line = 0.0
        self._clock = (time.monotonic(), -1)

    def line(self, text: str, style: str | None = None) -> None:
        """Print one line."""
        if self.speaks:
            self.console.print(text, style=style, markup=False)

    def warn(self, text: str) -> None:
        """Print one line of warning."""
        self.line(f"warning: {text}", style="yellow")

    @contextlib.contextmanager
    def tolerate(self, what: str) -> Iterator[None]:
        """Turn an OSError of writing `what` into a warning: for files that training can do without, on a full disk say."""
        try:
            yield
        except OSError as error:
            self.warn(f"{self.run / what}: not written ({error.strerror or error}); the run goes on without")

    def describe(self, name: str, settings: Mapping[str, Any]) -> None:
        """Tell the trackers what the run is called and its settings. Those in processes get nothing without."""
        names = [name for name in self.settings.trackers() if name in PROCESSES and self.speaks]
        self._trackers = [TrackerProcess(tracker, self, name, settings) for tracker in names]

    def rewind(self, step: int, evaluated: bool = True) -> None:
        """Drop the records of `metrics.jsonl` after `step`, which will be written again, and a line truncated by a crash.

        Unless `evaluated`, the evaluation after `step` will run again too, and its records are dropped; those of the
        training step itself stay.
        """
        path = self.run / "metrics.jsonl"
        if not self.speaks or not path.exists():
            return
        kept = [text for text in _lines(path) if _step_of(text) <= step]
        if not evaluated:
            kept = [
                text for text in kept if _step_of(text) < step or '"train/' in text or '"skipped"' in text
            ]
        write_atomic(path, "".join(f"{text}\n" for text in kept))

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Append one JSON object to `metrics.jsonl`, and its numbers to the trackers."""
        if not self.speaks:
            return
        record = {"step": step, "time": round(time.time(), 3), **values}
        with self.tolerate("metrics.jsonl"):
            append(self.run / "metrics.jsonl", json.dumps(record))
        self.send(step, values)

    def send(self, step: int, values: dict[str, float]) -> None:
        """Send numbers to the trackers alone: of what a file of its own has, such as result.json."""
        if not self.speaks:
            return

        def on_board(board: Any) -> None:
            for name, value in values.items():
                board.add_scalar(name, value, step)

        self._on_board(step, on_board)
        for tracker in self._trackers:
            tracker.scalars(step, time.time(), values)

    def event(self, step: int, facts: dict[str, Any]) -> None:
        """Append one JSON object to `metrics.jsonl`. Trackers are told that it happened, not of which samples.

        TensorBoard is not: an event is no curve.
        """
        if not self.speaks:
            return
        now = round(time.time(), 3)
        with self.tolerate("metrics.jsonl"):
            append(self.run / "metrics.jsonl", json.dumps({"step": step, "time": now, **facts}))
        for tracker in self._trackers:
            tracker.scalars(step, now, {f"event/{name}": 1.0 for name in list(facts)[:1]})

    def picture(self, name: str, pixels: "NDArray[np.uint8]", step: int) -> None:
        """Send a grey image (H, W) to the trackers."""
        if not self.speaks:
            return
        self._on_board(step, lambda board: board.add_image(name, pixels, step, dataformats="HW"))
        if self.settings.pictures:
            for tracker in self._trackers:
                tracker.picture(step, name, pixels)

    def _on_board(self, step: int, send: Callable[[Any], None]) -> None:
        """Call `send` with TensorBoard's writer, where it is asked for and has not failed: then it gets nothing more."""
        if not self._board:
            return
        self._board = False
        try:
            with self.tolerate(TENSORBOARD):
                send(self._writer_from(step))
                self._board = True
        except Exception as error:  # whatever a tracker raises, training goes on
            self.warn(f"{TENSORBOARD}: {one_line(error)}; it is off, and the run goes on")

    def _writer_from(self, step: int) -> Any:
        """TensorBoard's writer, created at the first use; it hides what an earlier start has logged after `step`."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  (a second of imports, rank 0 only)

            self._silence_its_threads()
            self._writer = SummaryWriter(str(self.run / "tensorboard"), purge_step=step)
        return self._writer

    def _silence_its_threads(self) -> None:
        """Let threads of TensorBoard end without a traceback: their error comes with the next number, and is one line."""
        before = threading.excepthook

        def hook(args: "threading.ExceptHookArgs") -> None:
            if not type(args.thread).__module__.startswith("tensorboard."):
                before(args)

        self._hooks = hook, before
        threading.excepthook = hook

    def progress(self, step: int, loss: float, samples_per_s: float, wait_share: float) -> None:
        """Show the step, loss, rate, share of time spent waiting for data, and time left."""
        if not self.speaks:
            return
        if self._clock[1] < 0:
            self._clock = (time.monotonic(), step)
        done, seconds = step - self._clock[1], time.monotonic() - self._clock[0]
        left = (self.total - step) * seconds / done if done else float("nan")
        text = f"loss {loss:.4f}  {samples_per_s:.1f} samples/s  waiting {wait_share:.0%}"
        if self.console.is_terminal:
            self._show_bar(step, text)
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            self.line(f"step {step}/{self.total}  {text}  left {hours_minutes_seconds(left)}")

    def _show_bar(self, step: int, text: str) -> None:
        if self._bar is None:
            columns = (
                "step",
                rp.MofNCompleteColumn(),
                rp.BarColumn(),
                "{task.description}",
                "left",
                rp.TimeRemainingColumn(),
            )
            self._bar = rp.Progress(*columns, console=self.console)
            self._bar.start()
            self._task = self._bar.add_task(text, total=self.total, completed=step)
        assert self._task is not None
        self._bar.update(self._task, completed=step, description=text)

    def close(self, state: str = "finished") -> None:
        """Stop the bar and flush the trackers, which are told how the run ended: as in status.json."""
        if self._bar is not None:
            self._bar.stop()
        if self._writer is not None:
            self._on_board(0, lambda board: board.close())
            if self._hooks and threading.excepthook is self._hooks[0]:
                threading.excepthook = self._hooks[1]
        for tracker in self._trackers:
            tracker.close(state)


def hours_minutes_seconds(seconds: float) -> str:
    """Seconds -> `h:mm:ss`; `?` while unknown."""
    if math.isnan(seconds):
        return "?"
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The records of `metrics.jsonl`, oldest first, without lines truncated by a crash."""
    path = run / "metrics.jsonl"
    lines = _lines(path) if path.exists() else []
    return [json.loads(text) for text in lines if _step_of(text) < float("inf")]


def _lines(path: Path) -> list[str]:
    """The lines of a file, in which a crash may have left bytes that are not text."""
    return path.read_text(errors="replace").splitlines()


def _step_of(text: str) -> float:
    """The step of a line of `metrics.jsonl`; infinity when the line is damaged."""
    try:
        return int(json.loads(text)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")
