"""Read and verify the voxels of MetaImage and NIfTI files in one pass; NRRD is read by ITK.

SimpleITK hides damage: it reads a truncated `.nii` or `.nii.gz`, and a `.zraw` with a broken stream, into an image without
an error (seen with SimpleITK 2.5). Here data of the wrong size or with a wrong checksum is a BadScan, and one pass over the
bytes gives the voxels and the checksum of the file. ITK also trusts the sizes in headers, so they are compared with the
size of the file before ITK reads it.

NRRD headers as in http://teem.sourceforge.net/nrrd/format.html; MetaImage's are read in `p2w.ct.meta_image`
"""

import contextlib
import functools
import importlib.util
import math
import os
import re
import resource
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
import SimpleITK as sitk
from crc32c import crc32c

from p2w.ct.orientation import BadScan

HEADER = 1 << 16  # bytes; longer headers are not read
MOST_FILES = 1 << 16  # of a list of data files
SPARE = 1 << 20  # bytes that a compressed stream may have after the voxels
PIECE = 1 << 20  # bytes decompressed at a time
MOST_RATIO = 1032  # highest compression ratio of zlib: a header that claims more is wrong
GZIP, MAGIC_GZIP = 16 + zlib.MAX_WBITS, b"\x1f\x8b"
RESERVED = 0xE0  # bits of the flags of a gzip header that have to be 0
BOTH = 32 + zlib.MAX_WBITS  # zlib or gzip, detected from the first bytes


@dataclass(frozen=True)
class VoxelLayout:
    """The file, position and encoding of the voxels of an image."""

    path: str
    offset: int  # bytes before the voxels: in the file, or with `unpack_first` in the decompressed stream
    dtype: np.dtype
    count: int
    compressed: bool = False
    own_file: bool = False  # the file has nothing but voxels, as a `.raw` beside its `.mhd`
    # .nii.gz: header and voxels are one stream; MetaImage compresses the voxels alone
    unpack_first: bool = False
    packed_size: int | None = None  # bytes of the compressed voxels, if the header says so
    slope: float = 1.0
    intercept: float = 0.0
    text: bool = False  # the voxels are numbers in text
    more: tuple[str, ...] = ()  # further files of as many voxels each

    def expected(self) -> int:
        """Size of the voxels in bytes, decompressed."""
        return self.count * self.dtype.itemsize


def pattern_files(text: str) -> list[str]:
    """Names that `name%03d.raw first last step` stands for, as MetaImage and NRRD write them. Raises BadScan."""
    match = re.fullmatch(
        r"([^%]*)%(0?\d{0,2})d([^%]*?)\s+(-?\d{1,6})\s+(-?\d{1,6})(?:\s+(-?\d{1,6}))?(?:\s+\d+)?", text
    )
    step = int(match[6] or 1) if match else 0
    if match is None or step == 0:
        raise BadScan(f"its data files {text[:80]!r}: no pattern `name%03d.raw first last step`")
    first, last = int(match[4]), int(match[5])
    numbers = range(first, last + (1 if step > 0 else -1), step)
    if not 0 < len(numbers) <= MOST_FILES:
        raise BadScan(f"its data files {text[:80]!r} are {len(numbers)} files")
    return [f"{match[1]}{number:{match[2]}d}{match[3]}" for number in numbers]


def own_data_file(name: str) -> bool:
    """Whether the path of a data file stays in the header's folder or below it."""
    return bool(name) and not os.path.isabs(name) and ".." not in name.replace("\\", "/").split("/")


