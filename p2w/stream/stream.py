"""The online half of the data: endless batches of int16 HU from a sharded set, local or remote.

    shards = open_set("shards")                         # or "https://host/shards", "s3://bucket/shards"
    with Stream(shards, batch=16, seed=0, rank=r, world_size=w, readers=2) as stream:
        for batch in stream.batches(epoch, step):       # batch.voxels (b, D, H, W), b = 16 / w
            ...                                         # resume at (batch.epoch, batch.step + 1)

The ids of a step are a function of (seed, epoch, step) alone: not of the world size, the readers, the shard
format or restarts. B = global batch, b = B / world size, D, H, W = slice, row, column. Training leaves out
the last incomplete batch of an epoch (n % B sub-scans, other ones each epoch); validation fills it up and
gives those places weight 0.
"""

import time
import weakref
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from p2w.errors import UserError
from p2w.shards.manifest import read_manifest
from p2w.stream.device_cache import DeviceCache
from p2w.stream.local import LocalSet, ShardSet
from p2w.stream.prefetch import RING, BadSamplePolicy, CachedBy, OnBadSample, Prefetch, ReaderThread
from p2w.stream.sampler import Sampler


def open_set(where: str, verify: bool = True, on_bad: OnBadSample = "stop") -> ShardSet:
    """Open the data set in a folder, or below an http(s) or s3 URL; `verify=False` leaves out checksums.

    Below http(s), sub-scans are asked for by byte ranges, in the order of a local set, where the server gives those; else
    tar shards are streamed, in another order (`remote`).

    With `on_bad="skip"`, streams put another sub-scan in the place of one whose checksum differs or whose shard
    can no longer be read (`standin`). A set that misses shards from the start is refused all the same.

    Raises:
        UserError: no manifest there; shards missing, cut short, or in a format that cannot be streamed.
    """
    shards: ShardSet
    if "://" in where:
        from p2w.stream.tar import open_url  # noqa: PLC0415 - webdataset, requests: for remote sets only

        shards = open_url(where, verify)
    else:
        shards = LocalSet(read_manifest(where), verify)
    shards.on_bad = on_bad
    return shards


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step. `voxels` is a reused buffer: valid until the next batch is asked for."""

    voxels: Tensor  # (b, D, H, W) int16 HU
    ids: Tensor  # (b,) int64 manifest rows of what was read
    weight: (
        Tensor  # (b,) float32: 1, or 0 where validation filled up the last batch or left out a bad sub-scan
    )
    epoch: int
    step: int
    bad: int = 0  # rows of sub-scans that could not be used, where others stand in
    fresh: tuple[int, ...] = ()  # rows that were read, where the device holds the others


class Stream:
    """Endless training batches, or one validation pass, of one rank.

    `wait_seconds` adds up the time that the consumer has waited for data. A stream runs one iteration at a
    time: asking for `batches` again ends the earlier one. Close it, or leave its `with` block, to end its
    threads at once; they also end with the stream and with the interpreter.
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
        held: DeviceCache | None = None,
    ) -> None:
        """Plan the order and allocate the buffers.

        `batch` is the global one, B; `readers` counts threads, 0 reads in the calling thread. With a CUDA
        device the buffers are pinned and batches arrive on the device. `held`: room on that device for the
        split, which then is read once.

        Raises:
            UserError: B is not a multiple of the world size, or larger than the split.
        """
        if readers < 0:
            raise UserError(f"{readers} reader threads: there must be 0 (the caller reads) or more")
        self.plan = Sampler(shards, split, batch, seed, rank, world_size, training)
        self.device, self.held = torch.device(device), held
        self.readers = min(max(readers, shards.at_once), self.plan.rows) if readers else 0
        self.wait_seconds = 0.0
        shape, pinned = (self.plan.rows, *shards.shape), self.device.type == "cuda"
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
        """One pass in fixed order, every sub-scan once; the last batch is filled up with weight 0."""
        share: dict[str, Any] = {"rank": rank, "world_size": world_size}
        return cls(shards, split, batch, **share, readers=readers, device=device, training=False)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch, the same on every rank: n // B in training, ceil(n / B) in validation."""
        return self.plan.steps

    def batches(self, epoch: int = 0, step: int = 0) -> Generator[Batch, None, None]:
        """Batches from a position on; (epoch, steps_per_epoch) is (epoch + 1, 0). Reads nothing before it.

        Raises:
            UserError: the position does not exist.
            DataError: a sub-scan's checksum differs, or its shard cannot be read, and the set's policy is to stop.
        """
        if epoch < 0 or not 0 <= step <= self.steps_per_epoch:
            raise UserError(
                f"position (epoch {epoch}, step {step}) does not exist: an epoch here has "
                f"{self.steps_per_epoch} steps; resume with the data set and batch that the run began with"
            )
        self.close()
        batches = self._host_batches(epoch, step)
        if self.device.type == "cuda":
            return _upload(batches, self.device, self.held)
        return _gathered(batches, self.held) if self.held else batches

    def _host_batches(self, epoch: int, step: int) -> Generator[Batch, None, None]:
        """Batches in the ring's own memory."""
        plan, threads = self.plan, self.readers
        count = plan.rows
        ring = [
            (buffer.numpy(), np.empty(count, np.int64), np.ones(count, np.bool_)) for buffer in self._ring
        ]
        stand_ins, had = BadSamplePolicy(plan), CachedBy(self.held, plan.steps) if self.held else None
        lanes = [
            ReaderThread(stand_ins, range(lane, count, threads or 1), had) for lane in range(threads or 1)
        ]
        prefetch = Prefetch(plan, lanes, ring)
        end = self._end = weakref.finalize(self, prefetch.close)  # also called at interpreter exit
        if threads:
            prefetch.start(epoch, step)
        try:
            for count, (at_epoch, at_step) in enumerate(plan.places(epoch, step)):
                began = time.perf_counter()
                if prefetch.stopped:
                    raise RuntimeError("these batches have ended: the stream was closed or asked for others")
                if threads:
                    prefetch.take(count)
                else:
                    lanes[0].fill(at_epoch, at_step, ring[0])
                self.wait_seconds += time.perf_counter() - began
                place = count % len(ring)
                ids = torch.from_numpy(ring[place][1].copy())
                meant = ids == torch.from_numpy(plan.epoch_ids(at_epoch)[at_step].copy())
                weight = plan.weight(at_step) if plan.training else plan.weight(at_step) * meant
                bad = int((~meant).sum())
                fresh = tuple(np.flatnonzero(ring[place][2]).tolist())
                yield Batch(self._ring[place], ids, weight, at_epoch, at_step, bad, fresh)
                prefetch.release(count)
        finally:
            end()
            if not threads:  # a thread closes its own lane
                lanes[0].close()

    def close(self) -> None:
        """End the running iteration and its threads."""
        if self._end is not None:
            self._end()
            self._end = None

    def __enter__(self) -> Self:
        """Nothing to do: the threads start with the first batch."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


def _gathered(batches: Generator[Batch, None, None], held: DeviceCache) -> Generator[Batch, None, None]:
    """The same batches out of the memory that holds the split, where that is the CPU's."""
    voxels: Tensor | None = None
    with closing(batches):
        for batch in batches:
            voxels = torch.empty_like(batch.voxels) if voxels is None else voxels
            held.gather(batch.ids, batch.fresh, batch.voxels, voxels)
            yield replace(batch, voxels=voxels)


