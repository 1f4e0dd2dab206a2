"""The order of sub-scans, a pure function of (seed, epoch), and the rows of each batch that one rank reads.

Every order below is an array (steps, batch) of ids: row s is the global batch of step s, column j its slot j; rank r of W
reads the slots r*B/W ... (r+1)*B/W. No order depends on NumPy's version, and resuming at any step is a slice.

- Version 1 sorts the ids by a 64-bit hash. The whole epoch must be held, and sorted first.
- Version 2 computes the index in the set from the index in the epoch (`permuted_indices`), so that a step costs what its
  batch costs, in no memory. It is that of sets from VERSION_2_FROM training sub-scans on.

A run keeps the version it began with, which `run.json` records; a run without that record has version 1.

The hash is the finaliser of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014),
a bijection on 64 bits, so that two ids never have the same hash.
"""

import functools
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2w.errors import UserError
from p2w.rng import Ids, hash64, key_word

if TYPE_CHECKING:
    from p2w.stream.local import ShardSet


def epoch_permutation(ids: Ids, seed: int, epoch: int) -> Ids:
    """The ids (n,) in the order of this epoch: sorted by hash64(id, seed, epoch)."""
    return ids[np.argsort(hash64(ids, seed, epoch))]


VERSION_2_FROM = 1_000_000  # training sub-scans
ROUNDS = 6  # of the permutation by index; each depends on a key of its own
# Number of this random stream under (seed, epoch); 1 to 3: streamed_order, prefetch, mixed
PERMUTATION_STREAM = 4
_MOST_LOOKED_UP = 1 << 14  # hashes of a round in a table: of sets of up to 268 million
_PIECE = 1 << 15  # indices computed at a time: their words stay in a core's cache


def permuted_indices(
    indices: Ids, count: int, seed: int, epoch: int, stream: int = PERMUTATION_STREAM
) -> Ids:
    """Indices in an epoch (any shape) -> indices in a set of `count`: a permutation of 0 … count - 1.

    A Feistel network over pairs (a, b), a < A and b < B, where A * B is count or a little more: in turn a changes by a hash
    of b and b by a hash of a (Black and Rogaway: Ciphers with arbitrary finite domains, CT-RSA 2002). An index outside the
    set goes through it again, until it is inside.
    """
    rounds, flat, out = (
        _rounds(count, seed, epoch, stream),
        indices.reshape(-1),
        np.empty(indices.size, np.int64),
    )
    for start in range(0, len(flat), _PIECE):
        found = _feistel(flat[start : start + _PIECE], rounds)
        while (outside := np.flatnonzero(found >= count)).size:
            found[outside] = _feistel(found[outside], rounds)
        out[start : start + _PIECE] = found
    return out.reshape(indices.shape)


@dataclass(frozen=True)
class _Rounds:
    """The permutation of one epoch: the sizes A, B and the key of each round.

    Round r adds to one number by a hash of the other, which has few values, about the root of the size of the set. So the
    hashes are looked up, in a tenth of the time of computing them: `tables` of (B,) or (A,), where that is not too many.
    """

    sizes: tuple[int, int]
    keys: tuple[np.uint64, ...]
    tables: tuple[NDArray[np.int64], ...]

    def add(self, number: int, half: Ids, out: Ids) -> None:
        """Write what round `number` adds into `out` (n,); `half` (n,) is the number that it is a hash of."""
        if self.tables:
            np.take(self.tables[number], half, out=out, mode="clip")  # "raise" would copy once more
        else:
            out[:] = self.hashed(number, half)

    def hashed(self, number: int, half: Ids) -> Ids:
        """What round `number` adds, below the size of the number that it is added to."""
        words = half.astype(np.uint64) ^ self.keys[number]
        for bits, factor in (
            (30, 0xBF58476D1CE4E5B9),
            (27, 0x94D049BB133111EB),
            (31, 1),
        ):  # as rng.splitmix64
            words ^= words >> np.uint64(bits)
            words *= np.uint64(factor)
        words >>= np.uint64(32)
        # 32 random bits times the size: the upper half is below it
        words *= np.uint64(self.sizes[number % 2])
        return (words >> np.uint64(32)).view(np.int64)


