"""Whole scans as shards (`--store scans`): every sample of a shard is a chunk of a scan, so that a box anywhere is read
from the few chunks that it touches.

The chunks of a scan lie side by side from its first voxel (behind `z_margin` slices) to its last; those at an end are filled
up with air, and their rows say how much of them is real. A chunk has half the edges of a sub-scan. A box at a random origin
then touches (k + 1)**3 = 27 chunks with k = 2 to an edge, and ((k + 1) / k)**3 = 3.4 times its own bytes are read and
checked; whole sub-scans as chunks (k = 1) would be 8 reads of 8 times the bytes, quarters (k = 4) 125 reads of twice the
bytes. A read costs about 10 us, and checking the bytes of a sub-scan of 2 MiB about 150 us, so that (k + 1)**3 * (10 + 150 /
k**3) us is least, 0.8 ms, for k = 2. A box at the origin of a sub-scan touches 8 chunks and nothing else.

The length of such a set is counted in sub-scans too: in an epoch, training cuts as many wholes from a scan as the tiling
keeps sub-scans of it. A sub-scan has the key and the id that it has in a set of sub-scans which is cut with the same
options, and validation reads it at its own origin. So both sets train in the same order and validate on the same voxels.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from p2w.ct.scan import Scan
from p2w.errors import UserError
from p2w.files import type_mismatch
from p2w.shards.manifest import DamagedManifest, Manifest
from p2w.shards.manifest_schema import PADDED_COLUMNS, REAL_COLUMNS, sub_scan_key
from p2w.shards.tiling import WINDOW_HU, SubScan, Tiling, cut_box

LEAST_CHUNK = 1 << 14  # voxels, 32 KiB: smaller reads cost as much, and a tar adds 2 KiB to each
# sub-scans of a set for each of its chunks: their table is kept in memory, 150 bytes each
MOST_PER_CHUNK = 16
SOURCE = {"uid": str, "shape": [int], "sub_scans": int, "tiles_left_out": [int]}
Triple = tuple[int, int, int]


def chunk_shape(tile: Triple) -> Triple:
    """Voxels z, y, x of the chunks of a set whose sub-scans have `tile` voxels: half its edges, and not too few voxels."""
    z, y, x = (-(-edge // 2) for edge in tile)
    while z * y * x < LEAST_CHUNK:
        z, y, x = 2 * z, 2 * y, 2 * x
    return z, y, x


def check_stride(tiling: Tiling) -> None:
    """Raise UserError for a stride so small that a set of whole scans would have too many sub-scans for its chunks."""
    chunk, stride = chunk_shape(tiling.shape), tiling.stride or tiling.shape
    size = " x ".join(map(str, chunk))
    many = math.prod(max(1.0, edge / step) for edge, step in zip(chunk, stride, strict=True))
    if many > MOST_PER_CHUNK:
        raise UserError(
            f"--stride {' '.join(map(str, stride))}: with --store scans a chunk of {size} voxels may have "
            f"{MOST_PER_CHUNK} sub-scans at most; places are random there, and a stride only lengthens epochs: leave it out"
        )


@dataclass(frozen=True)
class ChunkGrid:
    """The chunks of one scan: voxels z, y, x where the first one begins, behind the last real voxel, and of a chunk."""

    begin: Triple
    end: Triple
    chunk: Triple

    @staticmethod
    def of(tiling: Tiling, chunk: Triple, shape: tuple[int, ...]) -> "ChunkGrid":
        """The grid of a scan of `shape` [z,y,x], as it is cut."""
        return ChunkGrid((tiling.z_margin, 0, 0), (shape[0] - tiling.z_margin, shape[1], shape[2]), chunk)

    @property
    def counts(self) -> Triple:
        """Number of chunks along z, y, x."""
        z, y, x = (
            max(0, -(-(end - begin) // edge))
            for begin, end, edge in zip(self.begin, self.end, self.chunk, strict=True)
        )
        return z, y, x

    @property
    def count(self) -> int:
        """Number of chunks in all."""
        return math.prod(self.counts)

    def starts(self) -> NDArray[np.int64]:
        """(n, 3): the first voxel of every chunk, in the order of (z, y, x)."""
        return np.indices(self.counts).reshape(3, -1).T * np.array(self.chunk) + np.array(self.begin)

    def real(self, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n, 3): how many voxels along z, y, x of the chunks that begin there are the scan's own."""
        return np.minimum(self.chunk, np.array(self.end) - starts)


