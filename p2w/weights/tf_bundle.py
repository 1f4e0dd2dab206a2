"""Read a TensorFlow checkpoint (`NAME.index`, `NAME.data-00000-of-00001`) without TensorFlow.

The index is a sorted table in LevelDB's format: blocks of entries whose keys share prefixes, each block with a masked
CRC-32C, and a footer with the position of the index of blocks. Its values are small protobuf messages: the header (number
of shards, byte order) under the empty key, and under a variable's name its dtype, shape, shard, offset, size and masked
CRC-32C. Every length is checked before it is used, so that an untrusted file is read in bounded memory or refused.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import crc32c
import numpy as np
import torch
from torch import Tensor

from p2w.errors import UserError

MAGIC = 0xDB4775248B80FB57
FOOTER = 48  # bytes: two handles of at most 20 bytes, padding, the magic number
INDEX_LIMIT = 1 << 26  # bytes: an index of a million variables; larger ones are no checkpoint of a network
MAX_VALUES = 1 << 30  # of a tensor
# TensorFlow's numbers of dtypes; bfloat16 (14) is no NumPy dtype.
DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2"}
MASK = 0xA282EAD8


@dataclass(frozen=True)
class Entry:
    """A variable in the index: its dtype and shape, and its `offset` and `size` in bytes in its shard."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    sliced: bool


def prefix_of(path: Path) -> Path | None:
    """The checkpoint's path without `.index` or `.data-…`, if `path` is this or one of its files; else None."""
    name = path.name
    for cut in (".index", ".data-"):
        if cut in name:
            name = name[: name.rindex(cut)]
            break
    found = path.with_name(name) if name else None
    return found if found and found.with_name(f"{name}.index").is_file() else None


class Bundle:
    """The variables of a checkpoint. Raises UserError when it is no checkpoint, truncated or damaged."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        index = prefix.with_name(f"{prefix.name}.index")
        try:
            size = index.stat().st_size
            if size > INDEX_LIMIT:
                raise ValueError(f"{size:,} bytes, at most {INDEX_LIMIT:,}")
            pairs = dict(_table(index.read_bytes()))
            header = _message(pairs.pop(b""))
            self.shards = _integer(header, 1, 1)
            if _integer(header, 2) != 0:
                raise ValueError("big-endian values")
            self.entries = {key.decode(): _entry(value) for key, value in pairs.items()}
        except OSError as error:
            raise UserError(f"{index}: {error.strerror}") from error
        except (ValueError, LookupError, struct.error) as error:
            raise UserError(
                f"{index}: no index of a TensorFlow checkpoint ({error}); copy it again"
            ) from error

    def tensor(self, name: str) -> Tensor:
        """Read a variable and verify its checksum. Raises UserError when it is damaged or of another dtype."""
        entry = self.entries[name]
        shard = self.prefix.with_name(f"{self.prefix.name}.data-{entry.shard:05d}-of-{self.shards:05d}")
        if entry.dtype not in DTYPES or entry.sliced:
            what = "stored in slices" if entry.sliced else f"of TensorFlow's dtype {entry.dtype}"
            raise UserError(f"{shard}: {name} is {what}, which is not supported; save it as one float tensor")
        kind = np.dtype(DTYPES[entry.dtype])
        count = math.prod(entry.shape)
        if not 0 <= count <= MAX_VALUES or entry.size != count * kind.itemsize:
            raise UserError(
                f"{shard}: {name} of shape {entry.shape} in {entry.size} bytes; the index is damaged"
            )
        try:
            with open(shard, "rb") as file:
                file.seek(min(entry.offset, shard.stat().st_size))
                data = file.read(entry.size)
        except OSError as error:
            raise UserError(f"{shard}: {error.strerror}; both files of a checkpoint are needed") from error
        if len(data) != entry.size:
            raise UserError(f"{shard}: ends before {name} does; copy it again")
        if _masked(data) != entry.crc:
            raise UserError(f"{shard}: checksum of {name} differs, the file is damaged; copy it again")
        return torch.from_numpy(np.frombuffer(data, kind).reshape(entry.shape).copy())


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a sorted table, in order."""
    if len(data) < FOOTER or struct.unpack("<Q", data[-8:])[0] != MAGIC:
        raise ValueError("its last bytes are not a table's")
    footer = data[-FOOTER:]
    _, at = _handle(footer, 0)  # the handle of the metaindex, which is empty
    (offset, size), _ = _handle(footer, at)
    for _, handle in _block(data, offset, size):
        (offset, size), _ = _handle(handle, 0)
        yield from _block(data, offset, size)


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Entries of one block; a key is stored as the number of bytes shared with the key before, and the rest."""
    end = offset + size
    if end + 5 > len(data) - FOOTER or size < 4:
        raise ValueError("a block beyond the file's end")
    if data[end] != 0:
        raise ValueError("compressed blocks, which are not read")
    if _masked(data[offset : end + 1]) != struct.unpack("<I", data[end + 1 : end + 5])[0]:
        raise ValueError("a block's checksum differs")
    (restarts,) = struct.unpack("<I", data[end - 4 : end])
    end -= 4 * (restarts + 1)
    if end < offset:
        raise ValueError("a block of restarts alone")
    key = b""
    while offset < end:
        shared, offset = _varint(data, offset)
        own, offset = _varint(data, offset)
        length, offset = _varint(data, offset)
        if shared > len(key) or offset + own + length > end:
            raise ValueError("an entry longer than its block")
        key = key[:shared] + data[offset : offset + own]
        offset += own
        yield key, data[offset : offset + length]
        offset += length


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """Offset and size of a block, and the position after this handle."""
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return (offset, size), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A varint (7 bits a byte, lowest first), and the position after it."""
    value = 0
    for shift in range(0, 64, 7):
        byte = data[at]  # IndexError is a LookupError
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
    raise ValueError("an integer of more than 64 bits")


