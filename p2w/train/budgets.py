"""Budgets of a run, counted over all ranks: bad samples and non-finite steps; and sums between two logged lines.

On a GPU a step's gradient norm is read when the next step has been asked for, so that the GPU never waits for the host.
"""

import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from p2w.config import DataConfig
from p2w.errors import SharedError
from p2w.log import Log
from p2w.stream.stream import Batch, Stream
from p2w.train.step import StepResult
from p2w.world import World


class BadSampleBudget:
    """`total` since the first step, and of the running epoch. Part of a checkpoint, so restarts lose no count."""

    def __init__(self, config: DataConfig, world: World, stream: Stream) -> None:
        self.config, self.world = config, world
        self.per_epoch = stream.steps_per_epoch * config.batch
        self.epoch = self.in_epoch = self.total = 0

    def count(self, batch: Batch, step: int) -> None:
        """Account for a batch; every rank calls it at every step.

        Raises SharedError, on all ranks at the same step, past `data.max_bad_share` of the samples of an epoch.
        """
        if self.config.on_bad_sample == "stop":
            return
        if batch.epoch != self.epoch:
            self.epoch, self.in_epoch = batch.epoch, 0
        found = int(self.world.sum(torch.tensor([batch.bad])))
        self.in_epoch += found
        self.total += found
        if self.in_epoch > self.config.max_bad_share * self.per_epoch:
            raise SharedError(
                f"step {step}: {self.in_epoch} of an epoch's {self.per_epoch} samples could not be used, "
                f"data.max_bad_share={self.config.max_bad_share:g} allows {self.config.max_bad_share * self.per_epoch:g}; "
                "the warnings name them: repair the set with p2w verify, or pass a larger --data.max-bad-share"
            )

    def metrics(self) -> dict[str, float]:
        """For the log; nothing where a bad sample stops the run."""
        if self.config.on_bad_sample == "stop":
            return {}
        return {"data/bad_samples": self.total, "data/bad_share": self.in_epoch / self.per_epoch}

    def state(self) -> list[int]:
        """For a checkpoint."""
        return [self.epoch, self.in_epoch, self.total]

    def load(self, state: list[int]) -> None:
        """From a checkpoint."""
        self.epoch, self.in_epoch, self.total = state


class NonfiniteSteps:
    """`in_a_row` up to the newest step that was read. Part of a checkpoint, so a restart forgives nothing."""

    def __init__(self, most: int, world: World, key: Callable[[int], str], log: Log, lag: int = 0) -> None:
        """`most` in a row end the run; `key` gives the name of a sub-scan's id; the newest `lag` steps are not read yet."""
        self.most, self.world, self.key, self.log, self.lag = most, world, key, log, lag
        self.in_a_row = 0
        self._unread: deque[tuple[StepResult, Tensor, int]] = deque()

    def add(self, result: StepResult, ids: Tensor, step: int) -> None:
        """Take in a step on the sub-scans `ids` (b,), and account for the one `lag` steps before. Raises as `read_all`."""
        self._unread.append((result, ids, step))
        while len(self._unread) > self.lag:
            self._count(*self._unread.popleft())

    def read_all(self) -> None:
        """Account for every step so far; every rank calls it at the same steps.

        Raises SharedError, on all ranks at the same step, when there are too many skipped steps in a row.
        """
        while self._unread:
            self._count(*self._unread.popleft())

    def in_a_row_now(self) -> int:
        """Skipped steps in a row, the unread ones included. One rank may ask alone: nothing is said and nothing raised."""
        count = self.in_a_row
        for result, _, _ in self._unread:
            count = 0 if result.applied else count + 1
        return count

    def _count(self, result: StepResult, ids: Tensor, step: int) -> None:
        self.in_a_row = 0 if result.applied else self.in_a_row + 1
        if result.applied:
            return
        who = self._culprits(result, ids, step)
        self.log.warn(
            f"step {step}: gradient norm {result.grad_norm}, step skipped on all ranks ({self.in_a_row} in a row); {who}"
        )
        if self.in_a_row >= self.most:
            raise SharedError(
                f"step {step}, rank {self.world.rank}: {self.in_a_row} steps in a row without a finite gradient; {who}; "
                "lower --optim.lr, or pass --train.precision fp32"
            )

    def _culprits(self, result: StepResult, ids: Tensor, step: int) -> str:
        """Whose loss was not finite, on which sub-scans. All ranks skip together, so all are here to ask each other."""
        bad = self.world.gather(~torch.isfinite(result.loss).cpu().reshape(1)).tolist()
        keys = [self.key(sub_scan) for sub_scan in self.world.gather(ids.cpu()).tolist()]
        share = len(ids)
        said = [
            f"the loss of rank {rank} was not finite, on {', '.join(keys[rank * share : (rank + 1) * share])}"
            for rank in range(self.world.size)
            if bad[rank]
        ]
        who = "; ".join(said) or "the loss of every rank was finite"
        self.log.event(step, {"skipped": who, "grad_norm": str(result.grad_norm), "keys": keys})
        return who


class LogWindow:
    """Sums since the last logged line."""

    def __init__(self, wait_before: float = 0.0, stall_before: float = 0.0) -> None:
        self.loss = torch.zeros(())
        self.steps = self.samples = 0
        self.wait_before, self.stall_before = wait_before, stall_before
        self._start, self._paused = time.monotonic(), 0.0

    def add(self, loss: Tensor, samples: int) -> None:
        """One step's loss (device scalar) and this rank's samples."""
        self.loss = self.loss.to(loss.device) + loss
        self.steps += 1
        self.samples += samples

    def pause(self, seconds: float) -> None:
        """Leave validation out of the rate."""
        self._paused += seconds

    def seconds(self) -> float:
        """Training time so far."""
        return max(1e-9, time.monotonic() - self._start - self._paused)