@functools.lru_cache(maxsize=8)
def _rounds(count: int, seed: int, epoch: int, stream: int) -> _Rounds:
    wide = math.isqrt(max(0, count - 1)) + 1  # A
    keys = tuple(np.uint64(key_word(seed, epoch, stream, number)) for number in range(ROUNDS))
    rounds = _Rounds((wide, -(-count // wide)), keys, ())
    if wide > _MOST_LOOKED_UP:
        return rounds
    values = [np.arange(size) for size in rounds.sizes]
    tables = [rounds.hashed(number, values[1 - number % 2]) for number in range(ROUNDS)]
    return _Rounds(rounds.sizes, keys, tuple(tables))


def _feistel(indices: Ids, rounds: _Rounds) -> Ids:
    """One pass through all rounds, on int64 (n,)."""
    halves = [indices // rounds.sizes[1]]
    halves.append(indices - halves[0] * rounds.sizes[1])  # a, b
    spare = np.empty_like(indices)
    for number in range(ROUNDS):
        half = halves[number % 2]
        rounds.add(number, halves[1 - number % 2], spare)
        half += spare
        np.subtract(half, rounds.sizes[number % 2], out=spare)
        # Modulo the size: unsigned, a negative difference is larger than any sum.
        np.minimum(half.view(np.uint64), spare.view(np.uint64), out=half.view(np.uint64))
    halves[0] *= rounds.sizes[1]
    halves[0] += halves[1]
    return halves[0]


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

        Raises UserError where they do not; the message names a batch size or a number of ranks that would.
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
                f"{', or continue with --train.elastic, and the ranks that are too many leave' if self.training else ''}"
            )
        where = f"{self.shards.where}, split '{self.split}'"
        if n == 0:
            raise UserError(f"{where}: no sub-scans, there must be one at least: cut more scans")
        if self.training and n < batch:
            most = n - n % ranks
            remedy = (
                f"use a batch of at most {most} (--data.batch {most})" if most else f"use at most {n} ranks"
            )
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
    def order_version(self) -> int:
        """Version of the order of training: that of the run, or else what the size of the set asks for."""
        return self.shards.order_version or (2 if self.n >= VERSION_2_FROM else 1)

    @functools.cached_property
    def by_index(self) -> bool:
        """Whether the ids of a step are computed from its number, without the rest of the epoch."""
        return self.training and self.shards.order == "shuffled" and self.order_version == 2

    @functools.cached_property
    def epoch_order(self) -> Callable[[int], Ids]:
        """A function of the epoch that gives the ids of all ranks (steps, B); the last few epochs are cached.

        Reader threads share it: the first of them computes an epoch, and the others wait.
        """
        lock = threading.Lock()

        @functools.lru_cache(maxsize=4 if self.n < VERSION_2_FROM else 2)
        def cached(epoch: int) -> Ids:
            if self.by_index:
                indices = np.arange(self.steps * self.batch).reshape(self.steps, self.batch)
                return self.shards.ids_at(self.all_ids, indices, self.seed, epoch)
            if self.training:
                return self.shards.train_order(self.all_ids, self.batch, self.seed, epoch)
            return self.shards.fixed_order(self.all_ids, self.batch)

        def epoch_order(epoch: int) -> Ids:
            with lock:
                return cached(epoch)

        return epoch_order

    @functools.cached_property
    def _computed_step(self) -> Callable[[int, int], Ids]:
        """A function of epoch and step that gives the ids (B,) of all ranks, by index; the last few steps are cached."""
        lock = threading.Lock()

        @functools.lru_cache(maxsize=16)
        def cached(epoch: int, step: int) -> Ids:
            indices = np.arange(step * self.batch, (step + 1) * self.batch)
            return self.shards.ids_at(self.all_ids, indices, self.seed, epoch)

        def computed(epoch: int, step: int) -> Ids:
            with lock:
                return cached(epoch, step)

        return computed

    def step_ids(self, epoch: int, step: int) -> Ids:
        """The ids (B,) of a step, of all ranks."""
        return self._computed_step(epoch, step) if self.by_index else self.epoch_order(epoch)[step]

    def ids_from(self, epoch: int, step: int, row: int) -> Ids:
        """The ids that a row of this rank's batch has in an epoch from a step on."""
        return self.epoch_order(epoch)[step:, self.share.start + row]

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
