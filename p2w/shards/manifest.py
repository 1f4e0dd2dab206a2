"""The manifest of a data set: one row per sub-scan, with its shard and the byte at which its voxels start.

    DIR/
      manifest.parquet      written last and atomically: a folder without it is not a data set
      UID.tar | UID.arrow   one shard per scan, written once
      train.txt val.txt     shard names, for users of plain WebDataset
      report.json           scans left out, and why
      scans/UID.json        the record of one scan; lets a restart skip it

Rows are sorted by (scan_uid, z, y, x); the row number is the sub-scan's id. The bytes of the folder do not depend on the
time, the machine or the number of workers that wrote it.
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
    MANIFEST_NAME,
    MANIFEST_VERSION,
    SUB_SCAN_SCHEMA,
    ManifestSchema,
)
from p2w.shards.mixture import is_mixture, mixture_fingerprint, relocated

SEAL, UNSEALED = b"p2w-manifest-crc32c=", b"00000000"  # the seal is the manifest's checksum of itself


class DamagedManifest(UserError):
    """A manifest that is not as it was written, or whose content breaks a rule."""


@dataclass(frozen=True)
class Manifest:
    """A data set: its rows, how it was made, and its folder ("" when read from bytes)."""

    table: pa.Table
    meta: dict[str, Any]
    root: str


def manifest_bytes(
    rows: list[dict[str, Any]], meta: dict[str, Any], expected: ManifestSchema = SUB_SCAN_SCHEMA
) -> bytes:
    """The bytes of a parquet file of `rows` (sorted here), with `meta` as JSON under the schema metadata key "p2w".

    The key "p2w.seal" has the CRC-32C of the whole file, computed with eight zeros in place of its own digits. So a
    changed byte is detected anywhere, also in the footer, which Parquet's own checksums do not cover.
    """
    rows = sorted(rows, key=lambda row: (row["scan_uid"], row["z"], row["y"], row["x"], row["key"]))
    assert expected.schema is not None  # ANY_SCHEMA is for reading only
    schema = expected.schema.with_metadata(
        {b"p2w": canonical_json(meta | {"seal": SEAL.decode()}), b"p2w.seal": SEAL + UNSEALED}
    )
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, compression="zstd")
    data = buffer.getvalue()
    at = data.rindex(SEAL + UNSEALED) + len(SEAL)
    return data[:at] + b"%08x" % crc32c(data) + data[at + len(UNSEALED) :]


def read_manifest(
    where: str | os.PathLike[str] | bytes, expected: ManifestSchema = SUB_SCAN_SCHEMA
) -> Manifest:
    """Read the manifest of a folder, of a manifest file, or of its bytes (fetched by the caller).

    Raises UserError when it is missing, damaged, not written by p2w, or breaks a rule of `manifest_schema`, and when a
    shard that it names is missing or has another size (which is not checked for a manifest read from bytes).
    """
    manifest = open_manifest(where, expected)
    if manifest.root:
        again = f"copy it again, or cut it again: {repair_command(manifest.root, manifest.meta)}"
        manifest_schema.refuse_faults(manifest.root, manifest.meta, again)
    return manifest


def open_manifest(
    where: str | os.PathLike[str] | bytes, expected: ManifestSchema = SUB_SCAN_SCHEMA
) -> Manifest:
    """Read a manifest as `read_manifest` does, without checking the shards.

    Raises UserError when there is none, and DamagedManifest when it cannot be used.
    """
    if isinstance(where, bytes):
        return _parse(where, "the fetched manifest", "", expected)
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
        raise UserError(f"{folder}: {found}; {expected.remedy}")
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise DamagedManifest(f"{path}: cannot be read ({error.strerror}): copy it again") from error
    return _parse(data, path, os.path.dirname(path) or ".", expected)


def repair_command(root: str, meta: dict[str, Any]) -> str:
    """The command that cuts damaged shards again; FOLDER in it stands for the scans."""
    if "task" in meta:
        again = f"p2w prepare {meta['task']} --source FOLDER --out {shlex.quote(root)} …"
        return f"delete the shard, and repeat the command that made the set: {again}"
    luna = any(source["subset"] >= 0 for source in meta.get("sources", []))
    where = "SHARDS" if "://" in root else shlex.quote(root)
    again = f"p2w verify {where} --repair --{'luna' if luna else 'scans'} FOLDER"
    return (
        f"{again} on the folder it was uploaded from, then upload the shard again" if "://" in root else again
    )


def _parse(data: bytes, name: str, root: str, expected: ManifestSchema) -> Manifest:
    try:
        _check_seal(data)
        file = pq.ParquetFile(pa.BufferReader(data))
        schema = file.schema_arrow
        text = (schema.metadata or {}).get(b"p2w", b"{}")
        meta = parse_json(text, {})
    except (pa.ArrowException, OSError) as error:
        raise DamagedManifest(
            f"{name} is not a parquet file ({_first_line(error)}): copy it again"
        ) from error
    except ValueError as error:
        raise DamagedManifest(f"{name} is damaged ({_first_line(error)}): copy it again") from error
    bare = schema.remove_metadata()
    if meta.get("schema") != MANIFEST_VERSION or not expected.allows(bare):
        raise DamagedManifest(
            f"{name} is not a p2w manifest of version {MANIFEST_VERSION}: name a folder written by {expected.made_by}"
        )
    try:
        if meta.get("seal") is not None and SEAL not in data:
            raise ValueError("its checksum is gone")
        manifest_schema.check_meta(meta, expected.dims, expected.meta)
        manifest_schema.check_shard_size(file.metadata, len(data), meta)
        # Without Arrow's threads: if one of them still uses these bytes when Python exits, the process aborts (code 134).
        table = file.read(use_threads=False)
        table.validate(full=True)  # finds text that is not UTF-8, among others
        manifest_schema.check_rows(table, meta)
    except (ValueError, pa.ArrowException, OSError) as error:
        raise DamagedManifest(f"{name} makes no sense ({_first_line(error)}): copy it again") from error
    return Manifest(table.replace_schema_metadata(schema.metadata), meta, root)


def _check_seal(data: bytes) -> None:
    """Raise ValueError when the bytes are not those that were written; manifests of old versions have no seal."""
    at = data.rfind(SEAL) + len(SEAL)
    if at < len(SEAL):
        return
    found = crc32c(UNSEALED, crc32c(data[:at]))
    if b"%08x" % crc32c(data[at + len(UNSEALED) :], found) != data[at : at + len(UNSEALED)]:
        raise ValueError("its checksum differs from what was written")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def data_fingerprint(meta: dict[str, Any]) -> str:
    """16 hexadecimal digits that identify a data set: a hash of its manifest's shape, window, tiling, split and shards."""
    if "mixture" in meta:
        return mixture_fingerprint(meta["mixture"])
    identity = {key: meta.get(key) for key in ("shape", "window_hu", "tiling", "split", "shards")}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def candidate_data_paths(near: Path, start: Mapping[str, Any]) -> list[str]:
    """Paths at which a run's data set may be now, the likeliest first; never empty. The fingerprint tells which is right.

    `start` is a record of run.json: `shards` as it was typed, in the directory `cwd` if that is recorded. `near` is the
    folder of the run, or weights exported from it: if the project was moved, the set is below one of its parent folders.
    """
    where, cwd = str(start["shards"]), str(start.get("cwd") or "")
    if is_mixture(where):
        return [relocated(where, lambda part: candidate_data_paths(near, {**start, "shards": part})[0])]
    if "://" in where:
        return [where]
    absolute = os.path.join(cwd, where)
    below = os.path.relpath(where, cwd) if cwd and os.path.isabs(where) else where
    moved = [] if below.startswith("..") else [str(folder / below) for folder in near.absolute().parents]
    there = [path for path in (absolute, *moved, where) if os.path.isfile(os.path.join(path, MANIFEST_NAME))]
    return list(dict.fromkeys(there)) or [absolute]
