"""Resample a scan: to another voxel spacing, and slices that lean or lie at uneven steps to a straight grid.

Another spacing (`resample`): int16 HU in, int16 HU out, with the grid of the result. On every axis an output voxel is a
weighted mean of input voxels: linear interpolation where the new spacing is finer, the triangle filter where it is coarser,
as wide as the step between output voxels, so that fine detail cannot alias. This is the convention of `p2w.geometry`
(half-pixel centres, weights renormalised at the border). No weight is negative: nothing rings, no value leaves the range of
its neighbours, and air stays air to the last bit.

    resampled, grid = resample(scan.voxels, scan.grid, (2.0, 1.0, 1.0))      # mm z, y, x

Where it only refines, the values are those of SimpleITK's linear interpolator (a test compares them). SimpleITK has no
filter of non-negative weights for coarser grids that would be fast enough: its Gaussians take several times as long as
its resampling. Sparse matrices, one for each axis, take less time than SimpleITK's interpolation alone, and give the same
bits with any number of threads. Memory: the output, and some tens of MiB beside it.

A straight grid (`straighten`), for gantry tilt and uneven steps: every slice keeps its plane. It is moved within it to where
it lies in the patient (linear, by SimpleITK), and a plane of the new grid between two slices is interpolated between them.
What no slice covers is air.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from p2w.ct.orientation import BadScan, Grid
from p2w.errors import UserError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

SPACING_MM = (0.01, 100.0)  # smallest and largest spacing that can be asked for
MOST_VOXELS = 1 << 30  # of a resampled scan: 2 GiB, so that the input and it take less than 3 GiB
SAME = 1e-5  # relative difference of spacings below which an axis is left alone: 1/200 voxel over 512
SLAB = 16  # stored slices that are converted to float at a time
AIR = -1000  # HU
NEAR = 1e-3  # share of a step or pixel within which nothing is interpolated

Spacing = tuple[float, float, float]


def check_spacing(spacing_zyx: Sequence[float]) -> None:
    """Raise UserError unless these are three spacings in mm that a scan can be resampled to."""
    low, high = SPACING_MM
    if len(spacing_zyx) != 3 or not all(low <= mm <= high for mm in spacing_zyx):
        said = " ".join(f"{mm:g}" for mm in spacing_zyx)
        raise UserError(
            f"--spacing {said}: mm along z y x, three numbers from {low:g} to {high:g}, such as 2 1 1"
        )


def resampled_grid(grid: Grid, spacing_zyx: Spacing) -> Grid:
    """The grid of a scan after `resample`: as many voxels as cover its extent best, centred in it.

    The extent (number of voxels times spacing) of an axis changes by half a new voxel at most, and in equal parts at both
    ends, so flipping and resampling commute. Axes whose spacing is the wanted one stay as they are. Raises BadScan when the
    result would have more than MOST_VOXELS voxels.
    """
    size, spacing, origin = list(grid.size), list(grid.spacing), np.array(grid.origin, float)
    direction = np.array(grid.direction, float).reshape(3, 3)
    for axis, wanted in enumerate(reversed(spacing_zyx)):
        count, step = _count_and_step(grid.size[axis], grid.spacing[axis], wanted)
        if step == 1.0:
            continue
        first = _centres(grid.size[axis], count, step)[0] - 0.5  # as an index of the input, at voxel centres
        origin = origin + direction[:, axis] * first * grid.spacing[axis]
        size[axis], spacing[axis] = count, wanted
    if math.prod(size) > MOST_VOXELS:
        shape, said = " x ".join(map(str, size[::-1])), " x ".join(f"{mm:g}" for mm in spacing_zyx)
        raise BadScan(
            f"would have {shape} voxels (z, y, x) at {said} mm, at most {MOST_VOXELS:,} are possible: choose a "
            "coarser --spacing"
        )
    return Grid(tuple(size), tuple(spacing), tuple(origin.tolist()), grid.direction)


def resample(
    voxels: NDArray[np.int16], grid: Grid, spacing_zyx: Spacing, window: tuple[int, int] | None = None
) -> tuple[NDArray[np.int16], Grid]:
    """Voxels int16 [z,y,x] on `grid` (axes x, y, z) at the spacing `spacing_zyx` in mm, and their new grid.

    Values are clipped to `window` before they are averaged: padding of -3024 or metal of 3000 HU would else change their
    neighbours. The means are rounded half to even. Where nothing has to change, the input itself is returned, or clipped.
    Raises BadScan as `resampled_grid` does.
    """
    new = resampled_grid(grid, spacing_zyx)
    along = [
        _weights(before, after, _count_and_step(before, old, wanted)[1])
        for before, after, old, wanted in zip(
            voxels.shape, new.size[::-1], grid.spacing[::-1], spacing_zyx, strict=True
        )
    ]
    along_z, along_y, along_x = along
    if along_z is None and along_y is None and along_x is None:
        return (voxels if window is None else voxels.clip(*window)), new
    out = np.empty(new.size[::-1], np.int16)
    # The slices from `first` to `last`, resampled in their plane
    planes = np.empty((0, *out.shape[1:]), np.float32)
    first = last = 0
    stride = max(1, int(SLAB * min(1.0, len(out) / len(voxels))))
    for start in range(0, len(out), stride):
        stop = min(start + stride, len(out))
        needed_first, needed_last = (start, stop) if along_z is None else _touched(along_z, start, stop)
        added = _in_plane(voxels[last:needed_last], along_y, along_x, window)
        planes = np.concatenate((planes[needed_first - first :], added))
        first, last = needed_first, needed_last
        slab = planes
        if along_z is not None:
            slab = (along_z[start:stop, first:last] @ planes.reshape(len(planes), -1)).reshape(
                -1, *out.shape[1:]
            )
        np.rint(slab, out=out[start:stop], casting="unsafe")
    return out, new


def _count_and_step(count: int, spacing: float, wanted: float) -> tuple[int, float]:
    """Number of output voxels along an axis, and the step between them in input voxels; 1.0 for an axis left alone."""
    step = wanted / spacing
    if abs(step - 1.0) < SAME:
        return count, 1.0
    return max(1, math.floor(count / step + 0.5)), step


def _centres(count: int, out_count: int, step: float) -> NDArray[np.float64]:
    """Centres (out_count,) of the output voxels in coordinates where input voxel i covers [i, i + 1]."""
    steps: NDArray[np.float64] = np.arange(out_count, dtype=np.float64) + 0.5
    return (count - out_count * step) / 2 + steps * step


def _weights(count: int, out_count: int, step: float) -> "csr_matrix | None":
    """Weights (out_count, count) float32 of every input voxel in every output voxel; None where an axis is left alone."""
    if step == 1.0:
        return None
    from scipy.sparse import csr_matrix  # noqa: PLC0415  scipy takes long to import, and few sets are resampled

    radius, centres = max(1.0, step), _centres(count, out_count, step)
    # The border's output voxels may lie outside of the first and last centre, where the nearest voxel counts alone.
    centres = centres.clip(0.5, count - 0.5)
    voxel = np.floor(centres - radius).astype(np.int64)[:, None] + np.arange(math.ceil(2 * radius) + 2)
    weight = np.maximum(0.0, 1 - np.abs(voxel + 0.5 - centres[:, None]) / radius)
    weight[(voxel < 0) | (voxel >= count)] = 0
    weight /= weight.sum(1, keepdims=True)
    row, column = np.nonzero(weight)
    entries = (weight[row, column].astype(np.float32), (row, voxel[row, column]))
    return csr_matrix(entries, shape=(out_count, count))


def _touched(weights: "csr_matrix", start: int, stop: int) -> tuple[int, int]:
    """First and last (exclusive) input voxel that the output voxels from `start` to `stop` need."""
    columns = weights.indices[weights.indptr[start] : weights.indptr[stop]]
    return int(columns.min()), int(columns.max()) + 1


def _in_plane(
    slices: NDArray[np.int16],
    along_y: "csr_matrix | None",
    along_x: "csr_matrix | None",
    window: tuple[int, int] | None,
) -> NDArray[np.float32]:
    """Slices (n, Y, X) clipped and resampled along y and x, one at a time: a slice stays in a core's cache."""
    height = slices.shape[1] if along_y is None else along_y.shape[0]
    width = slices.shape[2] if along_x is None else along_x.shape[0]
    out = np.empty((len(slices), height, width), np.float32)
    image, clipped = np.empty(slices.shape[1:], np.float32), np.empty(slices.shape[1:], np.int16)
    for stored, made in zip(slices, out, strict=True):
        np.copyto(image, stored if window is None else np.clip(stored, *window, out=clipped))
        rows = image if along_y is None else along_y @ image
        made[...] = rows if along_x is None else (along_x @ np.ascontiguousarray(rows.T)).T
    return out


