"""Counts over all ranks that may end a run: bad samples, steps that are not finite, collapse, and sub-scans off the plan.

On a GPU, a step's gradient norm is read only after the next step has been launched, so that the GPU never waits for the
host.

`IdAudit` checks that all ranks together train on the planned sub-scans, each in its own slot. Each rank adds a checksum of
(epoch, step, slot, id) for every row that it trains on, and rank 0 subtracts those of the whole batch: over all ranks the
sum is 0 modulo 2^64, unless a rank has another order. The sum goes with the all-reduce that asks for stop requests, so it
costs no message. A checkpoint has the checksum of its last step, so that a run that continues in another order is refused
as well.
"""

import math
import time
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from p2w.config import DataConfig
from p2w.errors import SharedError
from p2w.log import Log
from p2w.rng import Ids, hash64
from p2w.stream.sampler import Sampler
from p2w.stream.stream import Batch, Stream
from p2w.train.step import StepResult
from p2w.world import World

_WORD = 1 << 64


class BadSampleBudget:
    """Counts bad samples: `total` since the first step, `in_epoch` in this epoch. Checkpoints contain the counts."""

    def __init__(self, config: DataConfig, world: World, stream: Stream) -> None:
        self.config, self.world = config, world
        self.per_epoch = stream.steps_per_epoch * config.batch
        self.epoch = self.in_epoch = self.total = 0

    def count(self, batch: Batch, step: int) -> None:
        """Count the bad samples of a batch; every rank calls it at every step.

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
        """Values for the log; empty when a bad sample stops the run."""
        if self.config.on_bad_sample == "stop":
            return {}
        return {"data/bad_samples": self.total, "data/bad_share": self.in_epoch / self.per_epoch}

    def state(self) -> list[int]:
        """The counts, for a checkpoint."""
        return [self.epoch, self.in_epoch, self.total]

    def load(self, state: list[int]) -> None:
        """Restore what `state` returned."""
        self.epoch, self.in_epoch, self.total = state


class NonfiniteSteps:
    """Counts steps in a row that were skipped for a non-finite gradient, up to the newest step whose norm was read.

    Checkpoints contain the count, so a restart does not reset it.
    """

    def __init__(self, limit: int, world: World, key: Callable[[int], str], log: Log, lag: int = 0) -> None:
        """`limit` skipped steps in a row end the run; `key` maps a sub-scan id to its name; `lag` steps stay unread."""
        self.limit, self.world, self.key, self.log, self.lag = limit, world, key, log, lag
        self.in_a_row = 0
        self._unread: deque[tuple[StepResult, Tensor, int]] = deque()

    def add(self, result: StepResult, ids: Tensor, step: int) -> None:
        """Add a step on the sub-scans `ids` (b,), and count the one `lag` steps before it. Raises as `read_all`."""
        self._unread.append((result, ids, step))
        while len(self._unread) > self.lag:
            self._count(*self._unread.popleft())

    def read_all(self) -> None:
        """Count every step so far; every rank calls it at the same steps.

        Raises SharedError, on all ranks at the same step, when there are too many skipped steps in a row.
        """
        while self._unread:
            self._count(*self._unread.popleft())

    def in_a_row_now(self) -> int:
        """Skipped steps in a row, including unread steps. No collective: it neither logs nor raises."""
        count = self.in_a_row
        for result, _, _ in self._unread:
            count = 0 if result.applied else count + 1
        return count

    def _count(self, result: StepResult, ids: Tensor, step: int) -> None:
        self.in_a_row = 0 if result.applied else self.in_a_row + 1
        if result.applied:
            return
        cause = self._cause(result, ids, step)
        self.log.warn(
            f"step {step}: gradient norm {result.grad_norm}, step skipped on all ranks ({self.in_a_row} in a row); {cause}"
        )
        if self.in_a_row >= self.limit:
            raise SharedError(
                f"step {step}, rank {self.world.rank}: {self.in_a_row} steps in a row without a finite gradient; {cause}; "
                "lower --optim.lr, or pass --train.precision fp32"
            )

    def _cause(self, result: StepResult, ids: Tensor, step: int) -> str:
        """Which ranks' losses were not finite, and on which sub-scans. A collective: all ranks skip the same steps."""
        bad = self.world.gather(~torch.isfinite(result.loss).cpu().reshape(1)).tolist()
        keys = [self.key(sub_scan) for sub_scan in self.world.gather(ids.cpu()).tolist()]
        share = len(ids)
        causes = [
            f"the loss of rank {rank} was not finite, on {', '.join(keys[rank * share : (rank + 1) * share])}"
            for rank in range(self.world.size)
            if bad[rank]
        ]
        cause = "; ".join(causes) or "the loss of every rank was finite"
        self.log.event(step, {"skipped": cause, "grad_norm": str(result.grad_norm), "keys": keys})
        return cause


