"""The training loop: batch -> views -> step, with checkpoints, evaluation and a log. It knows no pretext by name.

The position in the data is (epoch, step of the epoch), and both follow from the number of steps done. With the weights,
the optimizer and the schedule, that is all a run continues from. Torch's random state is seeded from (seed, step, rank)
at every step, so a pretext or layer that uses it repeats exactly after a resume.
"""

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from p2w.config import Config
from p2w.errors import SharedError, UserError
from p2w.log import Log
from p2w.pretext.protocol import Pretext, Views, has_after_step
from p2w.rng import SampleKeys
from p2w.stream.stream import Batch, Stream
from p2w.train.budgets import BadSampleBudget, Collapse, IdAudit, LogWindow, NonfiniteSteps
from p2w.train.checkpoint import AsyncCheckpointer, Checkpoints, Snapshot
from p2w.train.optim import Precision, Schedule, build_optimizer, load_optimizer, optimizer_state
from p2w.train.step import Stepper, StepResult
from p2w.train.watchdog import STOP_POLL_S, EvaluationInterrupted, StopRequest, Watchdog
from p2w.world import World

Evaluate = Callable[[int], Iterable[tuple[str, float]]]
"""Measures the network at a step and yields (name, value) for the log. A collective: all ranks get the same values."""
MAX_STEPS_A_POLL = 100


@dataclass
class Outcome:
    """How `fit` ended (`finished`, `stopped early` or `told to stop`), at which step and why."""

    state: str
    step: int
    why: str = ""


