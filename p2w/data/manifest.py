"""The manifest: one row per sub-scan, saying in which shard and at which byte its voxels lie.

    DIR/
      manifest.parquet   written last and atomically: no manifest, no data set
      UID.tar | UID.arrow   one shard per scan, written once
      train.txt val.txt  shard names, for stock WebDataset users
      report.json        scans left out, and why
      scans/UID.json     what was cut from one scan; lets a restart skip it

Rows are sorted by (scan_uid, z, y, x); the row number is the sub-scan's id. Nothing in the folder depends on
when, where or by how many workers it was written.
"""

import io
import json
import os
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from p2w.errors import UserError

NAME = "manifest.parquet"
VERSION = 1

SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # UID/z0025_y0000_x0128, the tile's first voxel in the canonical (LPS) scan
        ("split", pa.string()),  # train | val
        ("shard", pa.string()),  # file name in the same folder
        ("offset", pa.int64()),  # byte of the shard at which the raw voxels start
        ("nbytes", pa.int64()),  # of the raw voxels
        ("crc32c", pa.uint32()),  # of the raw voxels
        ("scan_uid", pa.string()),
        ("subset", pa.int16()),  # LUNA16's subset, -1 where there is none
        ("z", pa.int32()),  # tile origin, voxel
        ("y", pa.int32()),
        ("x", pa.int32()),
        ("spacing_z", pa.float32()),  # mm
        ("spacing_y", pa.float32()),
        ("spacing_x", pa.float32()),
        ("mean_hu", pa.float32()),  # of the sub-scan's voxels after the window
        ("std_hu", pa.float32()),
    ]
)


@dataclass(frozen=True)
class Manifest:
    """A data set: its rows, how it was made, and the folder it lies in ("" when read from bytes)."""

    table: pa.Table
    meta: dict[str, Any]
    root: str


def dump(value: object, indent: int | None = None) -> bytes:
    """JSON with one spelling for one value, so that equal content means equal bytes."""
    separators = (",", ":") if indent is None else (",", ": ")
    text = json.dumps(value, sort_keys=True, separators=separators, indent=indent, ensure_ascii=False)
    return text.encode() + b"\n"


def publish(path: str, data: bytes, temporary: str) -> None:
    """Write `data` to `temporary`, flush it to the disk, rename it: `path` is whole or absent, never half."""
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def manifest_bytes(rows: list[dict[str, Any]], meta: dict[str, Any]) -> bytes:
    """The parquet file of `rows` (sorted here) with `meta` as JSON under the schema metadata key "p2w"."""
    rows = sorted(rows, key=lambda row: (row["scan_uid"], row["z"], row["y"], row["x"]))
    schema = SCHEMA.with_metadata({b"p2w": dump(meta)})
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, compression="zstd")
    return buffer.getvalue()


def read_manifest(where: str | os.PathLike[str] | bytes) -> Manifest:
    """Read the manifest of a folder, of a manifest file, or of its bytes (fetched by the caller).

    Raises UserError when it is missing, is not one of ours, or a shard it names is absent or of another size
    (the shards of bytes cannot be checked and are not).
    """
    if isinstance(where, bytes):
        return _parse(pa.BufferReader(where), "the fetched manifest", "")
    path = os.fspath(where)
    if os.path.isdir(path):
        path = os.path.join(path, NAME)
    if not os.path.isfile(path):
        folder = (os.path.dirname(path) or ".") if os.path.basename(path) == NAME else path
        found = (
            f"no {NAME} there, so it is no finished set of shards"
            if os.path.isdir(folder)
            else "no such folder"
        )
        raise UserError(
            f"{folder}: {found}; name a data set with "
            "--shards, or make one: python preprocess/shard_luna.py or shard_scans.py, with --out shards"
        )
    manifest = _parse(path, path, os.path.dirname(path) or ".")
    for shard in manifest.meta["shards"]:
        name = os.path.join(manifest.root, shard["name"])
        size = os.path.getsize(name) if os.path.isfile(name) else None
        if size != shard["nbytes"]:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise UserError(
                f"{name} {found}, the manifest says {shard['nbytes']:,} bytes: copy it again, or repeat the "
                "command that cut the scans (it writes only what is missing)"
            )
    return manifest


def _parse(source: str | pa.NativeFile, name: str, root: str) -> Manifest:
    try:
        table = pq.read_table(source)
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{name} is not a parquet file ({reason}): copy it again") from error
    meta = json.loads((table.schema.metadata or {}).get(b"p2w", b"{}"))
    if meta.get("schema") != VERSION or not table.schema.remove_metadata().equals(SCHEMA):
        raise UserError(
            f"{name} is not a p2w manifest of version {VERSION}: name a folder written by "
            "preprocess/shard_luna.py or preprocess/shard_scans.py"
        )
    return Manifest(table, meta, root)
