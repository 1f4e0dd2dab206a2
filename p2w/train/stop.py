"""Stop requests: signal handlers that set a flag, and evaluations that all ranks end at the same batch."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator
from types import FrameType, TracebackType
from typing import Any

from p2w.stream.stream import Batch, Stream


class StopRequest:
    """Catches SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (Slurm's warning) while open; restores the handlers after.

    A SIGTERM or SIGINT later than BURST_S after a first one leaves at once, without saving, with exit code 128 + its
    number. Sooner ones change nothing: scancel signals torchrun and its workers, torchrun then signals the workers again,
    and all of it is one request. SIGUSR1 is never a second one: slurm/pretrain.sbatch repeats it until a run has ended.

    With `last_words`, an error leaves the handlers where they are: the process says why it ends and does so by itself, and
    the SIGTERM that torchrun sends it at once, because a peer has failed, must not cut that off.

    Python runs a handler only between two of its own instructions, so a process that waits for a dead peer inside a
    collective would never see the second signal. A thread does: the interpreter writes each signal's number to a socket.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    IMPATIENT = (signal.SIGTERM, signal.SIGINT)
    BURST_S = 2.0

    def __init__(self, speaks: bool = False, last_words: bool = False) -> None:
        self.name, self.speaks, self.last_words = "", speaks, last_words
        self._before: dict[signal.Signals, Any] = {}

    @property
    def asked(self) -> bool:
        """True once a signal came."""
        return bool(self.name)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            return
        self.name = signal.Signals(number).name
        if self.speaks:  # straight to the descriptor: a signal may come while Python's own stream is locked
            os.write(
                2,
                f"{self.name}: saves after this step, then leaves (a second Ctrl-C or SIGTERM leaves at once)\n".encode(),
            )

    def _watch(self, numbers: socket.socket) -> None:
        """In a thread of its own: leave at a second signal. Ends with the socket."""
        first: float | None = None
        while received := numbers.recv(1):
            if received[0] not in self.IMPATIENT:
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
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.last_words and isinstance(error, Exception):
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._written.close()


class EvaluationInterrupted(Exception):
    """The run was told to stop while it was looking; the look is still owed."""


class InterruptibleStream(Stream):
    """A stream of which every rank asks before each batch whether any rank was told to stop: one small all-reduce.

    So all ranks must go through it together. What one rank does alone takes a plain Stream, or the shards' reader.
    """

    stop_requested: Callable[[], bool] | None = None

    def batches(self, epoch: int = 0, step: int = 0) -> Generator[Batch, None, None]:
        """As Stream.batches. Raises EvaluationInterrupted, on all ranks, once `stop_requested()` is true."""
        for batch in super().batches(epoch, step):
            if self.stop_requested is not None and self.stop_requested():
                raise EvaluationInterrupted
            yield batch