def tiles_left_out(scan: Scan, tiling: Tiling) -> tuple[int, list[int]]:
    """How many sub-scans the tiling has of a scan, and the numbers, from 0, of those left out because they show too little.

    Raises BadScan when the scan is too small for one.
    """
    tiling.check_size(scan.voxels.shape)
    (depth, height, width), end = tiling.shape, scan.voxels.shape[0] - tiling.z_margin
    kept = [
        tiling.keeps(np.clip(scan.voxels[z : min(z + depth, end), y : y + height, x : x + width], *WINDOW_HU))
        for z, y, x in itertools.product(*tiling.starts(scan.voxels.shape))
    ]
    return len(kept), [number for number, one in enumerate(kept) if not one]


def cut_chunks(scan: Scan, tiling: Tiling) -> Iterator[SubScan]:
    """Yield the chunks of a scan in the order of (z, y, x), each with the voxels and statistics of a sub-scan."""
    grid = ChunkGrid.of(tiling, chunk_shape(tiling.shape), scan.voxels.shape)
    for z, y, x in grid.starts().tolist():
        yield cut_box(scan, (z, y, x), grid.chunk, grid.end[0])


@dataclass(frozen=True)
class ScanStore:
    """The scans and sub-scans that the manifest describes, checked: S scans, n sub-scans that are kept; axes are z, y, x."""

    tiling: Tiling
    chunk: Triple
    first_row: NDArray[np.int64]  # (S,) row of the manifest of each scan's first chunk
    begin: NDArray[np.int64]  # (S, 3) first voxel that is stored
    end: NDArray[np.int64]  # (S, 3) behind the last one
    counts: NDArray[np.int64]  # (S, 3) number of chunks
    scan: NDArray[np.int32]  # (n,) number of the scan of each sub-scan
    origin: NDArray[np.int32]  # (n, 3) first voxel of each sub-scan
    # (n rows) the sub-scans as the manifest of a set of sub-scans has them, without their bytes
    wholes: pa.Table


def read_scan_store(manifest: Manifest) -> ScanStore:
    """The scans and sub-scans of a set that stores scans. Raises DamagedManifest where its parts contradict each other."""
    try:
        return _read(manifest)
    except (ValueError, OverflowError, UserError) as error:
        where = manifest.root or "the fetched manifest"
        raise DamagedManifest(f"{where}: its manifest makes no sense ({error}): copy it again") from error


def _read(manifest: Manifest) -> ScanStore:
    meta, table = manifest.meta, manifest.table
    if said := type_mismatch(meta, {"tiling": {}, "sources": [{}]}, "its metadata"):
        raise ValueError(said)
    if REAL_COLUMNS[0] not in table.column_names:
        raise ValueError("its chunks do not say how much of them is real")
    tiling, chunk = Tiling.from_meta(meta["tiling"]), _triple(meta["chunk"])
    if list(tiling.shape) != meta["shape"]:
        raise ValueError(f"its shape is {meta['shape']}, its tiles are {list(tiling.shape)}")
    sources = {source.get("uid"): source for source in meta["sources"]}
    runs = _runs(table["scan_uid"])
    left = MOST_PER_CHUNK * table.num_rows
    scans: list[tuple[ChunkGrid, NDArray[np.int64]]] = []
    columns = [table[name].to_numpy() for name in ("z", "y", "x")]
    real = [table[name].to_numpy() for name in REAL_COLUMNS]
    for uid, start, stop in runs:
        source = sources.get(uid, {})
        if said := type_mismatch(source, SOURCE, f"its scan {uid}"):
            raise ValueError(said)
        grid = ChunkGrid.of(tiling, chunk, _triple(source["shape"]))
        if grid.count != stop - start:
            raise ValueError(f"scan {uid}: {stop - start:,} chunks, its shape has {grid.count:,}")
        found = np.stack([column[start:stop] for column in columns], 1)
        if not np.array_equal(found, grid.starts()):
            raise ValueError(f"scan {uid}: its chunks are not side by side")
        if not np.array_equal(np.stack([column[start:stop] for column in real], 1), grid.real(found)):
            raise ValueError(f"scan {uid}: its chunks do not end where the scan does")
        left -= tiling.count(source["shape"])
        if left < 0:
            raise ValueError(f"more than {MOST_PER_CHUNK} sub-scans a chunk, {table.num_rows:,} chunks")
        scans.append((grid, _kept_origins(tiling, source)))
    lengths = np.array([len(kept) for _, kept in scans], np.int64)
    grids = [grid for grid, _ in scans]
    origin = np.concatenate([kept for _, kept in scans] or [np.zeros((0, 3), np.int64)])
    scan = np.repeat(np.arange(len(scans)), lengths)
    return ScanStore(
        tiling, chunk, np.array([start for _, start, _ in runs], np.int64),
        _triples([grid.begin for grid in grids]), _triples([grid.end for grid in grids]),
        _triples([grid.counts for grid in grids]), scan.astype(np.int32), origin.astype(np.int32),
        _wholes(table, runs, grids, tiling, scan, origin),
    )  # fmt: skip


