"""Being told to stop. A handler only sets a flag; the loop finishes its step, saves and leaves."""

import os
import signal
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Catches SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (Slurm's warning) while open; restores the handlers after.

    A second SIGINT or SIGTERM leaves at once, without saving.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[signal.Signals, Any] = {}

    @property
    def asked(self) -> bool:
        """True once a signal came."""
        return bool(self.name)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.asked and number != signal.SIGUSR1
        self.name = signal.Signals(number).name
        if again:
            os._exit(128 + number)

    def __enter__(self) -> "StopRequest":
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
