"""The manifest of a data set: one row per sub-scan, with its shard and the byte at which its voxels start.

    DIR/
      manifest.parquet      written last and atomically: a folder without it is not a data set
      UID.tar | UID.arrow   one shard per scan, written once
      train.txt val.txt     shard names, for users of plain WebDataset
      README.md             dataset card: the shards of each split, for users of Hugging Face's datasets
      report.json           scans left out, and why
      scans/UID.json        the record of one scan; lets a restart skip it

Rows are sorted by (scan_uid, z, y, x); the row number is the sub-scan's id. The bytes of the folder do not depend on the
time, the machine or the number of workers that wrote it.

A manifest of version 1 has its lists, of shards, sources and scans, as JSON in its metadata. From LARGE_SHARDS shards or
LARGE_ROWS rows on, version 2 is written: the lists are tables of their own (`manifest_tables`), texts are in dictionaries,
and a key that follows from scan and position is not stored. Its rows are mapped into memory (`manifest_index`).
"""

import hashlib
import io
import json
import math
import mmap
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from crc32c import crc32c

from p2w.errors import UserError, first_line
from p2w.files import canonical_json, parse_json
from p2w.shards import manifest_schema
from p2w.shards.manifest_index import (
    INDEX_ROWS,
    Keys,
    codes_of,
    compact,
    keys_of,
    mapped_rows,
    own_dictionaries,
    sorted_rows,
)
from p2w.shards.manifest_schema import (
    MANIFEST_NAME,
    MANIFEST_VERSION,
    SUB_SCAN_SCHEMA,
    TABLE_VERSION,
    ManifestSchema,
)
from p2w.shards.manifest_tables import PAGE, json_pieces, long_texts, put_back, split_off

LARGE_SHARDS, LARGE_ROWS = 20_000, 1_000_000  # from which on version 2 is written
ROW_GROUP = 1 << 18
MAPPED = 16 << 20  # bytes of a manifest from which on it is mapped, and not read
SEAL, UNSEALED = b"p2w-manifest-crc32c=", b"00000000"  # the seal is the manifest's checksum of itself


class DamagedManifest(UserError):
    """A manifest that is not as it was written, or whose content breaks a rule."""


@dataclass(frozen=True)
class Manifest:
    """A data set: its rows, how it was made, and its folder ("" when read from bytes).

    Lists of `meta` may be a `TableList`, and texts of `table` in dictionaries. `table` may lack the column `key`.
    """

    table: pa.Table
    meta: dict[str, Any]
    root: str

    @property
    def keys(self) -> Keys:
        """The keys of all rows."""
        return keys_of(self.table)

    @cached_property
    def _by_shard(self) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
        """Rows in the order of their shards, where the rows of each shard begin, and the numbers of the shards."""
        names = [shard["name"] for shard in self.meta["shards"]]
        codes = codes_of(self.table["shard"], pa.array(names, pa.string()))
        order = np.argsort(codes, kind="stable")
        starts = np.searchsorted(codes[order], np.arange(len(names) + 1))
        return order, starts, {name: number for number, name in enumerate(names)}

    def rows_of(self, shard: str) -> np.ndarray:
        """The rows of the sub-scans in a shard, ascending."""
        order, starts, numbers = self._by_shard
        number = numbers[shard]
        return order[starts[number] : starts[number + 1]]


def manifest_bytes(
    rows: list[dict[str, Any]] | pa.Table,
    meta: dict[str, Any],
    expected: ManifestSchema = SUB_SCAN_SCHEMA,
    version: int | None = None,
) -> bytes:
    """The bytes of a parquet file of `rows` (sorted here), with `meta` as JSON under the schema metadata key "p2w".

    The key "p2w.seal" has the CRC-32C of the whole file, computed with eight zeros in place of its own digits. So a
    changed byte is detected anywhere, also in the footer, which Parquet's own checksums do not cover. `version` None is 1
    for a small set and 2 for a large one.
    """
    assert expected.schema is not None  # ANY_SCHEMA is for reading only
    large = len(rows) >= LARGE_ROWS or len(meta["shards"]) >= LARGE_SHARDS
    if version == TABLE_VERSION or (version is None and large):
        return _sealed(_with_tables(rows, meta, expected.schema))
    rows = rows.to_pylist() if isinstance(rows, pa.Table) else rows
    rows = sorted(rows, key=lambda row: (row["scan_uid"], row["z"], row["y"], row["x"], row["key"]))
    schema = expected.schema.with_metadata(
        {b"p2w": canonical_json(meta | {"seal": SEAL.decode()}), b"p2w.seal": SEAL + UNSEALED}
    )
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, compression="zstd")
    return _sealed(buffer.getvalue())


