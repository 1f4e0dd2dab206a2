"""Batches of int16 HU sub-scans from a data set, local or remote: endless for training, one pass for validation.

    shards = open_set("shards")                         # or "https://host/shards", "s3://bucket/shards"
    with Stream(shards, batch=16, seed=0, rank=r, world_size=w, readers=2) as stream:
        for batch in stream.batches(epoch, step):       # batch.voxels (b, D, H, W), b = 16 / w
            ...                                         # resume at (batch.epoch, batch.step + 1)

The ids of a step depend on (seed, epoch, step) alone, not on the world size, the reader threads, the shard format or
restarts. B = global batch, b = B / world size, D, H, W = slice, row, column. Training leaves out the last incomplete batch
of an epoch (n % B sub-scans, different ones in each epoch); validation pads it with rows of weight 0.
"""

import time
import weakref
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from p2w.errors import UserError
from p2w.shards.manifest import (
    candidate_data_paths,
    data_fingerprint,
    is_mixture,
    open_manifest,
    parse_mixture,
    read_manifest,
)
from p2w.shards.manifest_schema import stores_scans
from p2w.stream.local import LocalSet, Order, ShardSet
from p2w.stream.mixed import MixedSet
from p2w.stream.prefetch import (
    RING,
    BadSamplePolicy,
    CacheSchedule,
    DeviceCache,
    OnBadSample,
    Prefetch,
    RowReader,
)
from p2w.stream.sampler import Sampler


def open_set(
    where: str,
    verify: bool = True,
    on_bad: OnBadSample = "stop",
    retry_s: float = 0.0,
    order: Order | None = None,
    order_version: int = 0,
    check_shards: bool = True,
) -> ShardSet:
    """Open the data set in a folder, or below an http(s) or s3 URL, or a mixture; `verify=False` skips checksums.

    From an http(s) server that supports byte ranges, sub-scans are requested one by one, in the order of a local set. From
    other servers, and from s3, tar shards are streamed in another order (see `tar`).

    With `on_bad="skip"`, streams read a substitute for a sub-scan whose checksum differs or whose shard can no longer be
    read (see `prefetch.BadSamplePolicy`). A set that misses shards from the start is refused all the same.

    A server that fails is asked again for `retry_s` seconds. `order` and `order_version` are those that a run has begun
    with; a set with random access can be read in either order. Version 0: what the size of the set asks for (`sampler`).

    Without `check_shards` nobody looks whether every shard of a folder is there and of its size: another process does.

    Raises:
        UserError: no manifest there; shards missing, cut short, or in a format that cannot be streamed; sets that cannot
            be mixed; or the set can no longer be read in `order`.
    """
    shards: ShardSet
    if is_mixture(where):
        parts = parse_mixture(where)
        shards = MixedSet(
            [open_set(part.where, verify, retry_s=retry_s, check_shards=check_shards) for part in parts],
            parts,
        )
    elif "://" in where:
        from p2w.stream.tar import open_url  # noqa: PLC0415 - webdataset, requests: for remote sets only

        shards = open_url(where, verify, retry_s)
    else:
        manifest = read_manifest(where, check_shards=check_shards)
        if stores_scans(manifest.meta):
            from p2w.stream.random_crops import open_scan_store  # noqa: PLC0415 - SimpleITK: for such sets only

            shards = open_scan_store(manifest, LocalSet, verify)
        else:
            shards = LocalSet(manifest, verify)
    shards.on_bad, shards.retry_s = on_bad, retry_s
    if order == "shuffled" and shards.order != order:
        raise UserError(
            f"{where}: the run began in the order of a set with random access, and the server gives no byte ranges now, so "
            "that its order would be another: mend the server or the proxy between, or pass --shards a copy in a folder"
        )
    shards.order, shards.order_version = order or shards.order, order_version
    return shards


def open_trained_sets(
    near: Path, start: Mapping[str, Any], data: Any, of: str
) -> list[tuple[dict[str, Any], str]]:
    """The set that a run or weights were trained on: its manifest's metadata and where it is; of a mixture, of each set.

    `near` and `start` are as `candidate_data_paths` takes them, `data` is the set's fingerprint (None: not known), and `of`
    names the run or weights in messages. Raises the UserError of the likeliest location where none holds the set.
    """
    refused: UserError | None = None
    for location in candidate_data_paths(near, start):
        try:
            return _trained_set(location, data, of)
        except UserError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _trained_set(where: str, data: Any, of: str) -> list[tuple[dict[str, Any], str]]:
    """The manifests there, which must still be those of the set `data` (a fingerprint; None: not known)."""
    if is_mixture(where):
        if data is not None and data_fingerprint(open_set(where).meta) != data:
            raise UserError(f"{where}: is another mixture now than {of} was trained on")
        return [found for part in parse_mixture(where) for found in _trained_set(part.where, None, of)]
    meta = open_set(where).meta if "://" in where else open_manifest(where).meta
    if data is not None and data_fingerprint(meta) != data:
        raise UserError(f"{where}: is another data set now than {of} was trained on")
    return [(meta, where)]


