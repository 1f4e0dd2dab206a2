"""Read a scan: int16 HU [z,y,x] in LPS orientation, with its grid in the patient's space.

LPS is the canonical orientation: x grows to the patient's left, y to posterior, z to superior, as in DICOM and LUNA16.
Scans stored in another orientation (flipped or permuted direction matrices) become views with permuted and flipped axes;
nothing is interpolated, and an oblique scan keeps its small angles in `direction`.
"""

import math
import os
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from crc32c import crc32c

from p2w.ct.dicom import plain_pixels
from p2w.ct.discover import ScanSource
from p2w.ct.orientation import BadScan, Grid, to_canonical
from p2w.ct.voxel_files import (
    VoxelLayout,
    check_file_size,
    check_reader_size,
    last_line,
    memory_limit,
    meta_image_layout,
    nifti_layout,
    nrrd_files,
    open_reader,
    read_voxels,
)

INT16 = np.iinfo(np.int16)
PADDING_HU = (
    -1500
)  # scanners write -2000, -3024 or -32768 outside the field of view; no tissue or air is that low
AIR_HU = -200  # air and lung lie below, fat and everything denser above
VOXEL_BYTES = (
    24  # memory that ITK takes for a voxel while it reads: two images of 8 bytes, and one to convert
)
RARE = 1e-3  # share of voxels; a CT of a body has more air than this, and more tissue


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
    grid, _ = _header(source)
    return grid.canonical()[0], _nbytes(source)


def stored_grid(source: ScanSource) -> Grid:
    """The grid in the stored orientation, whose `canonical()` is the grid of `read_scan`. Raises BadScan."""
    return _header(source)[0]


def read_scan(source: ScanSource) -> Scan:
    """Read a scan, check it and give it in LPS orientation. Raises BadScan when it is damaged, or not a CT volume in HU."""
    plain = plain_pixels(source.files, source.grid.size) if source.grid and source.exact else None
    if source.grid and plain:
        voxels, checksum = plain
        grid = source.grid
    else:
        array, (slope, intercept), grid, checksum = _read(source)
        voxels = to_int16(array, slope, intercept)
    check_ct(voxels)
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
    canonical, order, flips = grid.canonical()
    return ImageVolume(to_canonical(array, order, flips), canonical, _nbytes(source), checksum)


def _nbytes(source: ScanSource) -> int:
    return sum(os.path.getsize(path) for path in source_files(source))


def _read(source: ScanSource) -> tuple[np.ndarray, tuple[float, float], Grid, int]:
    """Stored values [z,y,x] in the stored orientation, (slope, intercept) still to be applied, grid and CRC-32C."""
    grid, layout = _header(source)
    if layout is None:
        return _read_with_itk(source), (1.0, 0.0), grid, _checksum(source_files(source))
    checksum = 0 if layout.path == source.files[0] else _checksum(source.files)
    flat, checksum = read_voxels(layout, checksum)
    return flat.reshape(grid.size[::-1]), (layout.slope, layout.intercept), grid, checksum


def source_files(source: ScanSource) -> tuple[str, ...]:
    """All files of a scan: in some formats the voxels are in another file than the header."""
    path = source.files[0]
    lower = path.lower()
    if lower.endswith(".mhd"):
        layout = meta_image_layout(path)
        return (path,) if layout is None or layout.path == path else (path, layout.path)
    if lower.endswith(".nhdr"):
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


def check_ct(voxels: np.ndarray) -> None:
    """Raise BadScan unless the values look like HU: some air and some tissue, apart from padding.

    Every fourth row and column of every second slice is checked. Masks, MR or PET images, values scaled to [0, 1] and raw
    scanner units have no values below -200, where air is; a scan of air or padding alone has none above.
    """
    sample = voxels[::2, ::4, ::4]
    inside = sample[sample > PADDING_HU]
    if inside.size < RARE * sample.size:
        raise BadScan("not CT values: nothing but padding")
    low, high = int(inside.min()), int(inside.max())
    if np.count_nonzero(inside < AIR_HU) < RARE * inside.size:
        raise BadScan(
            f"not CT values: {low} … {high} and nearly none below {AIR_HU} HU, where air is: a mask, "
            "another modality, or no rescale (raw values: the intercept, often -1024, was not applied)"
        )
    if np.count_nonzero(inside > AIR_HU) < RARE * inside.size:
        raise BadScan(f"not CT values: {low} … {high} and nearly none above {AIR_HU} HU, where tissue is")


def _header(source: ScanSource) -> tuple[Grid, VoxelLayout | None]:
    """The stored grid, and the layout of the voxels, or None when ITK has to read them. Raises BadScan."""
    if source.grid is not None:
        return source.grid, None
    path = source.files[0]
    lower = path.lower()
    layout = None
    if lower.endswith((".mhd", ".mha")):
        layout = meta_image_layout(path)
    elif lower.endswith((".nii", ".nii.gz")):
        layout = nifti_layout(path)
    if layout is not None:
        check_file_size(layout)
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
    direction = np.array(reader.GetDirection()).reshape(full, full)[:3, :3]
    grid = Grid(
        tuple(size[:3]), reader.GetSpacing()[:3], reader.GetOrigin()[:3], tuple(direction.ravel().tolist())
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
            series.SetFileNames(source.files)
            series.SetOutputPixelType(sitk.sitkInt32 if source.exact else sitk.sitkFloat32)
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
    return array.reshape(array.shape[-3:])


def _checksum(files: tuple[str, ...]) -> int:
    crc = 0
    for path in files:
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                crc = crc32c(piece, crc)
    return crc
