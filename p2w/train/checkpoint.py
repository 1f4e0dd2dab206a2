"""Checkpoints: written beside, made durable, renamed. One that is damaged is passed over for the one before.

RUN/checkpoints/
    step-00000500/
        model.safetensors    the network's weights, named as in `encoder.…` and `decoder.…`
        state.pt             optimizer, scaler, schedule, position: plain types and tensors
        meta.json            step, validation, versions, CRC-32C of the two files above and of itself; written last
    latest                   link to the newest durable one; loading trusts checksums instead
    best.json                which of them had the lowest validation loss

Names that begin with a dot are being written or thrown away; the next save sweeps up what a crash left of them.

`AsyncCheckpointer`: the loop stands still for a copy on the CPU; a thread writes that copy to the disk.

One save at a time: the next waits for the one before, which is how a slow disk makes itself felt. What is lost by a kill is
at most one interval and the steps done while its last checkpoint was being written.

What torch, safetensors and crc32c do to the bytes, they do without Python's lock (bench/checkpoint.py), so steps go on.
"""

import contextlib
import json
import os
import pickle
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import crc32c
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from p2w import __version__
from p2w.config import TrainConfig
from p2w.errors import UserError
from p2w.files import write_atomic

FILES = ("model.safetensors", "state.pt")
CHUNK = 1 << 24
UNSEALED = '"seal": "00000000"'


@dataclass(frozen=True)
class Snapshot:
    """All that a run continues from."""

    step: int
    model: dict[str, Tensor]
    state: dict[str, Any]
    validation: float | None