@dataclass(frozen=True)
class Batch:
    """One rank's rows of a step. `voxels` is a reused buffer, valid until the next batch is requested."""

    voxels: Tensor  # (b, D, H, W) int16 HU
    ids: Tensor  # (b,) int64 manifest rows of the sub-scans in it
    weight: Tensor  # (b,) float32: 1, or 0 for padding of validation's last batch and for its substitutes
    epoch: int
    step: int
    bad: int = 0  # number of rows with a substitute for a sub-scan that could not be read
    fresh: tuple[int, ...] = ()  # rows that were read; the device cache has the others
    real: Tensor | None = None  # (b, 3) float32 voxels z, y, x that are the scan's own; None: all


class Stream:
    """Endless training batches, or one validation pass, of one rank.

    `wait_seconds` is the total time that the consumer has waited for data. A stream runs one iteration at a time: another
    call of `batches` ends the earlier one. Close it, or leave its `with` block, to end its threads at once; they also end
    with the stream and with the interpreter.
    """

    def __init__(
        self,
        shards: ShardSet,
        split: str = "train",
        batch: int = 16,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        readers: int = 2,
        device: torch.device | str = "cpu",
        training: bool = True,
        cache: DeviceCache | None = None,
    ) -> None:
        """Check the order and allocate the buffers.

        `batch` is the global batch size B; `readers` is the number of threads, 0 reads in the calling thread. With a CUDA
        device the buffers are pinned and batches are tensors on the device. With a `cache` on that device, every sub-scan
        is read once.

        Raises:
            UserError: B is not a multiple of the world size, or larger than the split.
        """
        if readers < 0:
            raise UserError(f"{readers} reader threads: there must be 0 (the caller reads) or more")
        self.sampler = Sampler(shards, split, batch, seed, rank, world_size, training)
        self.device, self.cache = torch.device(device), cache
        self.readers = min(max(readers, shards.min_threads), self.sampler.rows) if readers else 0
        self.wait_seconds = 0.0
        shape, pinned = (self.sampler.rows, *shards.shape), self.device.type == "cuda"
        count = RING if self.readers else 1
        self._ring = [torch.empty(shape, dtype=torch.int16, pin_memory=pinned) for _ in range(count)]
        self._end: weakref.finalize | None = None

    @classmethod
    def validation(
        cls,
        shards: ShardSet,
        batch: int = 16,
        *,
        rank: int = 0,
        world_size: int = 1,
        readers: int = 2,
        device: torch.device | str = "cpu",
        split: str = "val",
    ) -> Self:
        """A stream of one pass in fixed order, every sub-scan once; the last batch is padded with rows of weight 0."""
        share: dict[str, Any] = {"rank": rank, "world_size": world_size}
        return cls(shards, split, batch, **share, readers=readers, device=device, training=False)

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps per epoch, the same on every rank: n // B in training, ceil(n / B) in validation."""
        return self.sampler.steps

    def batches(self, epoch: int = 0, step: int = 0) -> Generator[Batch, None, None]:
        """Yield batches from a position on, without reading earlier ones; (epoch, steps_per_epoch) is (epoch + 1, 0).

        Raises:
            UserError: the position does not exist.
            DataError: a sub-scan's checksum differs or its shard cannot be read, and the set's `on_bad` is "stop".
        """
        if epoch < 0 or not 0 <= step <= self.steps_per_epoch:
            raise UserError(
                f"position (epoch {epoch}, step {step}) does not exist: an epoch here has "
                f"{self.steps_per_epoch} steps; resume with the data set and batch that the run began with"
            )
        self.close()
        batches = self._host_batches(epoch, step)
        if self.device.type == "cuda":
            return _upload(batches, self.device, self.cache)
        return _from_cpu_cache(batches, self.cache) if self.cache else batches

    def _host_batches(self, epoch: int, step: int) -> Generator[Batch, None, None]:
        """The batches in the ring's buffers, on the host."""
        sampler, threads = self.sampler, self.readers
        count = sampler.rows
        ring = [
            (buffer.numpy(), np.empty(count, np.int64), np.ones(count, np.bool_)) for buffer in self._ring
        ]
        policy, schedule = (
            BadSamplePolicy(sampler),
            CacheSchedule(self.cache, sampler.steps) if self.cache else None,
        )
        row_readers = [
            RowReader(policy, range(row_reader, count, threads or 1), schedule)
            for row_reader in range(threads or 1)
        ]
        prefetch = Prefetch(sampler, row_readers, ring)
        end = self._end = weakref.finalize(self, prefetch.close)  # also called at interpreter exit
        if threads:
            prefetch.start(epoch, step)
        try:
            for count, (at_epoch, at_step) in enumerate(sampler.positions(epoch, step)):
                began = time.perf_counter()
                if prefetch.stopped:
                    raise RuntimeError("these batches have ended: the stream was closed or asked for others")
                if threads:
                    prefetch.take(count)
                else:
                    row_readers[0].fill(at_epoch, at_step, ring[0])
                self.wait_seconds += time.perf_counter() - began
                slot = count % len(ring)
                ids = torch.from_numpy(ring[slot][1].copy())
                as_planned = ids == torch.from_numpy(
                    sampler.step_ids(at_epoch, at_step)[sampler.share].copy()
                )
                weight = sampler.weight(at_step) if sampler.training else sampler.weight(at_step) * as_planned
                bad = int((~as_planned).sum())
                fresh = tuple(np.flatnonzero(ring[slot][2]).tolist())
                real = sampler.shards.real_voxels(ids.numpy())
                yield Batch(self._ring[slot], ids, weight, at_epoch, at_step, bad, fresh, real)
                prefetch.release(count)
        finally:
            end()
            if not threads:  # threads close their own readers
                row_readers[0].close()

    def close(self) -> None:
        """End the current iteration and its threads."""
        if self._end is not None:
            self._end()
            self._end = None

    def __enter__(self) -> Self:
        """Nothing to do: the threads start with the first batch."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the stream."""
        self.close()


