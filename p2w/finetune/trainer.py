"""Fine-tuning: epochs of steps, a validation after each, the rate halved on a plateau, the best weights kept.

A trial continues from whole epochs: its state is (epoch, weights, optimizer, plateau, best weights), and the order of an
epoch's samples is a function of (seed, epoch). So a trial that was interrupted ends, on the CPU, with the same bits.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from p2w.errors import UserError
from p2w.finetune.recipe import FineTuneRecipe, Plateau
from p2w.finetune.samples import Samples, epoch_batches, fixed_batches
from p2w.finetune.task_types import TaskType
from p2w.model import Network
from p2w.model.conv import for_optimizer
from p2w.model.norm import recalibrated, synchronise_batch_norm
from p2w.train.optim import Precision, load_optimizer
from p2w.world import World, average_gradients, gather_rows

State = dict[str, Tensor]
BATCHES, ROWS = 16, 16  # of samples that a frozen encoder's batch norms are recalibrated on
VOTE_EVERY = 8  # batches between the votes of several ranks with GPUs whether to stop


class StopRequested(Exception):
    """A stop request ended the trial early; it continues from its last checkpoint."""


@dataclass
class EpochResult:
    """The result of an epoch; losses are means over the whole split."""

    number: int
    train_loss: float
    val_loss: float
    lr: float
    best: bool
    idle: int
    samples: int
    seconds: float


class FineTuner:
    """A trial in progress on every rank: `epoch()` until `ended`; then `best` holds the weights to judge."""

    def __init__(
        self, network: Network, kind: TaskType, recipe: FineTuneRecipe, precision: Precision, world: World, seed: int,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self.kind, self.recipe, self.precision, self.world, self.seed = kind, recipe, precision, world, seed
        self.stop_requested = stop_requested
        if recipe.freeze:
            network.encoder.requires_grad_(False)
        network.to(world.device)
        if recipe.channels_last:
            network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # torch's stub knows 2D only
        self.network = synchronise_batch_norm(network, world.size)
        self.encoder = network.encoder
        self.trained = [weight for weight in self.network.parameters() if weight.requires_grad]
        # On a CPU torch's fused Adam rounds differently, and published results are those of the other.
        fused = True if world.device.type == "cuda" else None
        weights = for_optimizer(self.network)
        self.optimizer = torch.optim.Adam(weights, lr=recipe.lr, eps=recipe.adam_eps, fused=fused)
        # A GPU's steps take milliseconds, and a vote would hold up the queue of the next ones.
        self.vote_every = VOTE_EVERY if world.device.type == "cuda" and world.size > 1 else 1
        self.plateau = Plateau(recipe)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision.name == "fp16")
        self.number = 0
        self.best: State = self._copy()

    def recalibrate(self, samples: Samples) -> None:
        """Give the encoder the running statistics of at most BATCHES batches of these samples, spread over all of them.

        Called before the first epoch, on all ranks together. A single sample has too few values: then they stay.
        """
        if len(samples) < 2:
            return
        count = max(1, min(BATCHES, len(samples) // ROWS))
        spread = np.linspace(0, len(samples) - 1, min(len(samples), count * ROWS)).astype(int)
        mine = [spread[number::count] for number in range(self.world.rank, count, self.world.size)]
        inputs = (x for x, _ in samples.batches(mine))
        with self._autocast():
            found = recalibrated(self.network, inputs, lambda rows: gather_rows(rows, self.world, count))
        self.encoder.load_state_dict(found.encoder.state_dict())
        self.best = self._copy()

    @property
    def ended(self) -> bool:
        """Whether the trial has ended: no epoch is left."""
        return self.number >= self.recipe.max_epochs or self.plateau.ended

    def epoch(self, train: Samples, val: Samples) -> EpochResult:
        """One pass over the training samples, then validation.

        Raises StopRequested, or UserError for a loss that is not finite.
        """
        began, lr = time.monotonic(), self.plateau.lr
        train_loss, seen = self._train(train, lr)
        val_loss = self._validate(val)
        if not math.isfinite(train_loss + val_loss):
            raise UserError(
                f"epoch {self.number + 1}: the loss is not finite (training {train_loss}, validation {val_loss}) at rate "
                f"{lr:g}; try a smaller --recipe.lr, or --recipe.precision fp32"
            )
        self.number += 1
        best = self.plateau.observe(val_loss)
        if best:
            self.best = self._copy()
        seconds = time.monotonic() - began
        return EpochResult(self.number, train_loss, val_loss, lr, best, self.plateau.idle, seen, seconds)

    def _train(self, samples: Samples, lr: float) -> tuple[float, int]:
        """The steps of an epoch, each rank on its share of every batch. Mean loss over the samples, and their number."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.network.train()
        if self.recipe.freeze:
            self.encoder.eval()
        # Layers that draw (dropout) do it anew each epoch, and the same after an interruption.
        torch.manual_seed((self.seed * 1_000_003 + self.number) * 1_000_003 + self.world.rank)
        whole = epoch_batches(
            len(samples), self.recipe.batch, self.recipe.epoch_steps, self.seed, self.number
        )
        share = [batch[self.world.rank :: self.world.size] for batch in whole]
        summed = torch.zeros((), device=self.world.device)
        for number, (batch, (x, target)) in enumerate(zip(whole, samples.batches(share), strict=True)):
            self._leave_if_stopped(number)
            self.optimizer.zero_grad(set_to_none=True)
            with self._autocast():
                logits = self.network(x)
            loss = self.kind.loss(logits, target, len(batch), self.world)
            self.scaler.scale(loss).backward()
            average_gradients(self.trained, self.world)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            summed += loss.detach() * len(batch)
        seen = sum(map(len, whole))
        return float(self.world.sum(summed)) / self.world.size / seen, seen

    def _validate(self, samples: Samples) -> float:
        """The mean over batches of their loss, weighted by samples. Batches are those of the split's order."""
        records = self.records(samples)
        ends = fixed_batches(len(samples), self.recipe.batch)
        parts = [records[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        return sum(self.kind.loss_of(part) * len(part) for part in parts) / len(samples)

    @torch.no_grad()
    def records(self, samples: Samples, test: bool = False) -> Tensor:
        """What loss and metrics need of each sample, (N, …) float64 on the CPU, in the split's order, on every rank.

        `test`: with the columns that the test alone needs (`TaskType.test_record`).
        """
        self.network.eval()
        rank, size = self.world.rank, self.world.size
        every = range(len(samples))
        together = self.recipe.batch * size
        share = [every[start:][:together][rank::size] for start in range(0, len(samples), together)]
        batches_of = samples.batches([positions for positions in share if len(positions)])
        found = []
        for number, positions in enumerate(share):
            self._leave_if_stopped(
                number
            )  # which all ranks ask together, also one that has none of the last samples
            if not len(positions):
                continue
            x, target = next(batches_of)
            with self._autocast():
                logits = self.network(x)
            if test:
                found.append(self.kind.test_record(logits, target, samples.spacing_mm(positions)))
            else:
                found.append(self.kind.record(logits, target))
        return gather_rows(torch.cat(found), self.world, len(samples)).cpu()

    def _autocast(self) -> torch.autocast:
        dtype = self.precision.dtype
        return torch.autocast(
            self.world.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None
        )

    def _leave_if_stopped(self, number: int) -> None:
        """Raise StopRequested on all ranks when any has a stop request; several GPUs ask one another every few batches."""
        stop_requested = self.stop_requested()
        if number % self.vote_every == 0 and self.world.any(stop_requested):
            raise StopRequested

    def _copy(self) -> State:
        """The weights as they are, on the CPU and in memory of their own."""
        return {
            name: value.detach().to("cpu", copy=True).contiguous()
            for name, value in self.network.state_dict().items()
        }

    def take_best(self) -> None:
        """Bring the best weights back into the network."""
        self.network.load_state_dict(self.best)

    def state_dict(self) -> tuple[State, dict[str, Any]]:
        """Weights, and all else that the trial continues from: plain types and tensors."""
        return self._copy(), {
            "optimizer": self.optimizer.state_dict(),
            "plateau": self.plateau.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best": self.best,
        }

    def load_state_dict(self, epoch: int, weights: State, state: dict[str, Any]) -> None:
        """Take up where `state_dict` left off, after `epoch` epochs."""
        self.network.load_state_dict(weights)
        load_optimizer(self.optimizer, state["optimizer"])
        self.plateau.load_state_dict(state["plateau"])
        self.scaler.load_state_dict(state["scaler"])
        self.best, self.number = state["best"], epoch
