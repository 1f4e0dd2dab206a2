"""DICOM headers: the elements of a file up to its pixels, and what a slice of a CT volume needs of them.

Headers are read here, of most files from their first 64 KiB; GDCM would read a file 2.7 times for its header, and 5 times
for its pixels. What makes slices a volume is in `p2w.ct.dicom_series`, their pixels in `p2w.ct.dicom_pixels`.

Tags and encodings: DICOM PS3.5 section 7, PS3.6 and PS3.10. Files that break PS3.10 but are common are read too: without
the preamble of 128 bytes, without a transfer syntax (then the first element shows how it is encoded), or packed by gzip.
"""

import hashlib
import math
import os
import struct
import zlib
from dataclasses import dataclass

from p2w.ct.orientation import BadScan

UNDEFINED = 0xFFFFFFFF
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
SHORT = {
    b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL", b"SS", b"ST",
    b"TM", b"UI", b"UL", b"US",
}  # fmt: skip
SYNTAX, LAST, PIXELS = 0x00020010, 0x00283000, 0x7FE00010
PHILIPS_SCALE = 0x2005100E  # of MR: its values compare after division by this times RescaleSlope
OVERLAY_BIT = 0x60000102  # of the first overlay, in repeating groups 6000, 6002, …
IMPLICIT, BIG_ENDIAN, DEFLATED = "1.2.840.10008.1.2", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
# SOP classes whose frames have their geometry in functional groups, also where a file holds one frame: Enhanced and Legacy
# Converted Enhanced CT, MR and PET.
ENHANCED = {
    f"1.2.840.10008.5.1.4.1.1.{number}" for number in ("2.1", "2.2", "4.1", "4.3", "4.4", "128.1", "130")
}
# Words in ImageType of pictures that are no slices.
PICTURES = dict.fromkeys(("LOCALIZER", "SCOUT", "TOPOGRAM", "SCANOGRAM", "SURVIEW"), "a localizer") | {
    "MOSAIC": "a mosaic, whose slices lie side by side in one picture: convert it to NIfTI (dcm2niix)"
}
DEEPEST = 100  # levels of nested sequences
UNPACKED = 1 << 24  # most bytes of a deflated or gzip-packed header, decompressed
PACKED_TIMES = 1032  # highest compression ratio, that of zlib: a header that claims more pixels is wrong
HEAD = 1 << 16  # bytes read at first; nearly every header fits
GZIP, GZIP_MAGIC = 16 + zlib.MAX_WBITS, b"\x1f\x8b"
NO_POSITION = "a slice whose position in space is missing (ImagePositionPatient)"
COLOURLESS = ("", "MONOCHROME1", "MONOCHROME2")
HU_TYPES = ("", "HU", "US", "HU_MOD")  # RescaleType; US: not specified, which many converters write for HU


@dataclass(frozen=True)
class SeriesInfo:
    """What headers say of a scan, without anything that names a person: identifiers are hashed, of dates only the year.

    Empty text, or 0, where the headers say nothing, as for image files that are not DICOM.
    """

    patient: str = ""  # salted hash of PatientID
    study: str = ""  # salted hash of StudyInstanceUID
    frame_of_reference: str = ""  # salted hash; equal for scans that share their coordinates
    series: str = ""  # SeriesInstanceUID
    acquisition: str = ""  # what tells this volume from others of its series, such as "acquisition 2"
    year: int = 0  # of the study
    modality: str = ""
    description: str = ""  # SeriesDescription
    body_part: str = ""  # BodyPartExamined
    kernel: str = ""  # ConvolutionKernel
    maker: str = ""  # Manufacturer
    thickness_mm: float = 0.0  # SliceThickness
    contrast: str = ""  # ContrastBolusAgent
    kvp: float = 0.0


