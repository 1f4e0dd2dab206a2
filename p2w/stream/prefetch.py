"""Reader threads that fill a small ring of reused batches ahead, and what they do with a sub-scan they cannot read.

Every thread knows from (epoch, step) alone what to read next, so nothing is handed out: thread t of N fills
the rows t, t+N, ... of every batch, at most as far ahead as the ring is long. Any number of threads gives the
same batches.

A bad sub-scan stops the run, or another one is read in its place, as `data.on_bad_sample` says.

Which one is a function of (seed, epoch, id) alone, and of which sub-scans are bad: not of ranks, readers or
restarts. It counts as itself: its id goes with the batch, so its parts are its own.
"""

import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from p2w.rng import Ids, hash64
from p2w.stream.device_cache import DeviceCache
from p2w.stream.local import DataError, SampleReader
from p2w.stream.sampler import Sampler

SUBSTITUTE_TRIES = 16  # stand-ins that may be bad too: with a hundredth of the set bad, never
_SUBSTITUTE_STREAM = 2  # which of the draws of (seed, epoch) this is; `sampler.streamed_order` has 1

OnBadSample = Literal["stop", "skip"]


class BadSamplePolicy:
    """Reads the sub-scans of a plan, by the policy of its set. Threads share it."""

    def __init__(self, plan: Sampler) -> None:
        """Nothing is read yet."""
        self.plan = plan
        self._lock = threading.Lock()

    def read(self, reader: SampleReader, sub_scan: int, epoch: int, out: Any) -> int:
        """Read a sub-scan into `out`, int16 (D, H, W), or one that stands in for it; the id of what was read.

        Raises:
            DataError: it cannot be used and the policy is to stop, or its stand-ins cannot be used either.
        """
        try:
            reader.read_into(sub_scan, out)
            return sub_scan
        except DataError as error:
            if self.plan.shards.on_bad == "stop":
                raise
            return self._instead(sub_scan, epoch, out, error)

    def _instead(self, sub_scan: int, epoch: int, out: Any, why: DataError) -> int:
        plan, ids = self.plan, self.plan.all_ids
        for attempt in range(SUBSTITUTE_TRIES):
            word = hash64(np.array([sub_scan], np.int64), plan.seed, epoch, _SUBSTITUTE_STREAM, attempt)[0]
            other = int(ids[int(word % np.uint64(len(ids)))])
            try:
                if other == sub_scan:
                    continue
                plan.shards.read_into(other, out)
            except DataError as error:
                self._name(other, error)
                continue
            self._name(sub_scan, why)
            return other
        raise DataError(
            f"{why} (on-bad-sample skip: {SUBSTITUTE_TRIES} others in its place could not be read either)"
        ) from why

    def _name(self, sub_scan: int, why: DataError) -> None:
        """Once a sub-scan and process, on any rank: only this rank has seen it."""
        with self._lock:
            named = self.plan.shards.named_bad
            if sub_scan in named:
                return
            named.add(sub_scan)
        line = f"warning: rank {self.plan.rank}: {why} (on-bad-sample skip: others stand in for it)"
        print(line, file=sys.stderr, flush=True)


# Voxels (b, D, H, W) of a batch, ids (b,) of what it holds, and (b,) which rows were read: the others are held already.
BatchBuffer = tuple[NDArray[np.int16], NDArray[np.int64], NDArray[np.bool_]]
RING = 3  # one batch with the consumer, one full, one being filled
_JOIN_SECONDS = 10.0  # a thread in a stalled network read is left behind rather than waited for


class CachedBy:
    """What a device holds, or will hold by a step; one for each iteration.

    A batch is taken in before a later one is put together, so what was read for one need not be read again for a later
    one. But lanes are not in step: what another lane has read for a later batch is not there for an earlier one.
    """

    def __init__(self, held: DeviceCache, steps: int) -> None:
        """Begin with what is there; `steps` of an epoch."""
        self.held, self.steps = held, steps
        self.since: Ids = np.where(held.there, -1, np.iinfo(np.int64).max)  # the step at which each is there

    def lacks(self, ids: Ids, epoch: int, step: int) -> NDArray[np.bool_]:
        """Which of these ids must be read for a step."""
        return self.since[self.held.places(ids)] > epoch * self.steps + step

    def add(self, ids: Ids, epoch: int, step: int) -> None:
        """These have been read for a step."""
        places = self.held.places(ids)
        self.since[places] = np.minimum(self.since[places], epoch * self.steps + step)


