"""The loop: batch -> views -> step, with checkpoints, evaluators and a log. It knows no method by name.

Position is (epoch, step of the epoch), both derived from the number of steps done; with the weights, the optimizer and
the schedule it is all a run continues from. Torch's own random numbers are reseeded from (seed, step, rank) at every
step, so a pretext or layer that draws from them repeats exactly after a resume.
"""

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from p2w.config import Config
from p2w.data.stream import Batch, Stream
from p2w.errors import UserError
from p2w.geometry import Keys
from p2w.log import Log
from p2w.pretext.protocol import Pretext, Views
from p2w.train.checkpoint import Checkpoints, Snapshot
from p2w.train.optim import Precision, Schedule, build_optimizer
from p2w.train.signals import StopRequest
from p2w.train.step import Stepper, StepResult
from p2w.world import World

Validate = Callable[[int], Iterable[tuple[str, float]]]


class Evaluator(Protocol):
    """Looks at the network between steps; every rank calls it, all see the same numbers."""

    def __call__(self, step: int) -> Iterable[tuple[str, float]]:
        """Yield (name, value) pairs for the log."""


@dataclass
class Outcome:
    """How a call of `fit` ended: `finished`, `stopped early` or `told to stop`, at which step."""

    state: str
    step: int
    why: str = ""


