"""Large manifests in little memory: rows as a mapped Arrow IPC file, texts in dictionaries, keys that follow from positions.

    DIR/.manifest-SEAL-CRC.arrow     SEAL: the manifest's checksum of itself; CRC: the CRC-32C of this file

The rows are unpacked once and shared by all processes of a node. The file is made by the first process that opens the set,
while the others wait for it, beside the manifest or, where that folder cannot be written, in a folder of the user's below
the system's temporary one. Its name says of which manifest it is, and its checksum is compared at every open, so that one
which is stale or damaged is made anew. It is a cache: it may be deleted while nothing reads the set. All rows are in one
record batch, so that every column is one array in the mapped file.

The key of a sub-scan is UID/zZZZZ_yYYYY_xXXXX, its scan and its first voxel. Of ten million these texts would take most of a
manifest and of its reader's memory, and say nothing that the columns `scan_uid`, `z`, `y` and `x` do not.
"""

import contextlib
import glob
import os
import tempfile
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from p2w.errors import UserError
from p2w.files import file_crc32c, hold_lock

INDEX_ROWS = 1_000_000  # of fewer rows, every process unpacks its own: 70 MB at most
PATTERN = ".manifest-*.arrow"
TEXT = pa.dictionary(pa.int32(), pa.string())
POSITION = ("z", "y", "x")
KEY_COLUMNS = ("scan_uid", *POSITION)  # of which a key is made


def mapped_rows(file: pq.ParquetFile, shards: pa.Array, seal: str, root: str) -> pa.Table | None:
    """The rows of a manifest, mapped; None where no folder can be written, or the rows cannot be mapped.

    `shards` are the names of the shards, in the order in which the dictionary of column `shard` shall have them; `seal` is
    the manifest's checksum as text, `root` its folder, "" for a manifest from elsewhere.
    """
    for folder in (root, _own_folder()):
        if not folder:
            continue
        try:
            if found := _find(folder, seal):
                return found
            with hold_lock(os.path.join(folder, ".indexing"), seal):
                return _find(folder, seal) or _make(file, shards, folder, seal)
        except (OSError, UserError, pa.ArrowException):
            continue
    return None


def _own_folder() -> str:
    """A folder for this user alone below the temporary one; "" where there is none, or it is somebody else's."""
    folder = os.path.join(tempfile.gettempdir(), f"p2w-{os.getuid()}")
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        found = os.lstat(folder)
    except OSError:
        return ""
    return folder if found.st_uid == os.getuid() and not found.st_mode & 0o22 else ""


def _find(folder: str, seal: str) -> pa.Table | None:
    """The mapped rows of the manifest with this seal, if the folder has them sound."""
    for path in glob.glob(os.path.join(glob.escape(folder), f".manifest-{seal}-*.arrow")):
        with contextlib.suppress(OSError, pa.ArrowException, ValueError):
            if f"{_checksum(path):08x}" == path[-len("12345678.arrow") : -len(".arrow")]:
                return pa.ipc.open_file(pa.memory_map(path)).read_all()
    return None


def _checksum(path: str) -> int:
    """CRC-32C of a file. It is read, and not mapped: mapped pages count as memory of this process."""
    with open(path, "rb", buffering=0) as file:
        return file_crc32c(file)