class ReaderThread:
    """One thread's share: the rows it fills, and its readers of the epoch in which it stands."""

    def __init__(self, stand_ins: BadSamplePolicy, rows: Sequence[int], had: CachedBy | None = None) -> None:
        """Fill `rows` of every batch, but for what the device has by then."""
        self.plan, self.stand_ins, self.rows, self.had = stand_ins.plan, stand_ins, rows, had
        self.epoch = -1
        self.readers: list[SampleReader] = []
        self._open = ExitStack()

    def fill(self, epoch: int, step: int, place: BatchBuffer) -> None:
        """Read this lane's rows of one batch; steps are asked for in order."""
        voxels, read, fresh = place
        ids = self.plan.epoch_ids(epoch)
        if epoch != self.epoch:
            self.close()
            shuffle = (self.plan.seed, epoch) if self.plan.training else None
            due = [ids[step:, row] for row in self.rows]
            due = [own[self.had.lacks(own, epoch, step)] for own in due] if self.had else due
            readers = [self.plan.shards.reader(own, shuffle) for own in due]
            self.readers = [self._open.enter_context(reader) for reader in readers]
            self.epoch = epoch
        for row, reader in zip(self.rows, self.readers, strict=True):
            fresh[row] = self.had is None or self.had.lacks(ids[step, row, None], epoch, step)[0]
            read[row] = ids[step, row]
            if fresh[row]:
                read[row] = self.stand_ins.read(reader, int(ids[step, row]), epoch, voxels[row])
                if self.had:
                    self.had.add(read[row, None], epoch, step)

    def close(self) -> None:
        """Close the readers of the epoch."""
        self._open.close()
        self.epoch = -1


class Prefetch:
    """The threads, the ring they fill, and the one condition at which they and the consumer meet."""

    def __init__(self, plan: Sampler, lanes: Sequence[ReaderThread], ring: Sequence[BatchBuffer]) -> None:
        """Nothing runs before `start`."""
        self.plan, self.lanes, self.ring = plan, lanes, ring
        self.meeting = threading.Condition()
        self.filled = [0] * len(ring)  # lanes that have finished each batch of the ring
        self.released = 0  # batches that the consumer has given back
        self.stopped = False
        self.error: BaseException | None = None
        self.threads: list[threading.Thread] = []

    def start(self, epoch: int, step: int) -> None:
        """Start reading at a position."""
        for number, lane in enumerate(self.lanes):
            # Daemons: at exit the interpreter waits for other threads before it calls what stops them.
            thread = threading.Thread(target=self._work, args=(lane, epoch, step), daemon=True)
            thread.name = f"p2w-reader-{number}"
            self.threads.append(thread)
            thread.start()

    def _work(self, lane: ReaderThread, epoch: int, step: int) -> None:
        try:
            for count, place in enumerate(self.plan.places(epoch, step)):
                if not self._may_fill(count):
                    break
                lane.fill(*place, self.ring[count % len(self.ring)])
                with self.meeting:
                    self.filled[count % len(self.ring)] += 1
                    self.meeting.notify_all()
        except BaseException as error:  # the consumer raises it
            with self.meeting:
                self.error = self.error or error
                self.meeting.notify_all()
        finally:
            lane.close()

    def _may_fill(self, count: int) -> bool:
        """Wait until the place of batch `count` in the ring is free; false when all is to end."""
        with self.meeting:
            self.meeting.wait_for(lambda: self.stopped or count < self.released + len(self.ring))
            return not self.stopped

    def take(self, count: int) -> None:
        """Wait until batch number `count` since the start stands in the ring.

        Raises:
            DataError: what a reader came upon; the batches before it have been given.
        """
        slot = count % len(self.ring)
        with self.meeting:
            self.meeting.wait_for(lambda: self.error is not None or self.filled[slot] == len(self.lanes))
            if self.error is not None and self.filled[slot] != len(self.lanes):
                raise self.error

    def release(self, count: int) -> None:
        """Give batch `count` back, to be filled anew."""
        with self.meeting:
            self.filled[count % len(self.ring)] = 0
            self.released = count + 1
            self.meeting.notify_all()

    def close(self) -> None:
        """Stop the threads and wait for them; safe to call twice."""
        with self.meeting:
            self.stopped = True
            self.meeting.notify_all()
        for thread in self.threads:
            thread.join(_JOIN_SECONDS)
        self.threads.clear()