class Trainer:
    """A run in progress. Build it, `resume()`, `fit()`."""

    def __init__(
        self, config: Config, world: World, pretext: Pretext, model: nn.Module, stream: Stream,
        checkpoints: Checkpoints, log: Log, precision: Precision,
    ) -> None:  # fmt: skip
        self.config, self.world, self.pretext, self.model = config, world, pretext, model
        self.stream, self.checkpoints, self.log = stream, checkpoints, log
        network: nn.Module = model
        if config.train.compile:
            network = cast(nn.Module, torch.compile(model))
        if world.size > 1:
            ids = [world.device] if world.device.type == "cuda" else None
            # Strides of a 1x1x1 kernel in channels-last have two names for the same memory, which DDP takes for a copy.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            # Training reads no running statistics: ranks share them where they are used, see _broadcast_buffers.
            # torch 2.13 warns that the argument has another name; 2.11 does not know that name.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
            network = DistributedDataParallel(network, device_ids=ids, broadcast_buffers=False)
        optimizer, self.optimizer_reason = build_optimizer(config.optim, model)
        schedule = Schedule(config.optim, config.train.steps)
        self.stepper = Stepper(config, pretext, network, optimizer, schedule, precision, world.device)
        self.step = 0
        self.kept = -1  # the newest step that a sound checkpoint holds
        self.skipped = 0
        self.validation: float | None = None
        self._settled = world.size < 3  # see Stepper.settle; two ranks add the same two numbers in any order
        self._window = Window()

    def resume(self) -> bool:
        """Take up the newest sound checkpoint; False when there is none."""
        snapshot = self.checkpoints.load_latest()
        found = torch.tensor([-1 if snapshot is None else snapshot.step])
        if (self.world.gather(found) != found).any():
            raise UserError(
                f"{self.checkpoints.folder}: rank {self.world.rank} sees another newest checkpoint than its peers; "
                "the run folder must be one all nodes share"
            )
        if snapshot is None:
            self.log.rewind(-1)  # killed before its first checkpoint, a run begins again
            return False
        self.model.load_state_dict(snapshot.model)
        state = snapshot.state
        self.stepper.optimizer.load_state_dict(state["optimizer"])
        self.stepper.schedule.load_state_dict(state["schedule"])
        self.stepper.scaler.load_state_dict(state["scaler"])
        self.step, self.skipped = snapshot.step, state["skipped"]
        self.kept = self.step
        self.log.rewind(self.step)
        return True

    def fit(self, validate: Validate, look: Validate = lambda step: ()) -> Outcome:
        """Train to the last step, to early stopping, or until told to stop. Leaves a checkpoint of where it ended.

        `look` is called every `train.look_every` steps, except where `validate` is due, which may hold it.
        """
        with StopRequest(self.log.speaks) as stop:
            if self.step == 0:
                self._validate(validate)
            outcome = self._train(validate, look, stop)
            if self.step != self.kept:
                self.save()
            if self.world.any(self.world.is_main and self.step != self.kept):
                raise UserError(
                    f"step {self.step}: could not be saved, the newest checkpoint is older; make room, then repeat the "
                    "command"
                )
        return outcome

    def _train(self, validate: Validate, look: Validate, stop: StopRequest) -> Outcome:
        settings, schedule = self.config.train, self.stepper.schedule
        batches = self.stream.batches(*divmod(self.step, self.stream.steps_per_epoch))
        while self.step < settings.steps:
            if 0 < settings.early_stop <= schedule.bad:
                return Outcome("stopped early", self.step, f"{schedule.bad} validations brought nothing")
            self._one(next(batches))
            told = self.world.any(stop.asked or self.world.orphaned())
            if self.step % settings.validate_every == 0 or self.step == settings.steps:
                self._validate(validate)
            elif settings.look_every and self.step % settings.look_every == 0:
                self._validate(look)
            if told and self.step < settings.steps:
                gone = "torchrun is gone" if self.world.orphaned() else "a signal to another rank"
                return Outcome("told to stop", self.step, stop.name or gone)
            if self.step % settings.checkpoint_every == 0 or self.checkpoints.would_be_best(self.validation):
                self.save()
        return Outcome("finished", self.step)

    def save(self) -> None:
        """Rank 0 writes a checkpoint of this moment."""
        if not self.world.is_main:
            return
        state = {
            "optimizer": self.stepper.optimizer.state_dict(),
            "schedule": self.stepper.schedule.state_dict(),
            "scaler": self.stepper.scaler.state_dict(),
            "skipped": self.skipped,
            "samples_seen": self.step * self.config.data.batch,
        }
        try:
            self.checkpoints.save(Snapshot(self.step, self.model.state_dict(), state, self.validation))
            self.kept = self.step
        except UserError as error:
            self.log.warn(f"{error}; the run goes on with the checkpoints it has")

    def _one(self, batch: Batch) -> None:
        """One step: from wholes to updated weights."""
        if not self._settled:
            self.stepper.settle(self._views(batch))
            self._settled = True
        result = self.stepper.step(self._views(batch), self.step)
        self.step += 1
        self.validation = None
        self._account(result, len(batch.ids))

    def _views(self, batch: Batch) -> Views:
        """What this rank's wholes become at this step, whenever it is asked for."""
        torch.manual_seed(_mix(self.config.train.seed, self.step, self.world.rank))
        return self.pretext.sample(batch.voxels, Keys(self.config.data.seed, batch.epoch, batch.ids))

    def _account(self, result: StepResult, samples: int) -> None:
        self.skipped = 0 if result.applied else self.skipped + 1
        if not result.applied:
            self.log.warn(
                f"step {self.step}: gradient norm {result.grad_norm}, step skipped on all ranks "
                f"({self.skipped} in a row)"
            )
        if self.skipped >= self.config.train.max_skipped:
            raise UserError(
                f"step {self.step}, rank {self.world.rank}: {self.skipped} steps in a row without a finite gradient; "
                "lower --optim.lr, or pass --train.amp fp32"
            )
        window = self._window
        window.add(result.loss, samples)
        every = self.config.train.log_every
        if self.step % every and self.step != self.config.train.steps:
            return
        loss = float(self.world.sum(window.loss / window.steps)) / self.world.size
        seconds = window.seconds()
        rate = window.samples * self.world.size / seconds
        wait = (self.stream.wait_seconds - window.wait_before) / seconds
        record = {
            "train/loss": loss,
            "train/lr": self.stepper.schedule.rate(self.step - 1),
            "train/grad_norm": result.grad_norm,
            "speed/samples_per_s": rate,
            "speed/waiting_share": wait,
            **{f"train/{name}": float(value) for name, value in result.extras.items()},
        }
        self.log.metrics(self.step, record)
        self.log.progress(self.step, loss, rate, wait)
        self._window = Window(self.stream.wait_seconds)

    def _validate(self, validate: Validate) -> None:
        """Run the evaluators, log what they yield, and let the schedule know the loss."""
        before = time.monotonic()
        self._broadcast_buffers()
        self.model.eval()
        with torch.no_grad(), self.stepper.autocast():
            values = dict(validate(self.step))
        self.model.train()
        self._window.pause(time.monotonic() - before)
        if not values:
            return
        self.log.metrics(self.step, values)
        self.validation = values.get("val/loss")
        due = self.step > 0 and self.step % self.config.train.validate_every == 0
        if (
            self.validation is not None and due
        ):  # the last step's extra look would tell a run made longer from a long one
            self.stepper.schedule.observe(self.validation)

    def _broadcast_buffers(self) -> None:
        """Give every rank rank 0's batch-norm statistics: the ones a checkpoint holds, so all validate one network."""
        if self.world.size > 1:
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)


class Window:
    """Sums since the last logged line."""

    def __init__(self, wait_before: float = 0.0) -> None:
        self.loss = torch.zeros(())
        self.steps = self.samples = 0
        self.wait_before = wait_before
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


def _mix(*numbers: int) -> int:
    """Numbers -> a 63-bit seed that differs for every combination met in practice."""
    value = 0x9E3779B97F4A7C15
    for number in numbers:
        value = ((value ^ number) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % (1 << 64)
        value ^= value >> 31
    return value >> 1
