"""Crops of an image round a place, in voxels of its own or of another size; and places between world and voxels.

Everything is z, y, x in the canonical (LPS) order of `p2w.data.scan`, world in mm. A crop's axes are the scan's own,
oblique ones too. Its voxel at `size // 2` lies on the place asked for, rounded to a voxel where voxels stay as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2w.data.grid import Grid

Floats = NDArray[np.floating]


def affine(grid: Grid) -> tuple[Floats, Floats]:
    """Matrix (3, 3) and origin (3,) so that world = matrix @ voxel + origin; rows and columns z, y, x."""
    matrix = np.array(grid.direction, float).reshape(3, 3) * np.array(grid.spacing, float)
    return matrix[::-1, ::-1], np.array(grid.origin, float)[::-1]


def to_voxel(grid: Grid, world_mm: Floats) -> Floats:
    """World (..., 3) z, y, x mm -> voxel (..., 3), through the inverse of the full affine."""
    matrix, origin = affine(grid)
    return np.linalg.solve(matrix, (np.asarray(world_mm, float) - origin)[..., None])[..., 0]


def to_world(grid: Grid, voxel: Floats) -> Floats:
    """Voxel (..., 3) z, y, x -> world (..., 3) mm."""
    matrix, origin = affine(grid)
    return (matrix @ np.asarray(voxel, float)[..., None])[..., 0] + origin


def spacing_zyx(grid: Grid) -> Floats:
    """mm of a voxel."""
    return np.array(grid.spacing[::-1], float)


@dataclass(frozen=True)
class Place:
    """Where a crop lies in its scan: the voxel (z, y, x) under each of its voxels is first + i * step."""

    first: Floats
    step: Floats  # voxels of the scan for one of the crop
    size: tuple[int, int, int]

    @classmethod
    def round(
        cls, centre: Floats, size: tuple[int, int, int], grid: Grid, spacing_mm: Sequence[float] | None
    ) -> "Place":
        """A crop of `size` round a voxel; `spacing_mm` z, y, x of its voxels, None: those of the scan."""
        half = np.array(size) // 2
        if spacing_mm is None:
            return cls(np.rint(np.asarray(centre, float)) - half, np.ones(3), size)
        step = np.asarray(spacing_mm, float) / spacing_zyx(grid)
        return cls(np.asarray(centre, float) - half * step, step, size)

    @property
    def centre(self) -> Floats:
        """The voxel of the scan under the crop's voxel size // 2."""
        return self.first + np.array(self.size) // 2 * self.step

    def cut(self, image: NDArray, outside: float) -> NDArray:
        """The crop, `outside` where the image ends; linear between voxels: float32 then, else of the image's type."""
        if (self.step == 1).all() and (self.first == np.rint(self.first)).all():
            return _whole(image, self.first.astype(int), self.size, outside)
        last = self.first + (np.array(self.size) - 0.5) * self.step
        low = np.maximum(np.floor(self.first - self.step / 2).astype(int), 0)
        high = np.minimum(np.ceil(last).astype(int) + 1, image.shape)
        if (low >= high).any():
            return np.full(self.size, outside, np.float32)
        box = image[tuple(slice(a, b) for a, b in zip(low, high, strict=True))].astype(np.float32)
        out = box
        for axis in range(3):  # the axes are the scan's: one at a time, memory stays small
            out = _line(out, axis, self.first[axis] - low[axis], self.step[axis], self.size[axis])
        inside = self.inside(image.shape)
        return out if inside is None else np.where(inside, out, np.float32(outside))

    def inside(self, shape: tuple[int, ...]) -> NDArray[np.bool_] | None:
        """Which voxels of the crop lie in an image of `shape`; None: all of them."""
        axes = []
        for axis in range(3):
            at = self.first[axis] + np.arange(self.size[axis]) * self.step[axis]
            axes.append((at > -0.5 - 1e-9) & (at < shape[axis] - 0.5 + 1e-9))
        if all(axis.all() for axis in axes):
            return None
        return axes[0][:, None, None] & axes[1][None, :, None] & axes[2][None, None, :]


def _whole(image: NDArray, first: NDArray[np.intp], size: tuple[int, int, int], outside: float) -> NDArray:
    """Voxels as they are."""
    out = np.full(size, outside, image.dtype)
    low = np.maximum(first, 0)
    high = np.minimum(first + np.array(size), image.shape)
    if (low < high).all():
        source = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        target = tuple(slice(a, b) for a, b in zip(low - first, high - first, strict=True))
        out[target] = image[source]
    return out


def _line(box: NDArray, axis: int, first: float, step: float, size: int) -> NDArray:
    """Linear along one axis: the values at first + i * step, held at the ends.

    A step of more than a voxel takes the mean over points spread evenly over the step, so that fine texture does not
    alias.
    """
    points = max(1, int(np.ceil(step - 0.01)))
    shape = list(box.shape)
    shape[axis] = size
    total = np.zeros(shape, np.float32)
    for point in range(points):
        at = first + (np.arange(size) + (point + 0.5) / points - 0.5) * step
        at = np.clip(at, 0, box.shape[axis] - 1)
        left = np.minimum(at.astype(int), max(0, box.shape[axis] - 2))
        share = (at - left).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        below, above = (box.take(np.minimum(i, box.shape[axis] - 1), axis) for i in (left, left + 1))
        total += below + (above - below) * share
    return total / np.float32(points)


def tiles(
    low: Sequence[int], high: Sequence[int], size: tuple[int, int, int], step: Floats, stride: float
) -> list[Floats]:
    """Centres of crops that cover the voxels from `low` to below `high`, the cover centred on them.

    `step` as in Place; `stride` in sizes of a crop: 1 = no overlap.
    """
    centres = []
    for axis in range(3):
        extent, width = high[axis] - low[axis], size[axis] * step[axis]
        count = 1 + max(0, int(np.ceil(round((extent - width) / (width * stride), 6))))
        covered = width * (1 + (count - 1) * stride)
        begin = low[axis] + (extent - covered) / 2 + size[axis] // 2 * step[axis]
        centres.append(begin + np.arange(count) * width * stride)
    return [np.array(c) for c in np.stack(np.meshgrid(*centres, indexing="ij"), -1).reshape(-1, 3)]
