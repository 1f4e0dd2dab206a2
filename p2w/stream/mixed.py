"""A mixture of data sets, from which training draws with weights. Its order is a function of seed and epoch alone.

An epoch takes as many sub-scans of every set as its weight says, and no sub-scan twice: it ends where the first set is used
up. So a set with a small share is not seen whole in an epoch, but another random share of it in each. Which sub-scans an
epoch takes, and where in the epoch, are two hashes of (seed, epoch, id); as elsewhere, a position in the run is (epoch,
step), and resuming is a slice. Validation has all sub-scans of all sets once, whatever the weights.

The id of a sub-scan is its row in the manifests, one after the other in the order of the command line.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2w.errors import UserError
from p2w.rng import Ids, hash64
from p2w.shards.manifest import BETWEEN, MixturePart, data_fingerprint
from p2w.stream.local import SampleReader, ShardSet
from p2w.stream.sampler import PERMUTATION_STREAM, permuted_indices

# Number of this random stream under (seed, epoch); 1 and 2 are those of `sampler` and `prefetch`
MIXING_STREAM = 3


class MixedSet(ShardSet):
    """Several sets, each with a share of an epoch."""

    def __init__(self, sets: list[ShardSet], parts: list[MixturePart]) -> None:
        """Put the sets together; a part without weight counts by the size of its training split.

        Raises:
            UserError: sets of different shapes or windows, an empty one, or one that can only be streamed.
        """
        self.sets, self.where = sets, BETWEEN.join(map(str, parts))
        _check(sets, self.where)
        first = sets[0]
        self.shape, self.nbytes, self.verify = first.shape, first.nbytes, first.verify
        self.on_bad, self.reported_bad = "stop", set()
        self.min_threads = max(one.min_threads for one in sets)
        self.random_crops = any(one.random_crops for one in sets)
        lengths = [len(one) for one in sets]
        # First id of each set, and the number of all
        self.starts: Ids = np.cumsum([0, *lengths]).astype(np.int64)
        weights = [
            len(one.ids("train")) if part.weight is None else part.weight
            for one, part in zip(sets, parts, strict=True)
        ]
        self.weights = [weight / sum(weights) for weight in weights]
        self.offsets, self.checksums = (
            np.concatenate([getattr(one, name) for one in sets]) for name in ("offsets", "checksums")
        )
        filled = any(one.real is not None for one in sets)
        every = [one.size_in_voxels(np.arange(len(one))) for one in sets]
        self.real = np.concatenate(every) if filled else None
        self.shard_names = [f"{one.where}/{name}" for one in sets for name in one.shard_names]
        self.shard_sizes = [size for one in sets for size in one.shard_sizes]
        before = np.cumsum([0, *(len(one.shard_names) for one in sets)])
        self.shard_numbers = np.concatenate(
            [one.shard_numbers + at for one, at in zip(sets, before, strict=False)]
        )
        self.meta = self._meta(parts)

    def _meta(self, parts: list[MixturePart]) -> dict[str, Any]:
        """What the sets' manifests have in common, all scans and shards, and the parts of the mixture."""
        first = self.sets[0].meta
        splits = [one.meta.get("split", {}) for one in self.sets]
        parts_meta = [
            {"shards": part.where, "weight": weight, "data": data_fingerprint(one.meta)}
            | ({"store": one.meta["store"]} if "store" in one.meta else {})
            for part, weight, one in zip(parts, self.weights, self.sets, strict=True)
        ]
        same = ("shape", "dtype", "window_hu", "format", "tiling", "modality", "intensity", "store")
        return {
            key: first[key]
            for key in same
            if all(one.meta.get(key) == first.get(key) for one in self.sets) and key in first
        } | {
            "split": {
                name: [uid for one in splits for uid in one.get(name, [])]
                for name in ("train_scans", "val_scans")
            },
            "shards": [shard for one in self.sets for shard in one.meta["shards"]],
            "mixture": parts_meta,
        }

    def call_while_waiting(self, call: Callable[[], None]) -> None:
        """As for `ShardSet`; the sets are what waits."""
        for one in self.sets:
            one.call_while_waiting(call)

    def ids(self, split: str) -> Ids:
        """Ids of the split of all sets, ascending."""
        return np.concatenate([one.ids(split) + at for one, at in zip(self.sets, self.starts, strict=False)])

    @functools.cached_property
    def spacing_mm(self) -> NDArray[np.float32]:
        """(n, 3): spacing of every sub-scan along z, y, x in mm."""
        return np.concatenate([one.spacing_mm for one in self.sets])

    def key(self, sub_scan: int) -> str:
        """The key `UID/zZZZZ_yYYYY_xXXXX` of a sub-scan."""
        own, row = self._set_of(sub_scan)
        return own.key(row)

    def scan_uids(self, ids: Ids) -> set[str]:
        """The scans that these sub-scans are cut from."""
        numbers = np.searchsorted(self.starts, ids, "right") - 1
        return set().union(
            *(one.scan_uids(ids[numbers == at] - self.starts[at]) for at, one in enumerate(self.sets))
        )

    def number_of(self, sub_scan: int) -> tuple[int, int]:
        """The number of a sub-scan's set, and its id there."""
        number = int(np.searchsorted(self.starts, sub_scan, "right")) - 1
        return number, sub_scan - int(self.starts[number])

    def _set_of(self, sub_scan: int) -> tuple[ShardSet, int]:
        """The set of a sub-scan, and its id there."""
        number, row = self.number_of(sub_scan)
        return self.sets[number], row

    def shares(self, ids: Ids) -> list[int]:
        """How many sub-scans of each set an epoch takes; `ids` are those of the split."""
        numbers = np.searchsorted(self.starts, ids, "right") - 1
        sizes = np.bincount(numbers, minlength=len(self.sets))
        epoch = min(size / weight for size, weight in zip(sizes.tolist(), self.weights, strict=True))
        return [
            min(size, math.floor(epoch * weight + 1e-9))
            for size, weight in zip(sizes.tolist(), self.weights, strict=True)
        ]

    def samples_per_epoch(self, ids: Ids) -> int:
        """Number of sub-scans in an epoch."""
        return sum(self.shares(ids))

    def train_order(self, ids: Ids, batch: int, seed: int, epoch: int) -> Ids:
        """Ids of every step of a training epoch, (steps, batch)."""
        numbers, chosen = np.searchsorted(self.starts, ids, "right") - 1, []
        for number, share in enumerate(self.shares(ids)):
            own = ids[numbers == number]
            chosen.append(own[np.argsort(hash64(own, seed, epoch))[:share]])
        taken = np.concatenate(chosen)
        steps = len(taken) // batch
        return taken[np.argsort(hash64(taken, seed, epoch, MIXING_STREAM))][: steps * batch].reshape(
            steps, batch
        )

    def ids_at(self, ids: Ids, indices: Ids, seed: int, epoch: int) -> Ids:
        """Ids at these indices (any shape) of a training epoch of version 2; `ids` are those of the split.

        The indices of all sets, one after the other, are permuted, and in each set's part its own sub-scans.
        """
        shares, firsts = self.shares(ids), np.searchsorted(ids, self.starts)
        ends = np.cumsum(shares)
        mixed = permuted_indices(indices, int(ends[-1]), seed, epoch, MIXING_STREAM + PERMUTATION_STREAM)
        numbers, found = np.searchsorted(ends, mixed, "right"), np.empty(indices.shape, np.int64)
        for number, share in enumerate(shares):
            chosen = numbers == number
            own = ids[firsts[number] : firsts[number + 1]]
            stream = PERMUTATION_STREAM + 256 * (number + 1)
            found[chosen] = own[
                permuted_indices(mixed[chosen] - (ends[number] - share), len(own), seed, epoch, stream)
            ]
        return found

    def reader(
        self, ids: Ids, shuffle: tuple[int, int] | None = None
    ) -> AbstractContextManager[SampleReader]:
        """The mixture itself; sets that store scans are cut at the random origins of `shuffle`, its (seed, epoch)."""
        return self._readers(shuffle) if self.random_crops else nullcontext(self)

    @contextmanager
    def _readers(self, shuffle: tuple[int, int] | None) -> Iterator[SampleReader]:
        none = np.zeros(0, np.int64)  # which ids are asked for says nothing to sets with random access
        with ExitStack() as stack:
            yield _MixedReader(self, [stack.enter_context(one.reader(none, shuffle)) for one in self.sets])

    def read_into(self, sub_scan: int, out: Any) -> None:
        """Copy the voxels of one sub-scan into `out`, int16 (D, H, W), and check them. Raises DataError."""
        own, row = self._set_of(sub_scan)
        own.on_wait = self.on_wait  # a plain attribute, set once a run has its watchdog
        own.read_into(row, out)