def _from_cpu_cache(
    batches: Generator[Batch, None, None], cache: DeviceCache
) -> Generator[Batch, None, None]:
    """The same batches, with voxels from a cache in CPU memory."""
    voxels: Tensor | None = None
    with closing(batches):
        for batch in batches:
            voxels = torch.empty_like(batch.voxels) if voxels is None else voxels
            cache.gather(batch.ids, batch.fresh, batch.voxels, voxels)
            yield replace(batch, voxels=voxels)


def _upload(
    batches: Generator[Batch, None, None], device: torch.device, cache: DeviceCache | None
) -> Generator[Batch, None, None]:
    """The same batches with every tensor on the GPU, copied while the GPU computes on the batch before.

    The copy of batch n starts, on a CUDA stream of its own, before batch n - 1 is yielded. Started later, it would leave
    the GPU idle, since a step ends by waiting for the norm of its gradient. Two device buffers alternate: the copy waits
    for the computation queued so far, that is on batch n - 2, which used the same buffer. A pinned buffer returns to the
    ring when its copy is done. The CPU never waits for the computation here.
    """
    side, buffers = torch.cuda.Stream(device), list[Tensor]()
    # The batch that is being copied, and the end of its copy
    ahead: tuple[Batch, torch.cuda.Event] | None = None
    with closing(batches):
        try:
            for count, batch in enumerate(batches):
                if count < 2:
                    buffers.append(torch.empty_like(batch.voxels, device=device))
                before, ahead = ahead, _start_copy(batch, buffers[count % 2], side, cache)
                if before is not None:
                    yield _wait_for_copy(*before)
                ahead[1].synchronize()
            if ahead is not None:
                yield _wait_for_copy(*ahead)
        finally:
            side.synchronize()  # nothing is freed while a copy writes or reads it


def _start_copy(
    batch: Batch, voxels: Tensor, side: torch.cuda.Stream, cache: DeviceCache | None
) -> tuple[Batch, torch.cuda.Event]:
    """Queue the copy of a batch into `voxels` (b, D, H, W) on the GPU; returns the batch and the end of the copy."""
    side.wait_stream(torch.cuda.current_stream(side.device))
    with torch.cuda.stream(side):
        if cache is None:
            voxels.copy_(batch.voxels, non_blocking=True)
        else:
            cache.gather(batch.ids, batch.fresh, batch.voxels, voxels)
        ids, weight = (
            small.pin_memory().to(side.device, non_blocking=True) for small in (batch.ids, batch.weight)
        )
        real = None if batch.real is None else batch.real.pin_memory().to(side.device, non_blocking=True)
        return replace(batch, voxels=voxels, ids=ids, weight=weight, real=real), side.record_event()


def _wait_for_copy(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """Make the current CUDA stream wait for the copy, and keep the memory of ids and weights until it has used them."""
    current = torch.cuda.current_stream(batch.voxels.device)
    current.wait_event(copied)
    batch.ids.record_stream(current)
    batch.weight.record_stream(current)
    if batch.real is not None:
        batch.real.record_stream(current)
    return batch
