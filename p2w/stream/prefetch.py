"""Reader threads that fill a ring of reused batch buffers ahead; what is read instead of a bad sub-scan; the device cache.

Every thread knows from (epoch, step) alone what to read next, so there is no queue of jobs: thread t of N fills the rows
t, t + N, ... of every batch, at most as many batches ahead as the ring has buffers. Any number of threads gives the same
batches.

A bad sub-scan stops the run, or a substitute is read instead, as the setting `data.on_bad_sample` says. The substitute
depends on (seed, epoch, id) and on which sub-scans are bad, not on ranks, reader threads or restarts. The batch has the
id of the substitute, so its crops are drawn as those of any sub-scan with that id.

With the setting `data.cache_on_device` a device keeps the sub-scans of a split once they were read. Order, voxels and
substitutes are those without cache, bit for bit. A rank reads and checks every sub-scan once; 28,144 sub-scans of 2 MiB are
59 GB. Each rank needs memory for the whole split: ids are shuffled over ranks anew in each epoch, so that a rank reads all
of them sooner or later; after e epochs on W ranks, a share (1 - 1/W)^e is still unread.
"""

import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2w.errors import UserError
from p2w.resources import free_memory
from p2w.rng import Ids, hash64
from p2w.stream.local import DataError, SampleReader, ShardSet
from p2w.stream.sampler import Sampler

# Substitutes may be bad too; if 1 % of the set is bad, 16 bad ones in a row do not happen
SUBSTITUTE_TRIES = 16
_SUBSTITUTE_STREAM = 2  # number of this random stream under (seed, epoch); `sampler.streamed_order` uses 1

OnBadSample = Literal["stop", "skip"]


class BadSamplePolicy:
    """Read sub-scans, and handle bad ones as the data set's `on_bad` says. Threads share it."""

    def __init__(self, sampler: Sampler) -> None:
        """Prepare; nothing is read yet."""
        self.sampler = sampler
        self._lock = threading.Lock()

    def read(self, reader: SampleReader, sub_scan: int, epoch: int, out: Any) -> int:
        """Read a sub-scan or its substitute into `out`, int16 (D, H, W); returns the id of the one that was read.

        Raises:
            DataError: it cannot be read and the policy is to stop, or no substitute can be read either.
        """
        try:
            reader.read_into(sub_scan, out)
            return sub_scan
        except DataError as error:
            if self.sampler.shards.on_bad == "stop":
                raise
            return self._substitute(sub_scan, epoch, out, error)

    def _substitute(self, sub_scan: int, epoch: int, out: Any, why: DataError) -> int:
        sampler, ids = self.sampler, self.sampler.all_ids
        for attempt in range(SUBSTITUTE_TRIES):
            word = hash64(np.array([sub_scan], np.int64), sampler.seed, epoch, _SUBSTITUTE_STREAM, attempt)[0]
            other = int(ids[int(word % np.uint64(len(ids)))])
            try:
                if other == sub_scan:
                    continue
                sampler.shards.read_into(other, out)
            except DataError as error:
                self._warn_once(other, error)
                continue
            self._warn_once(sub_scan, why)
            return other
        raise DataError(
            f"{why} (data.on-bad-sample skip: {SUBSTITUTE_TRIES} substitutes could not be read either)"
        ) from why

    def _warn_once(self, sub_scan: int, why: DataError) -> None:
        """Warn once per sub-scan and process, on any rank: no other rank knows of it."""
        with self._lock:
            named = self.sampler.shards.reported_bad
            if sub_scan in named:
                return
            named.add(sub_scan)
        line = f"warning: rank {self.sampler.rank}: {why} (data.on-bad-sample skip: another sub-scan is read instead)"
        print(line, file=sys.stderr, flush=True)


# Voxels (b, D, H, W) of a batch, the ids (b,) of its sub-scans, and which rows (b,) were read; the others are in the cache.
BatchBuffer = tuple[NDArray[np.int16], NDArray[np.int64], NDArray[np.bool_]]
RING = 3  # batch buffers: one in use by the consumer, one full, one being filled
_JOIN_SECONDS = 10.0  # after which a thread that hangs in a network read is left behind