def _make(file: pq.ParquetFile, shards: pa.Array, folder: str, seal: str) -> pa.Table | None:
    """Write the rows, one row group of the manifest after the other, and map them.

    The file is written with empty columns first, and these are then filled in place: a record batch of all rows would take
    as much private memory as there are rows.
    """
    schema, count = file.schema_arrow, file.metadata.num_rows
    fixed = [field for field in schema if _width(field.type)]
    if len(fixed) < len(schema):
        return None
    names = {
        field.name: shards if field.name == "shard" else _distinct(file, field.name)
        for field in fixed
        if pa.types.is_dictionary(field.type)
    }
    # By a process that was killed
    for left in glob.glob(os.path.join(glob.escape(folder), ".indexing-*.part")):
        os.unlink(left)
    handle, path = tempfile.mkstemp(dir=folder, prefix=".indexing-", suffix=".part")
    try:
        os.fchmod(handle, 0o644)
        os.close(handle)
        empty = [_empty(field.type, count, names.get(field.name)) for field in fixed]
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, schema.remove_metadata()) as writer:
            writer.write_batch(pa.record_batch(empty, schema=schema.remove_metadata()))
        del empty
        starts = _column_starts(path)
        with open(path, "r+b", buffering=0) as out:
            _fill(file, out.fileno(), dict(zip((field.name for field in fixed), starts, strict=True)), names)
            os.fsync(out.fileno())
        crc = _checksum(path)
        for stale in glob.glob(os.path.join(glob.escape(folder), PATTERN)):
            if folder != _own_folder():
                os.unlink(stale)
        os.replace(path, os.path.join(folder, f".manifest-{seal}-{crc:08x}.arrow"))
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        raise
    return _find(folder, seal)


def _fill(file: pq.ParquetFile, out: int, starts: dict[str, int], names: dict[str, pa.Array]) -> None:
    """Write all rows into the open file `out`; `starts` is the byte at which each column begins.

    Raises ValueError for a missing value, or a text that is not among `names`.
    """
    codes = {name: {one: code for code, one in enumerate(known.to_pylist())} for name, known in names.items()}
    row = 0
    for number in range(file.num_row_groups):
        group = file.read_row_group(number, use_threads=False)
        group.validate(full=True)
        for name, start in starts.items():
            values = group[name].combine_chunks()
            if values.null_count:
                raise ValueError(f"column {name} has missing values")
            if name in names:
                known = codes[name]
                texts = values.dictionary.to_pylist()
                if missing := next((one for one in texts if one not in known), None):
                    raise ValueError(f"{name} {missing!r} is not in its list of {name}s")
                found = np.array([known[one] for one in texts], np.int32)[values.indices.to_numpy()]
            else:
                found = values.to_numpy()
            data = memoryview(cast(Any, np.ascontiguousarray(found))).cast("B")
            at = start + row * found.itemsize
            while data:
                written = os.pwrite(out, data, at)
                data, at = data[written:], at + written
        row += group.num_rows


def _distinct(file: pq.ParquetFile, name: str) -> pa.Array:
    """The values of a column of texts, in the order of their first rows."""

    def found() -> Iterator[pa.Array]:
        for batch in file.iter_batches(batch_size=1 << 20, columns=[name], use_threads=False):
            yield batch.column(0).dictionary

    return pc.unique(pa.chunked_array(list(found()) or [[]], pa.string()))


def _width(kind: pa.DataType) -> int:
    """Bytes of a value in a column, its code where it is a text in a dictionary; 0: of no fixed number."""
    if pa.types.is_dictionary(kind):
        return 4 if kind.index_type == pa.int32() and kind.value_type == pa.string() else 0
    return kind.bit_width // 8 if pa.types.is_integer(kind) or pa.types.is_floating(kind) else 0


def _numpy(kind: pa.DataType) -> np.dtype:
    return np.dtype((kind.index_type if pa.types.is_dictionary(kind) else kind).to_pandas_dtype())


def _empty(kind: pa.DataType, count: int, names: pa.Array | None) -> pa.Array:
    values = pa.array(np.zeros(count, _numpy(kind)))  # untouched memory, so none of it is resident
    return values if names is None else pa.DictionaryArray.from_arrays(values, names)


def _column_starts(path: str) -> list[int]:
    """The byte of the file at which each column of its record batch begins."""
    with pa.memory_map(path) as mapped:
        base = mapped.read_buffer(mapped.size())
        mapped.seek(0)
        batch = pa.ipc.open_file(mapped).get_batch(0)
        values = [c.indices if pa.types.is_dictionary(c.type) else c for c in batch.columns]
        return [one.buffers()[1].address - base.address for one in values]


