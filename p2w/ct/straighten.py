"""Resample slices that lean (gantry tilt) or lie at uneven steps to a straight grid of equal steps.

Every slice keeps its plane: it is moved within it to where it lies in the patient (linear, by SimpleITK), and a plane of the
new grid between two slices is interpolated between them. What no slice covers is air.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from p2w.ct.orientation import Grid

AIR = -1000  # HU
NEAR = 1e-3  # share of a step or pixel within which nothing is interpolated


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
