"""Checkpoints: written to a temporary folder, synced to disk, then renamed. Loading skips a damaged one for an older one.

RUN/checkpoints/
    step-00000500/
        model.safetensors    the network's weights, named as in `encoder.…` and `decoder.…`
        state.pt             optimizer, scaler, schedule, counters: plain types and tensors
        meta.json            step, validation loss, versions, CRC-32C of the two files above and of itself; written last
    latest                   link to the newest durable checkpoint, for people; loading goes by checksums instead
    best.json                step and value of the lowest validation loss

Names that begin with a dot are being written or deleted; the next save removes those that a crash left behind.

`AsyncCheckpointer` copies the state to CPU memory, for which the loop waits; a thread writes the copy to disk.

There is one save at a time: the next one waits for it, so a slow disk slows the run down. A kill loses at most the steps
of one interval and those done while the last checkpoint was being written.

torch, safetensors and crc32c work on the bytes without holding Python's lock (bench/checkpoint.py), so steps go on.
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
from p2w.files import file_crc32c, sync_to_disk, write_atomic, write_remedy
from p2w.world import World

FILES = ("model.safetensors", "state.pt")
NOT_ASKED = -2  # in the place of a step, of a rank that leaves the checksums to another of its node
UNSEALED = '"seal": "00000000"'


@dataclass(frozen=True)
class Snapshot:
    """Everything that a run continues from: weights, training state, and the validation loss if this step has one."""

    step: int
    model: dict[str, Tensor]
    state: dict[str, Any]
    validation: float | None


def _step(snapshot: Snapshot | None) -> int:
    return -1 if snapshot is None else snapshot.step


class Checkpoints:
    """The folder of a run's checkpoints. Only rank 0 saves; every rank may load."""

    def __init__(
        self, folder: Path, keep: int = 3, warn: Callable[[str], None] = print, keep_every: int = 0
    ) -> None:
        self.folder, self.keep, self.warn, self.keep_every = folder, keep, warn, keep_every
        # Raises UserError where this process may no longer write
        self.guard: Callable[[], None] = lambda: None

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first."""
        return [step for step in self._all_steps() if (self.path(step) / "meta.json").is_file()]

    def _all_steps(self) -> list[int]:
        """Steps of all folders named as checkpoints, oldest first."""
        names = [re.fullmatch(r"step-(\d{8,})", path.name) for path in self.folder.glob("step-*/")]
        return sorted(int(name[1]) for name in names if name)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint at `step`."""
        return self.folder / f"step-{step:08d}"

    def save(self, snapshot: Snapshot) -> Path:
        """Write one durably, then delete old ones. Raises UserError when it cannot be written, e.g. on a full disk."""
        final, temporary = self.path(snapshot.step), self.folder / f".step-{snapshot.step:08d}.tmp"
        try:
            for left in self.folder.glob(".*.tmp"):
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            temporary.mkdir(parents=True)
            save_file({k: v.contiguous() for k, v in snapshot.model.items()}, temporary / FILES[0])
            torch.save(snapshot.state, temporary / FILES[1])
            meta = {
                "step": snapshot.step,
                "validation": snapshot.validation,
                "p2w": __version__,
                "torch": torch.__version__,
                "crc32c": {name: _checksum(temporary / name) for name in FILES},
            }
            (temporary / "meta.json").write_bytes(seal(meta))
            log = self.folder.parent / "metrics.jsonl"  # its lines up to this step will not be written again
            for path in (
                *(temporary / name for name in (*FILES, "meta.json", ".")),
                *([log] if log.is_file() else []),
            ):
                sync_to_disk(path)
            self.guard()
            self._publish(temporary, snapshot.step)
            self._mark_best(snapshot)
        except (
            OSError,
            SafetensorError,
            RuntimeError,
        ) as error:  # each writer raises another one for a full disk
            shutil.rmtree(temporary, ignore_errors=True)
            # torch's and safetensors' writers do not say why; on a disk that works it is full.
            remedy = write_remedy(error) if isinstance(error, OSError) else "make room"
            raise UserError(
                f"{final}: not saved ({str(error).splitlines()[0]}; {self._free()}); {remedy}, then repeat the command"
            ) from error
        self._prune(snapshot.step)
        return final

    def _free(self) -> str:
        """Free space on the disk as text; a lost file server gives no answer."""
        try:
            return f"{shutil.disk_usage(self.folder.parent).free >> 20:,} MiB free"
        except OSError as error:
            return f"free space unknown: {error.strerror}"

    def _publish(self, temporary: Path, step: int) -> None:
        """Rename a durable folder to its final name. It replaces one that is damaged, or was saved before validation."""
        final = self.path(step)
        if final.exists():
            if self._read_latest() == step:
                self._link_latest(max((other for other in self.steps() if other < step), default=None))
            self._delete(final)
        os.replace(temporary, final)
        sync_to_disk(self.folder)
        self._link_latest(step)

    def _read_latest(self) -> int | None:
        """The step that the link `latest` names; None without such a link."""
        with contextlib.suppress(OSError, ValueError):
            return int(os.readlink(self.folder / "latest").removeprefix("step-"))
        return None

    def _link_latest(self, step: int | None) -> None:
        """Point `latest` at this step, or remove it (None). Where no link can be made there is no `latest`."""
        link, temporary = self.folder / "latest", self.folder / ".latest.tmp"
        try:
            temporary.unlink(missing_ok=True)
            if step is None:
                link.unlink(missing_ok=True)
            else:
                os.symlink(self.path(step).name, temporary)
                os.replace(temporary, link)
            sync_to_disk(self.folder)
        except OSError:
            with contextlib.suppress(OSError):
                link.unlink(missing_ok=True)

    def _delete(self, folder: Path) -> None:
        """Delete a checkpoint. It is renamed first, so that a crash leaves no incomplete folder under its name."""
        renamed = folder.with_name(f".{folder.name}.old.tmp")
        shutil.rmtree(renamed, ignore_errors=True)
        os.replace(folder, renamed)
        shutil.rmtree(renamed, ignore_errors=True)

    def continue_from(self, snapshot: Snapshot | None) -> None:
        """Rank 0, before training continues from `snapshot` (None: from step 0): correct `latest` and `best.json`.

        Later checkpoints are damaged or will be written again, and a kill may have come before these two were written.
        """
        step = None if snapshot is None else snapshot.step
        with contextlib.suppress(OSError):  # the first save reports a folder that cannot be written
            if self.folder.is_dir() and self._read_latest() != step:
                self._link_latest(step)
            if (best := self.best()) is not None and best > (-1 if step is None else step):
                (self.folder / "best.json").unlink()
            if snapshot is not None:
                self._mark_best(snapshot)

    def load_latest(self) -> Snapshot | None:
        """The newest intact checkpoint, or None when there is none; warns of each damaged one that it skips."""
        for step in reversed(self._all_steps()):
            try:
                return self.load(step)
            except UserError as error:
                self.warn(f"{error}; taking the one before")
        return None

    def load_on_all_ranks(self, world: World) -> tuple[Snapshot | None, bool]:
        """`load_latest` on every rank, and whether all ranks found the same. A collective.

        One rank of a node compares the checksums, and passes over what is damaged. The others then read the same files, from
        the page cache of their node, without comparing them again.
        """
        verifies = world.speaks
        snapshot = self.load_latest() if verifies else None
        found = world.gather(torch.tensor([_step(snapshot) if verifies else NOT_ASKED]))
        newest = int(found[found != NOT_ASKED][0])
        if not verifies and newest >= 0:
            try:
                snapshot = self.load(newest, verified=True)
            except UserError as error:
                self.warn(f"rank {world.rank}: {error}")
        return snapshot, bool((world.gather(torch.tensor([_step(snapshot)])) == newest).all())

    def load(self, step: int, verified: bool = False) -> Snapshot:
        """The checkpoint at `step`, on the CPU. Raises UserError when it is missing, cut short or altered.

        `verified`: another process of this node has just compared the checksums, so they are not computed again.
        """
        folder = self.path(step)
        try:
            meta = _unseal(folder / "meta.json")
            if meta["step"] != step:
                raise UserError(f"{folder}: its meta.json is of step {meta['step']}")
            for name in FILES:
                if not verified and _checksum(folder / name) != meta["crc32c"][name]:
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
            raise UserError(f"{folder}: not a complete checkpoint ({why})") from error
        return Snapshot(step, model, state, validation)

    def best(self) -> int | None:
        """Step of the checkpoint with the lowest validation loss; None when `best.json` names none."""
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
        """Delete old ones. Those after `newest` are damaged ones that loading skipped: `keep` does not count them."""
        best = self.best()
        for step in [step for step in self.steps() if step <= newest][: -self.keep]:
            if step != best and not (self.keep_every and step % self.keep_every == 0):
                with contextlib.suppress(OSError):
                    self._delete(self.path(step))


