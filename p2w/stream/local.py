"""A data set in a folder: the manifest says in which shard, tar or Arrow, and at which byte each sub-scan starts.

Every shard is mapped into memory on first use and stays mapped. Reading a sub-scan is one copy from the page cache into
the caller's array; the checksum is computed from the copy. A map needs no open file, so thousands of shards need no file
descriptors. Shards are never changed in place: preprocessing and repair write a new file and rename it. Copying from the
map of a file that was truncated meanwhile would end the process with a bus error, so the size of the file is checked
before each copy, which takes 2 of 300 microseconds. If it is truncated just after that, or on a network disk whose
attributes are seconds old, the process still ends; the next start then names the shard.
"""

import functools
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from p2w.errors import UserError
from p2w.files import crc32c
from p2w.rng import Ids
from p2w.shards.manifest import Manifest, repair_command
from p2w.shards.manifest_index import codes_of
from p2w.shards.manifest_schema import REAL_COLUMNS, compressed, shard_columns
from p2w.shards.writer import unpack_voxels
from p2w.stream import sampler

_MAPS = 16384  # shards mapped at a time; Linux allows a process 65,530 maps in all. A set of more is read without maps
# sub-scans among which a slot of a streamed order shuffles; part of its definition, so not a setting
STREAM_BUFFER = 16
_BLOCK = 512 << 10  # bytes copied at a time, then checked while they are still in a core's cache


RANDOM_CROPS = ", cut from whole scans, in training at random places"  # for messages on such a set

Order = Literal["shuffled", "streamed"]
"""How an epoch is shuffled: as a whole, or by shards and within a buffer, as a stream of shards allows (see `sampler`)."""


class DataError(UserError):
    """A shard does not hold what its manifest says; the message names shard, sub-scan and what to do."""


class SampleReader(Protocol):
    """An object that reads sub-scans into arrays."""

    def read_into(self, sub_scan: int, out: Any) -> None:
        """Copy the voxels of one sub-scan into `out`, int16 (D, H, W), and check them."""


