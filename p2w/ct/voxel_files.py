"""Read and verify the voxels of MetaImage and NIfTI files in one pass; all other formats are read by ITK.

SimpleITK hides damage: it reads a truncated `.nii` or `.nii.gz`, and a `.zraw` with a broken stream, into an image without
an error (seen with SimpleITK 2.5). Here data of the wrong size or with a wrong checksum is a BadScan, and one pass over the
bytes gives the voxels and the checksum of the file. ITK also trusts the sizes in headers, so they are compared with the
size of the file before ITK reads it.

Formats: MetaIO header keys as in ITK's documentation; NIfTI-1 and -2 headers as in nifti1.h and nifti2.h; NRRD headers as
in http://teem.sourceforge.net/nrrd/format.html
"""

import contextlib
import math
import os
import resource
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from crc32c import crc32c

from p2w.ct.orientation import BadScan

META_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4",
    "MET_UINT": "u4", "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
NIFTI_TYPES = {
    2: "u1",
    4: "i2",
    8: "i4",
    16: "f4",
    64: "f8",
    256: "i1",
    512: "u2",
    768: "u4",
    1024: "i8",
    1280: "u8",
}
HEADER = 1 << 16  # bytes; longer headers are not read
LINE = 2048  # most bytes of a line in a MetaImage header; from 4096 on, ITK's parser overflows its buffer (SimpleITK 2.5)
MOST_DIMS = 10
SPARE = 1 << 20  # bytes that a compressed stream may have after the voxels
PIECE = 1 << 20  # bytes decompressed at a time
MOST_RATIO = 1032  # highest compression ratio of zlib: a header that claims more is wrong
GZIP = 16 + zlib.MAX_WBITS
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
    unpack_first: bool = (
        False  # .nii.gz: header and voxels are one stream; MetaImage compresses the voxels alone
    )
    packed_size: int | None = None  # bytes of the compressed voxels, if the header says so
    slope: float = 1.0
    intercept: float = 0.0

    def expected(self) -> int:
        """Size of the voxels in bytes, decompressed."""
        return self.count * self.dtype.itemsize


def meta_image_layout(path: str) -> VoxelLayout | None:
    """The layout of a `.mhd` or `.mha`; None for rare kinds that only ITK reads (text, lists). Raises BadScan."""
    with open(path, "rb") as file:
        fields, end = {}, 0
        while line := file.readline(HEADER):
            if len(line) > LINE or any(byte < 32 and byte not in b"\t\r\n" for byte in line):
                raise BadScan("the MetaImage header is damaged (a line that is not text): copy it again")
            key, _, value = line.decode("latin-1").partition("=")
            fields[key.strip().lower()] = value.strip()
            end += len(line)
            if key.strip().lower() == "elementdatafile" or end > HEADER:
                break
    data = fields.get("elementdatafile", "")
    if not data:
        raise BadScan("the MetaImage header names no ElementDataFile: copy it again")
    dims = _dims(fields)
    binary = fields.get("binarydata", "true").lower() != "false"
    if not binary or data.upper() == "LIST" or "%" in data or fields.get("elementtype") not in META_TYPES:
        return None
    local = data.upper() == "LOCAL"
    if not local and not own_data_file(data):
        raise BadScan(
            f"its data file {data!r} is not in the header's folder: put it there, and its bare name in the header"
        )
    big = fields.get("binarydatabyteordermsb", fields.get("elementbyteordermsb", "false")).lower() == "true"
    dtype = np.dtype((">" if big else "<") + META_TYPES[fields["elementtype"]])
    packed = fields.get("compresseddata", "false").lower() == "true"
    name = path if local else os.path.join(os.path.dirname(path), data)
    if not os.path.isfile(name):
        raise BadScan(f"its data file {data} is missing beside it")
    try:
        count = math.prod(dims)
        offset = end if local else int(fields.get("headersize", 0))
        size = int(fields["compresseddatasize"]) if packed and "compresseddatasize" in fields else None
    except ValueError as error:
        raise BadScan(f"the MetaImage header is damaged ({error}): copy it again") from error
    if offset == -1:  # in MetaIO: the voxels are the last bytes of the file
        offset = max(0, os.path.getsize(name) - count * dtype.itemsize)
    if offset < 0 or (size or 0) < 0:
        raise BadScan(f"the MetaImage header is damaged (sizes {offset} and {size}): copy it again")
    return VoxelLayout(name, offset, dtype, count, packed, own_file=not local, packed_size=size)


