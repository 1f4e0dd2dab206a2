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
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from p2w.errors import UserError
from p2w.files import crc32c
from p2w.rng import Ids
from p2w.shards.manifest import Manifest, repair_command
from p2w.shards.manifest_schema import REAL_COLUMNS
from p2w.stream import sampler

_MAPS = 16384  # shards mapped at a time; Linux allows a process 65,530 maps in all
STREAM_BUFFER = (
    16  # sub-scans among which a slot of a streamed order shuffles; part of its definition, so not a setting
)
_BLOCK = 512 << 10  # bytes copied at a time, then checked while they are still in a core's cache


RANDOM_PLACES = ", cut from whole scans, in training at random places"  # for messages on such a set

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
    random_places = False  # whether training cuts a sub-scan at another place of its scan in each epoch
    order: Order = "shuffled"  # a run has one for good; only `tar.TarSet` must have the streamed one
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
        self.keys = table["key"]
        self.offsets: Ids = table["offset"].to_numpy().astype(np.int64)
        self.checksums: Ids = table["crc32c"].to_numpy().astype(np.int64)
        self.spacing_mm = np.stack([table[f"spacing_{axis}"].to_numpy() for axis in "zyx"], 1)  # (n, 3)
        padded = REAL_COLUMNS[0] in table.column_names
        # Voxels along z, y, x (n, 3) that are the scan's own, in a set whose sub-scans may be filled up with air.
        self.real = np.stack([table[name].to_numpy() for name in REAL_COLUMNS], 1) if padded else None
        self.shard_names: list[str] = [shard["name"] for shard in self.meta["shards"]]
        named = table["shard"].to_pylist()
        number = {name: index for index, name in enumerate(self.shard_names)}
        self.shard_numbers: Ids = np.array([number[name] for name in named], np.int64)
        self._splits = np.array(table["split"].to_pylist(), dtype=object)
        if self.meta.get("dtype") != "int16":
            raise DataError(
                f"{where}: its sub-scans are {self.meta.get('dtype')}, not int16: cut the set again"
            )

    def __len__(self) -> int:
        """Number of sub-scans in all splits."""
        return len(self.offsets)

    def ids(self, split: str) -> Ids:
        """Manifest rows of the split ("train" or "val"), ascending."""
        return np.flatnonzero(self._splits == split).astype(np.int64)

    def key(self, sub_scan: int) -> str:
        """The key `UID/zZZZZ_yYYYY_xXXXX` of a sub-scan."""
        return str(self.keys[sub_scan])

    def real_voxels(self, ids: Ids, device: torch.device | str = "cpu") -> torch.Tensor | None:
        """(n, 3) float32: how many voxels along z, y, x of these sub-scans are the scan's own; None: in this set, all."""
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
            shards = self.shard_numbers[ids]
            return sampler.streamed_order(ids, shards, batch, seed=seed, epoch=epoch, buffer=STREAM_BUFFER)
        return sampler.shuffled_order(ids, batch, seed, epoch)

    def fixed_order(self, ids: Ids, batch: int) -> Ids:
        """Ids of every step of a validation pass, (steps, batch), the last one padded."""
        if self.order == "streamed":
            return sampler.streamed_fixed_order(ids, batch)
        return sampler.fixed_order(ids, batch)

    def reader(
        self, ids: Ids, shuffle: tuple[int, int] | None = None
    ) -> AbstractContextManager[SampleReader]:
        """A reader for one thread, which asks for these ids in this order, made from `shuffle`, its (seed, epoch)."""
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
        return f"cut that scan again: {repair_command(self.where, self.meta)}"

    def copy(self, sub_scan: int, source: NDArray[np.uint8], out: Any) -> None:
        """Copy voxels as raw bytes (nbytes,) into `out` and compare their checksum with the manifest's."""
        target = np.asarray(out)
        assert target.shape == self.shape and target.dtype == np.int16 and target.flags.c_contiguous
        target = target.reshape(-1).view(np.uint8)
        if len(source) != self.nbytes:
            raise self.damaged(sub_scan, f"{len(source)} bytes of {self.nbytes}")
        # Copies and crc32c release the GIL, so reader threads run in parallel.
        if not self.verify:
            np.copyto(target, source)
            return
        found, expected = 0, int(self.checksums[sub_scan])
        for start in range(0, self.nbytes, _BLOCK):
            block = target[start : start + _BLOCK]
            np.copyto(block, source[start : start + _BLOCK])
            found = crc32c(block.data, found)
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
        self._paths = [os.path.join(self.where, name) for name in self.shard_names]
        self._map = functools.lru_cache(maxsize=_MAPS)(self._map_shard)

    def _map_shard(self, number: int) -> NDArray[np.uint8]:
        """Map a shard into memory. Unlike `mmap`, torch closes the file afterwards."""
        path, nbytes = self._paths[number], self.meta["shards"][number]["nbytes"]
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
        shard = self._map(number)
        expected = self.meta["shards"][number]["nbytes"]
        try:
            size = os.stat(self._paths[number]).st_size
        except FileNotFoundError:
            size = expected  # removed, but still in memory by its map
        except OSError as error:
            raise self.damaged(sub_scan, f"the shard cannot be read ({error.strerror})") from error
        if size != expected:
            raise self.damaged(sub_scan, f"the shard has {size:,} bytes of {expected:,}")
        self.copy(sub_scan, shard[start : start + self.nbytes], out)
