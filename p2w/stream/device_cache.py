"""A split's sub-scans in the memory of one device, each from when it is first read: the setting `data.cache_on_device`.

Order, voxels and stand-ins are those of a stream that reads from disk, bit for bit: only where the voxels come from changes.
What a rank has read once, checksum and all, is not read again; 28,144 sub-scans of 2 MiB are 59 GB. Each rank holds every
sub-scan of the split that it meets, and not a share of them: the order deals ids to ranks anew each epoch, so a rank of W
meets them all, (1 - 1/W)^e of them not yet after e epochs. A set below a URL gains most: it crosses the network once.
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
    """Memory that could be had on a device now; of the CPU, what Linux and this process's control group leave."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory()


class DeviceCache:
    """Room for a split on a device, and which sub-scans are there."""

    def __init__(
        self, shards: ShardSet, split: str, device: torch.device, *, reserve: int = 0, sharers: int = 1
    ) -> None:
        """Take the memory at once; `reserve` bytes must stay free, and `sharers` processes share what is free.

        Raises:
            UserError: it does not fit.
        """
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
        except torch.OutOfMemoryError as error:  # free, but not in one piece, or taken meanwhile
            raise UserError(refusal) from error
        self.there: NDArray[np.bool_] = np.zeros(len(self.ids), np.bool_)
        self._written: torch.cuda.Event | None = (
            None  # in whichever CUDA stream that was: iterations have their own
        )

    def places(self, ids: Ids) -> Ids:
        """Where ids of the split stand in `voxels` and `there`."""
        return np.searchsorted(self.ids, ids)

    def gather(self, ids: Tensor, fresh: Sequence[int], source: Tensor, out: Tensor) -> None:
        """Take the `fresh` rows in from `source`, then fill `out` (b, D, H, W), on the device, with the batch of `ids`.

        On a GPU all of it is queued in the current CUDA stream. `source` (b, D, H, W) is on the CPU, pinned for a GPU.
        """
        places = self.places(ids.numpy())
        if self._written is not None:
            torch.cuda.current_stream(out.device).wait_event(self._written)
        if fresh:
            rows = [self.voxels[places[row]] for row in fresh]
            for row, voxels in zip(fresh, rows, strict=True):
                voxels.copy_(source[row], non_blocking=True)
            self.there[places[list(fresh)]] = True
            if out.is_cuda:
                self._written = torch.cuda.current_stream(out.device).record_event()
        # One launch, whose offsets have 64 bits whatever torch does for an index into 30 billion voxels.
        torch._foreach_copy_(list(out.unbind()), [self.voxels[place] for place in places])
