"""Columns and metadata of a manifest, and the rules that are checked before anything in it is used.

Every shard must be inside the folder, every sub-scan inside its shard without overlap, and nothing may be larger than the
files can hold.
"""

import math
import os
import stat
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from p2w.errors import UserError
from p2w.files import type_mismatch
from p2w.shards.manifest_index import KEY_COLUMNS, POSITION, TEXT, codes_of, keys_of
from p2w.shards.manifest_tables import TableList

MANIFEST_NAME = "manifest.parquet"
MANIFEST_VERSION = 1
TABLE_VERSION = 2  # of a large set: the lists of the metadata are tables of their own

COUNTS = {3: "three", 4: "four"}
MISSING, OUTSIDE = "is missing", "is a link that leads outside the folder"
CHECKED = 1 << 20  # rows checked at a time
LEAST_PACKED = 16  # bytes of packed voxels: their size, and the least zstd frame
MOST_VOXELS = 1 << 16  # along an axis
# Bytes that a manifest may take in memory, or UNPACKED_TIMES the size of its file if that is more
UNPACKED = 1 << 26
UNPACKED_TIMES = 64

SHARD_META = {"name": str, "nbytes": int, "crc32c": int}
REQUIRED_META = {"shape": [int], "shards": [SHARD_META]}
SOURCE_META = {"uid": str, "file": str, "subset": int, "nbytes": int, "checksum": str, "left_out": int}
GEOMETRY_META = {"shape": [int], "spacing_mm": [float], "origin_xyz_mm": [float], "direction_xyz": [float]}
OPTIONAL_META = {  # keys that sets of other tools, and of tests, may lack
    "dtype": str,
    "format": str,
    "compression": str,
    "tool": str,
    "sample_version": int,
    "window_hu": [float],
    "axis_order": str,
    "tiling": {"tile": [int], "z_margin": int, "min_std_hu": float},
    "sources": [SOURCE_META | GEOMETRY_META],
    "bad_scans": [{"where": str, "why": str}],
}
# The entry `store` of a set that holds whole scans, in chunks; others have no such entry
STORES_SCANS = "scans"


def stores_scans(meta: dict[str, Any]) -> bool:
    """Whether the set of this metadata holds whole scans in chunks (`scan_store`), and not sub-scans."""
    return meta.get("store") == STORES_SCANS


def compressed(meta: dict[str, Any]) -> bool:
    """Whether the voxels in the shards of this set are packed by zstd (`writer.unpack_voxels`)."""
    return "compression" in meta


def unpacked_bytes(meta: dict[str, Any]) -> int | None:
    """Bytes of the voxels of a sub-scan where they are packed in the shards; None where they are not."""
    return 2 * math.prod(stored_shape(meta)) if compressed(meta) else None


def stored_shape(meta: dict[str, Any]) -> list[int]:
    """Voxels z, y, x (or c, z, y, x) of every array in the shards: chunks where the set stores scans, else sub-scans."""
    shape: list[int] = meta["chunk"] if stores_scans(meta) else meta["shape"]
    return shape


def check_meta(meta: Any, dims: int | None = 3, optional: dict[str, Any] = OPTIONAL_META) -> None:
    """Raise ValueError unless the metadata has the expected types and its shards have plain file names.

    `dims` is the number of axes of an array, None for 3 or 4; `optional` gives the types of keys that may be missing.
    """
    forms: dict[str, Any] = REQUIRED_META | {key: kind for key, kind in optional.items() if key in meta}
    tables = {key: meta[key] for key in forms if isinstance(meta.get(key), TableList)}
    for key, entries in tables.items():
        entries.form = forms[key][0] if isinstance(forms[key], list) else forms[key]
    rest = {key: form for key, form in forms.items() if key not in tables}
    if said := type_mismatch(meta, rest, "its metadata"):
        raise ValueError(said)
    shape = meta["shape"]
    dims = len(shape) if dims is None else dims
    if not 3 <= len(shape) == dims <= 4 or not all(1 <= n <= MOST_VOXELS for n in shape):
        raise ValueError(
            f"its shape is {shape}, not {COUNTS.get(dims, 'three or four')} numbers of voxels from 1 to {MOST_VOXELS:,}"
        )
    if "store" in meta:
        if not stores_scans(meta):
            raise ValueError(f"it stores {meta['store']!r}, which this version of p2w does not know")
        if said := type_mismatch(meta, {"chunk": [int]}, "its metadata"):
            raise ValueError(said)
        if len(meta["chunk"]) != 3 or not all(1 <= n <= MOST_VOXELS for n in meta["chunk"]):
            raise ValueError(f"its chunks are {meta['chunk']}, not three numbers of voxels")
    names, sizes, checksums = shard_columns(meta)
    _check_compression(meta, names)
    for name in names:
        if not plain_name(name):
            raise ValueError(f"shard {name!r} is no plain file name, it could lead outside the folder")
    for name, nbytes, crc in zip(names, sizes, checksums, strict=True):
        if not (0 < nbytes < 1 << 62 and 0 <= crc < 1 << 32):
            raise ValueError(f"shard {name}: {nbytes} bytes, checksum {crc}")
    if len(set(names)) < len(names):
        raise ValueError("two shards have one name")