def _message(data: bytes) -> dict[int, list[int | bytes]]:
    """Fields of a protobuf message by number; only the wire types of these messages are supported."""
    fields: dict[int, list[int | bytes]] = {}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        value: int | bytes
        if tag & 7 == 0:
            value, at = _varint(data, at)
        elif tag & 7 == 2:
            length, at = _varint(data, at)
            value, at = data[at : at + length], at + length
        elif tag & 7 == 5:
            value, at = struct.unpack("<I", data[at : at + 4])[0], at + 4
        else:
            raise ValueError(f"a field of wire type {tag & 7}")
        if at > len(data):
            raise ValueError("a field longer than its message")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _integer(fields: dict[int, list[int | bytes]], number: int, default: int = 0) -> int:
    value = fields.get(number, [default])[-1]
    if not isinstance(value, int):
        raise ValueError(f"field {number} is no integer")
    return value


def _entry(data: bytes) -> Entry:
    """BundleEntryProto: 1 dtype, 2 shape, 3 shard, 4 offset, 5 size, 6 masked CRC-32C, 7 slices."""
    fields = _message(data)
    shape = []
    for packed in fields.get(2, []):
        if not isinstance(packed, bytes):
            raise ValueError("a shape that is no message")
        for dim in _message(packed).get(2, []):
            if not isinstance(dim, bytes):
                raise ValueError("an edge that is no message")
            shape.append(_integer(_message(dim), 1))
    numbers = (_integer(fields, number) for number in (3, 4, 5, 6))
    shard, offset, size, crc = numbers
    return Entry(_integer(fields, 1), tuple(shape), shard, offset, size, crc, 7 in fields)


def _masked(data: bytes) -> int:
    """The CRC-32C as these tables store it: rotated, plus a constant."""
    crc = crc32c.crc32c(data)
    return ((crc >> 15 | crc << 17) + MASK) & 0xFFFFFFFF
