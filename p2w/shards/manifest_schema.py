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

from p2w.errors import UserError
from p2w.files import type_mismatch

MANIFEST_NAME = "manifest.parquet"
MANIFEST_VERSION = 1

COUNTS = {3: "three", 4: "four"}
MISSING, OUTSIDE = "is missing", "is a link that leads outside the folder"
MOST_VOXELS = 1 << 16  # along an axis
UNPACKED = (
    1 << 26
)  # bytes that a manifest may take in memory, or UNPACKED_TIMES the size of its file if that is more
UNPACKED_TIMES = 64

SHARD_META = {"name": str, "nbytes": int, "crc32c": int}
REQUIRED_META = {"shape": [int], "shards": [SHARD_META]}
SOURCE_META = {"uid": str, "file": str, "subset": int, "nbytes": int, "checksum": str, "left_out": int}
GEOMETRY_META = {"shape": [int], "spacing_mm": [float], "origin_xyz_mm": [float], "direction_xyz": [float]}
OPTIONAL_META = {  # keys that sets of other tools, and of tests, may lack
    "dtype": str,
    "format": str,
    "tool": str,
    "sample_version": int,
    "window_hu": [float],
    "axis_order": str,
    "tiling": {"tile": [int], "z_margin": int, "min_std_hu": float},
    "sources": [SOURCE_META | GEOMETRY_META],
    "bad_scans": [{"where": str, "why": str}],
}
STORES_SCANS = (
    "scans"  # the entry `store` of a set that holds whole scans, in chunks; others have no such entry
)


def stores_scans(meta: dict[str, Any]) -> bool:
    """Whether the set of this metadata holds whole scans in chunks (`scan_store`), and not sub-scans."""
    return meta.get("store") == STORES_SCANS


def stored_shape(meta: dict[str, Any]) -> list[int]:
    """Voxels z, y, x (or c, z, y, x) of every array in the shards: chunks where the set stores scans, else sub-scans."""
    shape: list[int] = meta["chunk"] if stores_scans(meta) else meta["shape"]
    return shape


def check_meta(meta: Any, dims: int | None = 3, optional: dict[str, Any] = OPTIONAL_META) -> None:
    """Raise ValueError unless the metadata has the expected types and its shards have plain file names.

    `dims` is the number of axes of an array, None for 3 or 4; `optional` gives the types of keys that may be missing.
    """
    present = {key: kind for key, kind in optional.items() if key in meta}
    if said := type_mismatch(meta, REQUIRED_META | present, "its metadata"):
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
    for shard in meta["shards"]:
        if not plain_name(shard["name"]):
            raise ValueError(
                f"shard {shard['name']!r} is no plain file name, it could lead outside the folder"
            )
        if not (0 < shard["nbytes"] < 1 << 62 and 0 <= shard["crc32c"] < 1 << 32):
            raise ValueError(f"shard {shard['name']}: {shard['nbytes']} bytes, checksum {shard['crc32c']}")
    names = [shard["name"] for shard in meta["shards"]]
    if len(set(names)) < len(names):
        raise ValueError("two shards have one name")


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
    room = sum(shard["nbytes"] for shard in meta["shards"]) // (2 * math.prod(stored_shape(meta)))
    if file.num_rows > min(room, nbytes) or unpacked > max(UNPACKED, UNPACKED_TIMES * nbytes):
        raise ValueError(f"{file.num_rows:,} rows, its shards have room for {room:,} sub-scans")