def _check_compression(meta: dict[str, Any], names: list[str]) -> None:
    """Raise ValueError where the voxels are packed in a way that this version cannot read."""
    if not compressed(meta):
        return
    if meta["compression"] != "zstd" or stores_scans(meta) or not all(n.endswith(".arrow") for n in names):
        raise ValueError(f"its voxels are packed by {meta['compression']!r}, which this p2w cannot read")


def shard_columns(meta: dict[str, Any]) -> tuple[list[str], list[int], list[int]]:
    """Names, sizes in bytes and checksums of all shards."""
    shards, keys = meta["shards"], tuple(SHARD_META)
    if isinstance(shards, TableList):
        names, sizes, checksums = (shards.column(key) for key in keys)
    else:
        names, sizes, checksums = ([shard[key] for shard in shards] for key in keys)
    return names, sizes, checksums


def plain_name(name: str) -> bool:
    """Whether `name` is a file name of a shard, which cannot lead to another folder."""
    return (
        name.endswith((".tar", ".arrow"))
        and not name.startswith(".")
        and name.isprintable()
        and not set(name) & set("/\\")
        and len(name.encode()) <= 255
    )


def check_shard_size(file: Any, nbytes: int, meta: dict[str, Any]) -> None:
    """Raise ValueError when a table has more rows or bytes than its file and shards can hold.

    `file` is the metadata of the ParquetFile, `nbytes` the size of the file.
    """
    groups = [file.row_group(i) for i in range(file.num_row_groups)]
    unpacked = sum(g.column(c).total_uncompressed_size for g in groups for c in range(g.num_columns))
    least = LEAST_PACKED if compressed(meta) else 2 * math.prod(stored_shape(meta))
    room = sum(shard_columns(meta)[1]) // least
    if file.num_rows > min(room, nbytes) or unpacked > max(UNPACKED, UNPACKED_TIMES * nbytes):
        raise ValueError(f"{file.num_rows:,} rows, its shards have room for {room:,} sub-scans")