def check_file_size(layout: VoxelLayout) -> None:
    """Raise BadScan when the size of the file does not fit its header. Reads nothing."""
    if layout.text:
        if os.path.getsize(layout.path) < 2 * layout.count - 1:
            raise BadScan(
                f"truncated: {layout.count:,} numbers do not fit in {os.path.basename(layout.path)}"
            )
        return
    if layout.more:
        part = replace(layout, count=layout.count // (1 + len(layout.more)), more=())
        for path in (layout.path, *layout.more):
            check_file_size(replace(part, path=path))
        return
    size = os.path.getsize(layout.path)
    need = layout.offset + layout.expected()
    if layout.compressed:
        need = max(
            layout.expected() // MOST_RATIO,
            0 if layout.unpack_first else layout.offset + (layout.packed_size or 0),
        )
    if not 0 <= layout.offset <= need < 1 << 62 and not layout.compressed:
        raise BadScan(
            f"damaged: voxels at byte {layout.offset:,}, {layout.expected():,} of them: copy it again"
        )
    exact = not layout.compressed and (layout.own_file or size > need + SPARE)
    if size < need or (exact and size != need):
        name = os.path.basename(layout.path)
        what = "truncated" if size < need else "wrong size"
        raise BadScan(f"{what}: {name} has {size:,} bytes, its header promises {need:,}")


def read_voxels(layout: VoxelLayout, crc: int = 0) -> tuple[np.ndarray, int]:
    """All voxels as one flat array, and the CRC-32C of the file's bytes, continued from `crc`.

    Raises BadScan when voxels are missing or the checksum of the compression differs.
    """
    check_file_size(layout)
    if layout.text:
        return _read_text(layout, crc)
    if layout.more:
        part = replace(layout, count=layout.count // (1 + len(layout.more)), more=())
        flat = np.empty(layout.count, layout.dtype)
        for number, path in enumerate((layout.path, *layout.more)):
            flat[number * part.count : (number + 1) * part.count], crc = read_voxels(
                replace(part, path=path), crc
            )
        return flat, crc
    if layout.compressed:
        data, crc = _unpack(layout, crc)
    else:
        data, crc = _read_plain(layout, crc)
    if data.size != layout.expected():
        name = os.path.basename(layout.path)
        raise BadScan(f"wrong size: {name} holds {data.size:,} bytes of voxels, not {layout.expected():,}")
    return data.view(layout.dtype), crc


def _read_text(layout: VoxelLayout, crc: int) -> tuple[np.ndarray, int]:
    """Voxels written as numbers in text, and the checksum. Raises BadScan unless there are as many as the header says."""
    with open(layout.path, "rb") as file:
        data = file.read()
    crc = crc32c(data, crc)
    words = data[layout.offset :].split(None, layout.count)
    if len(words) != layout.count:
        raise BadScan(f"wrong size: {len(words):,} numbers or more, its header promises {layout.count:,}")
    try:
        values = (
            np.array(words, "f8") if layout.dtype.kind == "f" else np.array([int(word) for word in words])
        )
        return values.astype(layout.dtype), crc
    except (ValueError, OverflowError) as error:
        raise BadScan(f"damaged: its voxels are no numbers ({error})") from error


class _CheckedFile:
    """An open file that is read in pieces; `crc` is the CRC-32C of what was read, continued from the value at the start.

    Checksums are computed while the bytes are still in a core's cache.
    """

    def __init__(self, file: BinaryIO, crc: int) -> None:
        self.file, self.crc = file, crc

    def read_into(self, out: np.ndarray) -> int:
        """Fill `out`, uint8, as far as the file goes; returns the number of bytes."""
        view, done = out.data, 0
        while done < len(view) and (count := self.file.readinto(view[done : done + PIECE])):  # type: ignore[attr-defined]
            self.crc = crc32c(view[done : done + count], self.crc)
            done += count
        return done

    def skip(self, count: int) -> None:
        """Read `count` bytes, or fewer where the file ends, for their checksum alone."""
        self.crc = crc32c(self.file.read(count), self.crc)

    def pieces(self) -> Iterator[memoryview]:
        """Yield the rest of the file; a piece is valid until the next one."""
        buffer = np.empty(PIECE, "u1")
        while count := self.read_into(buffer):
            yield buffer.data[:count]


def _read_plain(layout: VoxelLayout, crc: int) -> tuple[np.ndarray, int]:
    """The bytes of uncompressed voxels, fewer where the file ends earlier, and the checksum of the whole file."""
    data = np.empty(layout.expected(), "u1")
    with open(layout.path, "rb") as file:
        checked = _CheckedFile(file, crc)
        checked.skip(layout.offset)
        count = checked.read_into(data)
        for _ in checked.pieces():
            pass
    return data[:count], checked.crc


def _unpack(layout: VoxelLayout, crc: int) -> tuple[np.ndarray, int]:
    """Decompress a zlib or gzip file into memory that is allocated once, and verify the checksum of each member.

    ISA-L does it where it is installed, three times as fast as zlib. A stream that it refuses goes through zlib, so that
    the same files are read with and without it, and refused with the same words.
    """
    if (fast := _isal()) is not None:
        with contextlib.suppress(fast.error):
            return _unpack_by(fast, layout, crc)
    try:
        return _unpack_by(zlib, layout, crc)
    except zlib.error as error:
        raise BadScan(f"damaged: {os.path.basename(layout.path)} does not unpack ({error})") from error


@functools.cache
def _isal() -> Any:
    """The module `isal_zlib`, or None where it is not installed."""
    if importlib.util.find_spec("isal") is None:
        return None
    from isal import isal_zlib  # noqa: PLC0415  (an extra)

    return isal_zlib


def _unpack_by(library: Any, layout: VoxelLayout, crc: int) -> tuple[np.ndarray, int]:
    """As `_unpack`, by a module with the functions of zlib. Raises its error where the stream is damaged, and BadScan."""
    skip = layout.offset if layout.unpack_first else 0
    need = skip + layout.expected()
    out, at, extra = np.empty(need, "u1"), 0, 0
    with open(layout.path, "rb") as file:
        checked = _CheckedFile(file, crc)
        checked.skip(0 if layout.unpack_first else layout.offset)
        packed = checked.pieces()
        for piece in _pieces(library, packed, need):
            keep = min(len(piece), need - at)
            out[at : at + keep] = np.frombuffer(piece, "u1", keep)
            at, extra = at + keep, extra + len(piece) - keep
            if extra > SPARE:
                name = os.path.basename(layout.path)
                raise BadScan(
                    f"wrong size: {name} unpacks to more than the {need:,} bytes its header promises"
                )
        for _ in packed:  # what follows the last member counts for the checksum of the file
            pass
    return out[skip:at], checked.crc


def _pieces(library: Any, packed: Iterable[memoryview], need: int) -> Iterator[bytes]:
    """Decompress a zlib or gzip stream in pieces: one gzip member, or more until there are `need` bytes.

    Parallel compressors write several members. Raises the library's error where a member is damaged or ends early.
    """
    stream, produced = None, 0
    for start in packed:
        rest: bytes | memoryview = start
        while rest:
            if stream is None or stream.eof:
                if stream and produced >= need:
                    return
                if library is not zlib and _unusual_header(rest):
                    raise library.error("left to zlib")
                stream = library.decompressobj(BOTH)
            piece = stream.decompress(rest, PIECE)
            produced += len(piece)
            yield piece
            rest = stream.unused_data if stream.eof else stream.unconsumed_tail
    while stream is None or not stream.eof:
        piece = stream.decompress(b"", PIECE) if stream else b""
        if not piece:
            raise library.error("it ends too early")
        yield piece


def _unusual_header(start: bytes | memoryview) -> bool:
    """Whether a member begins with a gzip header that has reserved flags, which zlib refuses and ISA-L overlooks, or that
    the end of the piece cuts off before them."""
    return len(start) < 4 or (bytes(start[:2]) == MAGIC_GZIP and start[3] & RESERVED != 0)


READERS = {
    ".mhd": "MetaImageIO", ".mha": "MetaImageIO", ".nrrd": "NrrdImageIO", ".nhdr": "NrrdImageIO",
}  # fmt: skip

BESIDE, THREAD = (
    256 << 20,
    16 << 20,
)  # memory in bytes that reading takes besides voxels: in total, and per thread


@contextlib.contextmanager
def memory_limit(nbytes: int) -> Iterator[None]:
    """Limit the memory that this process can allocate in the block to `nbytes`, and some for threads and tables.

    A compressed DICOM slice has sizes of its own, besides those of its header: a file of 5 kB made GDCM allocate 3 GB (seen
    with JPEG 2000, SimpleITK 2.5). With the limit, it raises an error. Linux only; elsewhere there is no limit.
    """
    try:
        with open("/proc/self/statm") as file:
            taken = int(file.read().split()[5]) * resource.getpagesize()
    except OSError:
        yield
        return
    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    # All cores of the machine: ITK starts threads by CPU affinity, without regard to the quota of a control group.
    limit = taken + nbytes + BESIDE + THREAD * (os.cpu_count() or 1)
    if all(other == resource.RLIM_INFINITY or limit < other for other in (before, hard)):
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))