class ShardSet:
    """A data set, local or remote, as its manifest describes it. The id of a sub-scan is its row in the manifest."""

    min_threads = 1  # reader threads needed to hide the latency of a request
    random_crops = False  # whether training cuts a sub-scan elsewhere in its scan in each epoch
    order: Order = "shuffled"  # a run keeps its order for good; `tar.TarSet` has the streamed one alone
    order_version = 0  # of the shuffled order, see `sampler`; 0: what the size of the set asks for
    copy_of = ""  # where the original is, of a copy on this node's disk (see `staging`)
    retry_s = 0.0  # how long a server that fails is asked again
    on_wait: Callable[[], None] = staticmethod(lambda: None)  # called while waiting for such a server

    def __init__(self, manifest: Manifest, where: str, verify: bool = True) -> None:
        """Index the manifest of the data set at `where`; `verify=False` skips checksums, for measurements."""
        table = manifest.table
        self.where = where
        self.meta = manifest.meta
        self.shape: tuple[int, int, int] = tuple(self.meta["shape"])  # D, H, W
        self.nbytes = 2 * int(np.prod(self.shape))
        self.verify = verify
        self.on_bad: Literal["stop", "skip"] = "stop"  # what streams do with sub-scans that cannot be read
        self.reported_bad: set[int] = set()  # ids that a warning has named
        self.keys = manifest.keys
        # Views of the table's columns: those of a large manifest are mapped, and shared by the processes of a node.
        self.offsets: Ids = table["offset"].to_numpy()
        # Bytes of every sub-scan in its shard, where they are packed; else all have `nbytes`.
        self.packed_sizes: Ids | None = table["nbytes"].to_numpy() if compressed(self.meta) else None
        self.checksums: NDArray[np.uint32] = table["crc32c"].to_numpy()
        self._table = table
        padded = REAL_COLUMNS[0] in table.column_names
        # Voxels along z, y, x (n, 3) that are the scan's own, in a set whose sub-scans may be filled up with air.
        self.real = np.stack([table[name].to_numpy() for name in REAL_COLUMNS], 1) if padded else None
        names, sizes, _ = shard_columns(self.meta)
        self.shard_names: Sequence[str] = names
        self.shard_sizes: Sequence[int] = sizes  # bytes
        self.shard_numbers: NDArray[np.int32] = codes_of(table["shard"], pa.array(names, pa.string()))
        if self.meta.get("dtype") != "int16":
            raise DataError(
                f"{where}: its sub-scans are {self.meta.get('dtype')}, not int16: cut the set again"
            )

    def __len__(self) -> int:
        """Number of sub-scans in all splits."""
        return len(self.offsets)

    @functools.cached_property
    def spacing_mm(self) -> NDArray[np.float32]:
        """(n, 3): spacing of every sub-scan along z, y, x in mm."""
        return np.stack([self._table[f"spacing_{axis}"].to_numpy() for axis in "zyx"], 1)

    def ids(self, split: str) -> Ids:
        """Manifest rows of the split ("train" or "val"), ascending."""
        named = self._table["split"]
        if not pa.types.is_dictionary(named.type):
            named = named.dictionary_encode()
        rows, at = [np.zeros(0, np.int64)], 0
        for chunk in named.chunks:
            code = chunk.dictionary.index(split).as_py()
            rows.append(np.flatnonzero(chunk.indices.to_numpy() == code) + at)
            at += len(chunk)
        return np.concatenate(rows)

    def scan_uids(self, ids: Ids) -> set[str]:
        """The scans that these sub-scans are cut from."""
        scans = self._table["scan_uid"]
        if not pa.types.is_dictionary(scans.type):
            scans = scans.dictionary_encode()
        scans = scans.unify_dictionaries()
        codes = np.concatenate([np.zeros(0, np.int32), *(c.indices.to_numpy() for c in scans.chunks)])[ids]
        present = np.zeros(len(scans.chunk(0).dictionary) if len(scans) else 0, np.bool_)
        present[codes] = True
        return set(scans.chunk(0).dictionary.filter(pa.array(present)).to_pylist()) if len(scans) else set()

    def key(self, sub_scan: int) -> str:
        """The key `UID/zZZZZ_yYYYY_xXXXX` of a sub-scan."""
        return str(self.keys[sub_scan])

    def real_voxels(self, ids: Ids, device: torch.device | str = "cpu") -> torch.Tensor | None:
        """(n, 3) float32: how many voxels along z, y, x of these sub-scans are the scan's own; None: all of them."""
        if self.real is None:
            return None
        return torch.from_numpy(self.real[ids].astype(np.float32)).to(device)

    def size_in_voxels(self, ids: Ids) -> NDArray[np.int64]:
        """(n, 3): size along z, y, x of these sub-scans, without the air that they were filled up with."""
        if self.real is None:
            return np.tile(np.array(self.shape, np.int64), (len(ids), 1))
        return self.real[ids].astype(np.int64)

    def shard(self, sub_scan: int) -> str:
        """File name of the shard that holds a sub-scan."""
        return self.shard_names[self.shard_numbers[sub_scan]]

    def call_while_waiting(self, call: Callable[[], None]) -> None:
        """Have `call` called now and then while a server that fails is waited for."""
        self.on_wait = call

    def samples_per_epoch(self, ids: Ids) -> int:
        """Number of sub-scans in an epoch, of which the ids are those of the training split."""
        return len(ids)

    def train_order(self, ids: Ids, batch: int, seed: int, epoch: int) -> Ids:
        """Ids of every step of a training epoch, (steps, batch)."""
        if self.order == "streamed":
            shards = self.shard_numbers[ids].astype(np.int64)
            return sampler.streamed_order(ids, shards, batch, seed=seed, epoch=epoch, buffer=STREAM_BUFFER)
        return sampler.shuffled_order(ids, batch, seed, epoch)

    def ids_at(self, ids: Ids, indices: Ids, seed: int, epoch: int) -> Ids:
        """Ids at these indices (any shape) of a training epoch of version 2; `ids` are those of the split."""
        return ids[sampler.permuted_indices(indices, len(ids), seed, epoch)]

    def fixed_order(self, ids: Ids, batch: int) -> Ids:
        """Ids of every step of a validation pass, (steps, batch), the last one padded."""
        if self.order == "streamed":
            return sampler.streamed_fixed_order(ids, batch)
        return sampler.fixed_order(ids, batch)

    def reader(
        self, ids: Ids, shuffle: tuple[int, int] | None = None
    ) -> AbstractContextManager[SampleReader]:
        """A reader for one thread, which will ask for `ids` in this order; `shuffle` is the (seed, epoch) of that order."""
        raise NotImplementedError

    def read_into(self, sub_scan: int, out: Any) -> None:
        """Copy the voxels of one sub-scan into `out`, int16 (D, H, W) in C order, NumPy or a CPU tensor.

        Raises:
            DataError: the shard cannot be read, or the checksum of the sub-scan differs from the manifest's.
        """
        with self.reader(np.array([sub_scan], np.int64)) as reader:
            reader.read_into(sub_scan, out)

    def damaged(self, sub_scan: int, what: str) -> DataError:
        """The error for a sub-scan that cannot be read: `what` is wrong, and how to repair it."""
        shard = self.shard(sub_scan)
        return DataError(f"{self.where}: shard {shard}, key {self.key(sub_scan)}: {what}; {self.remedy()}")

    def remedy(self) -> str:
        """The command that repairs a damaged shard, in words for a message."""
        if self.copy_of:
            return f"it is a copy of that in {self.copy_of}: delete it, and the next start copies it again"
        return f"cut that scan again: {repair_command(self.where, self.meta)}"

    def stored_bytes(self, sub_scan: int) -> int:
        """Number of bytes that a sub-scan has in its shard."""
        return self.nbytes if self.packed_sizes is None else int(self.packed_sizes[sub_scan])

    def copy(self, sub_scan: int, source: NDArray[np.uint8], out: Any) -> None:
        """Copy voxels as raw bytes, unpacked if need be, into `out` and compare their checksum with the manifest's."""
        target = self.bytes_of(out)
        if self.packed_sizes is not None:
            try:
                source = unpack_voxels(source, self.nbytes)
            except ValueError as error:
                raise self.damaged(sub_scan, f"its packed voxels {error}") from error
        if len(source) != self.nbytes:
            raise self.damaged(sub_scan, f"{len(source)} bytes of {self.nbytes}")
        # Copies and crc32c release the GIL, so reader threads run in parallel.
        if not self.verify:
            np.copyto(target, source)
            return
        found = 0
        for start in range(0, self.nbytes, _BLOCK):
            block = target[start : start + _BLOCK]
            np.copyto(block, source[start : start + _BLOCK])
            found = crc32c(block.data, found)
        self.check(sub_scan, found)

    def bytes_of(self, out: Any) -> NDArray[np.uint8]:
        """The bytes of `out`, int16 (D, H, W) in C order, as they are stored."""
        target = np.asarray(out)
        assert target.shape == self.shape and target.dtype == np.int16 and target.flags.c_contiguous
        return target.reshape(-1).view(np.uint8)

    def check(self, sub_scan: int, found: int) -> None:
        """Raise DataError where the CRC-32C of voxels that were read is not the manifest's."""
        expected = int(self.checksums[sub_scan])
        if found != expected:
            at = int(self.offsets[sub_scan])
            raise self.damaged(
                sub_scan,
                f"checksum differs at byte {at} (crc32c {found:08x}, manifest {expected:08x}): "
                "these are not the voxels that were written",
            )