def _dims(fields: dict[str, str]) -> list[int]:
    """Number of voxels along x, y, z, ... of a MetaImage. Raises BadScan."""
    try:
        dims = [int(n) for n in fields.get("dimsize", "").split()]
        given = int(fields.get("ndims", len(dims)))
    except ValueError as error:
        raise BadScan(f"the MetaImage header is damaged ({error}): copy it again") from error
    if not 1 <= len(dims) <= MOST_DIMS or given != len(dims) or min(dims) < 1:
        raise BadScan(
            f"wrong size: the MetaImage header is damaged (DimSize {dims[:MOST_DIMS]}, NDims {given}): copy it again"
        )
    return dims


def own_data_file(name: str) -> bool:
    """Whether the path of a data file stays in the header's folder or below it."""
    return bool(name) and not os.path.isabs(name) and ".." not in name.replace("\\", "/").split("/")


def nifti_layout(path: str) -> VoxelLayout | None:
    """The layout of a `.nii` or `.nii.gz`; None for voxel types that are left to ITK. Raises BadScan."""
    packed = path.lower().endswith(".gz")
    with open(path, "rb") as file:
        head = file.read(HEADER)
    try:
        head = zlib.decompressobj(GZIP).decompress(head, HEADER) if packed else head
        order = "<" if struct.unpack_from("<i", head)[0] in (348, 540) else ">"
        if struct.unpack_from(order + "i", head)[0] == 348:
            dims = struct.unpack_from(order + "8h", head, 40)
            kind = struct.unpack_from(order + "h", head, 70)[0]
            offset, slope, intercept = struct.unpack_from(order + "3f", head, 108)
        else:
            kind = struct.unpack_from(order + "h", head, 12)[0]
            dims = struct.unpack_from(order + "8q", head, 16)
            offset = struct.unpack_from(order + "q", head, 168)[0]
            slope, intercept = struct.unpack_from(order + "2d", head, 176)
    except (struct.error, zlib.error) as error:
        raise BadScan(f"the NIfTI header cannot be read ({error}): copy it again") from error
    if kind not in NIFTI_TYPES or not 1 <= dims[0] <= 7:
        return None
    if min(dims[1 : dims[0] + 1]) < 1 or not 0 <= offset < 1 << 62:  # NaN too
        raise BadScan(f"the NIfTI header is damaged (dimensions {dims}, voxels at {offset}): copy it again")
    count = math.prod(dims[1 : dims[0] + 1])
    if slope == 0 or not np.isfinite([slope, intercept]).all():  # the standard says: no scaling
        slope, intercept = 1.0, 0.0
    dtype = np.dtype(order + NIFTI_TYPES[kind])
    return VoxelLayout(
        path, int(offset), dtype, count, packed, unpack_first=packed, slope=slope, intercept=intercept
    )


def check_file_size(layout: VoxelLayout) -> None:
    """Raise BadScan when the size of the file does not fit its header. Reads nothing."""
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
    if size < need or (layout.own_file and not layout.compressed and size != need):
        name = os.path.basename(layout.path)
        what = "truncated" if size < need else "wrong size"
        raise BadScan(f"{what}: {name} has {size:,} bytes, its header promises {need:,}")


def read_voxels(layout: VoxelLayout, crc: int = 0) -> tuple[np.ndarray, int]:
    """All voxels as one flat array, and the CRC-32C of the file's bytes, continued from `crc`.

    Raises BadScan when voxels are missing or the checksum of the compression differs.
    """
    check_file_size(layout)
    if layout.compressed:
        data, crc = _unpack(layout, crc)
    else:
        data = np.fromfile(layout.path, "u1")
        crc = crc32c(data.data, crc)
        data = data[layout.offset : layout.offset + layout.expected()]
    if data.size != layout.expected():
        name = os.path.basename(layout.path)
        raise BadScan(f"wrong size: {name} holds {data.size:,} bytes of voxels, not {layout.expected():,}")
    return data.view(layout.dtype), crc