def open_reader(path: str) -> sitk.ImageFileReader:
    """An ITK reader for the format of the file name, which has read the header. Raises BadScan."""
    lower = path.lower()
    if lower.endswith((".nrrd", ".nhdr")):
        nrrd_files(path)
    kind = next((kind for ending, kind in READERS.items() if lower.endswith(ending)), None)
    if kind is None:
        raise BadScan("is no MetaImage, NIfTI or NRRD by its name; of DICOM, name the folder of the series")
    reader = sitk.ImageFileReader()
    reader.SetImageIO(kind)
    reader.SetFileName(path)
    try:
        with memory_limit(0):
            reader.ReadImageInformation()
    except (RuntimeError, MemoryError) as error:
        raise BadScan(f"cannot be read: {last_line(error)}") from error
    return reader


def check_reader_size(path: str, reader: sitk.ImageFileReader, nbytes: int) -> None:
    """Raise BadScan when a header claims more voxels than `nbytes` of files can hold; ITK would allocate them all."""
    count = math.prod(reader.GetSize()) * reader.GetNumberOfComponents()
    promised = count * sitk.Image(1, 1, reader.GetPixelID()).GetSizeOfPixelComponent()
    fields = nrrd_fields(path) if path.lower().endswith((".nrrd", ".nhdr")) else {}
    raw = fields.get("encoding", "").lower() == "raw"
    own = nbytes - os.path.getsize(path)
    skips = any(fields.get(key, "0") != "0" for key in ("byteskip", "lineskip"))
    if raw and fields.get("datafile") and not skips and own > promised:
        raise BadScan(f"wrong size: its data files have {own:,} bytes, its header promises {promised:,}")
    if promised > nbytes * (1 if raw else MOST_RATIO):
        raise BadScan(
            f"truncated: the header promises {promised:,} bytes of voxels, the files have {nbytes:,}"
        )