def _with_tables(rows: list[dict[str, Any]] | pa.Table, meta: dict[str, Any], schema: pa.Schema) -> bytes:
    """A manifest of version 2 before it is sealed."""
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows, schema=schema)
    table = compact(sorted_rows(table.select(schema.names).cast(schema)))
    stored = {key: value for key, value in meta.items() if key != "fingerprint"}
    stored |= {"schema": TABLE_VERSION, "seal": SEAL.decode(), "fingerprint": data_fingerprint(stored)}
    rest, blobs = split_off(stored)
    schema = table.schema.with_metadata({b"p2w": canonical_json(rest), b"p2w.seal": SEAL + UNSEALED})
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, compression="zstd", dictionary_pagesize_limit=PAGE) as writer:
        for blob in blobs:  # behind the first four bytes of the file, where no column is
            sink.write(blob)
        for start in range(0, max(1, len(table)), ROW_GROUP):
            # The texts of these rows alone: parquet would write the dictionary of all rows in every row group.
            writer.write_table(own_dictionaries(table.slice(start, ROW_GROUP)).cast(schema))
    return sink.getvalue().to_pybytes()


def _sealed(data: bytes) -> bytes:
    at = data.rindex(SEAL + UNSEALED) + len(SEAL)
    return data[:at] + b"%08x" % crc32c(data) + data[at + len(UNSEALED) :]


def read_manifest(
    where: str | os.PathLike[str] | bytes,
    expected: ManifestSchema = SUB_SCAN_SCHEMA,
    check_shards: bool = True,
) -> Manifest:
    """Read the manifest of a folder, of a manifest file, or of its bytes (fetched by the caller).

    Raises UserError when it is missing, damaged, not written by p2w, or breaks a rule of `manifest_schema`, and when a
    shard that it names is missing or has another size. That is not checked for a manifest read from bytes, nor without
    `check_shards`: of the ranks of a node one will do.
    """
    manifest = open_manifest(where, expected)
    if manifest.root and check_shards:
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
            large = os.fstat(file.fileno()).st_size >= MAPPED
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if large else file.read()
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


def _parse(data: bytes | mmap.mmap, name: str, root: str, expected: ManifestSchema) -> Manifest:
    buffer = pa.py_buffer(data)
    try:
        seal = _check_seal(data)
        if isinstance(data, mmap.mmap):
            # Its pages were read for the checksum; they stay in the page cache
            data.madvise(mmap.MADV_DONTNEED)
        file = pq.ParquetFile(pa.BufferReader(buffer), **long_texts(buffer.size))
        schema = file.schema_arrow
        text = (schema.metadata or {}).get(b"p2w", b"{}")
        meta = parse_json(text, {})
    except (pa.ArrowException, OSError) as error:
        raise DamagedManifest(f"{name} is not a parquet file ({first_line(error)}): copy it again") from error
    except ValueError as error:
        raise DamagedManifest(f"{name} is damaged ({first_line(error)}): copy it again") from error
    version = meta.get("schema")
    if type(version) is int and version > TABLE_VERSION:
        raise DamagedManifest(
            f"{name} is a manifest of version {version}, and this p2w reads versions up to {TABLE_VERSION}: update p2w"
        )
    with_tables = version == TABLE_VERSION
    if version not in (MANIFEST_VERSION, TABLE_VERSION) or not expected.allows(
        schema.remove_metadata(), compacted=with_tables
    ):
        raise DamagedManifest(
            f"{name} is not a p2w manifest of version {MANIFEST_VERSION}: name a folder written by {expected.made_by}"
        )
    try:
        if (with_tables or meta.get("seal") is not None) and not seal:
            raise ValueError("its checksum is gone")
        if with_tables:
            most = max(manifest_schema.UNPACKED, manifest_schema.UNPACKED_TIMES * buffer.size)
            put_back(meta, buffer, most, name)
        manifest_schema.check_meta(meta, expected.dims, expected.meta)
        manifest_schema.check_shard_size(file.metadata, buffer.size, meta)
        table = None
        if with_tables and seal and file.metadata.num_rows >= INDEX_ROWS:
            names = meta["shards"].table["name"].combine_chunks()
            table = mapped_rows(file, names, f"{seal}-{buffer.size:x}", root)
        if table is None:
            # Without Arrow's threads: if one still uses these bytes when Python exits, the process aborts (code 134).
            table = file.read(use_threads=False)
            table.validate(full=True)  # finds text that is not UTF-8, among others
        manifest_schema.check_rows(table, meta)
    except UserError as error:  # a list of the metadata that could not be unpacked
        raise DamagedManifest(str(error)) from error
    except (ValueError, pa.ArrowException, OSError) as error:
        raise DamagedManifest(f"{name} makes no sense ({first_line(error)}): copy it again") from error
    return Manifest(table.replace_schema_metadata(schema.metadata), meta, root)


