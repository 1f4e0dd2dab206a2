"""DICOM series: read the headers, sort the slices, check that they are one CT volume, and read uncompressed pixels.

Headers are read here, of most files from their first 64 KiB; GDCM would read a file 2.7 times for its header, and 5 times
for its pixels. So uncompressed pixels are read here too, in one pass that also gives the checksum of the files. GDCM,
through SimpleITK, reads pixels that are compressed, big-endian, deflated, inverted, mapped by a lookup table or rescaled by
fractions.

Tags and encodings: DICOM PS3.5 section 7 and PS3.6. PS3.5 section 8.1.1: a cell of 16 bits has the value in its lowest
`bits stored` bits, and anything in the others. PS3.3 C.11.1.1: HU = cell x slope + intercept.
"""

import math
import os
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2w.ct.orientation import BadScan, Grid
from p2w.files import crc32c

UNDEFINED = 0xFFFFFFFF
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
SYNTAX, LAST, PIXELS = 0x00020010, 0x00281053, 0x7FE00010
IMPLICIT, BIG_ENDIAN, DEFLATED = "1.2.840.10008.1.2", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
DEEPEST = 100  # levels of nested sequences
UNPACKED = 1 << 24  # most bytes of a deflated header, decompressed
PACKED_TIMES = 1032  # highest compression ratio, that of zlib: a header that claims more pixels is wrong
HEAD = 1 << 16  # bytes read at first; nearly every header fits


@dataclass(frozen=True)
class Slice:
    """The header of one DICOM file."""

    path: str
    nbytes: int
    series: str
    instance: str
    modality: str
    image_type: str
    frames: int
    samples: int  # per pixel: 3 for RGB
    rows: int
    columns: int
    spacing: tuple[float, ...]  # mm between rows, between columns
    position: tuple[float, ...]  # x, y, z of the first pixel, mm
    orientation: tuple[float, ...]  # direction of a row, then of a column
    rescale: tuple[float, ...]  # slope, intercept; shorter when a tag is missing


@dataclass(frozen=True)
class _Encoding:
    explicit: bool
    order: str  # "<" or ">"


def _element(data: bytes, at: int, code: _Encoding) -> tuple[int, bytes, int, int]:
    """Tag, value representation, position and length in bytes of the value, of the element at byte `at`."""
    group, number = struct.unpack_from(code.order + "HH", data, at)
    tag = group << 16 | number
    if not code.explicit or group == 0xFFFE:
        return tag, b"", at + 8, struct.unpack_from(code.order + "I", data, at + 4)[0]
    vr = data[at + 4 : at + 6]
    if vr in LONG:
        return tag, vr, at + 12, struct.unpack_from(code.order + "I", data, at + 8)[0]
    return tag, vr, at + 8, struct.unpack_from(code.order + "H", data, at + 6)[0]


def _skip(data: bytes, at: int, code: _Encoding, end: int, depth: int = 0) -> int:
    """The position after a sequence (end=SEQUENCE_END) or an item (end=ITEM_END) of undefined length."""
    if depth > DEEPEST:
        raise struct.error(f"sequences more than {DEEPEST} deep")
    while True:
        tag, vr, start, length = _element(data, at, code)
        if tag == end:
            return start
        if length != UNDEFINED:
            at = start + length
        elif tag == ITEM:
            at = _skip(data, start, code, ITEM_END, depth + 1)
        else:  # an unknown element of undefined length is written in implicit form
            inner = _Encoding(False, "<") if vr == b"UN" else code
            at = _skip(data, start, inner, SEQUENCE_END, depth + 1)


