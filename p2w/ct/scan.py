"""Read a scan: int16 HU [z,y,x] in LPS orientation, with its grid in the patient's space; or one of another modality.

LPS is the canonical orientation: x grows to the patient's left, y to posterior, z to superior, as in DICOM and LUNA16.
Scans stored in another orientation (flipped or permuted direction matrices) become views with permuted and flipped axes;
nothing is interpolated, and an oblique scan keeps its small angles in `direction`.

Modalities other than CT have values without a fixed unit, so each scan is scaled by its own percentiles: the 0.5th of all
voxels becomes 0, the 99.5th becomes 1, and what lies beyond is clipped. Shards hold these as int16 in the CT window, -1000
for 0 and 1000 for 1, so that every recipe's `pretext.window_hu` reads them as they are. Target tasks (`p2w prepare general
--values percentiles`) and `p2w predict` scale by the same percentiles.
"""

import contextlib
import math
import os
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import SimpleITK as sitk
from crc32c import crc32c
from numpy.typing import NDArray

from p2w.ct.dicom_pixels import correct_gdcm, plain_pixels, unpacked_files
from p2w.ct.discover import ScanSource
from p2w.ct.enhanced_dicom import read_frames
from p2w.ct.hu_values import check_hu
from p2w.ct.meta_image import meta_image_files, meta_image_layout
from p2w.ct.nifti import read_nifti
from p2w.ct.orientation import BadScan, Grid, ShearedAxes, check_axes, leaning_slices, to_canonical
from p2w.ct.resample import straight_grid, straighten
from p2w.ct.voxel_files import (
    VoxelLayout,
    check_file_size,
    check_nrrd,
    check_reader_size,
    last_line,
    memory_limit,
    nrrd_files,
    open_reader,
    read_voxels,
)

INT16 = np.iinfo(np.int16)
Modality = Literal["ct", "mr", "pt"]
PERCENTILES = (0.5, 99.5)
# Memory that ITK takes for a voxel while it reads: two images of 8 bytes, and one to convert
VOXEL_BYTES = 24


@dataclass(frozen=True)
class Scan:
    """Voxels int16 HU [z,y,x] in LPS orientation (a view, strides may be negative) and their grid, axes x, y, z."""

    uid: str
    voxels: np.ndarray
    grid: Grid
    nbytes: int  # of the source files
    checksum: int  # CRC-32C of the source files' bytes, one after the other


@dataclass(frozen=True)
class ImageVolume:
    """Values of any modality, or labels, [z,y,x] in LPS orientation (a view), and their grid; other fields as in Scan."""

    values: np.ndarray
    grid: Grid
    nbytes: int
    checksum: int


