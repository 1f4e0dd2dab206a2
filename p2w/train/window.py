"""What a run adds up between two logged lines."""

import time

import torch
from torch import Tensor


class Window:
    """Sums since the last logged line."""

    def __init__(self, wait_before: float = 0.0, stall_before: float = 0.0) -> None:
        self.loss = torch.zeros(())
        self.steps = self.samples = 0
        self.wait_before, self.stall_before = wait_before, stall_before
        self._start, self._paused = time.monotonic(), 0.0

    def add(self, loss: Tensor, samples: int) -> None:
        """One step's loss (device scalar) and this rank's samples."""
        self.loss = self.loss.to(loss.device) + loss
        self.steps += 1
        self.samples += samples

    def pause(self, seconds: float) -> None:
        """Leave validation out of the rate."""
        self._paused += seconds

    def seconds(self) -> float:
        """Training time so far."""
        return max(1e-9, time.monotonic() - self._start - self._paused)
