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

import hashlib
import io
import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from crc32c import crc32c

from p2w.errors import UserError
from p2w.files import canonical_json, parse_json
from p2w.shards import manifest_schema
from p2w.shards.manifest_schema import (
    LOCATION_COLUMNS,
    MANIFEST_NAME,
    MANIFEST_VERSION,
    SUB_SCAN_SCHEMA,
    ManifestSchema,
)

SEAL, UNSEALED = b"p2w-manifest-crc32c=", b"00000000"


class DamagedManifest(UserError):
    """There is a manifest, but not the one that was written, or one that cannot be trusted."""


@dataclass(frozen=True)
class Manifest:
    """A data set: its rows, how it was made, and the folder it lies in ("" when read from bytes)."""

    table: pa.Table
    meta: dict[str, Any]
    root: str


def manifest_bytes(
    rows: list[dict[str, Any]], meta: dict[str, Any], form: ManifestSchema = SUB_SCAN_SCHEMA
) -> bytes:
    """The parquet file of `rows` (sorted here) with `meta` as JSON under the schema metadata key "p2w".

    Another key carries the CRC-32C of the whole file with eight zeros in its own place, so that a byte that changes
    anywhere is found, in the footer too, which Parquet's own checksums leave out.
    """
    rows = sorted(rows, key=lambda row: (row["scan_uid"], row["z"], row["y"], row["x"], row["key"]))
    assert form.schema is not None  # one writes sets of a kind
    schema = form.schema.with_metadata(
        {b"p2w": canonical_json(meta | {"seal": SEAL.decode()}), b"p2w.seal": SEAL + UNSEALED}
    )
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, compression="zstd")
    data = buffer.getvalue()
    at = data.rindex(SEAL + UNSEALED) + len(SEAL)
    return data[:at] + b"%08x" % crc32c(data) + data[at + len(UNSEALED) :]


def read_manifest(where: str | os.PathLike[str] | bytes, form: ManifestSchema = SUB_SCAN_SCHEMA) -> Manifest:
    """Read the manifest of a folder, of a manifest file, or of its bytes (fetched by the caller).

    Raises UserError when it is missing, is damaged, is not one of ours, does not make sense (`rules`), or a shard
    it names is absent or of another size (the shards of bytes cannot be checked and are not).
    """
    manifest = open_manifest(where, form)
    if manifest.root:
        again = f"copy it again, or cut it again: {repair_command(manifest.root, manifest.meta)}"
        manifest_schema.refuse_faults(manifest.root, manifest.meta, again)
    return manifest


def open_manifest(where: str | os.PathLike[str] | bytes, form: ManifestSchema = SUB_SCAN_SCHEMA) -> Manifest:
    """As `read_manifest`, without a look at the shards.

    Raises UserError when there is none; DamagedManifest when there is one that cannot be used.
    """
    if isinstance(where, bytes):
        return _parse(where, "the fetched manifest", "", form)
    path = os.fspath(where)
    if os.path.isdir(path):
        path = os.path.join(path, MANIFEST_NAME)
    if not os.path.isfile(path):
        folder = (os.path.dirname(path) or ".") if os.path.basename(path) == MANIFEST_NAME else path
        found = (
            f"no {MANIFEST_NAME} there, so it is no finished set of shards"
            if os.path.isdir(folder)
            else "no such folder"
        )
        raise UserError(f"{folder}: {found}; {form.remedy}")
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise DamagedManifest(f"{path}: cannot be read ({error.strerror}): copy it again") from error
    return _parse(data, path, os.path.dirname(path) or ".", form)


def repair_command(root: str, meta: dict[str, Any]) -> str:
    """The command that cuts damaged shards again, for the user to fill in where the scans are."""
    if "task" in meta:
        again = (
            f"python preprocess/prepare_target.py {meta['task']} --source FOLDER --out {shlex.quote(root)} …"
        )
        return f"delete the shard, and repeat the command that made the set: {again}"
    luna = any(source["subset"] >= 0 for source in meta.get("sources", []))
    return f"p2w verify {shlex.quote(root)} --repair --{'luna' if luna else 'scans'} FOLDER"


def _parse(data: bytes, name: str, root: str, form: ManifestSchema) -> Manifest:
    try:
        _check_seal(data)
        file = pq.ParquetFile(pa.BufferReader(data))
        schema = file.schema_arrow
        text = (schema.metadata or {}).get(b"p2w", b"{}")
        meta = parse_json(text, {})
    except (pa.ArrowException, OSError) as error:
        raise DamagedManifest(f"{name} is not a parquet file ({_first(error)}): copy it again") from error
    except ValueError as error:
        raise DamagedManifest(f"{name} is damaged ({_first(error)}): copy it again") from error
    bare = schema.remove_metadata()
    ours = set(LOCATION_COLUMNS) <= set(bare.names) if form.schema is None else bare.equals(form.schema)
    if meta.get("schema") != MANIFEST_VERSION or not ours:
        raise DamagedManifest(
            f"{name} is not a p2w manifest of version {MANIFEST_VERSION}: name a folder written by {form.made_by}"
        )
    try:
        if meta.get("seal") is not None and SEAL not in data:
            raise ValueError("its checksum is gone")
        manifest_schema.check_meta(meta, form.dims, form.meta)
        manifest_schema.check_shard_size(file.metadata, len(data), meta)
        # In this thread: one of Arrow's pool that still holds our bytes when Python ends aborts the process (exit code 134).
        table = file.read(use_threads=False)
        table.validate(full=True)  # text that is none, for one
        manifest_schema.check_rows(table, meta)
    except (ValueError, pa.ArrowException, OSError) as error:
        raise DamagedManifest(f"{name} makes no sense ({_first(error)}): copy it again") from error
    return Manifest(table.replace_schema_metadata(schema.metadata), meta, root)


def _check_seal(data: bytes) -> None:
    """Raise ValueError when the file is not the one that was written; sets of an earlier time have no seal."""
    at = data.rfind(SEAL) + len(SEAL)
    if at < len(SEAL):
        return
    found = crc32c(UNSEALED, crc32c(data[:at]))
    if b"%08x" % crc32c(data[at + len(UNSEALED) :], found) != data[at : at + len(UNSEALED)]:
        raise ValueError("its checksum differs from what was written")


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


MANIFEST = "manifest.parquet"


def data_fingerprint(meta: dict[str, Any]) -> str:
    """A short name of a data set: a hash of what its manifest says of shape, window, tiling, split and shards."""
    told = {key: meta.get(key) for key in ("shape", "window_hu", "tiling", "split", "shards")}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def shard_places(near: Path, start: Mapping[str, Any]) -> list[str]:
    """Where the data set of a run's start may lie now, the likeliest first; never empty. The fingerprint tells which it is.

    `start` is a record of run.json: `shards` as it was typed, from the directory `cwd` where that is noted. `near` is the
    run, or weights made of it: after the project was moved, the set lies below one of the folders above.
    """
    where, cwd = str(start["shards"]), str(start.get("cwd") or "")
    if "://" in where:
        return [where]
    absolute = os.path.join(cwd, where)
    below = os.path.relpath(where, cwd) if cwd and os.path.isabs(where) else where
    moved = [] if below.startswith("..") else [str(folder / below) for folder in near.absolute().parents]
    there = [place for place in (absolute, *moved, where) if os.path.isfile(os.path.join(place, MANIFEST))]
    return list(dict.fromkeys(there)) or [absolute]
