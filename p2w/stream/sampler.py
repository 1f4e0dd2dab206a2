"""The order of sub-scans, a pure function of (seed, epoch), and the rows of each batch that one rank reads.

Sorting by a 64-bit hash shuffles without the state of a generator: the order does not depend on NumPy's version, and
resuming at any step is a slice. Every order below is an array (steps, batch) of ids: row s is the global batch of step s,
column j its slot j; rank r of W reads the slots r*B/W ... (r+1)*B/W.

The hash is the finaliser of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014),
a bijection on 64 bits, so that two ids never have the same hash.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from p2w.errors import UserError
from p2w.rng import Ids, hash64

if TYPE_CHECKING:
    from p2w.stream.local import ShardSet


def epoch_permutation(ids: Ids, seed: int, epoch: int) -> Ids:
    """The ids (n,) in the order of this epoch: sorted by hash64(id, seed, epoch)."""
    return ids[np.argsort(hash64(ids, seed, epoch))]


def shuffled_order(ids: Ids, batch: int, seed: int, epoch: int) -> Ids:
    """Training order of a set with random access: (steps, batch), steps = n // batch.

    A global shuffle; the last n % batch ids of it are left out, different ones in each epoch.
    """
    steps = len(ids) // batch
    return epoch_permutation(ids, seed, epoch)[: steps * batch].reshape(steps, batch)


def fixed_order(ids: Ids, batch: int) -> Ids:
    """Validation order: (ceil(n / batch), batch), every id once in ascending order, padded with the last id."""
    steps = -(-len(ids) // batch)
    return np.concatenate([ids, np.repeat(ids[-1:], steps * batch - len(ids))]).reshape(steps, batch)


def streamed_order(ids: Ids, shards: Ids, batch: int, *, seed: int, epoch: int, buffer: int) -> Ids:
    """Training order of a set whose shards are streamed from start to end: (steps, batch), steps = n // batch.

    The shards are shuffled as a whole, their samples follow in manifest order. Slot j of the global batch gets the j-th of
    `batch` equal segments of that sequence and shuffles it within `buffer` samples: sample i is sorted by i + u * buffer,
    u uniform in [0, 1), so that at most `buffer` samples of a slot wait in memory. The last n % batch samples are left
    out. `shards` (n,) is the shard number of each id.

    Slots belong to the batch and not to ranks. So this order too does not depend on the world size, every rank has the
    same number of steps however few shards there are, and each shard crosses the network about once per epoch (twice if
    two slots share it).
    """
    steps = len(ids) // batch
    sequence = ids[np.lexsort((ids, hash64(shards, seed, epoch)))]
    slots = sequence[: steps * batch].reshape(batch, steps)
    uniform = hash64(slots, seed, epoch, 1) / 2.0**64
    moved = np.argsort(np.arange(steps) + uniform * buffer, axis=1, kind="stable")
    return np.take_along_axis(slots, moved, axis=1).T


def streamed_fixed_order(ids: Ids, batch: int) -> Ids:
    """Validation order of a streamed set: as `fixed_order`, but each slot reads a segment of consecutive ids.

    Slot j gets n // batch ids, and one more if j < n % batch, so that only the last step is padded, in the same slots as
    in `fixed_order`.
    """
    steps = -(-len(ids) // batch)
    order = np.full((steps, batch), ids[-1] if len(ids) else 0, np.int64)
    for slot, own in enumerate(np.array_split(ids, batch)):
        order[: len(own), slot] = own
        order[len(own) :, slot] = own[-1] if len(own) else ids[-1]
    return order


@dataclass(frozen=True)
class Sampler:
    """Order and rows of one rank. `batch` is the global batch size B, of which the rank reads b = B / world_size rows."""

    shards: "ShardSet"
    split: str
    batch: int
    seed: int
    rank: int
    world_size: int
    training: bool

    def __post_init__(self) -> None:
        """Check that batch, ranks and split go together.

        Raises:
            UserError: they do not; the message names a batch size or a number of ranks that would.
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
        """Ids (n,) of the split, ascending."""
        return self.shards.ids(self.split)

    @functools.cached_property
    def n(self) -> int:
        """Number of sub-scans in the split; in training, of those in an epoch."""
        return self.shards.samples_per_epoch(self.all_ids) if self.training else len(self.all_ids)

    @property
    def rows(self) -> int:
        """Number of rows of the global batch that this rank reads."""
        return self.batch // self.world_size

    @property
    def share(self) -> slice:
        """Slots of the global batch that this rank reads."""
        return slice(self.rank * self.rows, (self.rank + 1) * self.rows)

    @property
    def steps(self) -> int:
        """Number of steps per epoch: n // B in training, ceil(n / B) in validation."""
        return self.n // self.batch if self.training else -(-self.n // self.batch)

    @functools.cached_property
    def epoch_order(self) -> Callable[[int], Ids]:
        """A function of the epoch that gives the ids of all ranks (steps, B); the last few epochs are cached."""

        @functools.lru_cache(maxsize=4)
        def epoch_order(epoch: int) -> Ids:
            if self.training:
                return self.shards.train_order(self.all_ids, self.batch, self.seed, epoch)
            return self.shards.fixed_order(self.all_ids, self.batch)

        return epoch_order

    def epoch_ids(self, epoch: int) -> Ids:
        """The rank's ids of an epoch, (steps, b)."""
        return self.epoch_order(epoch)[:, self.share]

    def positions(self, epoch: int, step: int) -> Iterator[tuple[int, int]]:
        """Yield (epoch, step) from this position on: without end in training, to the end of the pass in validation."""
        while True:
            for at_step in range(step, self.steps):
                yield epoch, at_step
            if not self.training:
                return
            epoch, step = epoch + 1, 0

    def weight(self, step: int) -> Tensor:
        """Weights (b,) float32 of the rank's rows: 1, or 0 for the padding of the last validation batch."""
        slots = torch.arange(step * self.batch, (step + 1) * self.batch)[self.share]
        return (slots < self.n).float()
