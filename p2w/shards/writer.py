"""Write a shard: the sub-scans of one scan in a WebDataset tar or an Arrow IPC file, voxels uncompressed unless asked for.

In both, the voxels of a sub-scan are int16 little-endian [z,y,x] and start at a multiple of 64 bytes, and the row for the
manifest is the same: a reader needs only (offset, nbytes), and can map the file into memory.

- tar: members `KEY.npy` and `KEY.json` with fixed times and owners; opens with stock `webdataset`. The JSON has the columns
  of the manifest that say what the sub-scan is, and, from version 2 on, what a reader must know of the voxels (SAMPLE_NOTE).
- Arrow: one record batch per sub-scan, voxels (`fixed_shape_tensor`) and metadata; opens with `pyarrow`. With "zstd" as
  `compress` Arrow packs the buffers of a batch, and (offset, nbytes) are those of the packed voxels (`unpack_voxels`);
  `pyarrow` opens these too.

Beside the shards lies README.md, a dataset card, by which `datasets.load_dataset(FOLDER)` finds samples and splits. Its
front matter lists the shards of each split; without it, Hugging Face's `datasets` takes train.txt for the data.
"""

import io
import json
import os
import tarfile
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from crc32c import crc32c
from numpy.lib import format as npy

from p2w.files import canonical_json
from p2w.shards.manifest_schema import SUB_SCAN_COLUMNS, compressed, stored_shape, stores_scans

ALIGNMENT = 64  # bytes: a cache line, and what Arrow asks for
MANIFEST_ONLY = ("split", "fold", "shard", "offset", "nbytes")  # columns that shards do not repeat
NOTE = {"window_hu": [-1000, 1000], "axis_order": "zyx", "orientation": "LPS", "spacing": "mm"}


# In the JSON of each sample of a tar since version 2, because a tar has no metadata of its own. Version 1 had the columns
# alone; a set that was begun in it goes on, and is repaired, in it (`scan_shards.ShardingSettings.sample_version`).
SAMPLE_VERSION = 2
SAMPLE_NOTE = {"window_hu": [-1000, 1000], "axis_order": "zyx", "orientation": "LPS", "spacing_unit": "mm"}


def unpack_voxels(packed: Any, nbytes: int) -> np.ndarray:
    """The `nbytes` bytes of voxels that Arrow has packed into a buffer of an IPC file by zstd: their size in 8 bytes, then a
    zstd frame. uint8 (nbytes,). Raises ValueError when it unpacks to something else."""
    size = int.from_bytes(bytes(packed[:8]), "little", signed=True)
    if size != nbytes:
        raise ValueError(f"unpack to {size:,} bytes of {nbytes:,}")
    try:
        unpacked = pa.Codec("zstd").decompress(pa.py_buffer(packed[8:]), nbytes)
    except (pa.ArrowException, OSError) as error:
        raise ValueError("do not unpack") from error
    return np.frombuffer(unpacked, np.uint8)


def columns_of(schema: pa.Schema) -> list[str]:
    """Columns of a manifest that a shard holds as well, beside the voxels."""
    return [name for name in schema.names if name not in MANIFEST_ONLY]


@dataclass(frozen=True)
class Shard:
    """A finished shard: file size in bytes and CRC-32C of the whole file."""

    nbytes: int
    crc32c: int


class ShardFile(Protocol):
    """An open shard of either format."""

    def add(self, row: dict[str, Any], voxels: np.ndarray) -> dict[str, Any]:
        """Append one sub-scan, voxels int16 [z,y,x] (or [c,z,y,x]); returns the row with its crc32c, offset and nbytes.

        `row` has the columns of the manifest: key, scan_uid, …
        """

    def close(self) -> Shard:
        """Complete the file and flush it to the disk."""

    def abandon(self) -> None:
        """Close the incomplete file after an error."""