def check_rows(table: pa.Table, meta: dict[str, Any]) -> None:
    """Raise ValueError unless every sub-scan has a key of its own, and bytes of its own inside its shard."""
    empty = next((name for name in table.column_names if table[name].null_count), None)
    if empty:
        raise ValueError(f"column {empty} has missing values")
    keys = keys_of(table)
    names, sizes, _ = shard_columns(meta)
    if not _keys_differ(table):
        raise ValueError("two sub-scans have one key")
    try:
        shard = codes_of(table["shard"], pa.array(names, pa.string()))
    except ValueError as error:
        raise ValueError(f"shard {str(error)!r} is not in its list of shards") from error
    offset, nbytes = table["offset"].to_numpy(), table["nbytes"].to_numpy()
    size_of, expected = np.array(sizes, np.int64), 2 * math.prod(stored_shape(meta))
    for start in range(0, len(shard), CHECKED):  # of ten million rows at once, the sizes alone take 80 MB
        part = slice(start, start + CHECKED)
        size = size_of[shard[part]]
        if compressed(meta):
            wrong = (nbytes[part] < LEAST_PACKED) | (nbytes[part] > expected + expected // 8 + 4096)
        else:
            wrong = nbytes[part] != expected
        wrong |= (offset[part] < 0) | (offset[part] > size - nbytes[part])
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            raise ValueError(
                f"{keys[start + at]}: {nbytes[start + at]:,} bytes from byte {offset[start + at]:,} of a shard of "
                f"{size[at]:,} bytes"
            )
    for axis, name in enumerate(REAL_COLUMNS if REAL_COLUMNS[0] in table.column_names else ()):
        real, edge = table[name].to_numpy(), stored_shape(meta)[axis]
        if ((real < 1) | (real > edge)).any():
            at = int(np.flatnonzero((real < 1) | (real > edge))[0])
            raise ValueError(f"{keys[at]}: {name} is {real[at]}, not from 1 to {edge}")
    if not compressed(meta) and _in_runs(shard) and _ascending(shard, offset, expected):
        return
    order = np.lexsort((offset, shard))
    apart = (np.diff(shard[order]) > 0) | (np.diff(offset[order]) >= nbytes[order][:-1])
    if not apart.all():
        raise ValueError(f"{keys[int(order[int(np.argmin(apart)) + 1])]} overlaps another sub-scan")


def _keys_differ(table: pa.Table) -> bool:
    """Whether every row has a key of its own. Sorted rows, as p2w writes them, need no set of all keys."""
    count = len(table)
    if "key" in table.column_names:
        keys = table["key"]
        rising = pc.all(pc.greater(keys.slice(1), keys.slice(0, max(0, count - 1)))).as_py()
        return rising is not False or pc.count_distinct(keys).as_py() == count
    scans = table["scan_uid"].unify_dictionaries()
    scan = codes_of(scans, scans.chunk(0).dictionary) if count else np.zeros(0, np.int32)
    position = [table[name].to_numpy() for name in POSITION]
    if not _in_runs(scan):
        order = np.lexsort((*reversed(position), scan))
        scan, position = scan[order], [one[order] for one in position]
    for start in range(0, count, CHECKED):
        part = slice(start, start + CHECKED + 1)
        after = np.zeros(max(0, len(scan[part]) - 1), np.bool_)
        same = scan[part][1:] == scan[part][:-1]
        for axis in position:  # z, then y, then x: the first in which two rows differ decides
            step = np.diff(axis[part])
            if (same & (step < 0)).any():
                return _differ(scan, position)
            same &= step == 0
            after |= step > 0
        if same.any():
            return False
    return True


def _differ(scan: NDArray[Any], position: list[NDArray[Any]]) -> bool:
    """Whether no two rows have the same scan and position, for rows in any order."""
    order = np.lexsort((*reversed(position), scan))
    same = np.diff(scan[order]) == 0
    for axis in position:
        same &= np.diff(axis[order]) == 0
    return not same.any()


def _in_runs(codes: NDArray[Any]) -> bool:
    """Whether equal codes stand beside each other."""
    changes = int(np.count_nonzero(codes[1:] != codes[:-1]))
    return len(np.unique(codes[np.flatnonzero(np.diff(codes, prepend=-1))])) == changes + (len(codes) > 0)


def _ascending(codes: NDArray[Any], offset: NDArray[np.int64], nbytes: int) -> bool:
    """Whether the sub-scans of a code follow one another in its shard, and none begins before the last one ends."""
    for start in range(0, len(codes), CHECKED):
        part = slice(start, start + CHECKED + 1)
        same = codes[part][1:] == codes[part][:-1]
        if (same & (np.diff(offset[part]) < nbytes)).any():
            return False
    return True


def shard_fault(root: str, shard: dict[str, Any]) -> str | None:
    """What is wrong with the file of a shard: missing, a link that leads outside, another size; None when it is as expected.

    Its content is not read.
    """
    return _file_fault(root, shard["name"], shard["nbytes"])


def _file_fault(root: str, name: str, nbytes: int) -> str | None:
    path = os.path.join(root, name)
    try:
        found = os.lstat(path)
        if stat.S_ISLNK(found.st_mode):
            inside = os.path.join(os.path.realpath(root), "")
            if not os.path.realpath(path).startswith(inside):
                return OUTSIDE
            found = os.stat(path)
    except OSError:
        return MISSING
    if not stat.S_ISREG(found.st_mode):
        return MISSING
    return None if found.st_size == nbytes else f"has {found.st_size:,} bytes"


def refuse_faults(root: str, meta: dict[str, Any], remedy: str) -> None:
    """Raise UserError for the first shard with a `shard_fault`; `remedy` ends the message."""
    names, sizes, _ = shard_columns(meta)
    for name, nbytes in zip(names, sizes, strict=True):
        if fault := _file_fault(root, name, nbytes):
            raise UserError(
                f"{os.path.join(root, name)} {fault}, the manifest says {nbytes:,} bytes: {remedy}"
            )


SUB_SCAN_COLUMNS = pa.schema(
    [
        ("key", pa.string()),  # UID/z0025_y0000_x0128, its first voxel in the canonical (LPS) scan
        ("split", pa.string()),  # train | val
        ("shard", pa.string()),  # file name in the same folder
        ("offset", pa.int64()),  # byte of the shard at which the raw voxels start
        ("nbytes", pa.int64()),  # of the raw voxels, or of the packed ones
        ("crc32c", pa.uint32()),  # of the raw voxels
        ("scan_uid", pa.string()),
        ("subset", pa.int16()),  # LUNA16's subset, -1 where there is none
        ("z", pa.int32()),  # first voxel in the canonical scan
        ("y", pa.int32()),
        ("x", pa.int32()),
        ("spacing_z", pa.float32()),  # mm
        ("spacing_y", pa.float32()),
        ("spacing_x", pa.float32()),
        ("mean_hu", pa.float32()),  # of the sub-scan's voxels after the window
        ("std_hu", pa.float32()),
    ]
)

# Further columns of a set of which sub-scans may be filled up with air (`tiling.short` "pad"): how many of their voxels are
# the scan's own. Behind them, all is air.
REAL_COLUMNS = tuple(f"real_{axis}" for axis in "zyx")
PADDED_COLUMNS = pa.schema([*SUB_SCAN_COLUMNS, *((name, pa.int32()) for name in REAL_COLUMNS)])


def sub_scan_key(uid: str, z: int, y: int, x: int) -> str:
    """The key of the sub-scan, or chunk, of a scan that begins at this voxel of the canonical scan."""
    return f"{uid}/z{z:04d}_y{y:04d}_x{x:04d}"


@dataclass(frozen=True)
class ManifestSchema:
    """What the manifest of a data set must look like: of sub-scans for pretraining, or of samples of a target task."""

    schema: pa.Schema | None  # None: any that has LOCATION_COLUMNS
    dims: int | None  # axes of an array: 3 for voxels [z,y,x], 4 with channels; None: either
    meta: dict[str, Any]  # types of optional metadata, as for `files.type_mismatch`
    made_by: str  # the command that writes such a set
    remedy: str  # what to do where there is no manifest
    # The schema of a set with further columns: sub-scans that may be filled up with air, samples with targets.
    wider: pa.Schema | None = None

    def allows(self, columns: pa.Schema, compacted: bool = False) -> bool:
        """Whether a manifest may have these columns; `compacted`: with texts in dictionaries, and maybe without keys."""
        if compacted:
            plain = [f.with_type(f.type.value_type) if f.type == TEXT else f for f in columns]
            has_key = "key" in columns.names or not set(KEY_COLUMNS) <= set(columns.names)
            columns = pa.schema(plain if has_key else [pa.field("key", pa.string()), *plain])
        if self.schema is None:
            return set(LOCATION_COLUMNS) <= set(columns.names)
        return any(columns.equals(one) for one in (self.schema, self.wider) if one is not None)


LOCATION_COLUMNS = ("key", "shard", "offset", "nbytes", "crc32c")  # columns that every manifest has
SUB_SCAN_SCHEMA = ManifestSchema(
    SUB_SCAN_COLUMNS, 3, OPTIONAL_META, "p2w shard-luna or p2w shard",
    "name a data set with --shards, or make one: p2w shard-luna --out shards, or p2w shard", PADDED_COLUMNS,
)  # fmt: skip
PADDED_SCHEMA = replace(SUB_SCAN_SCHEMA, schema=PADDED_COLUMNS)  # to write such a set
# Accepts any kind of set, to check its bytes alone.
ANY_SCHEMA = ManifestSchema(
    None, None, {}, "p2w shard-luna, p2w shard or p2w prepare", SUB_SCAN_SCHEMA.remedy
)