def nrrd_fields(path: str) -> dict[str, str]:
    """Fields of an NRRD header, names in lower case without blanks; `list` has the lines behind `data file: LIST`."""
    with open(path, "rb") as file:
        text = file.read(HEADER).partition(b"\n\n")[0].decode("latin-1").replace("\r\n", "\n")
    fields, lines = dict[str, str](), text.splitlines()
    for number, line in enumerate(lines):
        name, colon, value = line.partition(":")
        if not colon or line.startswith("#") or value.startswith("="):  # key:=value is a remark
            continue
        key = name.strip().lower().replace(" ", "")
        fields[key] = value.strip()
        if key == "datafile" and value.strip().upper().startswith("LIST"):
            fields["list"] = "\n".join(lines[number + 1 :])
            break
    return fields


def nrrd_files(path: str) -> tuple[str, ...]:
    """The header, and its data files if there are any. Raises BadScan when one is in another folder."""
    fields = nrrd_fields(path)
    data = fields.get("datafile", "")
    if not data:
        return (path,)
    if data.upper().startswith("LIST"):
        names = [line.strip() for line in fields["list"].splitlines() if line.strip()]
    else:
        names = pattern_files(data) if "%" in data else [data]
    for name in names:
        if not own_data_file(name):
            raise BadScan(
                f"its data file {name!r} is not in the header's folder: put it there, and its bare name in the header"
            )
    return (
        path,
        *(full for name in names if os.path.isfile(full := os.path.join(os.path.dirname(path), name))),
    )


NRRD_SPACES = {
    "right-anterior-superior", "ras", "left-anterior-superior", "las", "left-posterior-superior", "lps",
}  # fmt: skip


def check_nrrd(path: str) -> None:
    """Raise BadScan where an NRRD header does not say how large its voxels are or where they lie."""
    fields = nrrd_fields(path)
    sizes = fields.get("spacedirections", "") or fields.get("spacings", "")
    numbers = [
        float(number) for number in re.findall(r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+|nan|inf)", sizes)
    ]
    if not numbers or not np.isfinite(numbers).all():
        raise BadScan(
            "has no voxel sizes (space directions, or spacings): 1 mm would be a guess, write them into its header"
        )
    space = fields.get("space", "").lower()
    if space not in NRRD_SPACES:
        raise BadScan(
            f"space {space!r}: nothing says where left, front and head are; write `space: left-posterior-superior` and "
            "space directions into its header"
        )
    units = set(re.findall(r'"([^"]*)"', fields.get("spaceunits", ""))) - {"mm", "???", ""}
    if units:
        raise BadScan(f"space units {', '.join(sorted(units))}: readers take sizes for mm; write them in mm")
    for key in ("oldmin", "oldmax"):
        if fields.get(key, "nan").lower() != "nan":
            raise BadScan(
                f"has old {key[3:]} {fields[key]}: its values were quantized, and readers do not undo it; write the values "
                "that are meant"
            )
    if fields.get("spacedirections", "") == "" and min(numbers) <= 0:
        raise BadScan(f"spacings {sizes}: have to be above 0")


def last_line(error: Exception) -> str:
    """The last line of an ITK error, which has the reason, without addresses in memory and folders of files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[-1] if lines else type(error).__name__
    return re.sub(r"(?<![\w./])/(?:[^/\s\"']+/)+", "", re.sub(r"\(0x[0-9a-f]+\)", "", line))