class Checkpoints:
    """The folder of a run's checkpoints. Only rank 0 saves; every rank may load."""

    def __init__(
        self, folder: Path, keep: int = 3, say: Callable[[str], None] = print, keep_every: int = 0
    ) -> None:
        self.folder, self.keep, self.say, self.keep_every = folder, keep, say, keep_every

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first."""
        return [step for step in self._begun() if (self.path(step) / "meta.json").is_file()]

    def _begun(self) -> list[int]:
        """Steps of all folders named as checkpoints, oldest first."""
        names = [re.fullmatch(r"step-(\d{8,})", path.name) for path in self.folder.glob("step-*/")]
        return sorted(int(name[1]) for name in names if name)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint at `step`."""
        return self.folder / f"step-{step:08d}"

    def save(self, snapshot: Snapshot) -> Path:
        """Write one durably, then drop those no longer kept. Raises UserError when the disk takes no more."""
        final, beside = self.path(snapshot.step), self.folder / f".step-{snapshot.step:08d}.tmp"
        try:
            for left in self.folder.glob(".*.tmp"):
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            beside.mkdir(parents=True)
            save_file({k: v.contiguous() for k, v in snapshot.model.items()}, beside / FILES[0])
            torch.save(snapshot.state, beside / FILES[1])
            meta = {
                "step": snapshot.step,
                "validation": snapshot.validation,
                "p2w": __version__,
                "torch": torch.__version__,
                "crc32c": {name: _checksum(beside / name) for name in FILES},
            }
            (beside / "meta.json").write_bytes(seal(meta))
            log = self.folder.parent / "metrics.jsonl"  # whose lines of these steps nobody will write again
            for path in (
                *(beside / name for name in (*FILES, "meta.json", ".")),
                *([log] if log.is_file() else []),
            ):
                _sync(path)
            self._publish(beside, snapshot.step)
            self._mark_best(snapshot)
        except (OSError, SafetensorError, RuntimeError) as error:  # what each writer makes of a full disk
            shutil.rmtree(beside, ignore_errors=True)
            raise UserError(
                f"{final}: not saved ({str(error).splitlines()[0]}; {self._free()}); make room, then repeat the command"
            ) from error
        self._prune(snapshot.step)
        return final

    def _free(self) -> str:
        """Room on the disk, in words; a file server that is gone does not tell."""
        try:
            return f"{shutil.disk_usage(self.folder.parent).free >> 20:,} MiB free"
        except OSError as error:
            return f"free space unknown: {error.strerror}"

    def _publish(self, beside: Path, step: int) -> None:
        """Give a durable folder its name. One of that name was damaged, or still owed its validation."""
        final = self.path(step)
        if final.exists():
            if self._linked() == step:
                self._link(max((other for other in self.steps() if other < step), default=None))
            self._discard(final)
        os.replace(beside, final)
        _sync(self.folder)
        self._link(step)

    def _linked(self) -> int | None:
        """The step that `latest` names."""
        with contextlib.suppress(OSError, ValueError):
            return int(os.readlink(self.folder / "latest").removeprefix("step-"))
        return None

    def _link(self, step: int | None) -> None:
        """Have `latest` name this step, or nothing. A file system without links, or a full one, has no `latest`."""
        link, beside = self.folder / "latest", self.folder / ".latest.tmp"
        try:
            beside.unlink(missing_ok=True)
            if step is None:
                link.unlink(missing_ok=True)
            else:
                os.symlink(self.path(step).name, beside)
                os.replace(beside, link)
            _sync(self.folder)
        except OSError:
            with contextlib.suppress(OSError):
                link.unlink(missing_ok=True)

    def _discard(self, folder: Path) -> None:
        """Remove a checkpoint: first its name, so that a crash leaves nothing that looks like one."""
        aside = folder.with_name(f".{folder.name}.old.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)

    def continue_from(self, snapshot: Snapshot | None) -> None:
        """Rank 0, before training goes on from `snapshot` (None: from nothing): set right `latest` and `best.json`.

        What is beyond was damaged, or will be done and judged again; and a kill may have come before they were written.
        """
        step = None if snapshot is None else snapshot.step
        with contextlib.suppress(OSError):  # a folder that cannot be written says so at the first save
            if self.folder.is_dir() and self._linked() != step:
                self._link(step)
            if (best := self.best()) is not None and best > (-1 if step is None else step):
                (self.folder / "best.json").unlink()
            if snapshot is not None:
                self._mark_best(snapshot)

    def load_latest(self) -> Snapshot | None:
        """The newest sound checkpoint, or None when there is none; a damaged one is named and passed over."""
        for step in reversed(self._begun()):
            try:
                return self.load(step)
            except UserError as error:
                self.say(f"{error}; taking the one before")
        return None

    def load(self, step: int) -> Snapshot:
        """The checkpoint at `step`, on the CPU. Raises UserError when it is missing, cut short or altered."""
        folder = self.path(step)
        try:
            meta = _unseal(folder / "meta.json")
            if meta["step"] != step:
                raise UserError(f"{folder}: its meta.json is of step {meta['step']}")
            for name in FILES:
                if _checksum(folder / name) != meta["crc32c"][name]:
                    raise UserError(f"{folder / name}: checksum differs from meta.json, the file is damaged")
            model = load_file(folder / FILES[0])
            state = torch.load(folder / FILES[1], map_location="cpu", weights_only=True)
            validation = None if meta["validation"] is None else float(meta["validation"])
        except UserError:
            raise
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            RuntimeError,
            SafetensorError,
            EOFError,
            pickle.UnpicklingError,
        ) as error:
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"{folder}: not a whole checkpoint ({why})") from error
        return Snapshot(step, model, state, validation)

    def best(self) -> int | None:
        """Step of the checkpoint with the lowest validation loss, if one was marked."""
        found = self._best()
        return found and found[0]

    def _best(self) -> tuple[int, float] | None:
        """Step and validation loss in `best.json`; None when there is none that can be read."""
        try:
            best = json.loads((self.folder / "best.json").read_text())
            return int(best["step"]), float(best["validation"])
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def would_be_best(self, validation: float | None) -> bool:
        """Whether a checkpoint with this validation loss (None: not validated) would be better than all before."""
        if validation is None:
            return False
        before = self._best()
        return validation < (before[1] if before else float("inf"))

    def _mark_best(self, snapshot: Snapshot) -> None:
        if self.would_be_best(snapshot.validation):
            path = self.folder / "best.json"
            write_atomic(path, json.dumps({"step": snapshot.step, "validation": snapshot.validation}))

    def _prune(self, newest: int) -> None:
        """Drop old ones. What is beyond `newest` was damaged and passed over: it does not count as kept."""
        best = self.best()
        for step in [step for step in self.steps() if step <= newest][: -self.keep]:
            if step != best and not (self.keep_every and step % self.keep_every == 0):
                with contextlib.suppress(OSError):
                    self._discard(self.path(step))


def seal(meta: dict[str, Any]) -> bytes:
    """`meta.json` with its own CRC-32C, taken while zeros stand in the place of it."""
    text = json.dumps({**meta, "seal": "00000000"}, indent=2)
    return text.replace(UNSEALED, f'"seal": "{crc32c.crc32c(text.encode()):08x}"').encode()


