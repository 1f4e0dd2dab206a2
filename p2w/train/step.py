"""One optimizer step: accumulate, average over ranks (DDP), clip, and skip when the gradient is not finite.

Nothing here waits for a GPU: whether the gradient is finite is decided on the device, as torch's loss scaler does it, and
the host reads the answer when it asks the `StepResult` for it.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from p2w.config import Config
from p2w.errors import UserError
from p2w.pretext.protocol import Pretext, Views, has_after_step
from p2w.train.graph import Outputs, StepGraph, copy_all
from p2w.train.optim import Precision, Schedule


class Copied:
    """A scalar on its way from the device to the host: made without waiting, read when it is needed."""

    def __init__(self, scalar: Tensor) -> None:
        """`scalar` () of any floating type; its memory may be used again at once."""
        self._arrived: torch.cuda.Event | None = None
        if scalar.is_cuda:
            self._host = torch.empty((), dtype=scalar.dtype, pin_memory=True)
            self._host.copy_(scalar.detach(), non_blocking=True)
            self._arrived = torch.cuda.current_stream(scalar.device).record_event()
        else:
            self._host = scalar.detach().clone()

    def value(self) -> float:
        """The number; waits until it is there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._host)


@dataclass
class StepResult:
    """`loss`: mean over this rank's samples, on the device. `norm`: of the gradient, on its way to the host."""

    loss: Tensor
    extras: dict[str, Tensor]
    norm: Copied

    @property
    def grad_norm(self) -> float:
        """Norm of the whole gradient before clipping; on a GPU, waits until the step has got so far."""
        return self.norm.value()

    @property
    def applied(self) -> bool:
        """False when the step was skipped, since its gradient was not finite."""
        return math.isfinite(self.grad_norm)


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
        model: nn.Module | None = None,
    ) -> None:
        """`model`: the network itself, where `network` is wrapped by DDP or compiled; for what follows a step."""
        self.model = network if model is None else model
        self._step, self._after_step = 0, has_after_step(pretext)
        self.config, self.pretext, self.network = config, pretext, network
        self.optimizer, self.schedule, self.precision, self.device = optimizer, schedule, precision, device
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        frozen = [p for p in network.parameters() if not p.requires_grad]  # a momentum encoder's
        self.buffers = [*network.buffers(), *frozen]
        self._before = [torch.empty_like(buffer) for buffer in self.buffers]
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision.name == "fp16")
        # Torch's fused optimizers look at a flag on the device, and leave everything as it is where it is set.
        self.skips_on_device = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        self.graph: StepGraph | None = None

    def autocast(self) -> torch.autocast:
        """The context of the network's arithmetic; off for fp32 and tf32."""
        dtype = self.precision.dtype
        return torch.autocast(self.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    def use_graph(self, say: Callable[[str], None], forced: bool, exact: bool = False) -> None:
        """Replay the step as one CUDA graph from the fourth step on: where that is faster, or always if `forced`.

        For a fused Adam on one CUDA device. The learning rate becomes a tensor, which a graph reads anew at each replay.
        """
        for group in self.optimizer.param_groups:
            group["capturable"], group["lr"] = True, torch.zeros((), device=self.device)
        self.optimizer._warned_capturable_if_run_uncaptured = True
        self.graph = StepGraph(self._whole, self._state, say, forced, exact)

    def step(self, views: Views, step: int) -> StepResult:
        """Forward, backward and update for this rank's share of global step `step`."""
        passes = self.config.optim.accumulate
        if len(views) % passes:
            raise UserError(
                f"optim.accumulate={passes}: does not divide a rank's {len(views)} samples; pass a divisor"
            )
        self._step, rate_of_all = step, self.schedule.rate(step)
        for group in self.optimizer.param_groups:
            rate = rate_of_all * group.get("lr_factor", 1.0)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        loss, extras, norm = self.graph(views) if self.graph else self._whole(views)
        return StepResult(loss, extras, Copied(norm))

    def warm_up_ddp(self, views: Views) -> None:
        """A throw-away pass before the first step, of a fresh start and of a resume alike.

        DDP lays its buckets out anew after the first backward pass, and three ranks or more add numbers in an order
        that depends on the place in a bucket: without this, a resumed run's first step differs in the last bits.
        """
        part = views.split(self.config.optim.accumulate)[0]  # all of them at once may not fit
        copy_all(self._before, self.buffers)
        with self.autocast():
            output = self.network(part.input, *part.extra_inputs)
        self.pretext.loss(output, part)[0].backward()
        self.optimizer.zero_grad(set_to_none=True)
        copy_all(self.buffers, self._before)

    def _whole(self, views: Views) -> Outputs:
        """All of a step that happens on the device."""
        passes = self.config.optim.accumulate
        self.optimizer.zero_grad(set_to_none=True)
        copy_all(self._before, self.buffers)
        total = torch.zeros((), device=self.device)
        extras: dict[str, Tensor] = {}
        for index, part in enumerate(views.split(passes)):
            with self._no_sync(index < passes - 1):
                with self.autocast():
                    output = self.network(part.input, *part.extra_inputs)
                loss, extras = self.pretext.loss(output, part)
                self.scaler.scale(loss / passes).backward()
            total += loss.detach() / passes
        return total, extras, self._update()

    def _update(self) -> Tensor:
        """Clip and apply the gradient, or leave everything as it was; returns the norm."""
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.optim.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.optim.clip_norm, norm)
        if self.skips_on_device:
            self._apply_unless(torch.isfinite(norm).logical_not_())
        elif math.isfinite(float(norm)):
            self.optimizer.step()
            self._update_after_step()
        else:
            copy_all(self.buffers, self._before)
        self.scaler.update()
        return norm

    def _apply_unless(self, bad: Tensor) -> None:
        """Update the weights except where `bad` (a bool on the device) holds; then nothing keeps a trace of the step.

        Batch norm has by then averaged in what was not finite, and would never lose it again.
        """
        optimizer: torch.optim.Optimizer | torch.optim.Adam = self.optimizer
        optimizer.grad_scale, optimizer.found_inf = None, bad.float()  # type: ignore[union-attr]
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[union-attr]
        self._update_after_step()  # which the lines below undo in a skipped step: it changes nothing but `buffers`
        if self.device.type == "cpu":
            if bad:
                copy_all(self.buffers, self._before)
        else:
            select_all(bad, self._before, self.buffers)

    def _update_after_step(self) -> None:
        """Have the pretext update what no gradient trains."""
        if self._after_step:
            with torch.no_grad():
                self.pretext.after_step(self.model, self._step)

    def _state(self) -> list[Tensor]:
        """Every tensor that a step changes."""
        # Torch makes the scaler's two at its first use, and none at all where it is off.
        scaler = [getattr(self.scaler, name, None) for name in ("_scale", "_growth_tracker")]
        kept = [value for state in self.optimizer.state.values() for value in state.values()]
        return [
            value for value in (*self.parameters, *self.buffers, *kept, *scaler) if isinstance(value, Tensor)
        ]

    def _no_sync(self, skip: bool) -> contextlib.AbstractContextManager[None]:
        """DDP averages gradients in the last pass only."""
        no_sync = getattr(self.network, "no_sync", None)
        return no_sync() if skip and no_sync is not None else contextlib.nullcontext()


@torch.no_grad()
def select_all(condition: Tensor, chosen: list[Tensor], into: list[Tensor]) -> None:
    """Where `condition` (bool, a scalar on the device) holds, `into` becomes `chosen`; without a wait, and also from NaN."""
    for kind in dict.fromkeys(tensor.dtype for tensor in into):
        old = [tensor for tensor, like in zip(chosen, into, strict=True) if like.dtype == kind]
        new = [tensor for tensor in into if tensor.dtype == kind]
        both = [torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (old, new)]
        selected: Tensor = torch.where(condition, both[0], both[1])
        pieces = selected.split([tensor.numel() for tensor in new])
        torch._foreach_copy_(new, [piece.view(like.shape) for piece, like in zip(pieces, new, strict=True)])
