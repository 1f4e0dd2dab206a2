"""A scan cut into sub-scans: boxes of one shape, clipped to the HU window.

By default they are the paper's 128 x 128 x 64 native voxels and do not overlap. The first one starts at slice `z_margin`,
row 0, column 0; the grid ends where no complete sub-scan fits before slice Z - z_margin, row Y, column X. LUNA16's subsets
0-6 give 35,840 sub-scans with z_margin 0 and 28,144, the number of the paper, with 25.

`min_std_hu` leaves out sub-scans that are nearly constant. The default of 50 HU lies in a gap of the distribution: of 96
sub-scans of three chest CTs (LIDC-IDRI, RIDER, Lung-PET-CT-Dx), 19 have a standard deviation of 3 to 36 HU and a mean of
-990 HU or less; they show air outside the body and reconstruction noise. The next ones have 100 HU, 113 HU (the most
uniform soft tissue, mean 62 HU), and all others 238 HU or more. A crop of air looks like a crop of any other sub-scan of
air, so it teaches the network nothing and costs a fifth of the computation. 0 keeps every sub-scan, as the paper does.

`short` says what happens to a scan that is smaller than a sub-scan: with "pad" it gives one that is filled up with air
behind its last slice, row or column. `SubScan.real` is how many voxels along z, y, x are the scan's own; the manifest
keeps them, and training cuts parts and takes losses inside of them.

`body_only` leaves out sub-scans that show little of a body: less than a tenth of their voxels lies above -900 HU, where
lung and all other tissue is. It is meant for small sub-scans. Of 672 sub-scans of 64 x 64 x 32 voxels of eight chest CTs
(LIDC-IDRI, TCGA-THCA, 4D-Lung), 126 show so little, 78 of which `min_std_hu` keeps, for a strip of skin or the table.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from p2w.ct.orientation import BadScan, Grid
from p2w.ct.resample import Spacing, check_spacing, resample, resampled_grid
from p2w.ct.scan import Scan
from p2w.errors import UserError
from p2w.files import type_mismatch

SUB_SCAN_SHAPE = (64, 128, 128)  # z, y, x voxels: the paper's 128 x 128 x 64
WINDOW_HU = (-1000, 1000)
AIR = WINDOW_HU[0]  # what a short scan is filled up with
MOST_TILE_VOXELS = 1 << 28  # of a sub-scan: half a GiB
BODY_HU = -900  # lung and all other tissue lie above; air and its noise, clothes and foam below
BODY_SHARE = 0.1  # of a sub-scan's own voxels
SOME_SLICES = 8  # every so many slices are looked at first
# Types of the entries of a manifest's tiling that are written only where they differ from the default.
OPTIONAL_META = {
    "stride": [int],
    "short": str,
    "body": {"above_hu": int, "share": float},
    "spacing_mm": [float],
}


@dataclass(frozen=True)
class Tiling:
    """The grid of sub-scans in a scan, and which of them are kept; options of `p2w shard-luna` and `p2w shard`."""

    shape: Annotated[tuple[int, int, int], tyro.conf.arg(name="tile", metavar="D H W")] = SUB_SCAN_SHAPE
    """Size of a sub-scan in voxels z y x: the paper's 64 128 128."""
    z_margin: int = 0
    """Slices to leave out at each end of a scan; 25 gives the paper's number of sub-scans."""
    min_std_hu: Annotated[float, tyro.conf.arg(name="min-std")] = 50.0
    """Leave out sub-scans with a lower standard deviation (HU): nearly constant air. 0 keeps all."""
    stride: Annotated[tuple[int, int, int] | None, tyro.conf.arg(metavar="D H W")] = None
    """Voxels z y x from one sub-scan to the next; less than --tile makes them overlap. Unset: that of --tile."""
    short: Literal["skip", "pad"] = "skip"
    """A scan smaller than --tile: skip names it as a bad scan; pad fills it up with air, which training leaves out of parts
    and losses."""
    body_only: bool = False
    """Leave out sub-scans of which less than a tenth lies above -900 HU, where lung and all other tissue is."""
    spacing: Annotated[Spacing | None, tyro.conf.arg(metavar="Z Y X")] = None
    """Resample every scan to this spacing in mm, antialiased. Unset: native voxels, as in the paper."""

    def __post_init__(self) -> None:
        """Raise UserError for a value outside its range."""
        if self.z_margin < 0:
            raise UserError(f"--z-margin {self.z_margin}: slices to leave out at each end, 0 or more")
        if not 0 <= self.min_std_hu < WINDOW_HU[1]:
            raise UserError(
                f"--min-std {self.min_std_hu:g}: HU, from 0 (keep every sub-scan) to below {WINDOW_HU[1]}"
            )
        if min(self.shape) < 1 or math.prod(self.shape) > MOST_TILE_VOXELS:
            raise UserError(
                f"--tile {_spaced(self.shape)}: voxels z y x, each 1 or more, at most {MOST_TILE_VOXELS:,} together; the "
                f"usual is {_spaced(SUB_SCAN_SHAPE)}"
            )
        if self.stride is not None and min(self.stride) < 1:
            raise UserError(f"--stride {_spaced(self.stride)}: voxels z y x, each 1 or more")
        if self.spacing is not None:
            check_spacing(self.spacing)

    @staticmethod
    def from_meta(meta: dict[str, Any]) -> "Tiling":
        """The tiling that `to_meta` has written into a manifest. Raises UserError for impossible values."""
        present = {name: kind for name, kind in OPTIONAL_META.items() if name in meta}
        said = type_mismatch(meta, {"tile": [int]} | present, "its tiling")
        vectors = [meta[name] for name in ("tile", "stride", "spacing_mm") if name in meta]
        if said or any(len(one) != 3 for one in vectors) or meta.get("short", "pad") != "pad":
            raise UserError(f"the manifest does not say how the set was cut ({said or meta}): cut it anew")
        depth, height, width = meta["tile"]
        stride, spacing = (
            None if meta.get(name) is None else tuple(meta[name]) for name in ("stride", "spacing_mm")
        )
        more = {"short": meta.get("short", "skip"), "body_only": "body" in meta}
        return Tiling(
            (depth, height, width), meta["z_margin"], meta["min_std_hu"], stride, **more, spacing=spacing
        )

    def to_meta(self) -> dict[str, Any]:
        """The tiling as manifests and settings.json name it; defaults are left out, as in earlier versions."""
        meta = {"tile": list(self.shape), "z_margin": self.z_margin, "min_std_hu": self.min_std_hu}
        if self.stride not in (None, self.shape):
            meta["stride"] = list(self.stride)
        if self.short != "skip":
            meta["short"] = self.short
        if self.body_only:
            meta["body"] = {"above_hu": BODY_HU, "share": BODY_SHARE}
        if self.spacing is not None:
            meta["spacing_mm"] = list(self.spacing)
        return meta

    @property
    def pads(self) -> bool:
        """Whether sub-scans may be filled up with air, so that their rows say how much of them is real."""
        return self.short == "pad"

    def rule(self) -> str:
        """Which sub-scans are left out, in words for a message."""
        rules = [f"standard deviation < {self.min_std_hu:g} HU"] * bool(self.min_std_hu or not self.body_only)
        if self.body_only:
            rules.append(f"less than {BODY_SHARE:.0%} above {BODY_HU} HU")
        return " or ".join(rules)

    def resampled_grid(self, grid: Grid) -> Grid:
        """The grid of a scan as it is cut. Raises BadScan when it would be too large."""
        return grid if self.spacing is None else resampled_grid(grid, self.spacing)

    def resampled(self, scan: Scan) -> Scan:
        """The scan as it is cut: at the wanted spacing, if there is one. Raises BadScan when it would be too large."""
        if self.spacing is None:
            return scan
        voxels, grid = resample(scan.voxels, scan.grid, self.spacing, WINDOW_HU)
        return dataclasses.replace(scan, voxels=voxels, grid=grid)

    def starts(self, shape: tuple[int, ...]) -> tuple[range, range, range]:
        """First voxels of the sub-scans along z, y, x in a scan of `shape` [z,y,x], as it is cut."""
        z, y, x = (
            self._along(count, margin, axis)
            for axis, (count, margin) in enumerate(zip(shape, (self.z_margin, 0, 0), strict=True))
        )
        return z, y, x

    def _along(self, count: int, margin: int, axis: int) -> range:
        tile, step = self.shape[axis], (self.stride or self.shape)[axis]
        if self.pads and 0 < count - 2 * margin < tile:
            return range(margin, margin + 1)
        return range(margin, count - margin - tile + 1, step)

    def count(self, shape: tuple[int, ...]) -> int:
        """Number of sub-scans in a scan of `shape` [z,y,x], as it is cut, before some are left out for what they show."""
        return math.prod(map(len, self.starts(shape)))

    def keeps(self, voxels: np.ndarray) -> bool:
        """Whether a box of these voxels of a scan [z,y,x], clipped to the window, is not left out for what it shows.

        The answer is that of `SubScan.kept`. For most boxes every eighth slice decides: the squared deviations of some
        voxels from their own mean are never more than those of all voxels from the mean of all.
        """
        if self.body_only and not shows_body(voxels):
            return False
        if not self.min_std_hu:
            return True
        least = self.min_std_hu**2 * voxels.size
        some = voxels[::SOME_SLICES]
        if _mean_std(some)[1] ** 2 * some.size > least * (1 + 1e-6):
            return True
        return _mean_std(voxels)[1] >= self.min_std_hu

    def check_size(self, shape: tuple[int, ...]) -> None:
        """Raise BadScan when a scan of `shape` [z,y,x] is too small for one sub-scan."""
        if self.count(shape) == 0:
            margin = f" less {self.z_margin} slices at each end" if self.z_margin else ""
            size, needed = " x ".join(map(str, shape)), " x ".join(map(str, self.shape))
            raise BadScan(
                f"smaller than a sub-scan: {size} voxels (z, y, x){margin}, a sub-scan takes {needed}; --short pad fills it "
                "up with air, --tile D H W cuts smaller ones, --spacing Z Y X resamples"
            )


