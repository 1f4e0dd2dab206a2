"""Pixels of a DICOM series that lie plain in their files, with the checksum of the files, in one pass over their bytes.

GDCM reads a file five times over for its pixels, and is still asked for what is packed, big-endian, deflated, inverted,
mapped by a table or rescaled by fractions. DICOM PS3.5 section 8.1.1: a cell of 16 bits holds `bits stored` of value
below whatever else may lie there; PS3.3 C.11.1.1: HU = cell x slope + intercept.
"""

import os
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from p2w.data.checksum import crc32c
from p2w.data.dicom import elements

SAMPLES, COLOURS, FRAMES, ROWS, COLUMNS = 0x00280002, 0x00280004, 0x00280008, 0x00280010, 0x00280011
ALLOCATED, STORED, HIGH_BIT, SIGNED = 0x00280100, 0x00280101, 0x00280102, 0x00280103
INTERCEPT, SLOPE, TABLE = 0x00281052, 0x00281053, 0x00283000
INT16 = np.iinfo(np.int16)
MOST_SLOPE = 1 << 14  # cells of 16 bits times this stay within 32


def plain_pixels(files: Sequence[str], size_xyz: Sequence[int]) -> tuple[NDArray[np.int16], int] | None:
    """HU [z, y, x], limited to int16, of slices in this order, and the CRC-32C of all files; None: GDCM is needed.

    Raises OSError when a file cannot be read.
    """
    columns, rows, slices = size_xyz
    hu, checksum = np.empty((slices, rows, columns), np.int16), 0
    if slices != len(files):
        return None
    for path, out in zip(files, hu, strict=True):
        with open(path, "rb") as file:
            data = file.read(os.fstat(file.fileno()).st_size)
        checksum = crc32c(data, checksum)
        if not _decode(data, out):
            return None
    return hu, checksum


def _decode(data: bytes, out: NDArray[np.int16]) -> bool:
    """Fill `out` (rows, columns) with a file's HU; False for what is not plain."""
    try:
        found, code, end, length = elements(data)
    except (struct.error, zlib.error):
        return False
    if not end or end > len(data) or length is None or code.order != "<":
        return False

    def short(tag: int) -> int:
        value = found.get(tag, b"")
        return int.from_bytes(value, "little") if len(value) == 2 else -1

    def whole(tag: int) -> int | None:
        try:
            value = float(found.get(tag, b"").rstrip(b"\0 "))
        except ValueError:
            return None
        return int(value) if value.is_integer() and abs(value) < 1 << 30 else None

    stored, signed, slope, intercept = short(STORED), short(SIGNED), whole(SLOPE), whole(INTERCEPT)
    shape = (short(ROWS), short(COLUMNS))
    if (
        shape != out.shape
        or short(SAMPLES) != 1
        or found.get(COLOURS, b"").strip(b"\0 ") != b"MONOCHROME2"
        or found.get(FRAMES, b"1").strip(b"\0 ") != b"1"
        or (short(ALLOCATED), short(HIGH_BIT)) != (16, stored - 1)
        or not 8 <= stored <= 16
        or signed not in (0, 1)
        or slope is None
        or intercept is None
        or not 0 < slope <= MOST_SLOPE
        or TABLE in found
        or length - 2 * out.size not in (0, 1, 2)  # a filler may follow
    ):
        return False
    start = end - length
    cells = np.frombuffer(data, "<i2" if signed else "<u2", out.size, start).reshape(out.shape)
    if stored < 16:  # shift what lies above out, and the sign in
        cells = (cells << (16 - stored)) >> (16 - stored)
    values = cells.astype(np.int32)
    values *= slope
    values += intercept
    np.clip(values, INT16.min, INT16.max, out=values)
    out[:] = values
    return True