class _Sink:
    """A file that counts its bytes and computes their CRC-32C as they are written."""

    def __init__(self, path: str) -> None:
        self.file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by the shard)
        self.position = 0
        self.crc = 0
        self.closed = False  # pyarrow reads it
        self.prefix: bytes | None = None  # of a write that is looked for, and
        self.found = (0, 0)  # its position and size

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view):  # a raw write may be short, above all on a disk that is filling up
            written += self.file.write(view[written:])
        self.crc = crc32c(view, self.crc)
        if self.prefix is not None and bytes(view[: len(self.prefix)]) == self.prefix:
            self.prefix, self.found = None, (self.position, written)
        self.position += written
        return written

    def flush(self) -> None:
        """Do nothing: nothing is buffered, but pyarrow calls it."""

    def finish(self) -> Shard:
        os.fsync(self.file.fileno())
        self.close()
        return Shard(self.position, self.crc)

    def close(self) -> None:
        self.closed = True
        self.file.close()


def _check(voxels: np.ndarray, shape: tuple[int, ...]) -> None:
    assert voxels.shape == shape and voxels.dtype == np.dtype("<i2"), (voxels.shape, voxels.dtype)
    assert voxels.flags.c_contiguous


class TarShard:
    """A tar of `KEY.npy` and `KEY.json`; equal content gives equal bytes."""

    def __init__(
        self,
        path: str,
        shape: tuple[int, ...],
        schema: pa.Schema = SUB_SCAN_COLUMNS,
        note: dict[str, Any] = NOTE,
        sample_note: dict[str, Any] | None = None,
        compress: str = "none",
    ) -> None:
        assert compress == "none"  # a .npy of a tar cannot be packed, and stay one
        self.sink = _Sink(path)
        self.shape = shape
        self.columns = columns_of(schema)
        self.sample_note = sample_note or {}
        header = io.BytesIO()
        npy.write_array_header_1_0(header, {"descr": "<i2", "fortran_order": False, "shape": shape})
        self.npy_header = header.getvalue()  # 128 bytes, so that voxels stay aligned to 64

    def _member(self, name: str, size: int) -> None:
        info = tarfile.TarInfo(name)
        info.size = size
        info.mode = 0o644
        self.sink.write(info.tobuf(tarfile.USTAR_FORMAT))

    def _pad(self, block: int) -> None:
        self.sink.write(bytes(-self.sink.position % block))

    def add(self, row: dict[str, Any], voxels: np.ndarray) -> dict[str, Any]:
        """Append one sub-scan."""
        _check(voxels, self.shape)
        row = {**row, "crc32c": crc32c(voxels.data)}
        self._member(row["key"] + ".npy", len(self.npy_header) + voxels.nbytes)
        self.sink.write(self.npy_header)
        offset = self.sink.position
        assert offset % ALIGNMENT == 0, offset
        self.sink.write(voxels)
        self._pad(tarfile.BLOCKSIZE)
        text = canonical_json({name: row[name] for name in self.columns} | self.sample_note)
        self._member(row["key"] + ".json", len(text))
        self.sink.write(text)
        self._pad(tarfile.BLOCKSIZE)
        return {**row, "offset": offset, "nbytes": voxels.nbytes}

    def close(self) -> Shard:
        """Write the end of the tar, two empty blocks and padding to the record size, and flush it to the disk."""
        self.sink.write(bytes(2 * tarfile.BLOCKSIZE))
        self._pad(tarfile.RECORDSIZE)
        return self.sink.finish()

    def abandon(self) -> None:
        """Close the incomplete file after an error."""
        self.sink.close()