def _triple(values: list[int]) -> Triple:
    if len(values) != 3 or min(values) < 1:
        raise ValueError(f"{values} is no size in voxels")
    return values[0], values[1], values[2]


def _triples(values: list[Triple]) -> NDArray[np.int64]:
    return np.array(values, np.int64).reshape(-1, 3)


def _runs(column: pa.ChunkedArray) -> list[tuple[str, int, int]]:
    """Uid, first row and row behind the last of each scan. Raises ValueError where the rows of a scan lie apart."""
    encoded = column.combine_chunks().dictionary_encode()
    codes = encoded.indices.to_numpy()
    edges = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)] if len(codes) else [0]
    names = encoded.dictionary.to_pylist()
    if len(edges) - 1 != len(names):
        raise ValueError("the chunks of a scan lie apart")
    return [(names[codes[start]], start, stop) for start, stop in itertools.pairwise(edges)]


def _kept_origins(tiling: Tiling, source: dict[str, Any]) -> NDArray[np.int64]:
    """(n, 3): the first voxels of a scan's sub-scans that are kept, in the order of (z, y, x)."""
    starts = np.array([*itertools.product(*tiling.starts(source["shape"]))], np.int64).reshape(-1, 3)
    left_out = np.array(source["tiles_left_out"], np.int64)
    wrong = len(left_out) and (
        left_out[0] < 0 or left_out[-1] >= len(starts) or (np.diff(left_out) <= 0).any()
    )
    if wrong or not 0 < len(starts) - len(left_out) == source["sub_scans"]:
        raise ValueError(
            f"scan {source['uid']}: {source['sub_scans']} sub-scans, but {len(starts)} less {len(left_out)} are kept"
        )
    return np.delete(starts, left_out, axis=0)


def _wholes(
    table: pa.Table,
    runs: list[tuple[str, int, int]],
    grids: list[ChunkGrid],
    tiling: Tiling,
    scan: NDArray[np.int64],
    origin: NDArray[np.int64],
) -> pa.Table:
    """The table of the sub-scans: columns on their scan, from its first chunk, and their own keys and origins."""
    first = np.array([start for _, start, _ in runs], np.int64)
    same = ("split", "shard", "scan_uid", "subset", "spacing_z", "spacing_y", "spacing_x")
    of_scan = table.select(list(same)).take(pa.array(first))
    columns = {name: of_scan[name].take(pa.array(scan)) for name in same}
    count, unknown = len(origin), np.zeros(len(origin))
    keys = [
        sub_scan_key(runs[number][0], *at) for number, at in zip(scan.tolist(), origin.tolist(), strict=True)
    ]
    columns |= {"key": pa.array(keys, pa.string())}
    columns |= {name: pa.array(origin[:, axis]) for axis, name in enumerate("zyx")}
    columns |= {name: pa.array(unknown) for name in ("offset", "nbytes", "crc32c")}
    columns |= {name: pa.array(np.full(count, np.nan)) for name in ("mean_hu", "std_hu")}
    if tiling.pads:
        ends = _triples([grid.end for grid in grids])[scan]
        own = np.minimum(np.array(tiling.shape), ends - origin)
        columns |= {name: pa.array(own[:, axis]) for axis, name in enumerate(REAL_COLUMNS)}
    fields = [field for field in PADDED_COLUMNS if field.name in columns]
    return pa.table([columns[field.name].cast(field.type) for field in fields], schema=pa.schema(fields))
