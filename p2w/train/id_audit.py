"""Checks, by a sum of 64-bit checksums, that all ranks together train on the planned sub-scans, each in its own slot.

Each rank adds a checksum of (epoch, step, slot, id) for every row that it trains on, and rank 0 subtracts those of the whole
batch: over all ranks the sum is 0 modulo 2^64, unless a rank has another order. The sum goes with the all-reduce that asks
for stop requests, so it costs no message. A checkpoint has the checksum of its last step, so that a run that continues in
another order is refused as well.
"""

import numpy as np
import torch

from p2w.errors import SharedError
from p2w.rng import Ids, hash64
from p2w.stream.sampler import Sampler
from p2w.stream.stream import Batch
from p2w.world import World

_WORD = 1 << 64


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
        who = (
            f"rank(s) {', '.join(odd[:8])} have another order than rank 0"
            if odd
            else "a rank read other sub-scans"
        )
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
