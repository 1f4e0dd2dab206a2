"""Saving beside the training: the loop stands still for a copy on the CPU, a thread writes that copy to the disk.

One save at a time: the next waits for the one before, which is how a slow disk makes itself felt. What is lost by a kill is
at most one interval and the steps done while its last checkpoint was being written.

What torch, safetensors and crc32c do to the bytes, they do without Python's lock (bench/checkpoint.py), so steps go on.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from p2w.config import TrainConfig
from p2w.errors import UserError
from p2w.train.checkpoint import Checkpoints, Snapshot


class Saver:
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