def check_rows(table: pa.Table, meta: dict[str, Any]) -> None:
    """Raise ValueError unless every sub-scan has a key of its own, and bytes of its own inside its shard."""
    empty = next((name for name in table.column_names if table[name].null_count), None)
    if empty:
        raise ValueError(f"column {empty} has missing values")
    keys = table["key"].to_pylist()
    if len(set(keys)) < len(keys):
        raise ValueError("two sub-scans have one key")
    sizes = {shard["name"]: shard["nbytes"] for shard in meta["shards"]}
    named = table["shard"].to_pylist()
    unlisted = sorted(set(named) - set(sizes))
    if unlisted:
        raise ValueError(f"shard {unlisted[0]!r} is not in its list of shards")
    offset, nbytes = table["offset"].to_numpy(), table["nbytes"].to_numpy()
    size = np.array([sizes[name] for name in named], np.int64)
    wrong = (nbytes != 2 * math.prod(stored_shape(meta))) | (offset < 0) | (offset > size - nbytes)
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"{keys[at]}: {nbytes[at]:,} bytes from byte {offset[at]:,} of a shard of {size[at]:,} bytes"
        )
    for axis, name in enumerate(REAL_COLUMNS if REAL_COLUMNS[0] in table.column_names else ()):
        real, edge = table[name].to_numpy(), stored_shape(meta)[axis]
        if ((real < 1) | (real > edge)).any():
            at = int(np.flatnonzero((real < 1) | (real > edge))[0])
            raise ValueError(f"{keys[at]}: {name} is {real[at]}, not from 1 to {edge}")
    number = {name: index for index, name in enumerate(sizes)}
    shard = np.array([number[name] for name in named], np.int64)
    order = np.lexsort((offset, shard))
    apart = (np.diff(shard[order]) > 0) | (np.diff(offset[order]) >= nbytes[order][1:])
    if not apart.all():
        raise ValueError(f"{keys[int(order[int(np.argmin(apart)) + 1])]} overlaps another sub-scan")


def shard_fault(root: str, shard: dict[str, Any]) -> str | None:
    """What is wrong with the file of a shard: missing, a link that leads outside, another size; None when it is as expected.

    Its content is not read.
    """
    path = os.path.join(root, shard["name"])
    try:
        if os.path.islink(path):
            inside = os.path.join(os.path.realpath(root), "")
            if not os.path.realpath(path).startswith(inside):
                return OUTSIDE
        found = os.stat(path)
    except OSError:
        return MISSING
    if not stat.S_ISREG(found.st_mode):
        return MISSING
    return None if found.st_size == shard["nbytes"] else f"has {found.st_size:,} bytes"


def refuse_faults(root: str, meta: dict[str, Any], remedy: str) -> None:
    """Raise UserError for the first shard with a `shard_fault`; `remedy` ends the message."""
    for shard in meta["shards"]:
        if fault := shard_fault(root, shard):
            raise UserError(
                f"{os.path.join(root, shard['name'])} {fault}, the manifest says {shard['nbytes']:,} bytes: {remedy}"
            )


SUB_SCAN_COLUMNS = pa.schema(
    [
        ("key", pa.string()),  # UID/z0025_y0000_x0128, its first voxel in the canonical (LPS) scan
        ("split", pa.string()),  # train | val
        ("shard", pa.string()),  # file name in the same folder
        ("offset", pa.int64()),  # byte of the shard at which the raw voxels start
        ("nbytes", pa.int64()),  # of the raw voxels
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
    padded: pa.Schema | None = None  # the schema of a set whose sub-scans may be filled up with air

    def allows(self, columns: pa.Schema) -> bool:
        """Whether a manifest may have these columns."""
        if self.schema is None:
            return set(LOCATION_COLUMNS) <= set(columns.names)
        return any(columns.equals(one) for one in (self.schema, self.padded) if one is not None)


LOCATION_COLUMNS = ("key", "shard", "offset", "nbytes", "crc32c")  # columns that every manifest has
SUB_SCAN_SCHEMA = ManifestSchema(
    SUB_SCAN_COLUMNS,
    3,
    OPTIONAL_META,
    "p2w shard-luna or p2w shard",
    "name a data set with --shards, or make one: p2w shard-luna --out shards, or p2w shard",
    PADDED_COLUMNS,
)
PADDED_SCHEMA = replace(SUB_SCAN_SCHEMA, schema=PADDED_COLUMNS)  # to write such a set
# Accepts any kind of set, to check its bytes alone.
ANY_SCHEMA = ManifestSchema(
    None, None, {}, "p2w shard-luna, p2w shard or p2w prepare", SUB_SCAN_SCHEMA.remedy
)