@dataclass(frozen=True)
class SubScan:
    """Voxels int16 [z,y,x] of one sub-scan, clipped to the window, and its first voxel in the canonical (LPS) scan.

    `real` is how many voxels along z, y, x are the scan's own; behind them, all is air. Mean and standard deviation
    (population) are over the real voxels, after clipping; `body` is the share of them that lies above BODY_HU.
    """

    z: int
    y: int
    x: int
    voxels: np.ndarray
    mean_hu: float
    std_hu: float
    real: tuple[int, int, int]

    def kept(self, tiling: Tiling) -> bool:
        """Whether the sub-scan is kept by `min_std_hu` and `body_only`."""
        return self.std_hu >= tiling.min_std_hu and (not tiling.body_only or shows_body(self.own()))

    def own(self) -> np.ndarray:
        """The real voxels, a view."""
        depth, height, width = self.real
        return self.voxels[:depth, :height, :width]


def shows_body(voxels: np.ndarray) -> bool:
    """Whether at least BODY_SHARE of the voxels (HU) lie above BODY_HU."""
    return bool(np.count_nonzero(voxels > BODY_HU) >= BODY_SHARE * voxels.size)


def cut_sub_scans(scan: Scan, tiling: Tiling) -> Iterator[SubScan]:
    """Yield all sub-scans of a scan in the order of (z, y, x), those that are not `kept` included.

    The scan is cut as it is: `Tiling.resampled` comes before. Every sub-scan owns its memory. Raises BadScan when the scan
    is too small for one.
    """
    shape = scan.voxels.shape
    tiling.check_size(shape)
    for first in itertools.product(*tiling.starts(shape)):
        yield cut_box(scan, first, tiling.shape, shape[0] - tiling.z_margin)