def _unseal(path: Path) -> dict[str, Any]:
    """Read a `meta.json`. Raises UserError when it is not as it was written; ValueError, LookupError, TypeError likewise."""
    text = path.read_bytes().decode()
    meta = json.loads(text)
    found = str(meta["seal"])
    text = text.replace(f'"seal": "{found}"', UNSEALED)
    if f"{crc32c.crc32c(text.encode()):08x}" != found:
        raise UserError(f"{path}: differs from its own checksum, the file is damaged")
    return meta


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            value = crc32c.crc32c(block, value)
    return value


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class AsyncCheckpointer:
    """Writes snapshots of rank 0. `kept` is what the newest durable checkpoint holds: its step, and what it owes.

    `stall_s` adds up the seconds for which `save` and `wait` have kept the loop.
    """

    LEAVING_S = 20.0  # after an error; torchrun kills 30 s after it has asked

    def __init__(self, checkpoints: Checkpoints, settings: TrainConfig, warn: Callable[[str], None]) -> None:
        self.checkpoints, self.settings, self.warn = checkpoints, settings, warn
        self.kept = (-1, False)
        self.stall_s = 0.0
        self._tried = time.monotonic()
        # Of the copies, by their place in a snapshot: asked for once, and page-locked where a GPU writes it.
        self._memory: dict[tuple[Any, ...], tuple[tuple[Any, ...], Tensor]] = {}
        self._writing: Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Copy a snapshot as it is now, and have it written; waits while the one before is being written."""
        self.wait()
        began = self._tried = time.monotonic()
        self._writing = self._copied(snapshot)
        # A daemon: a process that must leave at once does not wait for a disk.
        self._thread = threading.Thread(
            target=self._write, args=(self._writing,), name="p2w-saver", daemon=True
        )
        self._thread.start()
        self.stall_s += time.monotonic() - began

    def poll(self) -> None:
        """Take note of a save that has ended since; warns when it failed, and the run goes on."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self, seconds: float | None = None) -> None:
        """Until the save under way is durable or has failed, or `seconds` are over."""
        if self._thread is None:
            return
        began = time.monotonic()
        self._thread.join(seconds)
        self.stall_s += time.monotonic() - began
        if self._thread.is_alive():
            return
        snapshot, error, self._thread, self._error, self._writing = (
            self._writing, self._error, None, None, None,
        )  # fmt: skip
        if isinstance(error, UserError):
            self.warn(f"{error}; the run goes on with the checkpoints it has")
        elif error is not None:
            raise error
        elif snapshot is not None:
            self.kept = (snapshot.step, snapshot.state["owed"])

    def due(self, step: int, validation: float | None) -> bool:
        """Whether a run saves after this step: at an interval, late by the clock, or because it is the best so far."""
        settings = self.settings
        regular = (settings.checkpoint_every, settings.keep_every)
        if step > 0 and any(every and step % every == 0 for every in regular):
            return True
        late = 0 < settings.checkpoint_minutes * 60 <= time.monotonic() - self._tried
        return step > 0 and (late or self._would_be_best(validation))

    def _would_be_best(self, validation: float | None) -> bool:
        """As Checkpoints.would_be_best, the one that is being written included."""
        coming = self._writing.validation if self._writing is not None else None
        if validation is not None and coming is not None and coming <= validation:
            return False
        return self.checkpoints.would_be_best(validation)

    def _write(self, snapshot: Snapshot) -> None:
        try:
            self.checkpoints.save(snapshot)
        except BaseException as error:  # the loop raises it, or warns
            self._error = error

    def _copied(self, snapshot: Snapshot) -> Snapshot:
        """The same in memory of its own. A GPU's copies are queued one behind another and waited for once."""
        model = self._still(snapshot.model, ("model",))
        state = self._still(snapshot.state, ("state",))
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return replace(snapshot, model=model, state=state)

    def _still(self, value: Any, place: tuple[Any, ...]) -> Any:
        """Plain types as they are; tensors copied, in the same layout, to the memory kept for this place."""
        if isinstance(value, Tensor):
            like = (value.shape, value.stride(), value.dtype)
            if place not in self._memory or self._memory[place][0] != like:
                memory = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)
                self._memory[place] = (like, memory)
            return self._memory[place][1].copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            return {key: self._still(item, (*place, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._still(item, (*place, at)) for at, item in enumerate(value))
        return value