def _upload(
    batches: Generator[Batch, None, None], device: torch.device, held: DeviceCache | None
) -> Generator[Batch, None, None]:
    """The same batches with every tensor on the GPU, copied beside the computation on the batch before.

    Batch n starts up, on a CUDA stream of its own, before batch n - 1 is handed out: asked for later it would
    find the GPU idle, since a step ends by waiting for its gradient's norm. Two device buffers take turns: the
    copy waits for all computation asked for so far, that is on n - 2, which had the buffer. A pinned batch goes
    back to its ring when its copy is done. Nothing here waits for the computation.
    """
    side, buffers = torch.cuda.Stream(device), list[Tensor]()
    ahead: tuple[Batch, torch.cuda.Event] | None = None  # on its way up, and what says that it has arrived
    with closing(batches):
        try:
            for count, batch in enumerate(batches):
                if count < 2:
                    buffers.append(torch.empty_like(batch.voxels, device=device))
                before, ahead = ahead, _start_up(batch, buffers[count % 2], side, held)
                if before is not None:
                    yield _arrived(*before)
                ahead[1].synchronize()
            if ahead is not None:
                yield _arrived(*ahead)
        finally:
            side.synchronize()  # nothing is freed while a copy writes or reads it


def _start_up(
    batch: Batch, voxels: Tensor, side: torch.cuda.Stream, held: DeviceCache | None
) -> tuple[Batch, torch.cuda.Event]:
    """Begin the copy of a batch into `voxels`; the event comes when it is done."""
    side.wait_stream(torch.cuda.current_stream(side.device))
    with torch.cuda.stream(side):
        if held is None:
            voxels.copy_(batch.voxels, non_blocking=True)
        else:
            held.gather(batch.ids, batch.fresh, batch.voxels, voxels)
        ids, weight = (
            few.pin_memory().to(side.device, non_blocking=True) for few in (batch.ids, batch.weight)
        )
        return replace(batch, voxels=voxels, ids=ids, weight=weight), side.record_event()


def _arrived(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """Have the computation on a batch wait for its copy, and keep its ids' memory until that has read them."""
    current = torch.cuda.current_stream(batch.voxels.device)
    current.wait_event(copied)
    batch.ids.record_stream(current)
    batch.weight.record_stream(current)
    return batch
