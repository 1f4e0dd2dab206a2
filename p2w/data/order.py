"""Which sub-scans at which step: pure functions of (seed, epoch), the same on every rank and restart.

Sorting by a 64-bit hash shuffles without a generator's state, so the order stays the same whatever NumPy's
random streams become, and resuming at any step is a slice. Every order below is an array (steps, batch) of
ids: row s is the global batch of step s, column j its slot j; rank r of W reads slots r*B/W ... (r+1)*B/W.

Hash: the finaliser of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators,
OOPSLA 2014), a bijection of 64 bits, so that two ids never tie.
"""

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Words = NDArray[np.uint64]

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = 2**64


def mix64(words: Words) -> Words:
    """Scramble 64-bit words: SplitMix64's finaliser, a bijection."""
    x = words.astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash64(ids: Ids, *key: int) -> Words:
    """One 64-bit word per id from the key (seed, epoch, ...); distinct ids get distinct words."""
    state = np.zeros(1, np.uint64)
    for part in key:  # integers of any size and sign count modulo 2**64
        state = mix64(state + np.array([(part + _GOLDEN) % _WORD], np.uint64))
    return mix64(state + ids.astype(np.uint64) * np.uint64(_GOLDEN))


def permutation(ids: Ids, seed: int, epoch: int) -> Ids:
    """The ids in the order of this epoch: sorted by hash64(id, seed, epoch)."""
    return ids[np.argsort(hash64(ids, seed, epoch))]


def shuffled(ids: Ids, batch: int, seed: int, epoch: int) -> Ids:
    """Training order of a set that can be read anywhere: (steps, batch), steps = n // batch.

    A global shuffle; the n % batch ids at its end are left out, other ones each epoch.
    """
    steps = len(ids) // batch
    return permutation(ids, seed, epoch)[: steps * batch].reshape(steps, batch)


def fixed(ids: Ids, batch: int) -> Ids:
    """Validation order: (ceil(n / batch), batch), every id once and ascending, filled up with the last id."""
    steps = -(-len(ids) // batch)
    return np.concatenate([ids, np.repeat(ids[-1:], steps * batch - len(ids))]).reshape(steps, batch)


def streamed(ids: Ids, shards: Ids, batch: int, *, seed: int, epoch: int, buffer: int) -> Ids:
    """Training order of a set that is streamed, shards front to back: (steps, batch), steps = n // batch.

    The shards stand in the order of `permutation`, their samples in manifest order behind one
    another. Slot j of the global batch owns the j-th of `batch` equal stretches of that sequence and shuffles
    it within `buffer` samples: place i moves to i + u * buffer, u uniform in [0, 1), so that at most `buffer`
    samples of a slot wait in memory. The n % batch samples at the end are left out. `shards` (n,) is the
    shard number of each id.

    Slots belong to the batch and not to ranks, so this order too is independent of the world size, every rank
    has the same number of steps however few the shards, and each shard crosses the network about once an
    epoch (twice where two slots share it).
    """
    steps = len(ids) // batch
    sequence = ids[np.lexsort((ids, hash64(shards, seed, epoch)))]
    slots = sequence[: steps * batch].reshape(batch, steps)
    uniform = hash64(slots, seed, epoch, 1) / 2.0**64
    moved = np.argsort(np.arange(steps) + uniform * buffer, axis=1, kind="stable")
    return np.take_along_axis(slots, moved, axis=1).T


def streamed_fixed(ids: Ids, batch: int) -> Ids:
    """Validation order of a streamed set: as `fixed`, but each slot reads a stretch of neighbours.

    Slot j owns n // batch ids, one more for the first n % batch slots, so that only the last step is filled
    up, and in the same places as in `fixed`.
    """
    steps = -(-len(ids) // batch)
    order = np.full((steps, batch), ids[-1] if len(ids) else 0, np.int64)
    for slot, own in enumerate(np.array_split(ids, batch)):
        order[: len(own), slot] = own
        order[len(own) :, slot] = own[-1] if len(own) else ids[-1]
    return order