@dataclass(frozen=True)
class Slice:
    """The header of one DICOM file, or of one frame of it."""

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
    photometric: str = "MONOCHROME2"
    rescale_type: str = ""
    patient: bytes = b""  # PatientID as it is written; it never leaves this process unhashed
    study: str = ""
    frame_of_reference: str = ""
    acquisition: str = ""  # AcquisitionNumber
    time: str = ""  # AcquisitionDateTime, or AcquisitionDate and AcquisitionTime
    phase: str = ""  # temporal position, trigger time or cardiac phase
    kernel: str = ""
    kvp: str = ""
    thickness: float = 0.0
    step: float = 0.0  # SpacingBetweenSlices
    sop_class: str = ""
    description: str = ""
    body_part: str = ""
    maker: str = ""
    contrast: str = ""
    date: str = ""  # StudyDate
    frame: int = 0  # number of the frame in the file, from 0
    series_number: str = ""
    echo: str = ""  # EchoTime of MR
    b_value: str = ""  # of diffusion-weighted MR
    stack: str = ""  # StackID of a frame
    philips_scale: float = 0.0  # scale slope of MR, 0 where there is none
    of_groups: bool = False  # its geometry was read from functional groups
    has_location: bool = False  # SliceLocation, which pictures that are no slices lack

    @property
    def has_groups(self) -> bool:
        """Whether the file holds frames whose geometry is in functional groups."""
        of_class = self.sop_class in ENHANCED and len(self.position) != 3
        return self.of_groups or self.frames > 1 or of_class

    def info(self, salt: str, acquisition: str = "") -> SeriesInfo:
        """What the table of series and the manifest may say of the scan that this slice belongs to."""
        return SeriesInfo(
            patient=salted_hash(self.patient.decode("latin-1"), salt),
            study=salted_hash(self.study, salt),
            frame_of_reference=salted_hash(self.frame_of_reference, salt),
            series=self.series,
            acquisition=acquisition,
            year=int(self.date[:4]) if self.date[:4].isdecimal() else 0,
            modality=self.modality,
            description=self.description,
            body_part=self.body_part,
            kernel=self.kernel,
            maker=self.maker,
            thickness_mm=self.thickness,
            contrast=self.contrast,
            kvp=float(self.kvp) if self.kvp.replace(".", "", 1).isdecimal() else 0.0,
        )


def salted_hash(text: str, salt: str) -> str:
    """16 hexadecimal digits that stand for an identifier; "" for none. Without the salt nobody can try out names."""
    return hashlib.sha256(f"{salt}\0{text}".encode()).hexdigest()[:16] if text else ""


@dataclass(frozen=True)
class Encoding:
    """How the elements of a file are written."""

    explicit: bool
    order: str  # "<" or ">"


def _element(data: bytes, at: int, code: Encoding) -> tuple[int, bytes, int, int]:
    """Tag, value representation, position and length in bytes of the value, of the element at byte `at`."""
    group, number = struct.unpack_from(code.order + "HH", data, at)
    tag = group << 16 | number
    if not code.explicit or group == 0xFFFE:
        return tag, b"", at + 8, struct.unpack_from(code.order + "I", data, at + 4)[0]
    vr = data[at + 4 : at + 6]
    if vr in LONG:
        return tag, vr, at + 12, struct.unpack_from(code.order + "I", data, at + 8)[0]
    return tag, vr, at + 8, struct.unpack_from(code.order + "H", data, at + 6)[0]


def _skip(data: bytes, at: int, code: Encoding, end: int, depth: int = 0) -> int:
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
            inner = Encoding(False, "<") if vr == b"UN" else code
            at = _skip(data, start, inner, SEQUENCE_END, depth + 1)


def _data_set_encoding(data: bytes, at: int, syntax: str) -> Encoding:
    """The encoding of the elements from byte `at`, as the first element shows: some writers name a wrong transfer syntax."""
    if syntax == BIG_ENDIAN:
        return Encoding(True, ">")
    vr = data[at + 4 : at + 6]
    return Encoding(vr in LONG or vr in SHORT, "<")


