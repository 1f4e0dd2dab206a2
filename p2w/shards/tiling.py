"""A scan cut into sub-scans: boxes of one shape that do not overlap, clipped to the HU window.

The first sub-scan starts at slice `z_margin`, row 0, column 0; the grid ends where no complete sub-scan fits before slice
Z - z_margin, row Y, column X. LUNA16's subsets 0-6 give 35,840 sub-scans with z_margin 0 and 28,144, the number of the
paper, with 25.

`min_std_hu` leaves out sub-scans that are nearly constant. The default of 50 HU lies in a gap of the distribution: of 96
sub-scans of three chest CTs (LIDC-IDRI, RIDER, Lung-PET-CT-Dx), 19 have a standard deviation of 3 to 36 HU and a mean of
-990 HU or less; they show air outside the body and reconstruction noise. The next ones have 100 HU, 113 HU (the most
uniform soft tissue, mean 62 HU), and all others 238 HU or more. A crop of air looks like a crop of any other sub-scan of
air, so it teaches the network nothing and costs a fifth of the computation. 0 keeps every sub-scan, as the paper does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import tyro

from p2w.ct.orientation import BadScan
from p2w.ct.scan import Scan
from p2w.errors import UserError

SUB_SCAN_SHAPE = (64, 128, 128)  # z, y, x voxels: the paper's 128 x 128 x 64
WINDOW_HU = (-1000, 1000)


@dataclass(frozen=True)
class Tiling:
    """The grid of sub-scans in a scan, and which of them are kept; `preprocess/shard_*.py` read it from the command line."""

    shape: Annotated[tuple[int, int, int], tyro.conf.Suppress] = SUB_SCAN_SHAPE  # z, y, x voxels
    z_margin: int = 0
    """Slices to leave out at each end of a scan; 25 gives the paper's number of sub-scans."""
    min_std_hu: Annotated[float, tyro.conf.arg(name="min-std")] = 50.0
    """Leave out sub-scans with a lower standard deviation (HU): nearly constant air. 0 keeps all."""

    def __post_init__(self) -> None:
        """Raise UserError for a value outside its range."""
        if self.z_margin < 0:
            raise UserError(f"--z-margin {self.z_margin}: slices to leave out at each end, 0 or more")
        if not 0 <= self.min_std_hu < WINDOW_HU[1]:
            raise UserError(
                f"--min-std {self.min_std_hu:g}: HU, from 0 (keep every sub-scan) to below {WINDOW_HU[1]}"
            )

    @staticmethod
    def from_meta(meta: dict[str, Any]) -> "Tiling":
        """The tiling that `to_meta` has written into a manifest or a settings.json."""
        depth, height, width = meta["tile"]
        return Tiling((depth, height, width), meta["z_margin"], meta["min_std_hu"])

    def to_meta(self) -> dict[str, Any]:
        """The tiling as manifests and settings.json name it."""
        return {"tile": list(self.shape), "z_margin": self.z_margin, "min_std_hu": self.min_std_hu}

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Number of sub-scans along z, y, x in a scan of `shape` [z,y,x]."""
        depth = max(0, shape[0] - 2 * self.z_margin)
        return depth // self.shape[0], shape[1] // self.shape[1], shape[2] // self.shape[2]

    def count(self, shape: tuple[int, ...]) -> int:
        """Number of sub-scans in a scan of `shape` [z,y,x], before `min_std_hu` leaves some out."""
        nz, ny, nx = self.grid(shape)
        return nz * ny * nx

    def check_size(self, shape: tuple[int, ...]) -> None:
        """Raise BadScan when a scan of `shape` [z,y,x] is too small for one sub-scan."""
        if self.count(shape) == 0:
            margin = f" less {self.z_margin} slices at each end" if self.z_margin else ""
            size, needed = " x ".join(map(str, shape)), " x ".join(map(str, self.shape))
            raise BadScan(
                f"smaller than a sub-scan: {size} voxels (z, y, x){margin}, a sub-scan takes {needed}"
            )


@dataclass(frozen=True)
class SubScan:
    """Voxels int16 [z,y,x] of one sub-scan, clipped to the window, and its first voxel in the canonical (LPS) scan."""

    z: int
    y: int
    x: int
    voxels: np.ndarray
    mean_hu: float
    std_hu: float


def cut_sub_scans(scan: Scan, tiling: Tiling) -> Iterator[SubScan]:
    """Yield all sub-scans of a scan in the order of (z, y, x), nearly constant ones included.

    Every sub-scan owns its memory. `mean_hu` and `std_hu` (population) are over all its voxels, after clipping. Raises
    BadScan when the scan is too small for one.
    """
    tiling.check_size(scan.voxels.shape)
    depth, height, width = tiling.shape
    nz, ny, nx = tiling.grid(scan.voxels.shape)
    for z in range(tiling.z_margin, tiling.z_margin + nz * depth, depth):
        for y in range(0, ny * height, height):
            for x in range(0, nx * width, width):
                part = scan.voxels[z : z + depth, y : y + height, x : x + width]
                voxels = np.empty(tiling.shape, "<i2")
                np.clip(part, *WINDOW_HU, out=voxels)
                yield SubScan(z, y, x, voxels, *_mean_std(voxels))


def _mean_std(voxels: np.ndarray) -> tuple[float, float]:
    """Mean and population standard deviation; exact, as float64 holds every partial sum of integers below 2**53.

    So the order of additions changes nothing. One slice at a time stays in the cache; einsum rather than a dot product,
    because BLAS starts threads, which compete with the other workers for the cores.
    """
    total, squares = 0.0, 0.0
    for image in voxels:
        values = image.astype(np.float64).ravel()
        total += float(values.sum())
        squares += float(np.einsum("i,i", values, values))
    n = voxels.size
    mean = total / n
    return mean, max(0.0, squares / n - mean * mean) ** 0.5
