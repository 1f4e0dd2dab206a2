"""Pixels of DICOM slices as HU: read here in one pass where they are plain, otherwise by GDCM, whose result is corrected.

Uncompressed pixels are read in one pass that also gives the checksum of the files. GDCM, through SimpleITK, reads pixels
that are compressed, big-endian, deflated, or rescaled by fractions. What it leaves undone is done here for both: MONOCHROME1
tells how pixels are displayed, and GDCM inverts their values; PixelPaddingValue marks what is no image.

PS3.5 section 8.1.1: a cell of 16 bits has the value in its lowest `bits stored` bits, and anything in the others. PS3.3
C.11.1.1: HU = cell x slope + intercept. C.7.5.1.1.2: cells from PixelPaddingValue to PixelPaddingRangeLimit are padding.
"""

import math
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import SimpleITK as sitk
from crc32c import crc32c
from numpy.typing import NDArray

from p2w.ct.dicom import COLOURLESS, GZIP, GZIP_MAGIC, IMPLICIT, OVERLAY_BIT, SYNTAX, Encoding, elements
from p2w.ct.orientation import BadScan
from p2w.ct.voxel_files import memory_limit

SAMPLES, COLOURS, FRAMES, ROWS, COLUMNS = 0x00280002, 0x00280004, 0x00280008, 0x00280010, 0x00280011
ALLOCATED, STORED, HIGH_BIT, SIGNED = 0x00280100, 0x00280101, 0x00280102, 0x00280103
PADDING, PADDING_LIMIT = 0x00280120, 0x00280121
INTERCEPT, SLOPE, TABLE = 0x00281052, 0x00281053, 0x00283000
INT16 = np.iinfo(np.int16)
MOST_SLOPE = 1 << 14  # times a cell of 16 bits still fits 32 bits
PLAIN = ("", IMPLICIT, "1.2.840.10008.1.2.1")  # transfer syntaxes
AIR = -1000  # HU that padding becomes where it would be brighter
# HU; padding above it is padding anywhere, below it only where it reaches the border of the slice
TISSUE_END = 3071
STRAY = 1e-3  # share of cells that may hold more than `bits stored` bits


@dataclass(frozen=True)
class PixelForm:
    """How the cells of a slice are to be understood."""

    stored: int  # bits
    high: int
    allocated: int
    signed: int
    inverted: bool  # MONOCHROME1
    slope: float
    intercept: float
    padding: tuple[int, int] | None  # the lowest and highest value that is padding
    cells: tuple[int, ...]  # the padding value as a whole cell, where it needs more bits than are stored
    overlay: bool  # overlays in the unused bits of cells

    @staticmethod
    def of(found: dict[int, bytes], code: Encoding) -> "PixelForm":
        """The form that a header tells. Raises BadScan where it contradicts itself."""

        def short(tag: int) -> int:
            value = found.get(tag, b"")
            return struct.unpack(code.order + "H", value[:2])[0] if len(value) >= 2 else -1

        def number(tag: int) -> float:
            try:
                return float(found.get(tag, b"").rstrip(b"\0 "))
            except ValueError:
                return math.nan

        stored, high, allocated, signed = (short(tag) for tag in (STORED, HIGH_BIT, ALLOCATED, SIGNED))
        if not 1 <= stored <= allocated or high != stored - 1:
            raise BadScan(
                f"BitsAllocated {allocated}, BitsStored {stored} and HighBit {high} contradict each other (HighBit is "
                "BitsStored - 1), so nothing says which bits are the value: export it again"
            )
        if TABLE in found:
            raise BadScan(
                "has a table of its values (Modality LUT) beside its rescale: export it again without"
            )
        padding, cells = None, tuple[int, ...]()
        if (low := short(PADDING)) >= 0:
            limit = short(PADDING_LIMIT) if short(PADDING_LIMIT) >= 0 else low
            ends = [_value(cell, stored, signed) for cell in (low, limit)]
            padding = (min(ends), max(ends))
            cells = (low,) if stored < 16 and _value(low, 16, signed) != ends[0] else ()
        return PixelForm(
            stored=stored,
            high=high,
            allocated=allocated,
            signed=signed,
            inverted=found.get(COLOURS, b"").strip(b"\0 ") == b"MONOCHROME1",
            slope=number(SLOPE),
            intercept=number(INTERCEPT),
            padding=padding,
            cells=cells,
            overlay=int.from_bytes(found.get(OVERLAY_BIT, b"\0\0")[:2], "little") != 0,
        )

    def values(self, cells: NDArray[Any]) -> NDArray[Any]:
        """The values in cells of 16 bits, the unused upper bits shifted out and the sign extended.

        Raises BadScan where these bits are neither zeros, nor the sign, nor an overlay: then BitsStored is wrong.
        """
        if self.stored == 16:
            return cells
        values = (cells << (16 - self.stored)) >> (16 - self.stored)
        more = values != cells
        if not self.overlay and more.any():
            upper = cells.view(np.uint16) >> self.stored
            more &= (upper != 0) & ~np.isin(cells.view(np.uint16), self.cells)
            if np.count_nonzero(more) > STRAY * cells.size:
                raise BadScan(
                    f"BitsStored is {self.stored}, but {np.count_nonzero(more):,} of {cells.size:,} cells of a slice hold "
                    "more bits: its header or its pixels are wrong, export it again"
                )
        return values

    def hu(self, value: float) -> float:
        """The HU of a stored value."""
        return value * self.slope + self.intercept

    @property
    def bright_padding(self) -> bool:
        """Whether there is padding that would become brighter than air."""
        return self.padding is not None and (
            bool(self.cells) or max(self.hu(self.padding[0]), self.hu(self.padding[1])) > AIR
        )


