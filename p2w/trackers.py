"""Where metrics and pictures of a run go besides `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow (`--log.to`).

TensorBoard's files are written by `p2w.log`. Each of the others runs in a process of its own (`p2w.tracker_process`), fed
by a thread from a bounded queue: a tracker that fails, hangs or asks for a password costs one warning line, and the run
goes on without it.

RUN/
    trackers.json   tracker -> the id of this run there: the next start of the run continues it
    trackers.log    what the trackers' processes print
    wandb/ mlruns/  what a tracker without a server writes
"""

import base64
import contextlib
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from p2w.errors import UserError
from p2w.files import last_part, write_atomic

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TENSORBOARD = "tensorboard"
PROCESSES = (
    "wandb",
    "mlflow",
)  # trackers in a process of their own; each is a package of that name, and an extra
IDS = "trackers.json"
WAITING = 1000  # records that a tracker may be behind
CLOSE_S = 60.0  # longest wait at the end for a tracker to take the last records
_ids_lock = threading.Lock()


@dataclass(frozen=True)
class LogConfig:
    """Where metrics go besides metrics.jsonl."""

    to: str = TENSORBOARD
    """Any of tensorboard, wandb, mlflow, separated by commas; or none. The two latter are extras: parts2whole[wandb],
    parts2whole[mlflow]. metrics.jsonl has all of it in any case."""
    pictures: bool = True
    """Send pictures of sub-scans to wandb and mlflow too; without, numbers and settings alone."""

    def trackers(self) -> tuple[str, ...]:
        """The names in `to`. Raises UserError for one that is unknown or comes twice."""
        names = tuple(name.strip() for name in self.to.split(","))
        if names == ("none",):
            return ()
        for name in names:
            if name not in (TENSORBOARD, *PROCESSES) or names.count(name) > 1:
                known = ", ".join((TENSORBOARD, *PROCESSES))
                raise UserError(
                    f"log.to={self.to}: any of {known}, each once and separated by commas, or none; got {name!r}"
                )
        return names

    def check_installed(self) -> None:
        """Raise UserError when a tracker's package is not installed."""
        for name in self.trackers():
            if name in PROCESSES and importlib.util.find_spec(name) is None:
                raise UserError(
                    f"--log.to {self.to}: {name} is not installed; pip install 'parts2whole[{name}]', or leave it out"
                )