def cut_box(scan: Scan, first: tuple[int, int, int], size: tuple[int, int, int], end_z: int) -> SubScan:
    """The box of `size` voxels (z, y, x) that begins at voxel `first` of a scan, clipped to the window.

    What lies behind slice `end_z` - 1, or the last row or column of the scan, is air.
    """
    (z, y, x), (depth, height, width) = first, size
    part = scan.voxels[z : min(z + depth, end_z), y : y + height, x : x + width]
    if part.shape == size:
        voxels = np.empty(size, "<i2")
        np.clip(part, *WINDOW_HU, out=voxels)
        return SubScan(z, y, x, voxels, *_mean_std(voxels), size)
    voxels = np.full(size, AIR, "<i2")
    own = voxels[: part.shape[0], : part.shape[1], : part.shape[2]]
    np.clip(part, *WINDOW_HU, out=own)
    return SubScan(z, y, x, voxels, *_mean_std(own), part.shape)


def _spaced(numbers: Iterable[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)


_ROWS = (1 << 24) // max(map(abs, WINDOW_HU)) ** 2  # squares whose sum float32 holds exactly: 16
_BLOCK = 1 << 16  # voxels that are summed at a time, so that they stay in a core's cache; a multiple of _ROWS


def _mean_std(voxels: np.ndarray) -> tuple[float, float]:
    """Mean and population standard deviation of voxels within WINDOW_HU, exact: every partial sum is an integer that its
    type holds.

    So the order of additions changes nothing. einsum rather than a dot product, because BLAS starts threads, which compete
    with the other workers for the cores.
    """
    flat = np.ascontiguousarray(voxels).reshape(-1)
    total, squares = 0, 0.0
    buffer = np.empty(min(_BLOCK, flat.size), np.float32)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        even = block.size - block.size % _ROWS
        rows = block[:even].reshape(_ROWS, -1)
        total += int(np.add.reduce(rows, dtype=np.int16).sum(dtype=np.int64))  # of 16 rows at most 16,000
        values = buffer[:even].reshape(rows.shape)
        values[...] = rows
        squares += float(np.einsum("ij,ij->j", values, values).sum(dtype=np.float64))
        for value in block[even:].tolist():
            total, squares = total + value, squares + value * value
    n = flat.size
    mean = total / n
    return mean, max(0.0, squares / n - mean * mean) ** 0.5