def _check_seal(data: bytes | mmap.mmap) -> str:
    """The manifest's checksum of itself; "" for one of an old version, which has none.

    Raises ValueError when the bytes are not those that were written.
    """
    at = data.rfind(SEAL) + len(SEAL)
    if at < len(SEAL):
        return ""
    with memoryview(data) as view:
        found = crc32c(UNSEALED, crc32c(view[:at]))
        if b"%08x" % crc32c(view[at + len(UNSEALED) :], found) != bytes(view[at : at + len(UNSEALED)]):
            raise ValueError("its checksum differs from what was written")
        return bytes(view[at : at + len(UNSEALED)]).decode()


def data_fingerprint(meta: dict[str, Any]) -> str:
    """16 hexadecimal digits that identify a data set: a hash of its manifest's shape, window, tiling, split and shards."""
    if "mixture" in meta:
        return mixture_fingerprint(meta["mixture"])
    if meta.get("schema") == TABLE_VERSION and "fingerprint" in meta:
        return str(meta["fingerprint"])  # computed when the manifest was written
    identity = {key: meta.get(key) for key in ("shape", "window_hu", "tiling", "split", "shards")}
    found = hashlib.sha256()
    for piece in json_pieces(identity):
        found.update(piece.encode())
    return found.hexdigest()[:16]


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


# A mixture of several data sets:
#     --shards a:0.7 b:0.3      on the command line; without weights, each set counts by its size
#     "a:0.7 + b:0.3"           as one text: in run.json, cards and messages, and for commands that take one --shards
# A path that ends in `:NUMBER` is taken for a path and a weight, unless there is something of that name.
BETWEEN = " + "


@dataclass(frozen=True)
class MixturePart:
    """One set of a mixture: a folder or URL, and its weight; None where none is given."""

    where: str
    weight: float | None

    def __str__(self) -> str:
        return self.where if self.weight is None else f"{self.where}:{self.weight:g}"


def is_mixture(where: str) -> bool:
    """Whether a text names several sets."""
    return BETWEEN in where


def parse_mixture(where: str) -> list[MixturePart]:
    """The parts of a mixture. Raises UserError for weights that some have and others lack, or that are not positive."""
    parts = [_part(text.strip()) for text in where.split(BETWEEN)]
    without = [part.where for part in parts if part.weight is None]
    if without and len(without) < len(parts):
        raise UserError(
            f"--shards {where}: {without[0]} has no weight and others have: write e.g. a:0.7 b:0.3"
        )
    for part in parts:
        if part.weight is not None and not 0 < part.weight < math.inf:
            raise UserError(f"--shards {where}: the weight of {part.where} must be above 0 and finite")
    named = [os.path.normpath(part.where) if "://" not in part.where else part.where for part in parts]
    if len(set(named)) < len(named):
        raise UserError(f"--shards {where}: names a set twice: give it once, with the sum of the weights")
    return parts


def _part(text: str) -> MixturePart:
    path, colon, number = text.rpartition(":")
    if not colon or not path or os.path.exists(text):
        return MixturePart(text, None)
    try:
        return MixturePart(path, float(number))
    except ValueError:
        return MixturePart(text, None)


def relocated(where: str, move: Callable[[str], str]) -> str:
    """The same set or mixture with every path replaced by `move(path)`."""
    if not is_mixture(where):
        return move(where)
    return BETWEEN.join(str(MixturePart(move(part.where), part.weight)) for part in parse_mixture(where))


def mixture_fingerprint(parts: Sequence[dict[str, Any]]) -> str:
    """16 hexadecimal digits that identify a mixture: a hash of its parts' `data` (fingerprints) and `weight`, in order."""
    identity = [[part["data"], part["weight"]] for part in parts]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
