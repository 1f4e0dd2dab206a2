"""Steps whose gradient was not finite: skipped on all ranks together, named, and too many in a row end the run.

On a GPU a step's gradient norm is read when the next step has been asked for, so that the GPU never waits for the host.
"""

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from p2w.errors import SharedError
from p2w.log import Log
from p2w.train.step import StepResult
from p2w.world import World


class Skips:
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
                "lower --optim.lr, or pass --train.amp fp32"
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