def elements(data: bytes) -> tuple[dict[int, bytes], _Encoding, int, int | None]:
    """Elements of the top level up to the pixels, their encoding, the byte at which the pixels end, and their length.

    The end is 0 where it cannot be known; the length is None where pixels are compressed or missing. Raises struct.error
    where `data` ends within the header.
    """
    code, found, at = _Encoding(True, "<"), dict[int, bytes](), 132
    in_meta, deflated = True, False
    while at < len(data):
        if in_meta and struct.unpack_from("<H", data, at)[0] != 2:
            in_meta = False
            syntax = found.get(SYNTAX, b"").rstrip(b"\0 ").decode("ascii", "replace")
            code = _Encoding(syntax != IMPLICIT, ">" if syntax == BIG_ENDIAN else "<")
            deflated = syntax == DEFLATED
            if deflated:
                data, at = zlib.decompressobj(-15).decompress(data[at:], UNPACKED), 0
        tag, vr, start, length = _element(data, at, code)
        if tag == PIXELS:
            plain = length != UNDEFINED
            return found, code, start + length if plain and not deflated else 0, length if plain else None
        if length == UNDEFINED:
            at = _skip(data, start, _Encoding(False, "<") if vr == b"UN" else code, SEQUENCE_END)
        else:
            if tag <= LAST:
                found[tag] = data[start : start + length]
            at = start + length
    if at > len(data):
        raise struct.error("it ends within its header")
    return found, code, 0, None


def read_slice(path: str) -> Slice | None:
    """The header of one file; None when it is not a DICOM image but another kind of file, a DICOMDIR or a report.

    Raises BadScan when the file is truncated or its header is damaged.
    """
    with open(path, "rb") as file:
        nbytes = os.fstat(file.fileno()).st_size
        data = file.read(HEAD)
        if data[128:132] != b"DICM":
            return None
        try:
            try:
                found, code, end, length = elements(data)
            except (struct.error, zlib.error):
                found, code, end, length = elements(data + file.read())
        except (struct.error, zlib.error) as error:
            raise BadScan(f"its DICOM header cannot be read ({error}): copy the file again") from error
    if end > nbytes:
        raise BadScan(f"truncated: has {nbytes:,} bytes, its pixels end at {end:,}: copy the file again")

    def text(tag: int) -> str:
        return found.get(tag, b"").rstrip(b"\0 ").decode("ascii", "replace").strip()

    def numbers(tag: int) -> tuple[float, ...]:
        try:
            found = tuple(float(part) for part in text(tag).split("\\") if part.strip())
        except ValueError:
            return ()
        return found if all(map(math.isfinite, found)) else ()

    def short(tag: int) -> int:
        value = found.get(tag, b"")
        return struct.unpack(code.order + "H", value[:2])[0] if len(value) >= 2 else 0

    if not text(0x0020000E) or not short(0x00280010):
        return None
    rows, columns, samples = short(0x00280010), short(0x00280011), short(0x00280002) or 1
    frames = max(1, int((numbers(0x00280008) or (1,))[0]))
    promised = rows * columns * samples * frames * (short(0x00280100) or 8) // 8
    if promised > (length if length is not None else PACKED_TIMES * nbytes):
        available = f"its pixels have {length:,}" if length is not None else f"it has {nbytes:,}, compressed"
        raise BadScan(
            f"{frames} x {columns} x {rows} pixels take {promised:,} bytes, {available}: copy the file again"
        )
    return Slice(
        path=path,
        nbytes=nbytes,
        series=text(0x0020000E),
        instance=text(0x00080018) or path,
        modality=text(0x00080060),
        image_type=text(0x00080008),
        frames=frames,
        samples=samples,
        rows=rows,
        columns=columns,
        spacing=numbers(0x00280030),
        position=numbers(0x00200032),
        orientation=numbers(0x00200037),
        rescale=numbers(0x00281053)[:1] + numbers(0x00281052)[:1],
    )


def not_a_scan(one: Slice) -> str | None:
    """Why a sound DICOM image is not a slice of a CT volume; None when it is one."""
    if one.modality != "CT":
        return f"modality {one.modality or 'unknown'}, not CT"
    if "LOCALIZER" in one.image_type.upper():
        return "a localizer"
    if one.frames == 1 and len(one.position) != 3:
        return "a picture without a position in space (a dose report or screenshot)"
    return None