class Collapse:
    """Notices a network that no longer learns: the gradient of all its weights is 0."""

    LEAST = 1e-12  # of the norm; a smaller gradient changes no float32 weight

    def __init__(self, log: Log) -> None:
        self.log, self.since = log, -1

    def look(self, grad_norm: float, step: int) -> None:
        """Warn at the first logged step whose gradient is 0; begin anew when a later gradient is not 0."""
        if grad_norm >= self.LEAST or math.isnan(grad_norm):
            self.since = -1
        elif self.since < 0:
            self.since = step
            self.log.warn(f"step {step}: {self.why()}")
            self.log.event(step, {"collapsed": self.why()})

    def why(self) -> str:
        """What has happened, in words; empty for a network that learns."""
        if self.since < 0:
            return ""
        return (
            f"the network has collapsed: from step {self.since} on its gradient is 0, so that it learns nothing more; begin "
            "anew with a lower --optim.lr"
        )


class LogWindow:
    """Sums of loss, samples and time since the last logged line."""

    def __init__(self, wait_before: float = 0.0, stall_before: float = 0.0) -> None:
        """`wait_before`, `stall_before`: seconds of waiting for data and for checkpoints when the window began."""
        self.loss = torch.zeros(())
        self.steps = self.samples = 0
        self.wait_before, self.stall_before = wait_before, stall_before
        self._start, self._paused = time.monotonic(), 0.0

    def add(self, loss: Tensor, samples: int) -> None:
        """Add a step's loss (device scalar) and this rank's number of samples."""
        self.loss = self.loss.to(loss.device) + loss
        self.steps += 1
        self.samples += samples

    def pause(self, seconds: float) -> None:
        """Do not count these seconds as training time: an evaluation took them."""
        self._paused += seconds

    def seconds(self) -> float:
        """Training time so far in seconds, without pauses."""
        return max(1e-9, time.monotonic() - self._start - self._paused)


class IdAudit:
    """The sum of one rank since the last `check`. Call `add` at every step, and `check` at the same steps on all ranks."""

    def __init__(self, sampler: Sampler, world: World, on: bool = True) -> None:
        self.sampler, self.world, self.on = sampler, world, on
        self._sum = 0

    def add(self, batch: Batch) -> None:
        """Add the rows of a batch. Substitutes for bad sub-scans, where they are allowed, count as what they replace."""
        if not self.on:
            return
        sampler, at = self.sampler, (batch.epoch, batch.step)
        own = sampler.step_ids(batch.epoch, batch.step)[sampler.share]
        first = sampler.share.start
        self._sum += checksum(own, *at, first)
        if batch.bad and sampler.shards.on_bad == "stop":
            self._sum += 1  # it has other sub-scans than this rank's own plan says
        if self.world.is_main:
            self._sum -= checksum(sampler.step_ids(batch.epoch, batch.step), *at)

    def take(self) -> int:
        """This rank's sum as a signed 64-bit integer, to be summed over ranks; the next sum begins at 0."""
        value, self._sum = self._sum % _WORD, 0
        return value - _WORD if value >= _WORD // 2 else value

    def check(self, total: int, step: int) -> None:
        """Raise SharedError, on all ranks, unless the sum over ranks is 0. The message names the ranks that differ."""
        if total == 0:
            return
        epoch, at = divmod(max(0, step - 1), self.sampler.steps)
        plan = checksum(self.sampler.step_ids(epoch, at), epoch, at)
        plans = self.world.gather(torch.tensor([plan - _WORD if plan >= _WORD // 2 else plan])).tolist()
        odd = [str(rank) for rank, other in enumerate(plans) if other != plans[0]]
        order = f"rank(s) {', '.join(odd[:8])} have another order than rank 0"
        who = order if odd else "a rank read other sub-scans"
        raise SharedError(
            f"step {step}: the ranks do not train on the sub-scans of the plan: {who}; checkpoints since the last start may "
            "be wrong: start all ranks with the same version and the same --shards"
        )

    def last(self, step: int) -> int:
        """The checksum of the whole batch of the step before `step`, for a checkpoint; 0 for step 0."""
        if step == 0:
            return 0
        epoch, at = divmod(step - 1, self.sampler.steps)
        return checksum(self.sampler.step_ids(epoch, at), epoch, at)

    def continue_from(self, step: int, saved: int | None) -> None:
        """Raise SharedError, on all ranks, when a checkpoint's last step had other sub-scans than this order gives.

        None: a checkpoint of an earlier version, which lacks it.
        """
        if self.on and saved is not None and saved != self.last(step):
            raise SharedError(
                f"step {step}: the run has trained on the sub-scans in another order than the one of this command, and "
                "would train on some twice and on others never: continue it with the version and the --shards it began with"
            )


def checksum(ids: Ids, epoch: int, step: int, first: int = 0) -> int:
    """The sum over slots `first`, `first` + 1, … of 64-bit words of (epoch, step, slot, id); modulo 2^64."""
    slots = np.arange(first, first + len(ids), dtype=np.uint64)
    words = hash64(ids, epoch, step) * (np.uint64(2) * slots + np.uint64(1))
    return int(words.sum(dtype=np.uint64))
