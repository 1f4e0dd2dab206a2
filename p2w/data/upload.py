"""Host to GPU beside the computation: pinned batches go up on their own CUDA stream, into two buffers."""

from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from p2w.data.stream import Batch


def upload(batches: "Generator[Batch, None, None]", device: torch.device) -> "Generator[Batch, None, None]":
    """The same batches with every tensor on `device`; each is valid until the next one is asked for.

    The copy of a batch waits only for the computation on the batch before the last one, which used the same
    device buffer, so it runs beside the computation on the last one. A pinned batch goes back to its ring
    when its copy is done.
    """
    side = torch.cuda.Stream(device)
    buffers: list[Tensor] = []
    done: list[torch.cuda.Event] = []  # the computation on each buffer
    with closing(batches):
        for count, batch in enumerate(batches):
            slot = count % 2
            current = torch.cuda.current_stream(device)
            if len(buffers) <= slot:
                buffers.append(torch.empty_like(batch.voxels, device=device))
                done.append(current.record_event())
            with torch.cuda.stream(side):
                side.wait_event(done[slot])
                buffers[slot].copy_(batch.voxels, non_blocking=True)
                copied = side.record_event()
            current.wait_event(copied)
            ids, weight = batch.ids.to(device), batch.weight.to(device)
            yield replace(batch, voxels=buffers[slot], ids=ids, weight=weight)
            done[slot] = torch.cuda.current_stream(device).record_event()
            copied.synchronize()
