"""The samples of a split on the device as batches in [0, 1], the fraction trained on, and their order."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2w.errors import UserError

Rows = NDArray[np.int64]


def data_fraction(
    rows: Rows,
    patients: list[str],
    fraction: float,
    seed: int,
    labels: NDArray[np.int8] | None = None,
    needed: Sequence[int] = (0, 1),
) -> Rows:
    """The rows of a fraction of the patients, ascending; `patients` and `labels` are columns of the whole set.

    Patients come in an order that a hash of seed and name draws, and the first ceil(fraction * n) stay: the patients of 10
    % are among those of 45 %, whatever else there is in the set. With `labels` as many more follow as it takes for every
    label of `needed` to be there. Raises UserError: fraction not in (0, 1], or no training patient.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"--fraction {fraction}: must be above 0 and at most 1")
    if fraction == 1:
        return rows
    names = sorted({patients[row] for row in rows})
    names.sort(key=lambda name: hashlib.sha256(f"{seed}:subset:{name}".encode()).digest())
    rank = {name: position for position, name in enumerate(names)}
    positions = np.array([rank[patients[row]] for row in rows])
    count = math.ceil(round(fraction * len(names), 9))
    if labels is not None:
        first = [positions[labels[rows] == which].min(initial=len(names) - 1) for which in needed]
        count = max([count, *(int(position) + 1 for position in first)])
    return rows[positions < count]


