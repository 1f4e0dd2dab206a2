"""MetaImage headers (.mhd, .mha): where the voxels are and how they are encoded. Keys as in MetaIO's documentation.

ITK reads the grid. What it overlooks is refused here: headers without voxel sizes, in other units than mm, with keys that
say different things twice, or with a function from stored values to intensities, which no reader applies.
"""

import math
import os

import numpy as np

from p2w.ct.orientation import BadScan
from p2w.ct.voxel_files import HEADER, MOST_FILES, VoxelLayout, own_data_file, pattern_files

META_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4",
    "MET_UINT": "u4", "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
LINE = 2048  # most bytes of a line in a MetaImage header; from 4096 on, ITK's parser overflows its buffer (SimpleITK 2.5)
# Keys of which several names mean one thing; MetaIO reads them in this spelling alone, and passes over any other.
ALIASES = (("Offset", "Position", "Origin"), ("TransformMatrix", "Orientation", "Rotation"))
EXACT = {
    key.lower(): key for key in ("DimSize", "ElementType", "ElementSpacing", "ElementSize", *sum(ALIASES, ()))
}
BYTE_ORDER = ("binarydatabyteordermsb", "elementbyteordermsb")
MOST_DIMS = 10


def meta_image_fields(path: str) -> tuple[dict[str, str], list[str], int]:
    """Fields of a MetaImage header (names in lower case), the lines of a LIST behind them, and the header's length in bytes.

    Raises BadScan for a header that is damaged or tells no voxel size.
    """
    with open(path, "rb") as file:
        fields, listed, end, written = dict[str, str](), list[str](), 0, set[str]()
        while line := file.readline(HEADER):
            if len(line) > LINE or any(byte < 32 and byte not in b"\t\r\n" for byte in line):
                raise BadScan("the MetaImage header is damaged (a line that is not text): copy it again")
            key, _, value = (part.strip() for part in line.decode("latin-1").partition("="))
            if fields.setdefault(key.lower(), value) != value:
                raise BadScan(
                    f"the MetaImage header has {key} twice, as {fields[key.lower()]} and as {value}"
                )
            written.add(key)
            end += len(line)
            if key.strip().lower() == "elementdatafile" or end > HEADER:
                break
        if fields.get("elementdatafile", "").upper().startswith("LIST"):
            listed = [
                line.strip() for line in file.read(HEADER).decode("latin-1").splitlines() if line.strip()
            ]
    if not fields.get("elementdatafile"):
        raise BadScan("the MetaImage header names no ElementDataFile: copy it again")
    if "NDims" not in written:
        raise BadScan(
            "the MetaImage header has no NDims (keys are written as in ElementSpacing): copy it again"
        )
    for key in sorted(written):
        if key != (exact := EXACT.get(key.lower(), key)):
            raise BadScan(f"the MetaImage header has {key}, which readers pass over: write {exact}")
    _check_fields(fields)
    sizes = fields.get("elementspacing") or fields.get("elementsize") or ""
    try:
        spacing = [float(mm) for mm in sizes.split()]
    except ValueError as error:
        raise BadScan(f"the MetaImage header is damaged ({error}): copy it again") from error
    if not spacing:
        raise BadScan(
            "has no voxel size (ElementSpacing): 1 mm would be a guess, write the true one into its header"
        )
    if not all(math.isfinite(mm) and mm != 0 for mm in spacing):
        raise BadScan(f"ElementSpacing {sizes}: mm that are not 0 are needed")
    return fields, listed, end


def _is_true(text: str) -> bool:
    """As MetaIO reads it: by the first letter."""
    return text[:1] in ("T", "t", "1")


