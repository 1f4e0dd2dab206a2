"""Checkpoints: written beside, made durable, renamed. One that is damaged is passed over for the one before.

RUN/checkpoints/
    step-00000500/
        model.safetensors    the network's weights, named as in `encoder.…` and `decoder.…`
        state.pt             optimizer, scaler, schedule, position: plain types and tensors
        meta.json            step, validation, versions, CRC-32C of the two files above and of itself; written last
    latest                   link to the newest durable one; loading trusts checksums instead
    best.json                which of them had the lowest validation loss

Names that begin with a dot are being written or thrown away; the next save sweeps up what a crash left of them.
"""

import contextlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crc32c
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from p2w import __version__
from p2w.errors import UserError
from p2w.log import write_atomic

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