def straight_grid(stored: Grid, positions: Sequence[Sequence[float]]) -> Grid:
    """The straight grid that holds all slices: `stored` is that of the first with the wanted step, `positions` in mm."""
    along, aside = _offsets(stored, positions)
    low, high = aside.min(axis=0), aside.max(axis=0)
    columns, rows = (
        int(np.ceil((high[i] - low[i]) / stored.spacing[i] - NEAR)) + stored.size[i] for i in (0, 1)
    )
    count = int(np.floor(float(along[-1]) / stored.spacing[2] + NEAR)) + 1
    axes = np.array(stored.direction).reshape(3, 3)
    origin = np.array(stored.origin) + axes[:, 0] * low[0] + axes[:, 1] * low[1]
    return Grid((columns, rows, count), stored.spacing, tuple(origin.tolist()), stored.direction)


def _offsets(
    stored: Grid, positions: Sequence[Sequence[float]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each slice, mm from the first one along the normal (n), and within its plane along rows and columns (n, 2)."""
    axes = np.array(stored.direction).reshape(3, 3)
    offset = (np.array(positions) - np.array(stored.origin)) @ axes
    return offset[:, 2], offset[:, :2]


def straighten(
    voxels: NDArray[Any], stored: Grid, positions: Sequence[Sequence[float]], air: float = AIR
) -> NDArray[Any]:
    """HU [z,y,x] of slices at these positions, resampled to `straight_grid(stored, positions)`; integers are rounded.

    Of another modality `air` is its lowest value: what no slice covers has it.
    """
    whole = voxels.dtype.kind in "iu"
    grid = straight_grid(stored, positions)
    along, aside = _offsets(stored, positions)
    corner = aside.min(axis=0)
    out = np.empty(grid.size[::-1], voxels.dtype)
    moved: dict[int, NDArray[np.float32]] = {}

    def plane(k: int) -> NDArray[np.float32]:
        if k not in moved:
            moved.pop(min(moved), None) if len(moved) > 1 else None
            moved[k] = _move(voxels[k], stored, aside[k], corner, grid, air)
        return moved[k]

    for z in range(len(out)):
        height = z * stored.spacing[2]
        k = min(int(np.searchsorted(along, height, side="right")) - 1, len(along) - 2)
        share = float((height - along[k]) / (along[k + 1] - along[k]))
        if share < NEAR or share > 1 - NEAR:
            made = plane(k + (share > NEAR))
        else:
            made = plane(k) * np.float32(1 - share) + plane(k + 1) * np.float32(share)
        out[z] = np.rint(made) if whole else made
    return out


def _move(
    image: NDArray[Any],
    stored: Grid,
    aside: NDArray[np.float64],
    corner: NDArray[np.float64],
    grid: Grid,
    air: float,
) -> NDArray[np.float32]:
    """One slice on the rows and columns of the new grid; air beyond it."""
    source = sitk.GetImageFromArray(np.maximum(image.astype(np.float32), np.float32(air)))
    spacing = stored.spacing[:2]
    source.SetSpacing(spacing)
    source.SetOrigin(aside.tolist())
    resample = sitk.ResampleImageFilter()
    resample.SetSize(grid.size[:2])
    resample.SetOutputSpacing(spacing)
    resample.SetOutputOrigin(corner.tolist())
    resample.SetInterpolator(sitk.sitkLinear)
    resample.SetDefaultPixelValue(air)
    moved: NDArray[np.float32] = sitk.GetArrayFromImage(resample.Execute(source))
    return moved
