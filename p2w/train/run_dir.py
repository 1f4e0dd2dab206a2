"""The run folder. The same command continues the run in it; a command with other settings is refused.

RUN/
    config.json     every setting; a run can be started from it
    run.json        data set, machine, versions and command of each start, and the step at which it began
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
    """Facts about the data set for run.json, for readers that cannot reach the shards; plain JSON types.

    Counts of sub-scans and scans by split, `shape` (z, y, x), `window_hu`, the tiling rule, the modality and how its
    intensities are scaled where it is not CT, and `spacing_mm` as [smallest, median, largest], each (z, y, x).
    """
    facts: dict[str, Any] = {key: shards.meta.get(key) for key in ("shape", "window_hu", "format", "tiling")}
    facts |= {key: shards.meta[key] for key in ("modality", "intensity", "mixture") if key in shards.meta}
    for split in ("train", "val"):
        ids = shards.ids(split)
        scans = {str(key).partition("/")[0] for key in shards.keys.take(ids).to_pylist()}
        facts[split] = {"sub_scans": len(ids), "scans": len(scans)}
    if len(shards):
        spread = np.quantile(shards.spacing_mm, (0, 0.5, 1), axis=0).round(4)
        facts["spacing_mm"] = spread.tolist()
    return facts


class RunDir:
    """The folder of a run; rank 0 holds its lock, so that one process trains in it at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / ".lock")

    def agrees(self, config: Config, data: str) -> None:
        """Check that a run with this configuration and data fingerprint may begin or continue in the folder.

        Raises UserError with the settings that differ, or for another data set, or where no folder can be made.
        """
        path = self.path / "config.json"
        if not path.exists():
            parents = (self.path, *self.path.absolute().parents)
            existing = next(parent for parent in parents if parent.exists())
            if not existing.is_dir():
                raise UserError(f"{self.path}: {existing} is a file; name a folder with --run-dir")
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
        """Rank 0: create the folder, lock it, add this start to run.json. UserError if another process trains in it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            locked = self._lock.acquire()
        except OSError as error:
            raise UserError(
                f"{self.path}: {error.strerror}; name a folder you may write with --run-dir"
            ) from error
        if not locked:
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

    def add_to_start(self, **facts: Any) -> None:
        """Rank 0: add entries to this start in run.json."""
        *before, start = self._starts()
        write_atomic(self.path / "run.json", json.dumps({"starts": [*before, start | facts]}, indent=2))

    def write_status(self, state: str, step: int, why: str = "") -> None:
        """Rank 0: write status.json, for schedulers and people."""
        write_atomic(self.path / "status.json", json.dumps({"state": state, "step": step, "why": why}))

    def last_start(self) -> dict[str, Any]:
        """The newest start in run.json; empty when there is none. Raises UserError for a run.json that is broken."""
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