def _check_fields(fields: dict[str, str]) -> None:
    """Raise BadScan for a unit of length other than mm, and for intensities that are not the values stored."""
    unit = fields.get("distanceunits", "mm").lower()
    if unit not in ("mm", "?", ""):
        raise BadScan(f"DistanceUnits {unit}: readers take sizes for mm; write them in mm")
    if fields["elementdatafile"].upper() == "LOCAL" and fields.get("headersize", "0") not in ("0", "-1"):
        raise BadScan(f"HeaderSize is {fields['headersize']}, but its voxels follow its header: remove it")
    for names in ALIASES:
        written = {tuple(fields[name.lower()].split()) for name in names if name.lower() in fields}
        if len(written) > 1:
            raise BadScan(
                f"the MetaImage header has {' and '.join(names)} that differ: remove the wrong ones"
            )
    for key, plain in (("Slope", 1.0), ("Offset", 0.0)):
        said = fields.get(f"elementtointensityfunction{key.lower()}", str(plain))
        try:
            same = float(said) == plain
        except ValueError:
            same = False
        if not same:
            raise BadScan(
                f"ElementToIntensityFunction{key} is {said}, which readers do not apply: write the values that are meant"
            )


def meta_image_layout(path: str) -> VoxelLayout | None:
    """The layout of a `.mhd` or `.mha`; None for types of voxels that only ITK reads. Raises BadScan."""
    fields, listed, end = meta_image_fields(path)
    data = fields["elementdatafile"]
    dims = _dims(fields)
    sizes = (fields.get("elementspacing") or fields["elementsize"]).split()
    if len(sizes) < len(dims):
        raise BadScan(
            f"ElementSpacing has {len(sizes)} numbers, of {len(dims)} axes: write all into its header"
        )
    if fields.get("elementtype") not in META_TYPES or fields.get("elementnumberofchannels", "1") != "1":
        return None
    local = data.upper() == "LOCAL"
    names = _data_files(data, listed)
    for name in names:
        if not own_data_file(name):
            raise BadScan(
                f"its data file {name!r} is not in the header's folder: put it there, and its bare name in the header"
            )
    orders = {_is_true(fields[key]) for key in BYTE_ORDER if key in fields}
    if len(orders) > 1:
        raise BadScan(
            "BinaryDataByteOrderMSB and ElementByteOrderMSB contradict each other: remove the wrong one"
        )
    big = orders == {True}
    dtype = np.dtype((">" if big else "<") + META_TYPES[fields["elementtype"]])
    packed = _is_true(fields.get("compresseddata", "False"))
    text = not _is_true(fields.get("binarydata", "True"))
    if packed and (text or len(names) > 1):
        raise BadScan("its voxels are compressed and text or a list, which is not read: write it as one .mha")
    paths = [path] if local else [os.path.join(os.path.dirname(path), name) for name in names]
    for name, full in zip(names, paths, strict=True):
        if not local and not os.path.isfile(full):
            raise BadScan(f"its data file {name} is missing beside it")
    try:
        count = math.prod(dims)
        offset = end if local else int(fields.get("headersize", 0))
        size = int(fields["compresseddatasize"]) if packed and "compresseddatasize" in fields else None
    except ValueError as error:
        raise BadScan(f"the MetaImage header is damaged ({error}): copy it again") from error
    if count % len(paths):
        raise BadScan(f"wrong size: {count:,} voxels in {len(paths)} data files")
    if offset == -1:  # in MetaIO: the voxels are the last bytes of the file
        offset = max(0, os.path.getsize(paths[0]) - count // len(paths) * dtype.itemsize)
    if offset < 0 or (size or 0) < 0:
        raise BadScan(f"the MetaImage header is damaged (sizes {offset} and {size}): copy it again")
    return VoxelLayout(
        paths[0], offset, dtype, count, packed, own_file=not local, packed_size=size, text=text, more=tuple(paths[1:])
    )  # fmt: skip


def meta_image_files(path: str) -> tuple[str, ...]:
    """The header, and the files of its voxels where they are others. Raises BadScan."""
    layout = meta_image_layout(path)
    return (path,) if layout is None or layout.path == path else (path, layout.path, *layout.more)


def _data_files(data: str, listed: list[str]) -> list[str]:
    """Names of a MetaImage's data files: one, those of a LIST, or those of a pattern `name%03d.raw first last step`."""
    if data.upper().startswith("LIST"):
        if not listed or len(listed) > MOST_FILES:
            raise BadScan(f"its LIST names {len(listed)} data files")
        return listed
    if "%" not in data:
        return [data]
    return pattern_files(data)


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