class Trainer:
    """Trains a network with a pretext. Build it, then call `resume()` and `fit()`."""

    def __init__(
        self, config: Config, world: World, pretext: Pretext, model: nn.Module, stream: Stream,
        checkpoints: Checkpoints, log: Log, precision: Precision, watchdog: Watchdog | None = None,
        key: Callable[[int], str] = str,
    ) -> None:  # fmt: skip
        self.watchdog = watchdog or Watchdog(world)  # starts to watch when its `with` block is entered
        self.config, self.world, self.pretext, self.model = config, world, pretext, model
        self.stream, self.checkpoints, self.log = stream, checkpoints, log
        network: nn.Module = model
        if config.train.compile:
            network = cast(nn.Module, torch.compile(model))
        if world.size > 1:
            ids = [world.device] if world.device.type == "cuda" else None
            # A 1x1x1 kernel in channels-last has two equivalent strides; DDP warns of a copy that it does not make.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            # Training does not read running statistics: _broadcast_buffers shares them before an evaluation.
            # torch 2.13 warns that the argument has a new name, which torch 2.11 does not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
            network = DistributedDataParallel(network, device_ids=ids, broadcast_buffers=False)
        groups = pretext.parameter_groups(model)
        optimizer, self.optimizer_reason = build_optimizer(config.optim, model, groups)
        schedule = Schedule(config.optim, config.train.steps)
        self.stepper = Stepper(config, pretext, network, optimizer, schedule, precision, world.device, model)
        self.checkpointer = AsyncCheckpointer(checkpoints, config.train, log.warn)
        self.step = 0
        self.evaluation_pending = True  # an evaluation at this step is still to be done; step 0 has one
        self.validation: float | None = None
        lag = int(world.device.type == "cuda" and self.stepper.skips_on_device)
        self.skips = NonfiniteSteps(config.train.max_nonfinite, world, key, log, lag)
        self._plan_graph()
        self.bad = BadSampleBudget(config.data, world, stream)
        self.audit = IdAudit(stream.sampler, world, config.data.audit_ids)
        self._stop = StopRequest()
        self._steps_to_poll, self._polled_at, self._polled_step = 1, time.monotonic(), self.step
        # See Stepper.warm_up_ddp. With two ranks, a sum has the same bits in any order.
        self._ddp_warmed_up = world.size < 3
        self.window = LogWindow()
        self.collapse = Collapse(log)

    def resume(self) -> bool:
        """Load the newest intact checkpoint; False when there is none."""
        snapshot, agreed = self.checkpoints.load_on_all_ranks(self.world)
        if not agreed:
            raise UserError(
                f"{self.checkpoints.folder}: rank {self.world.rank} sees another newest checkpoint than its peers; "
                "the run folder must be one all nodes share"
            )
        steps = self.checkpoints.steps()
        # A single damaged checkpoint costs no more than a kill before it was written: the run begins again.
        if snapshot is None and len(steps) > 1:
            raise SharedError(
                f"{self.checkpoints.folder}: {len(steps)} checkpoints and not one that can be read: check the disk first; "
                "to begin this run again, move that folder away"
            )
        if self.world.is_main:
            self.checkpoints.continue_from(snapshot)
        if snapshot is None:
            self.log.rewind(-1)  # a run that was killed before its first checkpoint begins again
            return False
        try:
            self.model.load_state_dict(snapshot.model)
        except RuntimeError as error:  # config.json was edited, or this version of p2w has another network
            raise SharedError(
                f"{self.checkpoints.path(snapshot.step)}: its weights do not fit the network that config.json describes "
                f"({str(error).splitlines()[-1].strip()[:160]}); put back the settings that the run began with"
            ) from error
        state = snapshot.state
        load_optimizer(self.stepper.optimizer, state["optimizer"])
        self.stepper.schedule.load_state_dict(state["schedule"])
        self.stepper.scaler.load_state_dict(state["scaler"])
        self.step, self.skips.in_a_row, self.evaluation_pending = (
            snapshot.step,
            state["skipped"],
            state.get("owed", False),
        )
        self.checkpointer.durable = (self.step, self.evaluation_pending)
        self.bad.load(state.get("bad_samples", self.bad.state()))
        self.audit.continue_from(self.step, state.get("ids"))
        self.log.rewind(self.step, evaluated=not self.evaluation_pending)
        return True

    def fit(self, validate: Evaluate, probe: Evaluate = lambda step: ()) -> Outcome:
        """Train until the last step, early stopping or a stop request. Saves a checkpoint of where it ended.

        `validate` is called every `train.validate_every` steps and at the last one; `probe` every `train.probe_every`
        steps, except where `validate` is called, which may include it.
        """
        with StopRequest(self.log.speaks, ignore_after_error=self.world.size > 1) as self._stop:
            try:
                outcome = self._train(validate, probe)
                self.audit.check(int(self.world.sum(torch.tensor([self.audit.take()]))), self.step)
                self.watchdog.at(self.step, "saving")
                self.checkpointer.wait()
                if self._unsaved():
                    self.save()
            finally:
                self.checkpointer.wait(AsyncCheckpointer.LEAVING_S if sys.exc_info()[0] else None)
            if self.world.any(self.world.is_main and self._unsaved()):
                raise UserError(
                    f"step {self.step}: could not be saved, the newest checkpoint is older; mend what the warning above "
                    "names, then repeat the command"
                )
        return outcome

    def _train(self, validate: Evaluate, probe: Evaluate) -> Outcome:
        settings, schedule = self.config.train, self.stepper.schedule
        batches = self.stream.batches(*divmod(self.step, self.stream.steps_per_epoch))
        # From here, not from step 0: the steps that a resumed run did before it was stopped took none of this time.
        self._steps_to_poll, self._polled_at, self._polled_step = 1, time.monotonic(), self.step
        stopping = False
        while True:
            if self.evaluation_pending or stopping or self.step >= settings.steps:
                self.skips.read_all()
            if self.evaluation_pending and not stopping:
                stopping = not self._evaluate(validate if self._validation_due() else probe)
            if stopping and (self.evaluation_pending or self.step < settings.steps):
                gone = "torchrun is gone" if self.world.orphaned() else "a signal to another rank"
                return Outcome("told to stop", self.step, self._stop.name or gone)
            self.checkpointer.poll()
            if self._unsaved() and self.checkpointer.should_save(self.step, self.validation):
                self.save()
            if self.step >= settings.steps:
                return Outcome("finished", self.step, self.collapse.why())
            if 0 < settings.early_stop <= schedule.bad:
                why = f"{schedule.bad} validations brought nothing"
                return Outcome(
                    "stopped early", self.step, "; ".join(filter(None, (why, self.collapse.why())))
                )
            self.watchdog.at(self.step, "reading data")
            self.train_step(next(batches))
            stopping = self._poll_stop_request()

    def stop_requested(self) -> bool:
        """Whether any rank has a stop request. A collective: all ranks get the same answer."""
        self.watchdog.count()
        return self.world.any(self._stop.requested or self.world.orphaned())

    def _poll_stop_request(self) -> bool:
        """`stop_requested` between steps, at most every STOP_POLL_S seconds: an all-reduce at every step takes too long.

        Each poll also averages the ranks' seconds a step, so that all ranks count the same steps to the next poll.
        """
        if self.world.size == 1:
            self.audit.check(self.audit.take(), self.step)
            return self._stop.requested or self.world.orphaned()
        self._steps_to_poll -= 1
        if self._steps_to_poll > 0:
            return False
        now = time.monotonic()
        pace = (now - self._polled_at) / max(1, self.step - self._polled_step)
        requested = self._stop.requested or self.world.orphaned()
        numbers = [int(requested), round(1e9 * pace / self.world.size), self.audit.take()]
        requests, nanoseconds, audited = self.world.sum(torch.tensor(numbers)).tolist()
        self.audit.check(audited, self.step)
        self._steps_to_poll = max(1, min(MAX_STEPS_A_POLL, int(STOP_POLL_S / max(1e-9 * nanoseconds, 1e-9))))
        self._polled_at, self._polled_step = now, self.step
        return bool(requests > 0)

    def _plan_graph(self) -> None:
        """Let steps run as a CUDA graph where that is possible. Raises UserError for `train.cuda_graph=on` where not."""
        wanted = self.config.train.cuda_graph
        if wanted == "off":
            return
        optim, name = self.config.optim, self.config.pretext.name
        hindrances = {
            "the device is no GPU": self.world.device.type != "cuda",
            "the run has several ranks": self.world.size > 1,
            "train.compile makes graphs of its own": self.config.train.compile,
            "only torch's fused Adam and AdamW can be captured": optim.fused != "torch"
            or optim.name not in ("adam", "adamw"),
            f"pretext {name} keeps a state on the host": not self.pretext.capturable,
            f"pretext {name} has work to do after each step": has_after_step(self.pretext),
        }
        why = next((text for text, hinders in hindrances.items() if hinders), "")
        if why and wanted == "on":
            raise UserError(f"train.cuda_graph=on: {why}; pass --train.cuda-graph auto")
        if not why:
            self.stepper.use_graph(self.log.line, wanted == "on", exact=self.config.train.deterministic)

    def _unsaved(self) -> bool:
        """Whether the newest durable checkpoint is older than the current state; rank 0's answer counts."""
        return self.checkpointer.durable != (self.step, self.evaluation_pending)

    def save(self) -> None:
        """Rank 0 starts to write a checkpoint of the current state; `checkpointer.wait()` waits until it is on disk."""
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
            "ids": self.audit.last(self.step),
            "owed": self.evaluation_pending,  # a run that must stop leaves before this step's evaluation
        }
        self.checkpointer.save(Snapshot(self.step, self.model.state_dict(), state, self.validation))

    def train_step(self, batch: Batch) -> None:
        """One step, from the voxels of a batch to updated weights and the log."""
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
        self.audit.add(batch)
        self.skips.add(result, batch.ids, self.step)
        self._log_step(result, len(batch.ids))

    def _validation_due(self) -> bool:
        """Whether the evaluation at this step is a validation."""
        return self.step % self.config.train.validate_every == 0 or self.step == self.config.train.steps

    def _views(self, batch: Batch) -> Views:
        """The network's inputs and targets from this rank's batch, the same for every call at this step."""
        torch.manual_seed(_mix(self.config.train.seed, self.step, self.world.rank))
        keys = SampleKeys(self.config.data.seed, batch.epoch, batch.ids, batch.real)
        return self.pretext.sample(batch.voxels, keys, self.step)

    def _log_step(self, result: StepResult, samples: int) -> None:
        """Add a step to the window; every `train.log_every` steps, log the window's means and begin a new one."""
        window = self.window
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
            "speed/checkpoint_stall_s": self.checkpointer.stall_s - window.stall_before,
            **self.bad.metrics(),
            **{f"train/{name}": float(value) for name, value in result.extras.items()},
        }
        self.log.metrics(self.step, record)
        self.collapse.look(result.grad_norm, self.step)
        self.log.progress(self.step, loss, rate, wait)
        self.window = LogWindow(self.stream.wait_seconds, self.checkpointer.stall_s)

    def _evaluate(self, evaluate: Evaluate) -> bool:
        """Log what `evaluate` yields and give the schedule the validation loss. False when a stop request interrupted it."""
        before = time.monotonic()
        self.watchdog.at(self.step, "validating")
        self._broadcast_buffers()
        self.model.eval()
        values: dict[str, float] = {}
        with contextlib.suppress(EvaluationInterrupted), torch.no_grad(), self.stepper.autocast():
            values = dict(evaluate(self.step))
            self.evaluation_pending = False
        self.model.train()
        self.window.pause(time.monotonic() - before)
        if not values:
            return not self.evaluation_pending
        self.log.metrics(self.step, values)
        self.validation = values.get("val/loss")
        # The extra validation at the last step does not count: a run made longer later would else differ from a long one.
        regular = self.step > 0 and self.step % self.config.train.validate_every == 0
        if self.validation is not None and regular:
            self.stepper.schedule.observe(self.validation)
        return True

    def _broadcast_buffers(self) -> None:
        """Give every rank rank 0's batch-norm statistics, which checkpoints contain: all ranks evaluate one network."""
        if self.world.size > 1:
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)


def _mix(*numbers: int) -> int:
    """A 63-bit seed from numbers; in practice it differs for every combination."""
    value = 0x9E3779B97F4A7C15
    for number in numbers:
        value = ((value ^ number) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % (1 << 64)
        value ^= value >> 31
    return value >> 1
