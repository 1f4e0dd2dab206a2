"""Lists of a manifest's metadata as tables of their own, for sets whose lists are too long for a JSON text.

A manifest of version 2 is a parquet file of sub-scans like one of version 1. Between its first four bytes and its first row
group lie further parquet files, one for each list: of shards, of sources, of the scans of a split. Parquet finds every
column by its offset, so other programs read the sub-scans as before. The metadata says at which byte each table begins.

A list is unpacked when it is first used: training needs the shards, and not the sources.
"""

import functools
import io
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import pyarrow as pa
import pyarrow.parquet as pq

from p2w.errors import UserError, first_line
from p2w.files import canonical_json, type_mismatch

LISTS = (("shards",), ("sources",), ("bad_scans",), ("split", "train_scans"), ("split", "val_scans"))
PLAIN = "value"  # name of the only column of a list of texts
AS_JSON = {b"p2w": b"json"}  # of a column whose values are JSON texts
_ABSENT: Any = object()  # in the place of a key that an object does not have
_SLICE = 4096  # rows turned into Python objects at a time
# Bytes of a parquet dictionary; above the default of 1 MiB, long columns of names are stored as they are
PAGE = 64 << 20


class TableList(Sequence[Any]):
    """A list of objects or texts that is stored as a table. Its entries are made when they are asked for."""

    def __init__(self, load: Callable[[], pa.Table], length: int, name: str) -> None:
        """`load` gives the table, of `length` rows; it is called at the first use. `name` is for messages."""
        self._load, self._length, self.name = load, length, name
        self._columns: dict[str, list[Any]] = {}
        # Of an entry, as `files.type_mismatch` has it; checked when the table is unpacked
        self.form: Any = None

    @functools.cached_property
    def table(self) -> pa.Table:
        """The table: a column for every key, or the one column PLAIN. Raises UserError when it is not what it should be."""
        try:
            table = self._load()
            said = list_mismatch(table, self.form, "an entry")
            for field in table.schema:
                if field.metadata == AS_JSON and field.type != pa.string():
                    said = f"{field.name!r} of an entry is {field.type}"
        except (ValueError, pa.ArrowException, OSError) as error:
            said = first_line(error)
        if said or len(table) != self._length:
            raise UserError(
                f"{self.name} makes no sense ({said or 'other rows than it says'}): copy it again"
            )
        return table

    def column(self, key: str) -> list[Any]:
        """The values of a key of all entries; the list is made once."""
        if key not in self._columns:
            self._columns[key] = self.table[key].to_pylist()
        return self._columns[key]

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(self._length))]
        if not -self._length <= index < self._length:
            raise IndexError(index)
        return self.part(index % self._length, 1)[0]

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, self._length, _SLICE):
            yield from self.part(start, _SLICE)

    def part(self, start: int, count: int) -> list[Any]:
        """The entries from `start` on, at most `count`. Raises UserError where one holds JSON that is none."""
        try:
            return _entries(self.table.slice(start, count))
        except UserError:
            raise
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.name} makes no sense ({str(error)[:80]}): copy it again") from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(other) == len(self) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def _entries(table: pa.Table) -> list[Any]:
    """Rows as the objects or texts that were stored; a key without a value is left out."""
    if table.column_names == [PLAIN]:
        return table[PLAIN].to_pylist()
    columns = {
        name: [_ABSENT if one is None else json.loads(one) for one in table[name].to_pylist()]
        if table.schema.field(name).metadata == AS_JSON
        else [_ABSENT if one is None else one for one in table[name].to_pylist()]
        for name in table.column_names
    }
    rows = zip(*columns.values(), strict=True)
    return [
        {key: value for key, value in zip(columns, row, strict=True) if value is not _ABSENT} for row in rows
    ]


def table_of(entries: Sequence[Any]) -> pa.Table:
    """The table of a list of objects or of texts. A key whose values have no common type becomes a column of JSON."""
    if isinstance(entries, TableList):
        return entries.table
    if all(isinstance(one, str) for one in entries):
        return pa.table({PLAIN: pa.array(entries, pa.string())})
    columns, fields = [], []
    for key in dict.fromkeys(key for one in entries for key in one):
        values = [one.get(key) for one in entries]
        try:
            column = pa.array(values)
            said = sum(key in one for one in entries)  # a None that was said is not an absent key
            exact = column.null_count == len(entries) - said and column.to_pylist() == values
        except (pa.ArrowException, OverflowError):
            exact = False
        if not exact:
            texts = [canonical_json(one[key]).decode() if key in one else None for one in entries]
            column = pa.array(texts, pa.string())
        columns.append(column)
        fields.append(pa.field(key, column.type, metadata=None if exact else AS_JSON))
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))