def free_bytes(device: torch.device) -> int:
    """Free memory of a device in bytes; for the CPU, what Linux and this process's control group still allow."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory()


def refuse_random_crops(shards: ShardSet) -> None:
    """Raise UserError for a set of whole scans: its sub-scans are cut elsewhere in each epoch, so none can be kept."""
    if shards.random_crops:
        raise UserError(
            f"data.cache_on_device: {shards.where} stores whole scans, and every epoch cuts other sub-scans of them, so "
            "that none can be kept: pass --data.no-cache-on-device, or cut the set with --store subscans"
        )


class DeviceCache:
    """Memory on a device for the sub-scans of a split, and a record of which are in it."""

    def __init__(
        self, shards: ShardSet, split: str, device: torch.device, *, reserve: int = 0, sharers: int = 1
    ) -> None:
        """Allocate memory for the whole split now.

        `reserve` bytes must stay free for the network; `sharers` processes share the free memory.

        Raises:
            UserError: the split does not fit, or the set has no sub-scans that stay the same from epoch to epoch.
        """
        refuse_random_crops(shards)
        self.ids = shards.ids(split)  # ascending
        need, free = len(self.ids) * shards.nbytes, free_bytes(device) // sharers
        gib = 1 << 30
        refusal = (
            f"data.cache_on_device: {len(self.ids):,} sub-scans take {need / gib:.1f} GiB of {device}, which has "
            f"{free / gib:.1f} GiB free and needs {reserve / gib:.1f} for the network; pass --data.no-cache-on-device"
        )
        if need + reserve > free:
            raise UserError(refusal)
        try:
            self.voxels = torch.empty((len(self.ids), *shards.shape), dtype=torch.int16, device=device)
        except torch.OutOfMemoryError as error:  # fragmented, or taken by another process meanwhile
            raise UserError(refusal) from error
        self.filled: NDArray[np.bool_] = np.zeros(len(self.ids), np.bool_)
        # End of the last copy into the cache, in whichever CUDA stream it ran
        self._written: torch.cuda.Event | None = None

    def rows_of(self, ids: Ids) -> Ids:
        """Rows of `voxels` and `filled` that belong to ids of the split."""
        return np.searchsorted(self.ids, ids)

    def gather(self, ids: Tensor, fresh: Sequence[int], source: Tensor, out: Tensor) -> None:
        """Copy the rows `fresh` of `source` into the cache, then fill `out` with the batch of `ids` from the cache.

        `source` and `out` are int16 (b, D, H, W); `source` is on the CPU, pinned for a GPU, `out` on the device. On a GPU
        all copies are queued in the current CUDA stream.
        """
        cache_rows = self.rows_of(ids.numpy())
        if self._written is not None:
            torch.cuda.current_stream(out.device).wait_event(self._written)
        if fresh:
            rows = [self.voxels[cache_rows[row]] for row in fresh]
            for row, voxels in zip(fresh, rows, strict=True):
                voxels.copy_(source[row], non_blocking=True)
            self.filled[cache_rows[list(fresh)]] = True
            if out.is_cuda:
                self._written = torch.cuda.current_stream(out.device).record_event()
        # One kernel launch with 64-bit offsets, which an index into 30 billion voxels needs.
        torch._foreach_copy_(list(out.unbind()), [self.voxels[row] for row in cache_rows])


class CacheSchedule:
    """From which step on each sub-scan is in the device cache; one for each iteration over the stream.

    A batch is copied into the cache before the next one is assembled, so what was read for one batch need not be read
    again for a later one. But reader threads run at different steps: what one has read for a later batch is not in the
    cache yet for an earlier batch of another.
    """

    def __init__(self, cache: DeviceCache, steps: int) -> None:
        """Begin with what the cache has now; `steps` is the number of steps per epoch."""
        self.cache, self.steps = cache, steps
        self.available_from: Ids = np.where(cache.filled, -1, np.iinfo(np.int64).max)  # global step

    def missing(self, ids: Ids, epoch: int, step: int) -> NDArray[np.bool_]:
        """Which of these ids must be read for a step, bool of the shape of `ids`."""
        return self.available_from[self.cache.rows_of(ids)] > epoch * self.steps + step

    def add(self, ids: Ids, epoch: int, step: int) -> None:
        """Record that these ids have been read for a step."""
        rows = self.cache.rows_of(ids)
        self.available_from[rows] = np.minimum(self.available_from[rows], epoch * self.steps + step)


class RowReader:
    """Fill some rows of every batch; holds the open readers of these rows for the current epoch."""

    def __init__(
        self, policy: BadSamplePolicy, rows: Sequence[int], schedule: CacheSchedule | None = None
    ) -> None:
        """Fill `rows` of every batch, except for what the device cache has by then."""
        self.sampler, self.policy, self.rows, self.schedule = policy.sampler, policy, rows, schedule
        self.epoch = -1
        self.readers: list[SampleReader] = []
        self._open = ExitStack()

    def fill(self, epoch: int, step: int, buffer: BatchBuffer) -> None:
        """Read these rows of one batch into the buffer; call it with steps in ascending order."""
        voxels, read, fresh = buffer
        sampler = self.sampler
        if epoch != self.epoch:
            self.close()
            shuffle = (sampler.seed, epoch) if sampler.training else None
            # A reader with random access need not know what it will be asked for; of a large set that takes long.
            if sampler.shards.order == "shuffled":
                wanted = [np.zeros(0, np.int64)] * len(self.rows)
            else:
                wanted = [sampler.ids_from(epoch, step, row) for row in self.rows]
            if self.schedule:
                wanted = [own[self.schedule.missing(own, epoch, step)] for own in wanted]
            readers = [sampler.shards.reader(own, shuffle) for own in wanted]
            self.readers = [self._open.enter_context(reader) for reader in readers]
            self.epoch = epoch
        ids = sampler.step_ids(epoch, step)[sampler.share]
        for row, reader in zip(self.rows, self.readers, strict=True):
            fresh[row] = self.schedule is None or self.schedule.missing(ids[row, None], epoch, step)[0]
            read[row] = ids[row]
            if fresh[row]:
                read[row] = self.policy.read(reader, int(ids[row]), epoch, voxels[row])
                if self.schedule:
                    self.schedule.add(read[row, None], epoch, step)

    def close(self) -> None:
        """Close the readers of the epoch."""
        self._open.close()
        self.epoch = -1


class Prefetch:
    """Reader threads, the ring that they fill, and the condition variable between them and the consumer."""

    def __init__(
        self, sampler: Sampler, row_readers: Sequence[RowReader], ring: Sequence[BatchBuffer]
    ) -> None:
        """Prepare; no thread runs before `start`."""
        self.sampler, self.row_readers, self.ring = sampler, row_readers, ring
        self.condition = threading.Condition()
        self.filled = [0] * len(ring)  # per buffer: how many threads have finished their rows
        self.released = 0  # number of batches that the consumer has given back
        self.stopped = False
        self.error: BaseException | None = None
        self.threads: list[threading.Thread] = []

    def start(self, epoch: int, step: int) -> None:
        """Start the threads at a position."""
        for number, row_reader in enumerate(self.row_readers):
            # Daemon threads, since the interpreter joins all others at exit before it calls the finalizer that stops these.
            thread = threading.Thread(target=self._work, args=(row_reader, epoch, step), daemon=True)
            thread.name = f"p2w-reader-{number}"
            try:
                thread.start()
            except RuntimeError as error:  # "can't start new thread"
                raise UserError(
                    f"reader thread {number + 1} of {len(self.row_readers)}: {error}; the limit of processes and threads is "
                    "reached (ulimit -u, or a container's pids): raise it, or pass fewer --data.reader-threads"
                ) from error
            self.threads.append(thread)

    def _work(self, row_reader: RowReader, epoch: int, step: int) -> None:
        try:
            for count, position in enumerate(self.sampler.positions(epoch, step)):
                if not self._may_fill(count):
                    break
                row_reader.fill(*position, self.ring[count % len(self.ring)])
                with self.condition:
                    self.filled[count % len(self.ring)] += 1
                    if self.filled[count % len(self.ring)] == len(self.row_readers):
                        self.condition.notify_all()  # the consumer waits for a whole batch, nobody for less
        except BaseException as error:  # the consumer raises it
            with self.condition:
                self.error = self.error or error
                self.condition.notify_all()
        finally:
            row_reader.close()

    def _may_fill(self, count: int) -> bool:
        """Wait until the buffer of batch number `count` is free; False when the threads must stop."""
        with self.condition:
            self.condition.wait_for(lambda: self.stopped or count < self.released + len(self.ring))
            return not self.stopped

    def take(self, count: int) -> None:
        """Wait until batch number `count` since the start is complete.

        Raises:
            DataError: a thread could not read a sub-scan of it; all batches before it are delivered first.
        """
        slot = count % len(self.ring)
        with self.condition:
            self.condition.wait_for(
                lambda: self.error is not None or self.filled[slot] == len(self.row_readers)
            )
            if self.error is not None and self.filled[slot] != len(self.row_readers):
                raise self.error

    def release(self, count: int) -> None:
        """Give the buffer of batch number `count` back to the threads."""
        with self.condition:
            self.filled[count % len(self.ring)] = 0
            self.released = count + 1
            self.condition.notify_all()

    def close(self) -> None:
        """Stop the threads and wait for them; safe to call twice."""
        with self.condition:
            self.stopped = True
            self.condition.notify_all()
        for thread in self.threads:
            thread.join(_JOIN_SECONDS)
        self.threads.clear()