def without_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they may leave this machine: of a path or URL only the last part, which names no user, host or folder."""
    return {name: last_part(value) for name, value in settings.items()}


class Reporter(Protocol):
    """The part of the run's `Log` through which a tracker's thread speaks to the user."""

    run: Path

    def line(self, text: str, style: str | None = None) -> None:
        """Print one line."""

    def warn(self, text: str) -> None:
        """Print one line of warning."""


class TrackerProcess:
    """Feeds one tracker in a process of its own. No method raises, and none but `close` waits.

    `command` starts the process; it is sent `name_of_run`, `settings`, and the id with which the run is continued.
    """

    def __init__(
        self, name: str, reporter: Reporter, name_of_run: str, settings: Mapping[str, Any], command: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.name, self.reporter = name, reporter
        self.command = list(command) or [sys.executable, "-m", "p2w.tracker_process", name]
        self._about = {
            "run": str(reporter.run.absolute()),
            "name": name_of_run,
            "settings": without_paths(settings),
        }
        self._records: queue.Queue[dict[str, Any]] = queue.Queue(WAITING)
        self._process: subprocess.Popen[bytes] | None = None
        self._off = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._feed, name=f"p2w-{name}", daemon=True)

    def scalars(self, step: int, time: float, values: Mapping[str, float]) -> None:
        """Send numbers of a step; `time` in seconds since 1970."""
        self._put(
            {"scalars": {name: float(value) for name, value in values.items()}, "step": step, "time": time}
        )

    def picture(self, step: int, name: str, pixels: "NDArray[np.uint8]") -> None:
        """Send a grey image (H, W)."""
        packed = base64.b64encode(pixels.tobytes()).decode()
        self._put({"picture": name, "step": step, "shape": list(pixels.shape), "pixels": packed})

    def close(self, state: str) -> None:
        """Send how the run ended, and wait a minute at most until the tracker has taken everything."""
        if self._thread.ident is None:  # there was nothing to send
            return
        self._put({"end": state})
        if not self._off.is_set():
            self._thread.join(CLOSE_S)
            if self._thread.is_alive():
                self._turn_off(f"has not taken the last records within {CLOSE_S:.0f} s")
        self._kill()

    def _put(self, record: dict[str, Any]) -> None:
        if self._off.is_set():
            return
        if self._thread.ident is None:
            self._thread.start()
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self._turn_off(f"is {WAITING} records behind")

    def _turn_off(self, why: str) -> None:
        """Say why once, and send nothing any more."""
        with self._lock:
            if self._off.is_set():
                return
            self._off.set()
        self.reporter.warn(
            f"{self.name}: {why}; it is off, the run goes on, and metrics.jsonl has everything"
        )
        self._kill()

    def _kill(self) -> None:
        """End the process and those that it started."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _feed(self) -> None:
        """The thread: start the process, hand it record after record, and wait for its end."""
        try:
            process = self._start()
            assert process.stdin is not None and process.stdout is not None
            self._send(process.stdin, self._about | {"id": self._known_id()})
            answer = self._heard(process.stdout.readline())
            if "id" in answer:
                self._remember(str(answer["id"]))
                self.reporter.line(f"{self.name:15} {answer['where']}")
                record: dict[str, Any] = {}
                while "end" not in record and not self._off.is_set():
                    record = self._records.get()
                    self._send(process.stdin, record)
                process.stdin.close()
                answer = self._heard(process.stdout.readline())
            if "error" in answer:
                self._turn_off(answer["error"])
            elif process.wait():
                self._turn_off(self._ended(process))
        except BrokenPipeError:  # it has ended, and has said why
            assert self._process is not None and self._process.stdout is not None
            answer = self._heard(self._process.stdout.readline())
            self._turn_off(answer.get("error") or self._ended(self._process))
        except Exception as error:
            self._turn_off(one_line(error))

    def _ended(self, process: subprocess.Popen[bytes]) -> str:
        return f"its process ended with code {process.wait()} ({self.reporter.run / 'trackers.log'})"

    def _start(self) -> subprocess.Popen[bytes]:
        with open(self.reporter.run / "trackers.log", "ab") as log:
            # A session of its own: Ctrl-C and torchrun's signals are for the run, which then says how it ended.
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
                env=_environment(self.reporter.run),
            )  # fmt: skip
        if self._off.is_set():
            self._kill()
        return self._process

    @staticmethod
    def _send(stdin: Any, record: dict[str, Any]) -> None:
        stdin.write(json.dumps(record).encode() + b"\n")
        stdin.flush()

    @staticmethod
    def _heard(line: bytes) -> dict[str, Any]:
        """An answer of the process; empty when it has ended without one."""
        return dict(json.loads(line)) if line else {}

    def _known_id(self) -> str | None:
        """The id with which an earlier start of the run is known to the tracker."""
        found = _read_ids(self.reporter.run).get(self.name)
        return found if isinstance(found, str) else None

    def _remember(self, of_run: str) -> None:
        with _ids_lock:
            known = _read_ids(self.reporter.run)
            if known.get(self.name) != of_run:
                write_atomic(self.reporter.run / IDS, json.dumps(known | {self.name: of_run}, indent=2))


def _read_ids(run: Path) -> dict[str, Any]:
    """The content of trackers.json; empty when there is none, or it is damaged."""
    try:
        return dict(json.loads((run / IDS).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _environment(run: Path) -> dict[str, str]:
    """Environment of a tracker's process: the user's own variables, and for those not set the values that send the least."""
    from p2w.world import variable, variables  # noqa: PLC0415  (imports torch, which reading settings does not need)

    defaults = {
        "WANDB_PROJECT": "p2w",
        "WANDB_DIR": str(run.absolute()),
        "WANDB_SILENT": "true",
        "WANDB_CONSOLE": "off",
        "WANDB_DISABLE_GIT": "true",
        "WANDB_DISABLE_CODE": "true",
        "WANDB_ERROR_REPORTING": "false",
        "MLFLOW_TRACKING_URI": (run.absolute() / "mlruns").as_uri(),
        "MLFLOW_EXPERIMENT_NAME": "p2w",
        "MLFLOW_ALLOW_FILE_STORE": "true",  # newer versions ask for it; the folder of a run needs no data base
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    return variables(**{name: value for name, value in defaults.items() if not variable(name)})


def one_line(error: BaseException) -> str:
    """The first line of an error's message with its type, at most 300 characters."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:300]