def elements(data: bytes) -> tuple[dict[int, bytes], Encoding, int, int | None]:
    """Elements of the top level up to the pixels, their encoding, the byte at which the pixels end, and their length.

    A sequence of undefined length has the value b"", as have pixels. The end is 0 where it cannot be known; the length is
    None where pixels are compressed or missing. Raises struct.error where `data` ends within the header.
    """
    code, found = Encoding(True, "<"), dict[int, bytes]()
    at = 132 if data[128:132] == b"DICM" else 0
    in_meta, deflated = True, False
    while at < len(data):
        if in_meta and struct.unpack_from("<H", data, at)[0] != 2:
            in_meta = False
            syntax = found.get(SYNTAX, b"").rstrip(b"\0 ").decode("ascii", "replace")
            deflated = syntax == DEFLATED
            if deflated:
                data, at = zlib.decompressobj(-15).decompress(data[at:], UNPACKED), 0
            code = _data_set_encoding(data, at, syntax)
        tag, vr, start, length = _element(data, at, code)
        if tag == PIXELS:
            found[PIXELS] = b""
            plain = length != UNDEFINED
            return found, code, start + length if plain and not deflated else 0, length if plain else None
        if length == UNDEFINED:
            at = _skip(data, start, Encoding(False, "<") if vr == b"UN" else code, SEQUENCE_END)
            if tag <= LAST:
                found[tag] = b""
        else:
            if tag <= LAST or tag == PHILIPS_SCALE:
                found[tag] = data[start : start + length]
            elif tag & 0xFF00FFFF == OVERLAY_BIT:
                found[OVERLAY_BIT] = data[start : start + length]
            at = start + length
    if at > len(data):
        raise struct.error("it ends within its header")
    return found, code, 0, None


def starts_as_dicom(data: bytes) -> bool:
    """Whether the first bytes of a file (132 are enough) are those of a DICOM file, with its preamble or without."""
    if data[128:132] == b"DICM":
        return True
    if len(data) < 16:
        return False
    group, number = struct.unpack_from("<HH", data)
    if group not in (2, 8) or number > 0x1200:
        return False
    if data[4:6] in SHORT or data[4:6] in LONG:
        return True
    # Implicit: the first elements are dates, names and uids
    return struct.unpack_from("<I", data, 4)[0] <= 256


def unpack_gzip(data: bytes, limit: int) -> bytes:
    """The first `limit` bytes of a gzip file's content; fewer where it ends earlier. Raises zlib.error."""
    return zlib.decompressobj(GZIP).decompress(data, limit)


def read_slice(path: str, modality: str = "CT") -> Slice | None:
    """The header of one file; None when it is not a DICOM image but another kind of file, a DICOMDIR or a report.

    Whether it has all its pixels is checked where it is a slice of a scan of `modality`.
    Raises BadScan when the file is truncated or its header is damaged.
    """
    with open(path, "rb") as file:
        nbytes = os.fstat(file.fileno()).st_size
        data = file.read(HEAD)
        packed = data[:2] == GZIP_MAGIC
        preamble = False
        try:
            if not starts_as_dicom(unpack_gzip(data, 132) if packed else data):
                return None
            data = unpack_gzip(data + file.read(), UNPACKED) if packed else data
            preamble = data[128:132] == b"DICM"
            try:
                found, code, end, length = elements(data)
            except (struct.error, zlib.error):
                if packed:
                    raise
                # Without a preamble it may be any kind of file, and a large one.
                found, code, end, length = elements(data + file.read(-1 if preamble else UNPACKED))
        except (struct.error, zlib.error) as error:
            if not preamble:
                return None
            raise BadScan(f"its DICOM header cannot be read ({error}): copy the file again") from error
    # Whether pixels of a packed file are missing shows when they are unpacked.
    one = _slice_of(found, code, path, max(nbytes, end) if packed else nbytes)
    if one is not None and not_a_scan(one, modality) is None:
        _check_length(one, found, code, end, length)
    return one


def _check_length(one: Slice, found: dict[int, bytes], code: Encoding, end: int, length: int | None) -> None:
    """Raise BadScan where the file has no pixels, or is too short for those that its header promises."""
    if PIXELS not in found:
        raise BadScan("has no pixels (PixelData; FloatPixelData is not read): export it again with them")
    if end > one.nbytes:
        raise BadScan(f"truncated: has {one.nbytes:,} bytes, its pixels end at {end:,}: copy the file again")
    bits = found.get(0x00280100, b"")
    allocated = struct.unpack(code.order + "H", bits[:2])[0] if len(bits) >= 2 else 8
    promised = one.rows * one.columns * one.samples * one.frames * (allocated or 8) // 8
    if promised > (length if length is not None else PACKED_TIMES * one.nbytes):
        available = (
            f"its pixels have {length:,}" if length is not None else f"it has {one.nbytes:,}, compressed"
        )
        raise BadScan(
            f"{one.frames} x {one.columns} x {one.rows} pixels take {promised:,} bytes, {available}: copy the file again"
        )