class ArrowShard:
    """An Arrow IPC file with one record batch per sub-scan; the voxels are the first column, so they start its body."""

    def __init__(
        self,
        path: str,
        shape: tuple[int, ...],
        schema: pa.Schema = SUB_SCAN_COLUMNS,
        note: dict[str, Any] = NOTE,
        sample_note: dict[str, Any] | None = None,
        compress: str = "none",
    ) -> None:
        self.sink = _Sink(path)
        self.shape = shape
        self.compressed = compress != "none"
        self.columns = columns_of(schema)
        self.tensor = pa.fixed_shape_tensor(pa.int16(), shape)
        fields = [pa.field("voxels", self.tensor)] + [schema.field(name) for name in self.columns]
        self.schema = pa.schema(fields, metadata={b"p2w": canonical_json(note)})
        options = pa.ipc.IpcWriteOptions(compression=compress if self.compressed else None)
        self.writer = pa.ipc.new_file(self.sink, self.schema, options=options)
        self.header_sizes: dict[int, int] = {}  # padding -> bytes before the voxels of a batch
        self.start = 0  # where the next batch starts

    def _batch(self, row: dict[str, Any], voxels: np.ndarray) -> pa.RecordBatch:
        flat = pa.FixedSizeListArray.from_arrays(pa.array(voxels.reshape(-1)), voxels.size)
        columns = [pa.ExtensionArray.from_storage(self.tensor, flat)]
        columns += [pa.array([row[name]], self.schema.field(name).type) for name in self.columns]
        return pa.record_batch(columns, schema=self.schema)

    def _measure(self, batch: pa.RecordBatch) -> None:
        """Measure the bytes between the end of one batch and the voxels of the next, for every padding of its metadata.

        Arrow aligns a body to 8 bytes only; a metadata entry of blanks of the right length brings it to a multiple of 64.
        """
        for padding in range(0, ALIGNMENT, 8):
            sink = pa.BufferOutputStream()
            note = {"padding": " " * padding}
            with pa.ipc.new_file(sink, self.schema) as writer:
                # Arrow writes the schema with the first batch
                writer.write_batch(batch, custom_metadata=note)
                end = sink.tell()
                writer.write_batch(batch, custom_metadata=note)
            data = sink.getvalue()
            file = pa.ipc.open_file(data)
            starts = [file.get_batch(i).column("voxels").storage.buffers()[-1].address for i in (0, 1)]
            self.header_sizes[padding] = starts[1] - data.address - end
            self.start = starts[0] - data.address - self.header_sizes[padding]

    def add(self, row: dict[str, Any], voxels: np.ndarray) -> dict[str, Any]:
        """Append one sub-scan."""
        _check(voxels, self.shape)
        row = {**row, "crc32c": crc32c(voxels.data)}
        batch = self._batch(row, voxels)
        if self.compressed:
            # Arrow writes the voxels at once, behind their size
            self.sink.prefix = voxels.nbytes.to_bytes(8, "little")
            self.writer.write_batch(batch)
            assert self.sink.prefix is None
            return {**row, "offset": self.sink.found[0], "nbytes": self.sink.found[1]}
        if not self.header_sizes:
            self._measure(batch)
        padding = next(p for p, size in self.header_sizes.items() if (self.start + size) % ALIGNMENT == 0)
        offset = self.start + self.header_sizes[padding]
        self.writer.write_batch(batch, custom_metadata={"padding": " " * padding})
        self.start = self.sink.position
        return {**row, "offset": offset, "nbytes": voxels.nbytes}

    def close(self) -> Shard:
        """Write the footer and flush the file to the disk."""
        self.writer.close()
        return self.sink.finish()

    def abandon(self) -> None:
        """Close the incomplete file after an error, without the footer that Arrow would write."""
        self.sink.close()


FORMATS: dict[str, type[TarShard] | type[ArrowShard]] = {"tar": TarShard, "arrow": ArrowShard}


def open_shard(
    path: str,
    shape: tuple[int, ...],
    schema: pa.Schema = SUB_SCAN_COLUMNS,
    note: dict[str, Any] = NOTE,
    sample_note: dict[str, Any] | None = None,
    compress: str = "none",
) -> ShardFile:
    """Create a shard at `path`, in the format of its extension (.tar or .arrow), for arrays of `shape`.

    Every array is stored with the columns that `columns_of(schema)` names. `note` is the metadata of an Arrow file,
    `sample_note` what the JSON of every sample in a tar says besides. `compress` is "none", or "zstd" for Arrow.
    """
    return FORMATS[os.path.splitext(path)[1][1:]](path, shape, schema, note, sample_note, compress)


