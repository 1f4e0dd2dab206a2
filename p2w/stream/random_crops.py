"""A set that stores whole scans (`p2w.shards.scan_store`): training cuts its sub-scans from them at random.

    origin of sub-scan `id` in epoch e = a function of (seed, e, id), uniform over all that its scan has

An origin, the first voxel z, y, x of a box, is drawn with counter-based random numbers, so that batches depend on (seed,
epoch, step) alone, and the position of a run is (epoch, step), as for any set. Where a box shows too little (`min_std_hu`,
`body_only`), the next counter is used; after TRIES of them the sub-scan's own origin is taken, known to show enough.
Validation, monitors, analyses and substitutes for sub-scans that cannot be read use this own origin. There the voxels are
bit for bit those of the set of sub-scans, and so are id, key and the number of real voxels, which for a scan shorter than a
tile is the same wherever it is cut.

Memory beside the ring of batches: a buffer of one chunk for each row that a rank reads, the table of the sub-scans, and
that of the chunks.
"""

import functools
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from p2w.rng import Ids, hash64_from, key_state
from p2w.shards.manifest import Manifest
from p2w.shards.scan_store import read_scan_store
from p2w.shards.tiling import AIR
from p2w.stream.local import SampleReader, ShardSet

# Number of this random stream under (seed, epoch); `sampler`, `prefetch` and `mixed` have 1 to 4, and 7.
CROP_STREAM = 5
TRIES = 8  # origins that are drawn; in a chest a fifth of them show too little


class ScanStoreSet(ShardSet):
    """The sub-scans of stored scans. `chunks` is the set that reads the chunks, checks them and names damaged ones."""

    random_crops = True

    def __init__(self, manifest: Manifest, chunks: ShardSet) -> None:
        """Check the manifest and make the table of the sub-scans. Raises DamagedManifest."""
        self.store = store = read_scan_store(manifest)
        super().__init__(Manifest(store.wholes, manifest.meta, manifest.root), chunks.where, chunks.verify)
        self.chunks, self.min_threads = chunks, chunks.min_threads
        # (S, 3): number of first voxels that a box may have along z, y, x of each scan
        self.choices = np.maximum(1, store.end - store.begin - self.shape + 1).astype(np.uint64)

    def reader(
        self, ids: Ids, shuffle: tuple[int, int] | None = None
    ) -> AbstractContextManager[SampleReader]:
        """A reader for one thread: at the random origins of `shuffle`, its (seed, epoch); without, at their own."""
        return nullcontext(_CropReader(self, shuffle))

    def random_origin(self, sub_scan: int, seed: int, epoch: int, attempt: int = 0) -> Ids:
        """(3,): the first voxel z, y, x of a sub-scan's box in an epoch, as it is drawn by counter number `attempt`."""
        scan, states = self.store.scan[sub_scan], _origin_states(seed, epoch, attempt)
        words = hash64_from(states, np.array([sub_scan], np.int64))
        origin: Ids = self.store.begin[scan] + (words % self.choices[scan]).astype(np.int64)
        return origin

    def read_box(self, sub_scan: int, origin: Ids, out: Any, buffer: Any) -> None:
        """Copy the box of a sub-scan's scan that begins at voxel `origin` (z, y, x) into `out`, int16 (D, H, W).

        `buffer` (int16, the shape of a chunk) is written over. Raises DataError where a chunk that the box touches cannot
        be read, or its checksum differs.
        """
        store, out = self.store, np.asarray(out)
        scan = int(store.scan[sub_scan])
        begin, counts = store.begin[scan].tolist(), store.counts[scan].tolist()
        end = np.minimum(origin + self.shape, store.end[scan])
        if (end - origin < self.shape).any():
            out.fill(AIR)
        self.chunks.retry_s, self.chunks.on_wait = self.retry_s, self.on_wait
        along_z, along_y, along_x = (
            _overlaps(first, last, origin, edge)
            for first, last, origin, edge in zip(
                origin.tolist(), end.tolist(), begin, store.chunk, strict=True
            )
        )
        first_row = int(store.first_row[scan])
        for (z, to_z, from_z), (y, to_y, from_y), (x, to_x, from_x) in itertools.product(
            along_z, along_y, along_x
        ):
            self.chunks.read_into(first_row + (z * counts[1] + y) * counts[2] + x, buffer)
            out[to_z, to_y, to_x] = buffer[from_z, from_y, from_x]

    def own_voxels(self, sub_scan: int, out: Any) -> Any:
        """The part of a box (D, H, W) of this sub-scan's scan that is the scan's own, a view."""
        if self.real is None:
            return np.asarray(out)
        depth, height, width = self.size_in_voxels(np.array([sub_scan]))[0]
        return np.asarray(out)[:depth, :height, :width]

    def read_into(self, sub_scan: int, out: Any) -> None:
        """Copy the sub-scan at its own origin into `out`, int16 (D, H, W), and check it. Raises DataError."""
        _CropReader(self, None).read_into(sub_scan, out)


def open_scan_store(
    manifest: Manifest, make: Callable[[Manifest, bool], ShardSet], verify: bool
) -> ScanStoreSet:
    """The set of a manifest that stores scans; `make` opens the set of its chunks."""
    meta = manifest.meta | {"shape": manifest.meta["chunk"]}
    return ScanStoreSet(manifest, make(Manifest(manifest.table, meta, manifest.root), verify))


@functools.lru_cache(maxsize=64)
def _origin_states(seed: int, epoch: int, attempt: int) -> Ids:
    """(3,): the states of the keys (seed, epoch, CROP_STREAM, attempt, axis) for the axes z, y, x."""
    return np.concatenate([key_state(seed, epoch, CROP_STREAM, attempt, axis) for axis in range(3)])


def _overlaps(first: int, end: int, origin: int, edge: int) -> list[tuple[int, slice, slice]]:
    """Along one axis: the chunks that the voxels `first` ... `end` - 1 touch; chunk 0 begins at `origin`, each has `edge`.

    Number of the chunk, where its voxels go in the box, and which of its voxels these are.
    """
    found = []
    for number in range((first - origin) // edge, (end - 1 - origin) // edge + 1):
        corner = origin + number * edge
        low, high = max(first, corner), min(end, corner + edge)
        found.append((number, slice(low - first, high - first), slice(low - corner, high - corner)))
    return found


class _CropReader:
    """Read sub-scans at random origins, or at their own; for one thread."""

    def __init__(self, shards: ScanStoreSet, shuffle: tuple[int, int] | None) -> None:
        self.shards, self.shuffle = shards, shuffle
        self.buffer = np.empty(shards.store.chunk, np.int16)

    def read_into(self, sub_scan: int, out: Any) -> None:
        """Copy the voxels of one sub-scan into `out`, int16 (D, H, W), and check them. Raises DataError."""
        shards, own = self.shards, self.shards.store.origin[sub_scan].astype(np.int64)
        seed, epoch = self.shuffle or (0, 0)
        for attempt in range(TRIES if self.shuffle else 0):
            origin = shards.random_origin(sub_scan, seed, epoch, attempt)
            shards.read_box(sub_scan, origin, out, self.buffer)
            if np.array_equal(origin, own) or shards.store.tiling.keeps(shards.own_voxels(sub_scan, out)):
                return
        shards.read_box(sub_scan, own, out, self.buffer)