class LocalSet(ShardSet):
    """A data set in a folder."""

    def __init__(self, manifest: Manifest, verify: bool = True) -> None:
        """Use a manifest whose shards `read_manifest` has found, each with the right size; nothing is opened yet."""
        super().__init__(manifest, manifest.root, verify)
        # Of one sub-scan for each reader thread, where shards are not mapped
        self._buffers = threading.local()
        self._map = functools.lru_cache(maxsize=_MAPS)(self._map_shard)

    def _path(self, number: int) -> str:
        return os.path.join(self.where, self.shard_names[number])

    def _read(self, sub_scan: int, number: int, start: int) -> NDArray[np.uint8]:
        """The raw bytes (nbytes,) of a sub-scan, from a file that is opened for them alone.

        Of so many shards most would be mapped for one sub-scan, and unmapped: five calls of the system, and a page fault for
        every 4 kB, where these are three.
        """
        nbytes = self.stored_bytes(sub_scan)
        buffer = self._buffers.__dict__.get("bytes")
        if buffer is None or len(buffer) < nbytes:
            buffer = self._buffers.__dict__["bytes"] = np.empty(max(nbytes, self.nbytes), np.uint8)
        view = memoryview(buffer.data)[:nbytes]
        try:
            file = os.open(self._path(number), os.O_RDONLY | os.O_CLOEXEC)
            try:
                done = 0
                while done < nbytes and (count := os.preadv(file, [view[done:]], start + done)):
                    done += count
            finally:
                os.close(file)
        except OSError as error:
            raise self.damaged(sub_scan, f"the shard cannot be read ({error.strerror})") from error
        return buffer[:done]

    def _map_shard(self, number: int) -> NDArray[np.uint8]:
        """Map a shard into memory. Unlike `mmap`, torch closes the file afterwards."""
        path, nbytes = self._path(number), self.shard_sizes[number]
        try:
            return torch.from_file(path, shared=False, size=nbytes, dtype=torch.uint8).numpy()
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            raise DataError(f"{path}: cannot be mapped into memory: {why}; {self.remedy()}") from error

    def reader(
        self, ids: Ids, shuffle: tuple[int, int] | None = None
    ) -> AbstractContextManager[SampleReader]:
        """The set itself: any number of threads can read any sub-scan of it."""
        return nullcontext(self)

    def read_into(self, sub_scan: int, out: Any) -> None:
        """Copy the voxels of one sub-scan into `out`, int16 (D, H, W) in C order, NumPy or a CPU tensor.

        Raises:
            DataError: the checksum differs from the manifest's, or the shard cannot be read or was truncated.
        """
        start, number = int(self.offsets[sub_scan]), int(self.shard_numbers[sub_scan])
        if len(self.shard_names) > _MAPS:
            self.copy(sub_scan, self._read(sub_scan, number, start), out)
            return
        try:
            shard = self._map(number)
        except DataError:
            self._check_size(sub_scan, number)  # a shard that was cut short cannot be mapped
            raise
        self._check_size(sub_scan, number)
        self.copy(sub_scan, shard[start : start + self.stored_bytes(sub_scan)], out)

    def _check_size(self, sub_scan: int, number: int) -> None:
        """Raise DataError where a shard has another size than the manifest says, or cannot be looked at."""
        expected = self.shard_sizes[number]
        try:
            size = os.stat(self._path(number)).st_size
        except FileNotFoundError:
            size = expected  # removed, but still in memory by its map
        except OSError as error:
            raise self.damaged(sub_scan, f"the shard cannot be read ({error.strerror})") from error
        if size != expected:
            raise self.damaged(sub_scan, f"the shard has {size:,} bytes of {expected:,}")
