"""A run is its folder: the same command on it continues it, another one is refused.

RUN/
    config.json     every setting; a run can be started from it
    run.json        data set, machine, versions and command of each start, and where it took the run up
    status.json     running | finished | stopped early | told to stop | failed, and the step
    metrics.jsonl   checkpoints/  tensorboard/  figures/  report.html
"""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np

from p2w import config as settings
from p2w.config import Config
from p2w.errors import UserError
from p2w.files import FileLock, write_atomic
from p2w.stream.local import ShardSet


def describe_data(shards: ShardSet) -> dict[str, Any]:
    """What a reader of the run wants to know of its data set once the shards are out of reach; plain JSON types.

    Counts of sub-scans and scans by split, `shape` (z, y, x), `window_hu`, the tiling rule, and `spacing_mm` (z, y, x) as
    [smallest, median, largest].
    """
    facts: dict[str, Any] = {key: shards.meta.get(key) for key in ("shape", "window_hu", "format", "tiling")}
    for split in ("train", "val"):
        ids = shards.ids(split)
        scans = {str(key).partition("/")[0] for key in shards.keys.take(ids).to_pylist()}
        facts[split] = {"sub_scans": len(ids), "scans": len(scans)}
    if len(shards):
        spread = np.quantile(shards.spacing_mm, (0, 0.5, 1), axis=0).round(4)
        facts["spacing_mm"] = spread.tolist()
    return facts


class RunDir:
    """The folder, held by rank 0 of one run at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / ".lock")

    def agrees(self, config: Config, data: str) -> None:
        """Check that this command may continue the folder. Raises UserError naming the first setting that differs."""
        path = self.path / "config.json"
        if not path.exists():
            place = next(place for place in (self.path, *self.path.absolute().parents) if place.exists())
            if not place.is_dir():
                raise UserError(f"{self.path}: {place} is a file; name a folder with --run-dir")
            return
        before, now = settings.flatten(settings.read_config(path)), settings.flatten(config)
        changed = [
            f"{name} was {before.get(name)}, now {now[name]}"
            for name in sorted(now)
            if now[name] != before.get(name) and name not in settings.MAY_CHANGE
        ]
        if changed:
            raise UserError(
                f"{path}: {'; '.join(changed)}. A run keeps its settings: repeat its own command, or name another folder "
                "with --run-dir"
            )
        starts = self._starts()
        if starts and starts[-1].get("data") != data:
            raise UserError(
                f"{self.path}: was trained on data set {starts[-1].get('data')}, now {data}; pass the --shards it began "
                "with, or name another folder with --run-dir"
            )

    def open(self, config: Config, data: str, shards: str, machine: dict[str, Any]) -> None:
        """Rank 0: make the folder, take its lock, note this start. Raises UserError when another process runs in it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            held = self._lock.acquire()
        except OSError as error:
            raise UserError(
                f"{self.path}: {error.strerror}; name a folder you may write with --run-dir"
            ) from error
        if not held:
            raise UserError(
                f"{self.path}: another process trains in it ({self._lock.note() or 'it left no name'}); wait for it or end "
                "it, or name another --run-dir"
            )
        self._lock.write(f"{socket.gethostname()}, pid {os.getpid()}")
        start = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "data": data, "shards": shards, **machine}
        try:
            write_atomic(self.path / "config.json", settings.config_to_json(config))
            write_atomic(self.path / "run.json", json.dumps({"starts": [*self._starts(), start]}, indent=2))
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}; make room, or name another --run-dir") from error

    def note(self, **facts: Any) -> None:
        """Rank 0: add to what is noted of this start."""
        *before, start = self._starts()
        write_atomic(self.path / "run.json", json.dumps({"starts": [*before, start | facts]}, indent=2))

    def status(self, state: str, step: int, why: str = "") -> None:
        """Rank 0: say how things stand, for schedulers and people."""
        write_atomic(self.path / "status.json", json.dumps({"state": state, "step": step, "why": why}))

    def last_start(self) -> dict[str, Any]:
        """What was noted of the newest start; empty where nothing was. Raises UserError for a run.json that is broken."""
        return (self._starts() or [{}])[-1]

    def close(self) -> None:
        """Release the lock."""
        self._lock.release()

    def _starts(self) -> list[dict[str, Any]]:
        path = self.path / "run.json"
        try:
            starts = json.loads(path.read_text())["starts"] if path.exists() else []
            return [dict(start) for start in starts]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"{path}: cannot be read ({error}); delete it if the data set is still the same, or name another folder "
                "with --run-dir"
            ) from error