def _value(cell: int, stored: int, signed: int) -> int:
    """The value in the lowest `stored` bits of a cell."""
    value = cell & ((1 << stored) - 1)
    return value - (1 << stored) if signed and value >> (stored - 1) else value


def plain_pixels(files: Sequence[str], size_xyz: Sequence[int]) -> tuple[NDArray[np.int16], int] | None:
    """HU int16 [z,y,x] (clipped) of slices in this order, and the CRC-32C of all files; None when GDCM is needed.

    Raises OSError when a file cannot be read, and BadScan where a header contradicts its pixels.
    """
    columns, rows, slices = size_xyz
    hu, checksum = np.empty((slices, rows, columns), np.int16), 0
    if slices != len(files):
        return None
    for path, out in zip(files, hu, strict=True):
        with open(path, "rb") as file:
            data = file.read(os.fstat(file.fileno()).st_size)
        checksum = crc32c(data, checksum)
        if not _decode(_unpacked(data, path, 2 * rows * columns), out):
            return None
    return hu, checksum


def hu_of_slice(path: str, rows: int, columns: int) -> NDArray[Any] | None:
    """The values [y,x] of one file after its rescale, or None where they cannot be read."""
    try:
        if plain := plain_pixels((path,), (columns, rows, 1)):
            return plain[0][0]
        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        with unpacked_files((path,)) as (name,), memory_limit(24 * rows * columns):
            reader.SetFileName(name)
            image: NDArray[Any] = sitk.GetArrayFromImage(reader.Execute())
    except (BadScan, OSError, RuntimeError, MemoryError):
        return None
    return image.reshape(image.shape[-2:])


def _unpacked(data: bytes, path: str, expected: int) -> bytes:
    """The content of a DICOM file that may be packed by gzip. Raises BadScan where it does not unpack."""
    if data[:2] != GZIP_MAGIC:
        return data
    try:
        stream = zlib.decompressobj(GZIP)
        content = stream.decompress(data, expected + (1 << 25))
    except zlib.error as error:
        raise BadScan(f"damaged: {os.path.basename(path)} does not unpack ({error})") from error
    if not stream.eof:
        raise BadScan(
            f"wrong size: {os.path.basename(path)} ends too early, or unpacks to more than its pixels"
        )
    return content


def _decode(data: bytes, out: NDArray[np.int16]) -> bool:
    """Fill `out` (rows, columns) with the HU of a file; False when GDCM is needed. Raises BadScan."""
    try:
        found, code, end, length = elements(data)
    except (struct.error, zlib.error):
        return False
    if not end or end > len(data) or length is None or code.order != "<":
        return False

    def short(tag: int) -> int:
        value = found.get(tag, b"")
        return int.from_bytes(value, "little") if len(value) == 2 else -1

    def integer(tag: int) -> int | None:
        try:
            value = float(found.get(tag, b"").rstrip(b"\0 "))
        except ValueError:
            return None
        return int(value) if value.is_integer() and abs(value) < 1 << 30 else None

    syntax = found.get(SYNTAX, b"").rstrip(b"\0 ").decode("latin-1")
    stored, signed, slope, intercept = short(STORED), short(SIGNED), integer(SLOPE), integer(INTERCEPT)
    shape = (short(ROWS), short(COLUMNS))
    if (
        shape != out.shape
        or syntax
        not in PLAIN  # a vendor's own may order the bytes of pixels in another way than those of headers
        or short(SAMPLES) not in (1, -1)
        or found.get(COLOURS, b"").strip(b"\0 ").decode("latin-1") not in COLOURLESS
        or found.get(FRAMES, b"1").strip(b"\0 ") != b"1"
        or (short(ALLOCATED), short(HIGH_BIT)) != (16, stored - 1)
        or not 8 <= stored <= 16
        or signed not in (0, 1)
        or slope is None
        or intercept is None
        or not 0 < slope <= MOST_SLOPE
        or TABLE in found
        or length - 2 * out.size not in (0, 1, 2)  # padding may follow
    ):
        return False
    start = end - length
    cells = np.frombuffer(data, "<i2" if signed else "<u2", out.size, start).reshape(out.shape)
    form = PixelForm.of(found, code)
    values = form.values(cells)
    hu = values.astype(np.int32)
    hu *= slope
    hu += intercept
    np.clip(hu, INT16.min, INT16.max, out=hu)
    out[:] = hu
    if form.bright_padding:
        fill_padding(out, values, form, cells)
    return True


