"""The run folder. The same command continues the run in it; a command with other settings is refused.

RUN/
    config.json     every setting; a run can be started from it
    run.json        data set, machine, versions and command of each start, and the step at which it began
    status.json     running | finished | stopped early | told to stop | failed, and the step; while running, host, pid, boot
                    id and the time of the last sign of life. `p2w.run_owner.run_state` tells a killed run from a live one
    .lock .owner    keep a second process out, see `p2w.run_owner`
    metrics.jsonl   checkpoints/  tensorboard/  figures/  report.html
    trackers.json   trackers.log  wandb/  mlruns/   where `--log.to` names trackers, see `p2w.trackers`
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np

from p2w import config as settings
from p2w.config import Config
from p2w.errors import UserError
from p2w.files import FileLock, write_atomic, write_remedy
from p2w.run_owner import BEAT_S, Owner, described, this_process
from p2w.stream.local import Order, ShardSet

OTHERS_FILES = {"transfer.json": "a run of p2w finetune", "manifest.parquet": "a data set"}


def describe_data(shards: ShardSet) -> dict[str, Any]:
    """Facts about the data set for run.json, for readers that cannot reach the shards; plain JSON types.

    Counts of sub-scans and scans by split, `shape` (z, y, x), `window_hu`, the tiling rule, the modality and how its
    intensities are scaled where it is not CT, and `spacing_mm` as [smallest, median, largest], each (z, y, x). Where
    sub-scans may be filled up with air, `real_shape` is the median of what is real. Of a set that stores whole scans,
    `store` and the size of its chunks.
    """
    facts: dict[str, Any] = {key: shards.meta.get(key) for key in ("shape", "window_hu", "format", "tiling")}
    facts |= {
        key: shards.meta[key]
        for key in ("modality", "intensity", "mixture", "store", "chunk")
        if key in shards.meta
    }
    for split in ("train", "val"):
        ids = shards.ids(split)
        facts[split] = {"sub_scans": len(ids), "scans": len(shards.scan_uids(ids))}
    if len(shards):
        spread = np.quantile(shards.spacing_mm, (0, 0.5, 1), axis=0).round(4)
        facts["spacing_mm"] = spread.tolist()
    if shards.real is not None:
        facts["real_shape"] = np.median(shards.real, axis=0).tolist()
    return facts


class RunDir:
    """The folder of a run; rank 0 is its owner, so that one process trains in it at a time."""

    STATUS_EVERY = 3  # heartbeats

    def __init__(self, path: Path) -> None:
        self.path = path
        self.owner = Owner(path)
        self._lock = FileLock(
            path / ".lock",
            without=f"a second process is kept out by .owner there, which is touched every {BEAT_S:.0f} s",
        )
        self._files: dict[
            str, str
        ] = {}  # what was written, in case the folder is deleted and has to be made again
        self._place: tuple[int, int] | None = None
        self._handle = -1
        self._end, self._writing = threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None

    def check_may_continue(self, config: Config, data: str) -> None:
        """Check that a run with this configuration and data fingerprint may begin or continue in the folder.

        Raises UserError with the settings that differ, or for another data set, or where no folder can be made.
        """
        path = self.path / "config.json"
        if not path.exists():
            parents = (self.path, *self.path.absolute().parents)
            existing = next(parent for parent in parents if parent.exists())
            if not existing.is_dir():
                raise UserError(f"{self.path}: {existing} is a file; name a folder with --run-dir")
            for name, what in OTHERS_FILES.items():
                if (self.path / name).exists():
                    raise UserError(
                        f"{self.path}: is {what} ({name}); a pretraining gets its own folder: name it with --run-dir"
                    )
            return
        own = settings.read_config(path)
        settings.refuse_edited_config(self.path, own)
        before, now = settings.flatten(own), settings.flatten(config)
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
            other = self.owner.other(not locked, have_lock=locked and self._lock.works)
            if not locked and not other:
                locked = self._lock.acquire()  # the owner may have just left
        except OSError as error:
            raise UserError(
                f"{self.path}: {error.strerror}; name a folder you may write with --run-dir"
            ) from error
        if other or (not locked and not self.owner.read()):
            name = described(other) if other else self._lock.note() or "it left no name"
            self._lock.release()
            raise UserError(
                f"{self.path}: another process trains in it ({name}); wait for it or end it, or name another --run-dir"
            )
        start = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "data": data, "shards": shards, **machine}
        start["config"] = json.loads(settings.config_to_json(config))
        try:
            if locked:
                self._lock.write(f"{socket.gethostname()}, pid {os.getpid()}")
            self.owner.take()
            self._write("config.json", settings.config_to_json(config))
            self._write("run.json", json.dumps({"starts": [*self._starts(), start]}, indent=2))
        except OSError as error:
            raise UserError(
                f"{self.path}: {error.strerror}; {write_remedy(error)}, or name another --run-dir"
            ) from error

    def _write(self, name: str, text: str) -> None:
        """Write a file, and keep its text."""
        write_atomic(self.path / name, text)
        self._files[name] = text

    def watch(
        self, step: Callable[[], int], warn: Callable[[str], None], on_lost: Callable[[str], None]
    ) -> None:
        """Rank 0: write the heartbeat from a thread until `close`.

        `warn` gets one line when the folder is moved or deleted, which is then made anew; `on_lost` gets one line when
        another process has taken over.
        """
        self._remember_place()
        self._thread = threading.Thread(
            target=self._beat, args=(step, warn, on_lost), name="p2w-owner", daemon=True
        )
        self._thread.start()

    def _remember_place(self) -> None:
        with contextlib.suppress(OSError):
            if self._handle >= 0:
                os.close(self._handle)
            self._handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            found = os.fstat(self._handle)
            self._place = (found.st_dev, found.st_ino)

    def _beat(
        self, step: Callable[[], int], warn: Callable[[str], None], on_lost: Callable[[str], None]
    ) -> None:
        count = 0
        while not self._end.wait(BEAT_S):
            count += 1
            with contextlib.suppress(OSError):
                self._check_place(warn)
                if other := self.owner.beat():
                    on_lost(
                        f"{self.path}: {described(other)} has taken it over while this process gave no sign of life"
                    )
                    return
                if count % self.STATUS_EVERY == 0:
                    self.write_status("running", step())

    def _check_place(self, warn: Callable[[str], None]) -> None:
        """Warn, and make the folder anew, where it is no longer at its path. Raises OSError."""
        try:
            found = os.stat(self.path)
            if self._place is None or (found.st_dev, found.st_ino) == self._place:
                return
        except FileNotFoundError:
            pass
        now = os.readlink(f"/proc/self/fd/{self._handle}") if self._handle >= 0 else "unknown"
        gone = "was deleted" if now.endswith(" (deleted)") or now == "unknown" else f"was moved to {now}"
        warn(
            f"{self.path}: the folder {gone} while the run trains in it; the run goes on in a new one at the same path, "
            "with the checkpoints from now on"
        )
        self.path.mkdir(parents=True, exist_ok=True)
        self._remember_place()
        for name, text in self._files.items():
            write_atomic(self.path / name, text)
        self.owner.take()

    def check_owner(self) -> None:
        """Raise UserError when another process has taken the folder over: before a checkpoint is published."""
        found = self.owner.read()
        if found and found.get("word") != self.owner.word:
            raise UserError(f"{self.path}: {described(found)} trains in it now")

    def add_to_start(self, **facts: Any) -> None:
        """Rank 0: add entries to this start in run.json."""
        *before, start = self._starts()
        self._write("run.json", json.dumps({"starts": [*before, start | facts]}, indent=2))

    def write_status(self, state: str, step: int, why: str = "") -> None:
        """Write status.json, for schedulers and people: rank 0, or the rank that reports why all leave."""
        alive = {**this_process(), "heartbeat": round(time.time(), 3)} if state == "running" else {}
        with self._writing:
            # The final state stays: when the watchdog has reported a hang, a collective fails next, and must not replace it.
            if state in ("running", "failed") and self._end.is_set():
                return
            if state == "failed" and self._has_ended():  # on another rank, which waits for one that has left
                return
            if state != "running":
                self._end.set()  # the heartbeat does not overwrite it
            write_atomic(
                self.path / "status.json", json.dumps({"state": state, "step": step, "why": why, **alive})
            )

    def _has_ended(self) -> bool:
        """Whether a rank of the newest start has written how it ended; a start that has `from_step` was "running" before."""
        with contextlib.suppress(OSError, ValueError, KeyError, UserError):
            now = json.loads((self.path / "status.json").read_text())
            return "from_step" in self.last_start() and now["state"] != "running"
        return False

    def last_start(self) -> dict[str, Any]:
        """The newest start in run.json; empty when there is none. Raises UserError for a run.json that is broken."""
        return (self._starts() or [{}])[-1]

    def ranks_of_first_start(self) -> int:
        """How many ranks the run in the folder has begun with; 0 for no run, or where that is unknown."""
        found = (self._starts() or [{}])[0].get("world_size", 0)
        return found if isinstance(found, int) else 0

    def order(self) -> Order | None:
        """The order of sub-scans with which the run in the folder has begun; None for no run, or where that is unknown.

        Runs of earlier versions did not record it; a folder and s3 have one each.
        """
        start = self.last_start()
        if start.get("order") in get_args(Order):
            return cast(Order, start["order"])
        shards = str(start.get("shards", "http://"))
        return None if shards.startswith("http") else "streamed" if shards.startswith("s3:") else "shuffled"

    def order_version(self) -> int:
        """Version of the order with which the run in the folder has begun (see `p2w.stream.sampler`); 0 for no run."""
        start = self.last_start()
        found = start.get("order_version", 1 if start else 0)
        if found not in (0, 1, 2):
            raise UserError(
                f"{self.path / 'run.json'}: the run has its sub-scans in an order of version {found!r}, which this p2w does "
                "not have: continue it with the version of p2w that it began with"
            )
        return int(found)

    def close(self) -> None:
        """Stop the heartbeat, and release the folder."""
        self._end.set()
        if self._thread is not None:
            self._thread.join(BEAT_S)
            self._thread = None
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        self.owner.release()
        self._lock.release()
        self._end = threading.Event()

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
