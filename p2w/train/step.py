"""One optimizer step: accumulate, average over ranks (DDP), clip, and skip when the gradient is not finite."""

import contextlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from p2w.config import Config
from p2w.errors import UserError
from p2w.pretext.protocol import Pretext, Views
from p2w.train.optim import Precision, Schedule


@dataclass
class StepResult:
    """`loss`: mean over this rank's samples, on the device. `applied`: False when the step was skipped."""

    loss: Tensor
    extras: dict[str, Tensor]
    grad_norm: float
    applied: bool


class Stepper:
    """Applies `pretext.loss` to the network. Gradients are the same on all ranks, so all skip together."""

    def __init__(
        self,
        config: Config,
        pretext: Pretext,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        precision: Precision,
        device: torch.device,
    ) -> None:
        self.config, self.pretext, self.network = config, pretext, network
        self.optimizer, self.schedule, self.precision, self.device = optimizer, schedule, precision, device
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        frozen = [p for p in network.parameters() if not p.requires_grad]  # a momentum encoder's
        self.buffers = [*network.buffers(), *frozen]
        self._before = [torch.empty_like(buffer) for buffer in self.buffers]
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision.name == "fp16")

    def autocast(self) -> torch.autocast:
        """The context of the network's arithmetic; off for fp32."""
        dtype = self.precision.dtype
        return torch.autocast(self.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    def step(self, views: Views, step: int) -> StepResult:
        """Forward, backward and update for this rank's share of global step `step`."""
        passes = self.config.optim.accumulate
        if len(views) % passes:
            raise UserError(
                f"optim.accumulate={passes}: does not divide a rank's {len(views)} samples; pass a divisor"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(step)
        self.optimizer.zero_grad(set_to_none=True)
        _copy(self._before, self.buffers)
        total = torch.zeros((), device=self.device)
        extras: dict[str, Tensor] = {}
        for index, part in enumerate(views.split(passes)):
            with self._no_sync(index < passes - 1):
                with self.autocast():
                    output = self.network(part.input, *part.beside)
                loss, extras = self.pretext.loss(output, part)
                self.scaler.scale(loss / passes).backward()
            total += loss.detach() / passes
        return self._update(total, extras)

    def settle(self, views: Views) -> None:
        """A throw-away pass before the first step, of a fresh start and of a resume alike.

        DDP lays its buckets out anew after the first backward pass, and three ranks or more add numbers in an order
        that depends on the place in a bucket: without this, a resumed run's first step differs in the last bits.
        """
        part = views.split(self.config.optim.accumulate)[0]  # all of them at once may not fit
        _copy(self._before, self.buffers)
        with self.autocast():
            output = self.network(part.input, *part.beside)
        self.pretext.loss(output, part)[0].backward()
        self.optimizer.zero_grad(set_to_none=True)
        _copy(self.buffers, self._before)

    def _update(self, loss: Tensor, extras: dict[str, Tensor]) -> StepResult:
        self.scaler.unscale_(self.optimizer)
        limit = self.config.optim.clip_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        applied = math.isfinite(norm)
        if applied:
            self.scaler.step(self.optimizer)
        else:  # batch norm has already averaged in what was not finite, and would never lose it again
            _copy(self.buffers, self._before)
        self.scaler.update()
        return StepResult(loss, extras, norm, applied)

    def _no_sync(self, skip: bool) -> contextlib.AbstractContextManager[None]:
        """DDP averages gradients in the last pass only."""
        no_sync = getattr(self.network, "no_sync", None)
        return no_sync() if skip and no_sync is not None else contextlib.nullcontext()


def _copy(into: list[Tensor], source: list[Tensor]) -> None:
    """Copy all tensors, in one launch for all of a type: given mixed types, torch makes a launch of each."""
    for kind in {tensor.dtype for tensor in into}:
        torch._foreach_copy_(
            [tensor for tensor in into if tensor.dtype == kind],
            [tensor for tensor in source if tensor.dtype == kind],
        )
