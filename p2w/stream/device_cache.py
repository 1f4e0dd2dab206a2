"""The setting `data.cache_on_device`: keep the sub-scans of a split in the memory of a device once they were read.

Order, voxels and substitutes are those of a stream without cache, bit for bit. A rank reads and checks every sub-scan once;
28,144 sub-scans of 2 MiB are 59 GB. Each rank needs memory for the whole split: ids are shuffled over ranks anew in each
epoch, so that a rank reads all of them sooner or later; after e epochs on W ranks, a share (1 - 1/W)^e is still unread. A
set below a URL gains most, since it crosses the network once per rank.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2w.errors import UserError
from p2w.resources import free_memory
from p2w.rng import Ids
from p2w.stream.local import ShardSet


def free_bytes(device: torch.device) -> int:
    """Free memory of a device in bytes; for the CPU, what Linux and this process's control group still allow."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory()


def refuse_random_places(shards: ShardSet) -> None:
    """Raise UserError for a set of whole scans: its sub-scans are cut elsewhere in each epoch, so none can be kept."""
    if shards.random_places:
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
        refuse_random_places(shards)
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
