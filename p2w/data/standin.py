"""What happens to a sub-scan that cannot be used: the run stops, or another one stands in for it.

Which one is a function of (seed, epoch, id) alone, and of which sub-scans are bad: not of ranks, readers or
restarts. It counts as itself: its id goes with the batch, so its parts are its own.
"""

import sys
import threading
from typing import Any, Literal

import numpy as np

from p2w.data.local import DataError, Reader
from p2w.data.order import hash64
from p2w.data.plan import Plan

TRIES = 16  # stand-ins that may be bad too: with a hundredth of the set bad, never
_CHOICE = 2  # which of the draws of (seed, epoch) this is; `order.streamed` has 1

Policy = Literal["stop", "skip"]


class StandIns:
    """Reads the sub-scans of a plan, by the policy of its set. Threads share it."""

    def __init__(self, plan: Plan) -> None:
        """Nothing is read yet."""
        self.plan = plan
        self._lock = threading.Lock()

    def read(self, reader: Reader, sub_scan: int, epoch: int, out: Any) -> int:
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
        for attempt in range(TRIES):
            word = hash64(np.array([sub_scan], np.int64), plan.seed, epoch, _CHOICE, attempt)[0]
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
            f"{why} (on-bad-sample skip: {TRIES} others in its place could not be read either)"
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