def fill_padding(
    hu: NDArray[Any],
    values: NDArray[Any],
    form: PixelForm,
    cells: NDArray[Any] | None = None,
    air: float = AIR,
    tissue_end: float = TISSUE_END,
) -> None:
    """Set padding of a slice `hu` (rows, columns) to `air` where it is brighter; `values` are those stored.

    Some headers name a padding value that tissue has too, such as 0 for 0 HU. So padding in the range of tissue, up to
    `tissue_end`, counts only where it reaches the border of the slice.
    """
    padded = _padded(values, form, cells)
    padded &= hu > air
    if not padded.any():
        return
    inside = padded & (hu <= tissue_end)
    if inside.any():
        from scipy import ndimage  # noqa: PLC0415  scipy takes long to import, and few scans need it

        labels, _ = ndimage.label(inside)
        border = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
        inside &= ~np.isin(labels, border[border > 0])
        padded &= ~inside
    hu[padded] = air


def _padded(values: NDArray[Any], form: PixelForm, cells: NDArray[Any] | None = None) -> NDArray[np.bool_]:
    """Where stored values are padding."""
    assert form.padding is not None
    if form.cells and cells is not None:
        return np.isin(cells.view(np.uint16), form.cells)
    low, high = form.padding
    return (values >= low) & (values <= high)


def darken_padding(image: NDArray[Any], padded: Sequence[tuple[NDArray[Any], PixelForm] | None]) -> None:
    """Set padding of an image [z,y,x] that is not in HU, such as MR, to its lowest value that is none, where it is brighter.

    `padded` has, of every slice with padding, the stored values (rows, columns) and how they are to be understood.
    """
    lowest = math.inf
    for one, slice_padding in zip(image, padded, strict=True):
        real = one if slice_padding is None else one[~_padded(*slice_padding)]
        lowest = min(lowest, float(real.min())) if real.size else lowest
    for one, slice_padding in zip(image, padded, strict=True):
        if slice_padding is not None and lowest < math.inf:
            fill_padding(one, *slice_padding, air=lowest, tissue_end=math.inf)


def correct_gdcm(hu: NDArray[Any], files: Sequence[str], in_hu: bool = True) -> None:
    """Put right, in place, what GDCM makes of slices [z,y,x]: inverted MONOCHROME1, and padding. Raises BadScan.

    Without `in_hu` the values are those of another modality, whose padding becomes as dark as its darkest voxel.
    """
    padded: list[tuple[NDArray[Any], PixelForm] | None] = []
    for path, image in zip(files, hu, strict=True):
        padded.append(None)
        with open(path, "rb") as file:
            found, code, _, _ = elements(_unpacked(file.read(), path, 1 << 28))
        form = PixelForm.of(found, code)
        if not in_hu and math.isnan(form.slope + form.intercept):  # of MR without a rescale
            form = replace(form, slope=1.0, intercept=0.0)
        has_padding = form.bright_padding if in_hu else form.padding is not None
        if not form.inverted and not has_padding:
            continue
        values = np.rint((image.astype(np.float64) - form.intercept) / form.slope)
        if form.inverted:  # GDCM has turned v into -1 - v, or into the highest value - v
            values = (-1 if form.signed else (1 << form.stored) - 1) - values
            image[...] = values * form.slope + form.intercept
        if in_hu and has_padding:
            fill_padding(image, values, form)
        elif has_padding:
            padded[-1] = (values, form)
    if any(padded):
        darken_padding(hu, padded)


@contextmanager
def unpacked_files(files: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The files for GDCM, which reads none that is packed by gzip: those are unpacked into a temporary folder."""
    packed = [path for path in files if _is_packed(path)]
    if not packed:
        yield tuple(files)
        return
    with TemporaryDirectory(prefix="p2w-") as folder:
        names = {path: os.path.join(folder, f"{number}.dcm") for number, path in enumerate(packed)}
        for path, name in names.items():
            with open(path, "rb") as packed_file, open(name, "wb") as out:
                out.write(_unpacked(packed_file.read(), path, 1 << 28))
        yield tuple(names.get(path, path) for path in files)


def _is_packed(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == GZIP_MAGIC