@dataclass(frozen=True)
class _Elements:
    """The data elements of a header, by tag, and how their numbers are encoded; what is not there is empty or 0."""

    values: dict[int, bytes]
    order: str  # of bytes, as `struct` spells it

    def text(self, tag: int) -> str:
        return self.values.get(tag, b"").rstrip(b"\0 ").decode("ascii", "replace").strip()

    def words(self, tag: int) -> str:
        """Free text, on one line that a terminal can show: some character sets switch by control characters."""
        shown = "".join(
            letter if letter.isprintable() else " " for letter in self.text(tag).replace("\ufffd", "?")
        )
        return " ".join(shown.split())[:64]

    def numbers(self, tag: int) -> tuple[float, ...]:
        """The finite decimal numbers of an element; () where any is none."""
        try:
            found = tuple(float(part) for part in self.text(tag).split("\\") if part.strip())
        except ValueError:
            return ()
        return found if all(map(math.isfinite, found)) else ()

    def short(self, tag: int) -> int:
        value = self.values.get(tag, b"")
        return struct.unpack(self.order + "H", value[:2])[0] if len(value) >= 2 else 0


def _slice_of(found: dict[int, bytes], code: Encoding, path: str, nbytes: int) -> Slice | None:
    """The slice that these elements describe; None when they are not those of an image."""
    elements = _Elements(found, code.order)
    text, words, numbers, short = elements.text, elements.words, elements.numbers, elements.short
    if not short(0x00280010):
        return None
    scale = found.get(PHILIPS_SCALE, b"")
    return Slice(
        path=path,
        nbytes=nbytes,
        series=text(0x0020000E),
        instance=text(0x00080018) or path,
        modality=text(0x00080060),
        image_type=text(0x00080008),
        frames=max(1, int((numbers(0x00280008) or (1,))[0])),
        samples=short(0x00280002) or 1,
        rows=short(0x00280010),
        columns=short(0x00280011),
        spacing=numbers(0x00280030),
        position=numbers(0x00200032),
        orientation=numbers(0x00200037),
        rescale=numbers(0x00281053)[:1] + numbers(0x00281052)[:1],
        photometric=text(0x00280004),
        rescale_type=text(0x00281054).upper(),
        patient=found.get(0x00100020, b"").strip(b"\0 "),
        study=text(0x0020000D),
        frame_of_reference=text(0x00200052),
        acquisition=text(0x00200012),
        time=text(0x0008002A) or text(0x00080022) + text(0x00080032),
        phase="\\".join(text(tag) for tag in (0x00200100, 0x00181060, 0x00209241)).strip("\\"),
        kernel=words(0x00181210),
        kvp=text(0x00180060),
        thickness=(numbers(0x00180050) or (0.0,))[0],
        step=abs((numbers(0x00180088) or (0.0,))[0]),
        sop_class=text(0x00080016),
        description=words(0x0008103E),
        body_part=words(0x00180015),
        maker=words(0x00080070),
        contrast=words(0x00180010),
        date=text(0x00080020),
        series_number=text(0x00200011),
        echo=text(0x00180081),
        b_value=found.get(0x00189087, b"").hex(),
        philips_scale=struct.unpack(code.order + "f", scale)[0] if len(scale) == 4 else 0.0,
        has_location=len(numbers(0x00201041)) == 1,
    )


def not_a_scan(one: Slice, modality: str = "CT") -> str | None:
    """Why a sound DICOM image is not a slice of a volume of `modality` (CT, MR, PT); None when it is one."""
    if one.modality != modality:
        return f"modality {one.modality or 'unknown'}, not {modality}"
    if one.samples > 1 or one.photometric not in COLOURLESS:
        return "a colour picture (a screenshot, a dose report or a rendering)"
    for word, what in PICTURES.items():
        if word in one.image_type.upper():
            return what
    if modality == "CT" and one.rescale_type not in HU_TYPES:
        return f"its values are {one.rescale_type} (RescaleType), not HU"
    if not one.has_groups and len(one.position) != 3:
        picture = "a picture without a position in space (a dose report or screenshot)"
        return NO_POSITION if one.has_location else picture
    return None
