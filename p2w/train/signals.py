"""Being told to stop. A handler only sets a flag; the loop finishes its step, saves and leaves."""

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Catches SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (Slurm's warning) while open; restores the handlers after.

    Another Ctrl-C later than BURST_S leaves at once, without saving. Sooner ones, and any other signal, change nothing:
    scancel signals torchrun and its workers, torchrun then signals the workers again, and all of it is one request.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    BURST_S = 1.0

    def __init__(self, speaks: bool = False) -> None:
        self.name, self.speaks, self._at = "", speaks, 0.0
        self._before: dict[signal.Signals, Any] = {}

    @property
    def asked(self) -> bool:
        """True once a signal came."""
        return bool(self.name)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if number == signal.SIGINT and time.monotonic() - self._at > self.BURST_S:
                os._exit(128 + number)
            return
        self.name, self._at = signal.Signals(number).name, time.monotonic()
        if self.speaks:  # straight to the descriptor: a signal may come while Python's own stream is locked
            os.write(
                2,
                f"{self.name}: saves after this step, then leaves (a second Ctrl-C leaves at once)\n".encode(),
            )

    def __enter__(self) -> "StopRequest":
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
