"""Stop requests: signal handlers that set a flag, and evaluations that all ranks end at the same batch."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator
from types import FrameType, TracebackType
from typing import Any

from p2w.stream.stream import Batch, Stream

STOP_POLL_S = 0.25  # time between two all-reduces that ask whether any rank has a stop request


class StopRequest:
    """Records SIGTERM, SIGINT (Ctrl-C), SIGUSR1 (Slurm's warning) and SIGHUP (the terminal goes) inside a `with` block.

    It restores the handlers after the block.

    A SIGTERM or SIGINT later than BURST_S after the first one ends the process at once, without saving, with exit code 128
    + its number. Earlier ones change nothing: scancel signals torchrun and its workers, torchrun then signals the workers
    again, and all of that is one request. SIGUSR1 never counts as a second signal, because slurm/pretrain.sbatch repeats it
    until the run has ended. SIGHUP does not either, and is left alone where the process was started to ignore it (nohup).

    With `ignore_after_error`, the handlers stay in place when the block ends with an error: the process then reports the
    error and exits by itself, and the SIGTERM that torchrun sends because a peer has failed must not cut that short.

    Python runs a handler only between two of its own instructions, so a process that waits for a dead peer inside a
    collective would never see the second signal. A thread does: the interpreter writes each signal's number to a socket.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    FORCING = (signal.SIGTERM, signal.SIGINT)  # a second one of these ends the process at once
    BURST_S = 2.0

    def __init__(self, speaks: bool = False, ignore_after_error: bool = False) -> None:
        """`speaks`: this process tells the user that it will stop."""
        self.name, self.speaks, self.ignore_after_error = "", speaks, ignore_after_error
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """True after the first signal; `name` is then its name."""
        return bool(self.name)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            return
        self.name = signal.Signals(number).name
        if self.speaks:
            line = f"{self.name}: saves after this step, then leaves (a second Ctrl-C or SIGTERM leaves at once)\n"
            # To the file descriptor: a signal may come while Python's own stream is locked. The terminal may be gone.
            with contextlib.suppress(OSError):
                os.write(2, line.encode())

    def _watch(self, numbers: socket.socket) -> None:
        """Runs in a thread: ends the process at a second signal, and returns when the socket is closed."""
        first: float | None = None
        while received := numbers.recv(1):
            if received[0] not in self.FORCING:
                continue
            now = time.monotonic()
            first = now if first is None else first
            if now - first > self.BURST_S:
                os._exit(128 + received[0])
        numbers.close()

    def __enter__(self) -> "StopRequest":
        numbers, self._written = socket.socketpair()
        self._written.setblocking(False)
        threading.Thread(target=self._watch, args=(numbers,), name="p2w-signals", daemon=True).start()
        self._wakeup = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        for number in self.SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.ignore_after_error and isinstance(error, Exception):
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._written.close()


class EvaluationInterrupted(Exception):
    """A stop request came during an evaluation, which must be repeated after the restart."""


class InterruptibleStream(Stream):
    """A stream that asks before each batch whether any rank has a stop request: one small all-reduce.

    All ranks must iterate over it together. Code that runs on one rank alone uses a plain Stream, or the shards' reader.
    """

    stop_requested: Callable[[], bool] | None = None

    def batches(self, epoch: int = 0, step: int = 0) -> Generator[Batch, None, None]:
        """As Stream.batches. Raises EvaluationInterrupted on all ranks when `stop_requested()` is true."""
        for batch in super().batches(epoch, step):
            if self.stop_requested is not None and self.stop_requested():
                raise EvaluationInterrupted
            yield batch