def _unpack(layout: VoxelLayout, crc: int) -> tuple[np.ndarray, int]:
    """Decompress a zlib or gzip file into memory that is allocated once; zlib verifies the checksum of each member."""
    skip = layout.offset if layout.unpack_first else 0
    need = skip + layout.expected()
    with open(layout.path, "rb") as file:
        data = memoryview(file.read())
    crc = crc32c(data, crc)
    packed = data if layout.unpack_first else data[layout.offset :]
    name = os.path.basename(layout.path)
    out, at, extra = np.empty(need, "u1"), 0, 0
    try:
        for piece in _pieces(packed, need):
            keep = min(len(piece), need - at)
            out[at : at + keep] = np.frombuffer(piece, "u1", keep)
            at, extra = at + keep, extra + len(piece) - keep
            if extra > SPARE:
                raise BadScan(
                    f"wrong size: {name} unpacks to more than the {need:,} bytes its header promises"
                )
    except zlib.error as error:
        raise BadScan(f"damaged: {name} does not unpack ({error})") from error
    return out[skip:at], crc


def _pieces(packed: memoryview, need: int) -> Iterator[bytes]:
    """Decompress a zlib or gzip stream in pieces: one gzip member, or more until there are `need` bytes.

    Parallel compressors write several members. Raises zlib.error where a member is damaged or ends early.
    """
    stream, produced = zlib.decompressobj(BOTH), 0
    for start in range(0, len(packed), PIECE):
        rest: bytes | memoryview = packed[start : start + PIECE]
        while rest:
            if stream.eof:
                if produced >= need:
                    return
                stream = zlib.decompressobj(BOTH)
            piece = stream.decompress(rest, PIECE)
            produced += len(piece)
            yield piece
            rest = stream.unused_data if stream.eof else stream.unconsumed_tail
    while not stream.eof:
        piece = stream.decompress(b"", PIECE)
        if not piece:
            raise zlib.error("it ends too early")
        yield piece


READERS = {
    ".mhd": "MetaImageIO", ".mha": "MetaImageIO", ".nii": "NiftiImageIO", ".nii.gz": "NiftiImageIO",
    ".nrrd": "NrrdImageIO", ".nhdr": "NrrdImageIO",
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
    reader = sitk.ImageFileReader()
    reader.SetImageIO(next(kind for ending, kind in READERS.items() if lower.endswith(ending)))
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
    raw = path.lower().endswith((".nrrd", ".nhdr")) and nrrd_fields(path).get("encoding", "").lower() == "raw"
    if promised > nbytes * (1 if raw else MOST_RATIO):
        raise BadScan(
            f"truncated: the header promises {promised:,} bytes of voxels, the files have {nbytes:,}"
        )


def nrrd_fields(path: str) -> dict[str, str]:
    """Fields of an NRRD header, names in lower case without blanks."""
    with open(path, "rb") as file:
        text = file.read(HEADER).partition(b"\n\n")[0].decode("latin-1")
    pairs = (
        line.partition(":")[::2] for line in text.splitlines() if ":" in line and not line.startswith("#")
    )
    return {name.strip().lower().replace(" ", ""): value.strip() for name, value in pairs}


def nrrd_files(path: str) -> tuple[str, ...]:
    """The header, and its data file if there is one. Raises BadScan when that is in another folder."""
    data = nrrd_fields(path).get("datafile", "")
    if not data or data.upper().startswith("LIST") or "%" in data:
        return (path,)
    if not own_data_file(data):
        raise BadScan(
            f"its data file {data!r} is not in the header's folder: put it there, and its bare name in the header"
        )
    full = os.path.join(os.path.dirname(path), data)
    return (path, full) if os.path.isfile(full) else (path,)


def last_line(error: Exception) -> str:
    """The last line of an ITK error, which has the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
