"""Crops of a scan that are drawn: a share of them around voxels of the classes, the others anywhere. No torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2w.ct.orientation import Grid
from p2w.errors import UserError
from p2w.tasks.crops import Channels, CropBox, make_sample, seeded_uniform, spacing_zyx
from p2w.tasks.task import Sample


@dataclass(frozen=True)
class RandomCrops:
    """How many crops are drawn of each scan, and how many of them around a voxel of a class."""

    size: tuple[int, int, int]
    spacing: Sequence[float] | None  # mm of a sample's voxels, None: the scan's own
    crops: int
    foreground_share: float
    seed: int

    def check(self) -> None:
        """Raise UserError for numbers that make no crops."""
        if not 1 <= self.crops <= 1000:
            raise UserError(f"--crops {self.crops}: from 1 to 1000 of each scan")
        if not 0 <= self.foreground_share <= 1:
            raise UserError(f"--foreground-share {self.foreground_share:g}: from 0 to 1")

    def cut(
        self, channels: Channels, labels: NDArray[np.integer], grid: Grid, uid: str, bits: int = 0
    ) -> Iterator[Sample]:
        """The crops of a scan, a function of seed and `uid`. `labels`: numbers of classes [z,y,x], or `bits` bits.

        The first ceil(share x crops) lie around a random voxel of one of the classes in turn, so that a small class gets as
        many as a large one. A crop stays inside the scan where it fits.
        """
        present = [number for number, _ in self._classes(labels, bits)]
        around = int(np.ceil(self.crops * self.foreground_share - 1e-9)) if present else 0
        start = int(self._uniform(uid, "class") * max(1, len(present)))
        step = np.ones(3) if self.spacing is None else np.array(self.spacing) / spacing_zyx(grid)
        extent, room = np.array(labels.shape), np.array(self.size) * step
        for crop in range(self.crops):
            if crop < around:
                number = present[(start + crop) % len(present)]
                mask = (labels >> number) & 1 if bits else labels == number
                centre = nth_voxel(mask, self._uniform(uid, f"{crop} voxel"))
                of = f"crop {crop}, around class {number + bool(bits)}"
            else:
                centre = np.array([self._uniform(uid, f"{crop} {axis}") for axis in "zyx"]) * extent
                of = f"crop {crop}, anywhere"
            first = np.where(extent > room, np.clip(centre - room / 2, 0, extent - room), (extent - room) / 2)
            box = CropBox.around(first + np.array(self.size) // 2 * step, self.size, grid, self.spacing)
            yield make_sample(channels(box), box, grid, of, -1, box.cut_labels(labels, bits))

    def _uniform(self, uid: str, what: str) -> float:
        return seeded_uniform(self.seed, uid, f"random crop {what}")

    def _classes(self, labels: NDArray[np.integer], bits: int) -> list[tuple[int, int]]:
        """The classes that a volume has, as (number, or bit; voxels)."""
        counts = np.zeros(1 << 16, np.int64)
        for image in labels:
            counts += np.bincount(image.ravel(), minlength=1 << 16)
        if not bits:
            return [(int(number), int(counts[number])) for number in np.flatnonzero(counts) if number]
        values = np.arange(len(counts))
        own = [(bit, int(counts[(values >> bit) & 1 == 1].sum())) for bit in range(bits)]
        return [(bit, count) for bit, count in own if count]


def nth_voxel(mask: NDArray, share: float) -> NDArray[np.float64]:
    """The voxel (z, y, x) of a mask that lies at `share` (0 to below 1) of all its voxels in the order of memory."""
    levels = np.array([np.count_nonzero(image) for image in mask])
    number = int(share * levels.sum())
    z = int(np.searchsorted(np.cumsum(levels), number, side="right"))
    y, x = np.nonzero(mask[z])
    at = number - int(levels[:z].sum())
    return np.array([z, y[at], x[at]], float)
