"""A scan cut into sub-scans: full tiles that do not overlap, clipped to the HU window.

Tiles start at slice `z_margin`, row 0, column 0, and stop where no full one fits before slice Z - z_margin,
row Y, column X. LUNA16's subsets 0-6 give 35,840 tiles with z_margin 0 and 28,144, the number of the paper,
with 25.

`min_std_hu` leaves out nearly constant tiles. The default, 50 HU, lies in the gap that real scans show: of 96
full tiles of three chest CTs (LIDC-IDRI, RIDER, Lung-PET-CT-Dx), 19 have a standard deviation of 3 to 36 HU
and a mean of -990 HU or less: air outside the body, with the noise of the reconstruction. Then come 100 HU,
113 HU (the most even soft tissue, mean 62 HU) and from 238 HU up all others. Such air has no parts to tell
apart: a part of it is as like any other tile of air as like its own, so it teaches nothing and costs a fifth
of the computation. 0 keeps every tile, as the paper's set does.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from p2w.ct.orientation import BadScan
from p2w.ct.scan import Scan

TILE = (64, 128, 128)  # z, y, x voxels: the paper's 128 x 128 x 64
WINDOW_HU = (-1000, 1000)
MIN_STD_HU = 50.0


@dataclass(frozen=True)
class Tiling:
    """Where tiles lie and which are kept."""

    tile: tuple[int, int, int] = TILE
    z_margin: int = 0  # slices left out at each end of the scan
    min_std_hu: float = MIN_STD_HU

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Full tiles along z, y, x in a scan of `shape` [z,y,x]."""
        depth = max(0, shape[0] - 2 * self.z_margin)
        return depth // self.tile[0], shape[1] // self.tile[1], shape[2] // self.tile[2]

    def count(self, shape: tuple[int, ...]) -> int:
        """Full tiles in a scan of `shape` [z,y,x], before `min_std_hu`."""
        nz, ny, nx = self.grid(shape)
        return nz * ny * nx

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise BadScan when not one full tile fits."""
        if self.count(shape) == 0:
            margin = f" less {self.z_margin} slices at each end" if self.z_margin else ""
            size, tile = " x ".join(map(str, shape)), " x ".join(map(str, self.tile))
            raise BadScan(f"smaller than a tile: {size} voxels (z, y, x){margin}, a tile takes {tile}")


@dataclass(frozen=True)
class SubScan:
    """One tile: its first voxel in the canonical scan, its voxels, int16 [z,y,x] clipped to the window."""

    z: int
    y: int
    x: int
    voxels: np.ndarray
    mean_hu: float
    std_hu: float


def cut_sub_scans(scan: Scan, tiling: Tiling) -> Iterator[SubScan]:
    """All full tiles, in the order of (z, y, x). Raises BadScan when there is none.

    Every tile owns its memory. `mean_hu` and `std_hu` (population) are over all its voxels, after clipping.
    """
    tiling.check(scan.voxels.shape)
    depth, height, width = tiling.tile
    nz, ny, nx = tiling.grid(scan.voxels.shape)
    for z in range(tiling.z_margin, tiling.z_margin + nz * depth, depth):
        for y in range(0, ny * height, height):
            for x in range(0, nx * width, width):
                part = scan.voxels[z : z + depth, y : y + height, x : x + width]
                voxels = np.empty(tiling.tile, "<i2")
                np.clip(part, *WINDOW_HU, out=voxels)
                yield SubScan(z, y, x, voxels, *_mean_std(voxels))


def _mean_std(voxels: np.ndarray) -> tuple[float, float]:
    """Exact: float64 holds every partial sum of whole numbers below 2**53, so no order of adding changes it.

    Slice by slice, which stays in the cache; einsum and no dot product, whose threads fight over busy cores.
    """
    total, squares = 0.0, 0.0
    for image in voxels:
        values = image.astype(np.float64).ravel()
        total += float(values.sum())
        squares += float(np.einsum("i,i", values, values))
    n = voxels.size
    mean = total / n
    return mean, max(0.0, squares / n - mean * mean) ** 0.5
