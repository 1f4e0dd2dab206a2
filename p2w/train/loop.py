"""The loop: batch -> views -> step, with checkpoints, evaluators and a log. It knows no method by name.

Position is (epoch, step of the epoch), both derived from the number of steps done; with the weights, the optimizer and
the schedule it is all a run continues from. Torch's own random numbers are reseeded from (seed, step, rank) at every
step, so a pretext or layer that draws from them repeats exactly after a resume.
"""

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from p2w.config import Config
from p2w.errors import SharedError, UserError
from p2w.log import Log
from p2w.pretext.protocol import Pretext, Views
from p2w.rng import SampleKeys
from p2w.stream.stream import Batch, Stream
from p2w.train.budgets import BadSampleBudget, LogWindow, NonfiniteSteps
from p2w.train.checkpoint import AsyncCheckpointer, Checkpoints, Snapshot
from p2w.train.optim import Precision, Schedule, build_optimizer, load_optimizer, optimizer_state
from p2w.train.step import Stepper, StepResult
from p2w.train.stop import EvaluationInterrupted, StopRequest
from p2w.train.watchdog import Watchdog
from p2w.world import World

Validate = Callable[[int], Iterable[tuple[str, float]]]
VOTE_S = 0.25  # between two times that ranks ask each other whether one was told to stop
MOST_STEPS_A_VOTE = 100


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
        checkpoints: Checkpoints, log: Log, precision: Precision, watchdog: Watchdog | None = None,
        key: Callable[[int], str] = str,
    ) -> None:  # fmt: skip
        self.watchdog = watchdog or Watchdog(world)  # which watches once it is entered
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
        self.saver = AsyncCheckpointer(checkpoints, config.train, log.warn)
        self.step = 0
        self.evaluation_pending = True  # a look at this step: before the first one there is one
        self.validation: float | None = None
        lag = int(world.device.type == "cuda" and self.stepper.skips_on_device)
        self.skips = NonfiniteSteps(config.train.max_nonfinite, world, key, log, lag)
        self._plan_graph()
        self.bad = BadSampleBudget(config.data, world, stream)
        self._stop = StopRequest()
        self._until_vote, self._voted, self._voted_at = 1, time.monotonic(), 0
        self._ddp_warmed_up = (
            world.size < 3
        )  # see Stepper.warm_up_ddp; two ranks add the same two numbers in any order
        self._window = LogWindow()

    def resume(self) -> bool:
        """Take up the newest sound checkpoint; False when there is none."""
        snapshot = self.checkpoints.load_latest()
        found = torch.tensor([-1 if snapshot is None else snapshot.step])
        if (self.world.gather(found) != found).any():
            raise UserError(
                f"{self.checkpoints.folder}: rank {self.world.rank} sees another newest checkpoint than its peers; "
                "the run folder must be one all nodes share"
            )
        there = self.checkpoints.steps()
        if (
            snapshot is None and len(there) > 1
        ):  # one alone, damaged, costs what a kill before it would have cost
            raise SharedError(
                f"{self.checkpoints.folder}: {len(there)} checkpoints and not one that can be read: look at the disk first; "
                "to begin this run again, move that folder away"
            )
        if self.world.is_main:
            self.checkpoints.continue_from(snapshot)
        if snapshot is None:
            self.log.rewind(-1)  # killed before its first checkpoint, a run begins again
            return False
        self.model.load_state_dict(snapshot.model)
        state = snapshot.state
        load_optimizer(self.stepper.optimizer, state["optimizer"])
        self.stepper.schedule.load_state_dict(state["schedule"])
        self.stepper.scaler.load_state_dict(state["scaler"])
        self.step, self.skips.in_a_row, self.evaluation_pending = (
            snapshot.step,
            state["skipped"],
            state.get("owed", False),
        )
        self.saver.kept = (self.step, self.evaluation_pending)
        self.bad.load(state.get("bad_samples", self.bad.state()))
        self.log.rewind(self.step, evaluated=not self.evaluation_pending)
        return True

    def fit(self, validate: Validate, look: Validate = lambda step: ()) -> Outcome:
        """Train to the last step, to early stopping, or until told to stop. Leaves a checkpoint of where it ended.

        `look` is called every `train.probe_every` steps, except where `validate` is due, which may hold it.
        """
        with StopRequest(self.log.speaks, last_words=self.world.size > 1) as self._stop:
            try:
                outcome = self._train(validate, look)
                self.watchdog.at(self.step, "saving")
                self.saver.wait()
                if self._unsaved():
                    self.save()
            finally:
                self.saver.wait(AsyncCheckpointer.LEAVING_S if sys.exc_info()[0] else None)
            if self.world.any(self.world.is_main and self._unsaved()):
                raise UserError(
                    f"step {self.step}: could not be saved, the newest checkpoint is older; make room, then repeat the "
                    "command"
                )
        return outcome

    def _train(self, validate: Validate, look: Validate) -> Outcome:
        settings, schedule = self.config.train, self.stepper.schedule
        batches = self.stream.batches(*divmod(self.step, self.stream.steps_per_epoch))
        stopping = False
        while True:
            if self.evaluation_pending or stopping or self.step >= settings.steps:
                self.skips.read_all()
            if self.evaluation_pending and not stopping:
                stopping = not self._validate(validate if self._validation_due() else look)
            if stopping and (self.evaluation_pending or self.step < settings.steps):
                gone = "torchrun is gone" if self.world.orphaned() else "a signal to another rank"
                return Outcome("told to stop", self.step, self._stop.name or gone)
            self.saver.poll()
            if self._unsaved() and self.saver.due(self.step, self.validation):
                self.save()
            if self.step >= settings.steps:
                return Outcome("finished", self.step)
            if 0 < settings.early_stop <= schedule.bad:
                return Outcome("stopped early", self.step, f"{schedule.bad} validations brought nothing")
            self.watchdog.at(self.step, "reading data")
            self._train_step(next(batches))
            stopping = self._vote()

    def stop_requested(self) -> bool:
        """Whether any rank was told to stop; all ranks ask together and get the same answer."""
        self.watchdog.count()
        return self.world.any(self._stop.asked or self.world.orphaned())

    def _vote(self) -> bool:
        """`told`, asked between steps as often as every VOTE_S seconds: a sum over ranks at each step would cost steps.

        All ranks count the same steps to the next vote, since each vote brings them the mean of their seconds a step.
        """
        if self.world.size == 1:
            return self._stop.asked or self.world.orphaned()
        self._until_vote -= 1
        if self._until_vote > 0:
            return False
        now = time.monotonic()
        pace = (now - self._voted) / max(1, self.step - self._voted_at)
        asked = float(self._stop.asked or self.world.orphaned())
        asked, pace = self.world.sum(
            torch.tensor([asked, pace / self.world.size], dtype=torch.float64)
        ).tolist()
        self._until_vote = max(1, min(MOST_STEPS_A_VOTE, int(VOTE_S / max(pace, 1e-9))))
        self._voted, self._voted_at = now, self.step
        return asked > 0

    def _plan_graph(self) -> None:
        """Have steps run as a CUDA graph where that is possible. Raises UserError where one is asked for in vain."""
        wanted = self.config.train.cuda_graph
        if wanted == "off":
            return
        hindrances = {
            "the device is no GPU": self.world.device.type != "cuda",
            "the run has several ranks": self.world.size > 1,
            "train.compile makes graphs of its own": self.config.train.compile,
            "only torch's fused Adam and AdamW can be captured": not (
                self.config.optim.fused == "torch" and self.config.optim.name in ("adam", "adamw")
            ),
            f"pretext {self.config.pretext.name} keeps a state on the host": not getattr(
                self.pretext, "capturable", False
            ),
        }
        why = next((text for text, hinders in hindrances.items() if hinders), "")
        if why and wanted == "on":
            raise UserError(f"train.cuda_graph=on: {why}; pass --train.cuda-graph auto")
        if not why:
            self.stepper.use_graph(self.log.line, forced=wanted == "on")

    def _unsaved(self) -> bool:
        """Whether the newest durable checkpoint holds less than this moment. Rank 0 knows."""
        return self.saver.kept != (self.step, self.evaluation_pending)

    def save(self) -> None:
        """Rank 0 has a checkpoint of this moment written; `saver.wait()` makes sure of it."""
        if not self.world.is_main:
            return
        self.watchdog.at(self.step, "saving")
        state = {
            "optimizer": optimizer_state(self.stepper.optimizer),
            "schedule": self.stepper.schedule.state_dict(),
            "scaler": self.stepper.scaler.state_dict(),
            "skipped": self.skips.in_a_row_now(),
            "bad_samples": self.bad.state(),
            "samples_seen": self.step * self.config.data.batch,
            "owed": self.evaluation_pending,  # told to stop, a run leaves without the look that is due
        }
        self.saver.save(Snapshot(self.step, self.model.state_dict(), state, self.validation))

    def _train_step(self, batch: Batch) -> None:
        """One step: from wholes to updated weights."""
        if not self._ddp_warmed_up:
            self.stepper.warm_up_ddp(self._views(batch))
            self._ddp_warmed_up = True
        views = self._views(batch)
        self.watchdog.at(self.step, "computing")
        result = self.stepper.step(views, self.step)
        self.step += 1
        every = self.config.train.probe_every
        self.evaluation_pending = self._validation_due() or (every > 0 and self.step % every == 0)
        self.validation = None
        self.bad.count(batch, self.step)
        self.skips.add(result, batch.ids, self.step)
        self._account(result, len(batch.ids))

    def _validation_due(self) -> bool:
        """Whether the look at this step is a validation."""
        return self.step % self.config.train.validate_every == 0 or self.step == self.config.train.steps

    def _views(self, batch: Batch) -> Views:
        """What this rank's wholes become at this step, whenever it is asked for."""
        torch.manual_seed(_mix(self.config.train.seed, self.step, self.world.rank))
        return self.pretext.sample(batch.voxels, SampleKeys(self.config.data.seed, batch.epoch, batch.ids))

    def _account(self, result: StepResult, samples: int) -> None:
        """Add a step to the window, and log the window where a line is due."""
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
            "speed/checkpoint_stall_s": self.saver.stall_s - window.stall_before,
            **self.bad.metrics(),
            **{f"train/{name}": float(value) for name, value in result.extras.items()},
        }
        self.log.metrics(self.step, record)
        self.log.progress(self.step, loss, rate, wait)
        self._window = LogWindow(self.stream.wait_seconds, self.saver.stall_s)

    def _validate(self, validate: Validate) -> bool:
        """Run the evaluators, log what they yield, and let the schedule know the loss. False: told to stop meanwhile."""
        before = time.monotonic()
        self.watchdog.at(self.step, "validating")
        self._broadcast_buffers()
        self.model.eval()
        values: dict[str, float] = {}
        with contextlib.suppress(EvaluationInterrupted), torch.no_grad(), self.stepper.autocast():
            values = dict(validate(self.step))
            self.evaluation_pending = False
        self.model.train()
        self._window.pause(time.monotonic() - before)
        if not values:
            return not self.evaluation_pending
        self.log.metrics(self.step, values)
        self.validation = values.get("val/loss")
        due = self.step > 0 and self.step % self.config.train.validate_every == 0
        if (
            self.validation is not None and due
        ):  # the last step's extra look would tell a run made longer from a long one
            self.stepper.schedule.observe(self.validation)
        return True

    def _broadcast_buffers(self) -> None:
        """Give every rank rank 0's batch-norm statistics: the ones a checkpoint holds, so all validate one network."""
        if self.world.size > 1:
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)


def _mix(*numbers: int) -> int:
    """Numbers -> a 63-bit seed that differs for every combination met in practice."""
    value = 0x9E3779B97F4A7C15
    for number in numbers:
        value = ((value ^ number) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % (1 << 64)
        value ^= value >> 31
    return value >> 1
