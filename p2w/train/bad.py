"""How many samples could not be used and had others stand in for them, counted over all ranks; and when it is too many."""

import torch

from p2w.config import DataConfig
from p2w.data.stream import Batch, Stream
from p2w.errors import SharedError
from p2w.world import World


class BadSamples:
    """`total` since the first step, and of the running epoch. Part of a checkpoint, so restarts lose no count."""

    def __init__(self, config: DataConfig, world: World, stream: Stream) -> None:
        self.config, self.world = config, world
        self.per_epoch = stream.steps_per_epoch * config.batch
        self.epoch = self.in_epoch = self.total = 0

    def count(self, batch: Batch, step: int) -> None:
        """Account for a batch; every rank calls it at every step.

        Raises SharedError, on all ranks at the same step, past `data.max_bad_share` of the samples of an epoch.
        """
        if self.config.on_bad_sample == "stop":
            return
        if batch.epoch != self.epoch:
            self.epoch, self.in_epoch = batch.epoch, 0
        found = int(self.world.sum(torch.tensor([batch.bad])))
        self.in_epoch += found
        self.total += found
        if self.in_epoch > self.config.max_bad_share * self.per_epoch:
            raise SharedError(
                f"step {step}: {self.in_epoch} of an epoch's {self.per_epoch} samples could not be used, "
                f"data.max_bad_share={self.config.max_bad_share:g} allows {self.config.max_bad_share * self.per_epoch:g}; "
                "the warnings name them: repair the set with p2w verify, or pass a larger --data.max-bad-share"
            )

    def metrics(self) -> dict[str, float]:
        """For the log; nothing where a bad sample stops the run."""
        if self.config.on_bad_sample == "stop":
            return {}
        return {"data/bad_samples": self.total, "data/bad_share": self.in_epoch / self.per_epoch}

    def state(self) -> list[int]:
        """For a checkpoint."""
        return [self.epoch, self.in_epoch, self.total]

    def load(self, state: list[int]) -> None:
        """From a checkpoint."""
        self.epoch, self.in_epoch, self.total = state
