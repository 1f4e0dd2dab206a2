"""Columns of a manifest in few bytes: texts in dictionaries, and keys that follow from scan and position.

The key of a sub-scan is UID/zZZZZ_yYYYY_xXXXX, its scan and its first voxel. Of ten million these texts would take most of a
manifest and of its reader's memory, and say nothing that the columns `scan_uid`, `z`, `y` and `x` do not.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

TEXT = pa.dictionary(pa.int32(), pa.string())
POSITION = ("z", "y", "x")
KEY_COLUMNS = ("scan_uid", *POSITION)  # of which a key is made


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
    """For each text its place among all texts, sorted."""
    encoded = texts.combine_chunks().dictionary_encode()
    place = np.empty(len(encoded.dictionary), np.int64)
    place[pc.sort_indices(encoded.dictionary).to_numpy()] = np.arange(len(place))
    return place[encoded.indices.to_numpy()]


def codes_of(column: pa.ChunkedArray, names: pa.Array) -> NDArray[np.int32]:
    """For each text its place in `names`. Raises ValueError, naming the text, where it is not among them."""
    chunks = column.chunks if pa.types.is_dictionary(column.type) else column.dictionary_encode().chunks
    parts = []
    for chunk in chunks:
        if len(chunk.dictionary) == len(names) and chunk.dictionary.equals(names):
            parts.append(chunk.indices.to_numpy())
            continue
        place = pc.index_in(chunk.dictionary, value_set=names)
        if place.null_count:
            raise ValueError(chunk.dictionary.filter(place.is_null())[0].as_py())
        parts.append(place.to_numpy()[chunk.indices.to_numpy()].astype(np.int32, copy=False))
    return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.zeros(0, np.int32)])
