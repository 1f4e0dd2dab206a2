"""One tracker of a run, in a process that `p2w.trackers` starts: `python -m p2w.tracker_process wandb`.

It reads JSON objects, one a line: first a description of the run, then records, then how the run ended. It answers with the
run's id at the tracker, or with an error. If its input ends before it is told how the run ended, the run was killed; the
process then has a minute to send what it has.
"""

import base64
import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from p2w.trackers import one_line

LEAVING_S = 60  # after the run was killed
DONE = ("finished", "stopped early")


class Tracker(Protocol):
    """A run at a tracker. Its constructor begins or continues it; any method may raise or hang."""

    id: str
    """The name by which the tracker knows the run."""
    where: str
    """One line that says where a person can look at the run."""

    def scalars(self, step: int, time_s: float, values: dict[str, float]) -> None:
        """Log numbers of a step; `time_s` in seconds since 1970."""

    def picture(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        """Log a grey image (H, W)."""

    def close(self, state: str) -> None:
        """End: `finished`, `stopped early`, `told to stop`, `failed` or `killed`."""


class Wandb:
    """A run at Weights & Biases, or with WANDB_MODE=offline in files of RUN/wandb, which `wandb sync` sends.

    Steps that are done again after a resume are dropped there. Nothing about the machine is sent: no host, user, command,
    packages or code.
    """

    def __init__(self, run: Path, name: str, settings: dict[str, Any], id: str | None) -> None:
        import wandb  # noqa: PLC0415  (an extra)

        self._image = wandb.Image
        quiet = wandb.Settings(
            x_disable_meta=True, x_disable_stats=True, x_save_requirements=False, x_disable_machine_info=True,
            host="", username="", email="", program="", program_relpath="",
        )  # fmt: skip
        self._run = wandb.init(name=name, id=id, resume="allow", config=settings, settings=quiet)
        self._run.config.update(settings, allow_val_change=True)
        offline = f"wandb sync {Path(self._run.dir).parent} sends it"  # wandb takes another folder where it may not write
        self.id, self.where = str(self._run.id), str(self._run.url or offline)

    def scalars(self, step: int, time_s: float, values: dict[str, float]) -> None:
        """Log numbers of a step."""
        self._run.log(values, step=step)

    def picture(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        """Log a grey image (H, W)."""
        self._run.log({name: self._image(pixels)}, step=step)

    def close(self, state: str) -> None:
        """Send the rest and end."""
        self._run.finish(exit_code=0 if state in DONE else 1)


class MLflow:
    """A run of the experiment `p2w` on the server of MLFLOW_TRACKING_URI, else in files of RUN/mlruns.

    What a step logged before is not logged twice when a resumed run does it again. A setting that the run was continued with
    is a tag, because a parameter cannot change.
    """

    def __init__(self, run: Path, name: str, settings: dict[str, Any], id: str | None) -> None:
        import mlflow  # noqa: PLC0415  (an extra)
        from mlflow.entities import Metric  # noqa: PLC0415

        self._metric, self._client = Metric, mlflow.MlflowClient()
        self._logged: dict[str, int] = {}  # the last step of each metric
        self._before = -1  # the last step of earlier starts
        params = {name: str(value)[:500] for name, value in settings.items()}
        found = id and self._continued(id, mlflow.exceptions.MlflowException)
        if not found:
            experiment = mlflow.environment_variables.MLFLOW_EXPERIMENT_NAME.get() or "p2w"
            known = self._client.get_experiment_by_name(experiment)
            of = known.experiment_id if known else self._client.create_experiment(experiment)
            found = self._client.create_run(of, run_name=name)
        self.id = str(found.info.run_id)
        before = found.data.params
        for key, value in params.items():
            if key not in before:
                self._client.log_param(self.id, key, value, synchronous=True)
            elif before[key] != value:
                self._client.set_tag(self.id, f"changed.{key}", value)
        uri = mlflow.get_tracking_uri()
        at = f"MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri {run}/mlruns"
        self.where = (
            at if uri.startswith("file:") else f"run {self.id} of experiment {found.info.experiment_id}"
        )

    def _continued(self, id: str, error: type[Exception]) -> Any:
        """The run of an earlier start; None when the server does not know it. Raises for a server that cannot be asked."""
        try:
            found = self._client.get_run(id)
        except error as said:
            if getattr(said, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        for name in found.data.metrics:
            self._logged[name] = max(one.step for one in self._client.get_metric_history(id, name))
        self._before = max(self._logged.values(), default=-1)
        self._client.set_terminated(id, "RUNNING")
        return found

    def scalars(self, step: int, time_s: float, values: dict[str, float]) -> None:
        """Log numbers of a step."""
        named = {_allowed(name): value for name, value in values.items()}
        new = [name for name in named if step > self._logged.get(name, -1)]
        self._client.log_batch(
            self.id, metrics=[self._metric(name, named[name], round(1000 * time_s), step) for name in new]
        )
        self._logged |= dict.fromkeys(new, step)

    def picture(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        """Log a grey image (H, W)."""
        if step >= self._before:
            self._client.log_image(self.id, pixels, key=_allowed(name), step=step)

    def close(self, state: str) -> None:
        """Say how the run ended."""
        ended = "FINISHED" if state in DONE else "FAILED" if state == "failed" else "KILLED"
        self._client.set_terminated(self.id, ended)


def _allowed(name: str) -> str:
    """A name with the characters that MLflow takes."""
    return re.sub(r"[^\w\-. /:]", "", name)


TRACKERS: dict[str, Callable[[Path, str, dict[str, Any], str | None], Tracker]] = {
    "wandb": Wandb,
    "mlflow": MLflow,
}


def serve(
    begin: Callable[[Path, str, dict[str, Any], str | None], Tracker], lines: Iterable[bytes],
    answer: Callable[[dict[str, str]], None],
) -> int:  # fmt: skip
    """Read lines, hand them to the tracker, and answer. Returns the exit code."""
    records = map(json.loads, lines)
    try:
        about = next(records)
        tracker = begin(Path(about["run"]), about["name"], about["settings"], about["id"])
        answer({"id": tracker.id, "where": tracker.where})
        for record in records:
            if "scalars" in record:
                tracker.scalars(record["step"], record["time"], record["scalars"])
            elif "picture" in record:
                pixels = np.frombuffer(base64.b64decode(record["pixels"]), np.uint8)
                tracker.picture(record["step"], record["picture"], pixels.reshape(record["shape"]))
            else:
                tracker.close(record["end"])
                return 0
        signal.signal(signal.SIGALRM, _give_up)
        signal.alarm(LEAVING_S)
        tracker.close("killed")
    except Exception as error:
        with contextlib.suppress(BrokenPipeError):  # the run is gone
            answer({"error": one_line(error)})
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {one_line(error)}", file=sys.stderr, flush=True)
    return 1


def _give_up(number: int, frame: FrameType | None) -> None:
    """End at once, with the processes that the tracker has started."""
    os.killpg(0, signal.SIGKILL)


def run_tracker(begin: Callable[[Path, str, dict[str, Any], str | None], Tracker]) -> None:
    """Serve this process's stdin and stdout, and end it without waiting for what the tracker may have left running."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print goes to the log

    def answer(said: dict[str, str]) -> None:
        answers.write(json.dumps(said).encode() + b"\n")
        answers.flush()

    code = serve(begin, sys.stdin.buffer, answer)
    os._exit(code)


if __name__ == "__main__":
    run_tracker(TRACKERS[sys.argv[1]])