SPLITS = {"train": "train", "val": "validation", "test": "test"}  # list of shards -> split of `datasets`
MARK = "<!-- written by p2w; delete this line to keep your own text -->"

MEMBERS = {
    "tar": """Each shard is a WebDataset tar. A sample has two members of one stem, the `key`:

- `.npy`: the voxels, int16 {shape}, axes {axes}
- `.json`: what and where it is{note}

```python
import webdataset as wds  # shards are named after scans: pass the list, not a brace range

names = open("train.txt").read().split()
samples = wds.WebDataset(names, shardshuffle=False).decode().to_tuple("npy", "json")
```

With Hugging Face: `load_dataset(FOLDER)` gives the samples in the splits above.
""",
    "arrow": """Each shard is an Arrow IPC file with one record batch a sample: `voxels` (a tensor of
int16 {shape}, axes {axes}) and the columns that say what and where it is. The key `p2w` of the schema's metadata says how to
read the voxels.

```python
import pyarrow as pa

file = pa.ipc.open_file(pa.memory_map(open("train.txt").read().split()[0]))
voxels = file.get_batch(0).column("voxels").to_numpy_ndarray()[0]
```

Hugging Face's `datasets` has no type for these tensors: for it, cut the set with `--format tar`.
""",
}


CHUNKS = """
A shard is one scan, and a sample of it is a chunk: `z`, `y`, `x` are its first voxel in the scan, and `real_z`, `real_y`,
`real_x` how many of its voxels are the scan's own; what lies behind them is air. In the manifest, `chunk` is the size of a
chunk, and `shape` that of the sub-scans that p2w cuts from the scans at random places.
"""


def dataset_card(meta: dict[str, Any], lists: dict[str, list[str]]) -> bytes:
    """The card of a set with this metadata; `lists` are the text files beside the manifest, and the shards in them."""
    stems = {name.removesuffix(".txt"): shards for name, shards in lists.items()}
    splits = {split: stems[stem] for stem, split in SPLITS.items() if stems.get(stem)}
    front = ["configs:", "- config_name: default", "  data_files:"]
    for split, shards in splits.items():
        front += [f"  - split: {split}", "    path:"]
        # JSON strings are YAML strings. `datasets` takes a path for a pattern, so what would be one is escaped.
        front += [f"    - {json.dumps(_literal(shard))}" for shard in shards]
    whole_scans = stores_scans(meta)
    axes = "z, y, x" if len(meta["shape"]) == 3 else "channel, z, y, x"
    note = ", and how its voxels are to be read: window, axes, orientation" * ("sample_version" in meta)
    members = MEMBERS[meta["format"]].format(
        shape=" x ".join(map(str, stored_shape(meta))), axes=axes, note=note
    )
    if compressed(meta):
        members += "\nThe buffers of a batch are packed by zstd, which `pyarrow` unpacks by itself.\n"
    counts = "\n".join(f"- `{split}`: {len(shards):,} shards" for split, shards in splits.items())
    what = "Whole scans" if whole_scans else os.path.basename(str(meta.get("task", "Sub-scans")))
    text = f"""# {what} of a p2w data set

{MARK}

{counts}

Values are int16 HU, or what the metadata says, in LPS orientation, clipped to the window. `manifest.parquet` says where each
sample lies, and carries its checksum and all that is known of how it was made. `train.txt`, `val.txt`, …: the shards of each
split.
{CHUNKS if whole_scans else ""}
{members}"""
    return ("---\n" + "\n".join(front if splits else ["configs: []"]) + "\n---\n" + text).encode()


def _literal(name: str) -> str:
    """A file name as a glob pattern that matches it alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def may_write_card(path: str) -> bool:
    """Whether a README.md may be written at `path`: there is none yet, or it is not the user's own."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return MARK in file.read()
    except FileNotFoundError:
        return True