def quiet_itk(threads: int) -> None:
    """Limit ITK to `threads` threads in this process, and switch its warnings off."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    sitk.ProcessObject.SetGlobalWarningDisplay(False)


def read_grid(source: ScanSource) -> tuple[Grid, int]:
    """The canonical grid and the size in bytes of a scan, from its headers alone. Raises BadScan."""
    return stored_grid(source).canonical()[0], _nbytes(source)


def stored_grid(source: ScanSource) -> Grid:
    """The grid in the stored orientation, whose `canonical()` is the grid of `read_scan`. Raises BadScan."""
    grid, _ = _header(source)
    return straight_grid(grid, source.positions) if source.positions else grid


def read_scan(source: ScanSource) -> Scan:
    """Read a scan, check it and give it in LPS orientation. Raises BadScan when it is damaged, or not a CT volume in HU."""
    plain = (
        plain_pixels(source.files, source.grid.size)
        if source.grid and source.exact and not source.frames
        else None
    )
    if source.grid and plain:
        voxels, checksum = plain
        grid = source.grid
    else:
        array, (slope, intercept), grid, checksum = _read(source)
        voxels = to_int16(array, slope, intercept)
    if not source.assume_hu:
        check_hu(voxels)
    if source.positions:
        voxels, grid = straighten(voxels, grid, source.positions), straight_grid(grid, source.positions)
    canonical, order, flips = grid.canonical()
    return Scan(source.uid, to_canonical(voxels, order, flips), canonical, _nbytes(source), checksum)


def read_image(source: ScanSource) -> ImageVolume:
    """Read an image of any modality, or a mask, in LPS orientation; values are scaled if the header says so.

    Raises BadScan when it is damaged or holds values that are not finite.
    """
    array, (slope, intercept), grid, checksum = _read(source)
    if (slope, intercept) != (1.0, 0.0):
        array = array * np.float32(slope) + np.float32(intercept)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise BadScan("NaN or infinite values")
    if source.positions:
        lowest = float(array.min())
        array, grid = straighten(array, grid, source.positions, lowest), straight_grid(grid, source.positions)
    canonical, order, flips = grid.canonical()
    return ImageVolume(to_canonical(array, order, flips), canonical, _nbytes(source), checksum)


def _nbytes(source: ScanSource) -> int:
    return sum(os.path.getsize(path) for path in source_files(source))


def _read(source: ScanSource) -> tuple[np.ndarray, tuple[float, float], Grid, int]:
    """Stored values [z,y,x] in the stored orientation, (slope, intercept) still to be applied, grid and CRC-32C."""
    grid, layout = _header(source)
    if source.frames:
        array = read_frames(source.files, source.frames, source.info.modality == "CT")
        if array.shape != grid.size[::-1]:
            raise BadScan(f"its pixels are {array.shape} (z, y, x), its headers say {grid.size[::-1]}")
        return array, (1.0, 0.0), grid, _checksum(source.files)
    if layout is None:
        return _read_with_itk(source), (1.0, 0.0), grid, _checksum(source_files(source))
    checksum = 0 if layout.path == source.files[0] else _checksum(source.files)
    flat, checksum = read_voxels(layout, checksum)
    return flat.reshape(grid.size[::-1]), (layout.slope, layout.intercept), grid, checksum


def source_files(source: ScanSource) -> tuple[str, ...]:
    """All files of a scan: in some formats the voxels are in another file than the header."""
    path = source.files[0]
    lower = path.lower()
    if lower.endswith((".mhd", ".mha")):
        return meta_image_files(path)
    if lower.endswith((".nhdr", ".nrrd")):
        return nrrd_files(path)
    return source.files


def to_int16(array: np.ndarray, slope: float = 1.0, intercept: float = 0.0) -> np.ndarray:
    """Stored values [z,y,x] to int16 HU, rounded half to even and clipped. Raises BadScan unless all are finite.

    Converted slice by slice, so that a whole scan is never in memory as floats too.
    """
    plain = (slope, intercept) == (1.0, 0.0)
    if plain and array.dtype == np.int16 and array.dtype.isnative:
        return array
    out = np.empty(array.shape, np.int16)
    for z, image in enumerate(array):
        values = image if plain else image.astype(np.float64) * slope + intercept
        if values.dtype.kind == "f":
            if not np.isfinite(values).all():
                raise BadScan(f"NaN or infinite values, first in stored slice {z}")
            values = np.rint(values)
        out[z] = np.clip(values, INT16.min, INT16.max)
    return out


def straightened(source: ScanSource) -> ScanSource:
    """The scan; where it is an image file whose third axis leans, with the places of its slices, so that it is resampled.

    Any other scan is given as it is: what is wrong with it shows when it is read.
    """
    if source.grid is not None:
        return source
    try:
        grid, _ = _file_header(source)
    except (BadScan, OSError):
        return source
    try:
        check_axes(grid)
    except ShearedAxes as why:
        with contextlib.suppress(BadScan):
            return replace(source, positions=leaning_slices(grid)[1], resampled=str(why).partition(" (")[0])
    except BadScan:
        pass
    return source


def _header(source: ScanSource) -> tuple[Grid, VoxelLayout | None]:
    """The stored grid, and the layout of the voxels, or None when ITK has to read them. Raises BadScan.

    Of slices that have to be resampled it is the grid of the first, with the wanted step.
    """
    if source.grid is not None:
        return source.grid, None
    grid, layout = _file_header(source)
    if source.positions:
        return leaning_slices(grid)[0], layout
    check_axes(grid)
    return grid, layout


def _file_header(source: ScanSource) -> tuple[Grid, VoxelLayout | None]:
    """The grid as an image file has it, whose axes may be sheared, and the layout of its voxels, or None as `_header`."""
    path = source.files[0]
    lower = path.lower()
    if lower.endswith((".nii", ".nii.gz")):
        voxels, grid = read_nifti(path)
        check_file_size(voxels)
        return grid, voxels
    layout = meta_image_layout(path) if lower.endswith((".mhd", ".mha")) else None
    if layout is not None:
        check_file_size(layout)
    elif lower.endswith((".nrrd", ".nhdr")):
        check_nrrd(path)
    reader = open_reader(path)
    size, dimension = list(reader.GetSize()), reader.GetDimension()
    while dimension > 3 and size[dimension - 1] == 1:
        dimension -= 1
    if reader.GetNumberOfComponents() != 1:
        raise BadScan(
            f"has {reader.GetNumberOfComponents()} values a voxel (RGB or a vector), not one CT value"
        )
    if dimension != 3:
        raise BadScan(
            f"{dimension}-D, of size {'x'.join(map(str, size))}: one volume of 3 dimensions is needed"
        )
    full = reader.GetDimension()
    spacing = np.array(reader.GetSpacing()[:3])
    # Older ITK wrote negative spacings; the axis then runs the other way.
    direction = np.array(reader.GetDirection()).reshape(full, full)[:3, :3] * np.sign(spacing)
    grid = Grid(
        tuple(size[:3]),
        tuple(np.abs(spacing).tolist()),
        reader.GetOrigin()[:3],
        tuple((direction + 0.0).ravel().tolist()),
    )
    if layout is None:
        check_reader_size(path, reader, sum(os.path.getsize(file) for file in source_files(source)))
    elif layout.count != math.prod(grid.size):
        raise BadScan(f"wrong size: {layout.count:,} voxels, not {'x'.join(map(str, grid.size))}")
    return grid, layout


def _read_with_itk(source: ScanSource) -> np.ndarray:
    """Values [z,y,x] in the stored orientation; DICOM is rescaled, to int32 if slopes and intercepts are integers."""
    try:
        if source.grid is not None:
            series = sitk.ImageSeriesReader()
            series.SetImageIO("GDCMImageIO")
            series.SetOutputPixelType(sitk.sitkInt32 if source.exact else sitk.sitkFloat32)
            with unpacked_files(source.files) as files:
                series.SetFileNames(files)
                with memory_limit(VOXEL_BYTES * math.prod(source.grid.size)):
                    image = series.Execute()
        else:
            reader = open_reader(source.files[0])
            with memory_limit(VOXEL_BYTES * math.prod(reader.GetSize())):
                image = reader.Execute()
    except (RuntimeError, MemoryError) as error:
        raise BadScan(f"cannot be read: {last_line(error)}") from error
    array = sitk.GetArrayFromImage(image)
    if source.grid is not None and array.shape != source.grid.size[::-1]:
        raise BadScan(f"its pixels are {array.shape} (z, y, x), its headers say {source.grid.size[::-1]}")
    if source.grid is not None:
        correct_gdcm(array, source.files, source.info.modality == "CT")
    return array.reshape(array.shape[-3:])


def _checksum(files: tuple[str, ...]) -> int:
    crc = 0
    for path in files:
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                crc = crc32c(piece, crc)
    return crc


def percentile_range(values: NDArray) -> tuple[float, float]:
    """The values of a scan that become 0 and 1: its percentiles over all voxels. Raises BadScan where they are one value."""
    low, high = (float(value) for value in np.percentile(values, PERCENTILES))
    if not low < high:
        raise BadScan(
            f"99 % of its voxels have one value, {low:g}: nothing to scale by percentiles; is it a mask or an empty image?"
        )
    return low, high


def read_scaled(source: ScanSource, window: tuple[int, int]) -> tuple[Scan, tuple[float, float]]:
    """Read a scan of any modality and scale its percentiles to `window`, int16 rounded half to even; and their values.

    Raises BadScan as `read_image` and `percentile_range` do.
    """
    image = read_image(source)
    low, high = percentile_range(image.values)
    bottom, top = window
    voxels = np.empty(image.values.shape, np.int16)
    # Slice by slice, so that a whole scan is never in memory as float64
    for z, values in enumerate(image.values):
        share = np.clip((values.astype(np.float64) - low) / (high - low), 0, 1)
        voxels[z] = np.rint(bottom + share * (top - bottom))
    return Scan(source.uid, voxels, image.grid, image.nbytes, image.checksum), (low, high)
