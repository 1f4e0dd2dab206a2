"""A look at the network that can be broken off, by all ranks at the same batch."""

from collections.abc import Callable, Generator

from p2w.data.stream import Batch, Stream


class Interrupted(Exception):
    """The run was told to stop while it was looking; the look is still owed."""


class Interruptible(Stream):
    """A stream of which every rank asks before each batch whether any rank was told to stop: one small all-reduce.

    So all ranks must go through it together. What one rank does alone takes a plain Stream, or the shards' reader.
    """

    told: Callable[[], bool] | None = None

    def batches(self, epoch: int = 0, step: int = 0) -> Generator[Batch, None, None]:
        """As Stream.batches. Raises Interrupted, on all ranks, once `told()` is true."""
        for batch in super().batches(epoch, step):
            if self.told is not None and self.told():
                raise Interrupted
            yield batch