class Keys:
    """The keys of the rows of a manifest that has no column of them."""

    def __init__(self, table: pa.Table) -> None:
        self._columns = [table[name] for name in KEY_COLUMNS]

    def __len__(self) -> int:
        return len(self._columns[0])

    def __getitem__(self, row: int) -> str:
        uid, z, y, x = (column[int(row)].as_py() for column in self._columns)
        return f"{uid}/z{z:04d}_y{y:04d}_x{x:04d}"

    def take(self, rows: Any) -> pa.Array:
        """The keys of these rows, as an array of texts."""
        return derived_keys(*(column.take(pa.array(rows)) for column in self._columns))

    def to_pylist(self) -> list[str]:
        """All keys."""
        return derived_keys(*self._columns).to_pylist()


class StoredKeys(Keys):
    """The keys of a manifest with a column of them."""

    def __init__(self, table: pa.Table) -> None:
        self._keys = table["key"]

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, row: int) -> str:
        return str(self._keys[int(row)])

    def take(self, rows: Any) -> pa.Array:
        """The keys of these rows, as an array of texts."""
        return self._keys.take(pa.array(rows))

    def to_pylist(self) -> list[str]:
        """All keys."""
        return self._keys.to_pylist()


def keys_of(table: pa.Table) -> Keys:
    """The keys of the rows, stored or not."""
    return StoredKeys(table) if "key" in table.column_names else Keys(table)


def derived_keys(uid: pa.ChunkedArray, z: Any, y: Any, x: Any) -> pa.ChunkedArray:
    """UID/zZZZZ_yYYYY_xXXXX for these scans and positions, which are not negative."""
    padded = [pc.utf8_lpad(pc.cast(one, pa.string()), 4, padding="0") for one in (z, y, x)]
    return pc.binary_join_element_wise(
        pc.cast(uid, pa.string()), "/z", padded[0], "_y", padded[1], "_x", padded[2], ""
    )


def compact(table: pa.Table) -> pa.Table:
    """The table with its texts in dictionaries, and without the column `key` if every key follows from its row."""
    negative = any(pc.min(table[name]).as_py() < 0 for name in POSITION if len(table))
    if not negative and table["key"].equals(derived_keys(*(table[name] for name in KEY_COLUMNS))):
        table = table.drop_columns(["key"])
    fields = [
        field.with_type(TEXT) if field.type == pa.string() and field.name != "key" else field
        for field in table.schema
    ]
    return table.cast(pa.schema(fields))


def own_dictionaries(table: pa.Table) -> pa.Table:
    """The table with dictionaries that have the texts of its rows alone."""
    plain = [field.with_type(pa.string()) if field.type == TEXT else field for field in table.schema]
    return table.cast(pa.schema(plain)).cast(table.schema)


def sorted_rows(table: pa.Table) -> pa.Table:
    """The rows sorted by scan, position and key, as the texts of a list are sorted."""
    ranks = [_rank(table["key"])] if len(table) else []
    columns = [table[name].to_numpy() for name in reversed(POSITION)]
    order = np.lexsort([*ranks, *columns, _rank(table["scan_uid"])])
    return table if (np.diff(order) > 0).all() else table.take(pa.array(order))


def _rank(texts: pa.ChunkedArray) -> NDArray[np.int64]:
    """For each text its rank among all distinct texts."""
    encoded = texts.combine_chunks().dictionary_encode()
    rank = np.empty(len(encoded.dictionary), np.int64)
    rank[pc.sort_indices(encoded.dictionary).to_numpy()] = np.arange(len(rank))
    return rank[encoded.indices.to_numpy()]


def codes_of(column: pa.ChunkedArray, names: pa.Array) -> NDArray[np.int32]:
    """For each text its index in `names`. Raises ValueError, naming the text, where it is not among them."""
    chunks = column.chunks if pa.types.is_dictionary(column.type) else column.dictionary_encode().chunks
    parts = []
    for chunk in chunks:
        if len(chunk.dictionary) == len(names) and chunk.dictionary.equals(names):
            parts.append(chunk.indices.to_numpy())
            continue
        index = pc.index_in(chunk.dictionary, value_set=names)
        if index.null_count:
            raise ValueError(chunk.dictionary.filter(index.is_null())[0].as_py())
        parts.append(index.to_numpy()[chunk.indices.to_numpy()].astype(np.int32, copy=False))
    return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.zeros(0, np.int32)])