class _MixedReader:
    """Read sub-scans of a mixture for one thread, by a reader of each of its sets."""

    def __init__(self, mixture: MixedSet, readers: list[SampleReader]) -> None:
        self.mixture, self.readers = mixture, readers

    def read_into(self, sub_scan: int, out: Any) -> None:
        """Copy the voxels of one sub-scan into `out`, int16 (D, H, W), and check them. Raises DataError."""
        number, row = self.mixture.number_of(sub_scan)
        self.mixture.sets[number].on_wait = self.mixture.on_wait
        self.readers[number].read_into(row, out)


def _check(sets: list[ShardSet], where: str) -> None:
    first = sets[0]
    for one in sets:
        if one.order == "streamed":
            raise UserError(
                f"--shards {where}: {one.where} can only be streamed, and a mixture needs folders, or servers with byte "
                "ranges: copy it to a folder"
            )
        if one.shape != first.shape:
            shapes = " and ".join(" x ".join(map(str, shape)) for shape in (first.shape, one.shape))
            raise UserError(
                f"--shards {where}: sub-scans of {shapes} voxels (z, y, x) cannot be mixed: cut the sets with one --tile"
            )
        if one.meta.get("window_hu") != first.meta.get("window_hu"):
            raise UserError(f"--shards {where}: their windows differ: cut the sets with one version of p2w")
        if not len(one.ids("train")):
            raise UserError(f"--shards {where}: {one.where} has no sub-scan to train on: leave it out")