def split_off(meta: dict[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
    """The metadata without its long lists, and the bytes of the tables that hold these, in the order of the file.

    `tables` of the metadata then says for each list: the keys that lead to it, its first byte in the file, its bytes.
    """
    rest, blobs, entries, at = dict(meta), [], [], 4
    for path in LISTS:
        holder = rest
        for key in path[:-1]:
            if not isinstance(holder.get(key), dict):
                holder = {}
                break
            holder[key] = holder = dict(holder[key])
        if not holder.get(path[-1]):
            continue
        table = table_of(holder.pop(path[-1]))
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd", dictionary_pagesize_limit=PAGE)
        blobs.append(sink.getvalue())
        entries.append({"of": list(path), "at": at, "nbytes": len(blobs[-1])})
        at += len(blobs[-1])
    return rest | {"tables": entries}, blobs


ENTRIES = {"tables": [{"of": [str], "at": int, "nbytes": int}]}


def put_back(meta: dict[str, Any], data: pa.Buffer, most: int, name: str) -> None:
    """Put the lists that `split_off` took out into `meta` again, as TableList. `data` is the manifest, `name` its path.

    Raises ValueError for an entry outside the file, a list that may not be a table, or more than `most` unpacked bytes.
    """
    if said := type_mismatch(meta, ENTRIES, "its metadata"):
        raise ValueError(said)
    for entry in meta.pop("tables"):
        path, at, nbytes = tuple(entry["of"]), entry["at"], entry["nbytes"]
        if path not in LISTS or not 4 <= at <= at + nbytes <= data.size:
            raise ValueError(f"its table {'.'.join(path)[:40]} lies at byte {at:,}, {nbytes:,} bytes long")
        holder = meta
        for key in path[:-1]:
            holder = holder.setdefault(key, {})
            if not isinstance(holder, dict):
                raise ValueError(f"{key!r} of its metadata is not an object")
        holder[path[-1]] = _open(data.slice(at, nbytes), most, f"{name}, table {'.'.join(path)},")


def _open(data: pa.Buffer, most: int, name: str) -> TableList:
    """The list in the bytes of a table. Raises ValueError when its file says that it unpacks to more than `most` bytes."""
    footer = pq.ParquetFile(pa.BufferReader(data), **long_texts(data.size)).metadata
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    unpacked = sum(g.column(c).total_uncompressed_size for g in groups for c in range(g.num_columns))
    if unpacked > most or footer.num_rows > max(1 << 20, data.size):
        raise ValueError(f"a table of {footer.num_rows:,} rows unpacks to {unpacked:,} bytes")

    def load() -> pa.Table:
        table = pq.ParquetFile(pa.BufferReader(data), **long_texts(data.size)).read(use_threads=False)
        table.validate(full=True)
        return table

    return TableList(load, footer.num_rows, name)


def long_texts(nbytes: int) -> dict[str, int]:
    """Arguments of ParquetFile that let it read metadata as long as a file of so many bytes can hold."""
    return {
        "thrift_string_size_limit": max(100_000_000, nbytes),
        "thrift_container_size_limit": max(1_000_000, nbytes),
    }


def list_mismatch(table: pa.Table, form: Any, where: str) -> str | None:
    """Why the types of a table's columns do not fit the form of its entries (see `files.type_mismatch`), or None."""
    if form is None:
        return None
    form = form if isinstance(form, dict) else {PLAIN: form}
    for key, kind in form.items():
        if key not in table.column_names or table[key].null_count:
            return f"{where} lacks {key!r}"
        if not _fits(table.schema.field(key).type, kind):
            return f"{key!r} of {where} is {table.schema.field(key).type}"
    return None


def _fits(kind: pa.DataType, form: Any) -> bool:
    if isinstance(form, list):
        return (pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)) and _fits(
            kind.value_type, form[0]
        )
    if form is str:
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if form is int:
        return pa.types.is_integer(kind)
    return form is float and (pa.types.is_integer(kind) or pa.types.is_floating(kind))


def json_pieces(value: Any) -> Iterator[str]:
    """The text of `json.dumps(value, sort_keys=True)` in pieces, for values that hold a TableList."""
    if isinstance(value, dict):
        yield "{"
        for number, key in enumerate(sorted(value)):
            yield f"{', ' if number else ''}{json.dumps(key)}: "
            yield from json_pieces(value[key])
        yield "}"
    elif isinstance(value, TableList):
        yield "["
        for start in range(0, len(value), _SLICE):
            part = value.part(start, _SLICE)
            yield (", " if start else "") + json.dumps(part, sort_keys=True)[1:-1]
        yield "]"
    else:
        yield json.dumps(value, sort_keys=True)
