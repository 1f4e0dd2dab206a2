"""Which ids one rank reads at which step, and whether the batch, the ranks and the set fit together."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from p2w.data.local import ShardSet
from p2w.data.order import Ids
from p2w.errors import UserError


@dataclass(frozen=True)
class Plan:
    """The order of one rank. `batch` is the global one, B; the rank reads b = B / world_size rows of it."""

    shards: ShardSet
    split: str
    batch: int
    seed: int
    rank: int
    world_size: int
    training: bool

    def __post_init__(self) -> None:
        """Check.

        Raises:
            UserError: what does not fit, and which batch or number of ranks would.
        """
        batch, ranks, n = self.batch, self.world_size, self.n
        if batch < 1 or not 0 <= self.rank < ranks:
            raise UserError(
                f"batch {batch} on rank {self.rank} of {ranks}: needs batch >= 1, 0 <= rank < ranks"
            )
        if batch % ranks:
            below = batch - batch % ranks
            fitting = f"{below} or {below + ranks}" if below else str(ranks)
            raise UserError(
                f"a global batch of {batch} cannot be shared evenly by {ranks} ranks: it must be a multiple "
                f"of their number; use a batch of {fitting}"
            )
        where = f"{self.shards.where}, split '{self.split}'"
        if n == 0:
            raise UserError(f"{where}: no sub-scans, there must be one at least: cut more scans")
        if self.training and n < batch:
            most = n - n % ranks
            remedy = f"use a batch of at most {most}" if most else f"use at most {n} ranks"
            raise UserError(
                f"{where}: {n} sub-scans do not fill one global batch of {batch}, and training leaves out "
                f"incomplete batches; {remedy}, or cut more scans"
            )

    @functools.cached_property
    def all_ids(self) -> Ids:
        """The ids of the split, ascending."""
        return self.shards.ids(self.split)

    @property
    def n(self) -> int:
        """Sub-scans of the split."""
        return len(self.all_ids)

    @property
    def rows(self) -> int:
        """Rows of the global batch that this rank reads."""
        return self.batch // self.world_size

    @property
    def share(self) -> slice:
        """The rank's slots of the global batch."""
        return slice(self.rank * self.rows, (self.rank + 1) * self.rows)

    @property
    def steps(self) -> int:
        """Steps of an epoch: n // B in training, ceil(n / B) in validation."""
        return self.n // self.batch if self.training else -(-self.n // self.batch)

    @functools.cached_property
    def epoch_ids(self) -> Callable[[int], Ids]:
        """The rank's ids (steps, b) of an epoch; kept for the few epochs in which the readers stand."""

        @functools.lru_cache(maxsize=4)
        def epoch_ids(epoch: int) -> Ids:
            if self.training:
                return self.shards.train_order(self.all_ids, self.batch, self.seed, epoch)[:, self.share]
            return self.shards.fixed_order(self.all_ids, self.batch)[:, self.share]

        return epoch_ids

    def places(self, epoch: int, step: int) -> Iterator[tuple[int, int]]:
        """The (epoch, step) from this one on: endless in training, one pass in validation."""
        while True:
            for place in range(step, self.steps):
                yield epoch, place
            if not self.training:
                return
            epoch, step = epoch + 1, 0

    def weight(self, step: int) -> Tensor:
        """1 for each of the rank's rows (b,) that holds a sub-scan, 0 where validation filled up."""
        places = torch.arange(step * self.batch, (step + 1) * self.batch)[self.share]
        return (places < self.n).float()