def order_series(slices: list[Slice], allow_gaps: bool) -> tuple[list[Slice], Grid]:
    """The slices of a series sorted along their normal, and their grid. Raises BadScan when they are not one volume."""
    if any(one.frames > 1 for one in slices):
        raise BadScan(
            "an enhanced multi-frame DICOM, which is not read: convert it to NIfTI (dcm2niix) first"
        )
    if any(one.samples > 1 for one in slices):
        raise BadScan("has colour pixels, not CT values")
    _check_equal("sizes", Counter(f"{one.columns}x{one.rows}" for one in slices))
    _check_equal("pixel spacings", Counter(str([round(s, 4) for s in one.spacing]) for one in slices))
    _check_equal("orientations", Counter(str([round(v, 3) + 0.0 for v in one.orientation]) for one in slices))
    if len(slices[0].orientation) != 6 or len(slices[0].spacing) != 2:
        raise BadScan("lacks its orientation or pixel spacing (ImageOrientationPatient, PixelSpacing)")
    bare = sum(len(one.rescale) < 2 for one in slices)
    if bare:
        raise BadScan(
            f"no rescale: RescaleSlope or RescaleIntercept is missing in {bare} of {len(slices)} slices"
        )
    if any(len(one.position) != 3 for one in slices):
        raise BadScan("has slices without a position in space (ImagePositionPatient)")
    row, column = np.array(slices[0].orientation).reshape(2, 3)
    normal = np.cross(row, column)
    slices = sorted(
        {one.instance: one for one in slices}.values(), key=lambda one: float(normal @ one.position)
    )
    positions = np.array([normal @ one.position for one in slices])
    step = _step(slices, positions, allow_gaps)
    first = slices[0]
    grid = Grid(
        size=(first.columns, first.rows, len(slices)),
        spacing=(first.spacing[1], first.spacing[0], step),
        origin=(first.position[0], first.position[1], first.position[2]),
        direction=tuple(np.stack([row, column, normal], axis=1).ravel().tolist()),
    )
    return slices, grid


def _check_equal(what: str, kinds: Counter[str]) -> None:
    if len(kinds) > 1:
        listing = ", ".join(f"{count} of {kind}" for kind, count in sorted(kinds.items()))
        raise BadScan(f"slices of different {what} in one series: {listing}")


def _step(slices: list[Slice], positions: np.ndarray, allow_gaps: bool) -> float:
    """Distance of adjacent slices in mm. Raises BadScan where slices are missing or share a position."""
    if len(slices) < 2:
        return 1.0
    steps = np.diff(positions)
    usual = float(np.median(steps))
    if (steps < 0.01).any():
        count = int((steps < 0.01).sum())
        raise BadScan(f"4-D: {count} slices share their position with another slice of the series")
    wide = np.flatnonzero(steps > 1.5 * usual)
    if wide.size and not allow_gaps:
        at = int(wide[0])
        missing = int(sum(round(float(steps[i]) / usual) - 1 for i in wide))
        names = " and ".join(os.path.basename(one.path) for one in slices[at : at + 2])
        raise BadScan(
            f"{missing} slices missing, {wide.size} gaps: the first is {steps[at]:.2f} mm between {names}, "
            f"elsewhere {usual:.2f} mm; --allow-gaps cuts it all the same"
        )
    return usual


SAMPLES, COLOURS, FRAMES, ROWS, COLUMNS = 0x00280002, 0x00280004, 0x00280008, 0x00280010, 0x00280011
ALLOCATED, STORED, HIGH_BIT, SIGNED = 0x00280100, 0x00280101, 0x00280102, 0x00280103
INTERCEPT, SLOPE, TABLE = 0x00281052, 0x00281053, 0x00283000
INT16 = np.iinfo(np.int16)
MOST_SLOPE = 1 << 14  # times a cell of 16 bits still fits 32 bits


def plain_pixels(files: Sequence[str], size_xyz: Sequence[int]) -> tuple[NDArray[np.int16], int] | None:
    """HU int16 [z,y,x] (clipped) of slices in this order, and the CRC-32C of all files; None when GDCM is needed.

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
    """Fill `out` (rows, columns) with the HU of a file; False when GDCM is needed."""
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

    stored, signed, slope, intercept = short(STORED), short(SIGNED), integer(SLOPE), integer(INTERCEPT)
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
        or length - 2 * out.size not in (0, 1, 2)  # padding may follow
    ):
        return False
    start = end - length
    cells = np.frombuffer(data, "<i2" if signed else "<u2", out.size, start).reshape(out.shape)
    if stored < 16:  # shift the unused upper bits out, and extend the sign
        cells = (cells << (16 - stored)) >> (16 - stored)
    values = cells.astype(np.int32)
    values *= slope
    values += intercept
    np.clip(values, INT16.min, INT16.max, out=values)
    out[:] = values
    return True