def fixed_batches(count: int, batch: int) -> list[int]:
    """The ends of the batches of an epoch of `count` samples: ceil(count / batch) batches whose sizes differ by one at most.

    Every sample is seen once an epoch, and none in a small last batch, whose statistics batch norm would take for the set's.
    """
    number = math.ceil(count / batch)
    return [count * (i + 1) // number for i in range(number)]


def epoch_batches(count: int, batch: int, least: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """The batches of an epoch: all samples in an order of its own, again and again until there are `least` steps."""
    ends = fixed_batches(count, batch)
    found = []
    for time in range(max(1, math.ceil(least / len(ends)))):
        positions = np.random.default_rng((seed, epoch, time)).permutation(count)
        found += [positions[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return found


def oversampled(
    batches: list[NDArray[np.int64]], foreground: NDArray[np.bool_], share: float, seed: int, epoch: int
) -> list[NDArray[np.int64]]:
    """The batches of an epoch, with samples of `foreground` in the place of others until they are `share` of each batch.

    The first samples of a batch that have none are replaced, by foreground that is not in the batch while there is some.
    """
    rng = np.random.default_rng((seed, epoch, OVERSAMPLED))
    every = np.flatnonzero(foreground)
    found = []
    for drawn_batch in batches:
        batch = drawn_batch.copy()
        lacking = math.ceil(round(share * len(batch), 9)) - int(foreground[batch].sum())
        if lacking > 0 and len(every):
            others = np.setdiff1d(every, batch)
            drawn = rng.permutation(others)[:lacking]
            drawn = np.concatenate((drawn, rng.choice(every, lacking - len(drawn))))
            batch[np.flatnonzero(~foreground[batch])[:lacking]] = drawn
        found.append(batch)
    return found


OVERSAMPLED = 1 << 20  # key of this random stream; repetitions of an epoch have keys below it
CHUNK = 64  # samples read at a time
Positions = Sequence[int] | NDArray[np.int64]


class SampleSet(Protocol):
    """What `Samples` needs of a data set; `p2w.tasks.reader.TargetSet` has it."""

    @property
    def meta(self) -> dict[str, Any]:
        """The set's metadata. Its `window` is used: the stored values that become 0 and 1."""

    @property
    def patient(self) -> Sequence[str]:
        """(n,): who each row of the set is of."""

    @property
    def label(self) -> NDArray[np.int8]:
        """(n,): -1 where there is a mask instead."""

    @property
    def foreground(self) -> NDArray[np.float32]:
        """(n,): the share of the voxels in the mask."""

    @property
    def spacing_mm(self) -> NDArray[np.float32]:
        """(n, 3): the edges of the voxels of every row of the set, z, y, x."""

    def read(self, rows: Any) -> tuple[Tensor, Tensor]:
        """Voxels int16 (B, C, D, H, W) and targets of these rows."""


class Samples:
    """Rows of a set. A sample is named by its position among them.

    Voxels lie on the device as int16 and targets as read, where the split takes at most `cache_bytes`; otherwise every batch
    is read from the shards, one batch ahead.
    """

    def __init__(
        self, source: SampleSet, rows: NDArray[np.int64], device: torch.device, cache_bytes: float
    ) -> None:
        self.source, self.rows, self.device = source, rows, device
        low, high = source.meta["window"]
        self.low, self.scale = float(low), 1 / float(high - low)
        self.cached: tuple[Tensor, Tensor] | None = None
        if len(rows) and self._sample_bytes() * len(rows) <= cache_bytes:
            self.cached = self._read_all()

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.rows)

    def spacing_mm(self, positions: Positions) -> NDArray[np.float32]:
        """(B, 3): the edges of the voxels of the samples at these positions, z, y, x."""
        return self.source.spacing_mm[self.rows[np.asarray(positions, np.int64)]]

    def batches(self, positions: Sequence[Positions]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each list of positions: volumes (B, C, D, H, W) float32 in [0, 1], and targets, on the device."""
        if not len(positions):
            return
        if self.cached is not None:
            voxels, targets = self.cached
            every = torch.from_numpy(np.concatenate([np.asarray(some, np.int64) for some in positions]))
            every = self.pinned(every).to(self.device, non_blocking=True)  # one copy for all batches
            for at in every.split([len(some) for some in positions]):
                yield self._unit(voxels[at]), targets[at]
            return
        with ThreadPoolExecutor(1, "p2w-samples", self._own_device) as reader:
            ahead = reader.submit(self._read, positions[0])
            for number in range(1, len(positions) + 1):
                voxels, targets = ahead.result()
                if number < len(positions):
                    ahead = reader.submit(self._read, positions[number])
                x, target = (part.to(self.device, non_blocking=True) for part in (voxels, targets))
                yield self._unit(x), target

    def _unit(self, voxels: Tensor) -> Tensor:
        """Stored int16 -> float32 in [0, 1] (clipped to the window and scaled)."""
        return voxels.float().sub_(self.low).mul_(self.scale).clamp_(0, 1)

    def _read(self, positions: Positions) -> tuple[Tensor, Tensor]:
        """Voxels and targets of these positions; for a GPU in pinned memory, from which they are copied beside its work."""
        voxels, targets = self.source.read(self.rows[np.asarray(positions, np.int64)])
        return self.pinned(voxels), self.pinned(targets)

    def pinned(self, part: Tensor) -> Tensor:
        """The tensor in memory from which a GPU copies beside its work; on a CPU itself."""
        return part.pin_memory() if self.device.type == "cuda" else part

    def _own_device(self) -> None:
        """A new thread begins on device 0, where pinning memory would cost other ranks theirs."""
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)

    def _sample_bytes(self) -> int:
        voxels, targets = self.source.read(self.rows[:1])
        return voxels.nbytes + targets.nbytes

    def _read_all(self) -> tuple[Tensor, Tensor]:
        """Read all samples, a chunk at a time, into memory that is allocated once."""
        cached: tuple[Tensor, Tensor] | None = None
        for start in range(0, len(self.rows), CHUNK):
            parts = self.source.read(self.rows[start : start + CHUNK])
            if cached is None:
                voxels, targets = (
                    torch.empty((len(self.rows), *part.shape[1:]), dtype=part.dtype, device=self.device)
                    for part in parts
                )
                cached = voxels, targets
            for whole, part in zip(cached, parts, strict=True):
                whole[start : start + len(part)] = part.to(self.device)
        assert cached is not None
        return cached