def seal(meta: dict[str, Any]) -> bytes:
    """The bytes of `meta.json` with their own CRC-32C in `seal`, computed while `seal` is zeros."""
    text = json.dumps({**meta, "seal": "00000000"}, indent=2)
    return text.replace(UNSEALED, f'"seal": "{crc32c.crc32c(text.encode()):08x}"').encode()


def _unseal(path: Path) -> dict[str, Any]:
    """Read a `meta.json`. Raises UserError, ValueError, LookupError or TypeError when it is not as it was written."""
    text = path.read_bytes().decode()
    meta = json.loads(text)
    found = str(meta["seal"])
    text = text.replace(f'"seal": "{found}"', UNSEALED)
    if f"{crc32c.crc32c(text.encode()):08x}" != found:
        raise UserError(f"{path}: differs from its own checksum, the file is damaged")
    return meta


def _checksum(path: Path) -> int:
    with open(path, "rb", buffering=0) as file:
        return file_crc32c(file)


class AsyncCheckpointer:
    """Writes rank 0's snapshots in a thread.

    `durable` is (step, evaluation pending) of the newest durable checkpoint. `stall_s` sums the seconds for which the loop
    has waited in `save` and `wait`.
    """

    LEAVING_S = 20.0  # longest wait after an error; torchrun kills 30 s after its SIGTERM

    def __init__(self, checkpoints: Checkpoints, settings: TrainConfig, warn: Callable[[str], None]) -> None:
        self.checkpoints, self.settings, self.warn = checkpoints, settings, warn
        self.durable = (-1, False)
        self.stall_s = 0.0
        self._last_save = time.monotonic()
        # Memory of the copies by key path in the snapshot, allocated once; page-locked for tensors of a GPU.
        self._memory: dict[tuple[Any, ...], tuple[tuple[Any, ...], Tensor]] = {}
        self._writing: Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Copy a snapshot and start to write it; waits first until the save before has ended."""
        self.wait()
        began = self._last_save = time.monotonic()
        self._writing = self._copy_snapshot(snapshot)
        # A daemon thread, so that a process that must exit at once does not wait for the disk.
        self._thread = threading.Thread(
            target=self._write, args=(self._writing,), name="p2w-checkpoint", daemon=True
        )
        self._thread.start()
        self.stall_s += time.monotonic() - began

    def poll(self) -> None:
        """Finish a save whose thread has ended; warns when it failed, and the run goes on."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the running save is durable or has failed, at most `seconds`."""
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
            self.durable = (snapshot.step, snapshot.state["owed"])

    def should_save(self, step: int, validation: float | None) -> bool:
        """Whether to save after this step: an interval of steps or minutes is over, or its validation loss is the lowest."""
        settings = self.settings
        regular = (settings.checkpoint_every, settings.keep_every)
        if step > 0 and any(every and step % every == 0 for every in regular):
            return True
        late = 0 < settings.checkpoint_minutes * 60 <= time.monotonic() - self._last_save
        return step > 0 and (late or self._would_be_best(validation))

    def _would_be_best(self, validation: float | None) -> bool:
        """As Checkpoints.would_be_best, including the checkpoint that is being written."""
        pending = self._writing.validation if self._writing is not None else None
        if validation is not None and pending is not None and pending <= validation:
            return False
        return self.checkpoints.would_be_best(validation)

    def _write(self, snapshot: Snapshot) -> None:
        try:
            self.checkpoints.save(snapshot)
        except BaseException as error:  # `wait` raises it, or warns of it, in the loop's thread
            self._error = error

    def _copy_snapshot(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot in separate CPU memory. All copies from a GPU are queued, and then waited for once."""
        model = self._copy(snapshot.model, ("model",))
        state = self._copy(snapshot.state, ("state",))
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return replace(snapshot, model=model, state=state)

    def _copy(self, value: Any, path: tuple[Any, ...]) -> Any:
        """Copy tensors, with their strides, into the memory of this key path; other values are returned as they are."""
        if isinstance(value, Tensor):
            like = (value.shape, value.stride(), value.dtype)
            if path not in self._memory or self._memory[path][0] != like:
                memory = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)
                self._memory[path] = (like, memory)
            return self._memory[path][1].copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            return {key: self._copy(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(item, (*path, index)) for index, item in enumerate(value))
        return value
