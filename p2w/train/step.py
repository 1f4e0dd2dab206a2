"""One optimizer step: accumulate gradients, average them over ranks (DDP), clip; skip the update if they are not finite.

Nothing here waits for a GPU: the device itself decides whether the gradient is finite, as with torch's GradScaler, and the
host reads the result only when it asks the `StepResult` for it.

As one CUDA graph (`StepGraph`), a step is one launch by the host instead of hundreds, so that the GPU does not wait for it.
The first steps run eagerly, while libraries initialise. Then the step is captured. Unless the graph is forced, it is
compared with eager steps, and state is restored afterwards: the graph is used only if it is faster and two replays give
the same bits.
"""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from p2w.config import Config
from p2w.errors import UserError, first_line
from p2w.pretext.protocol import Pretext, Views, has_after_step
from p2w.train.optim import Precision, Schedule

Outputs = tuple[Tensor, dict[str, Tensor], Tensor]  # loss, further scalars, gradient norm; all on the device
WARM_UP_STEPS = 3
ROUNDS = 5  # steps that are timed, for the graph and for eager steps


class HostScalar:
    """A scalar that is copied from the device to the host asynchronously; `value` waits for the copy."""

    def __init__(self, scalar: Tensor) -> None:
        """Start to copy `scalar` () of any floating type; its memory may be used again at once."""
        self._copied: torch.cuda.Event | None = None
        if scalar.is_cuda:
            self._host = torch.empty((), dtype=scalar.dtype, pin_memory=True)
            self._host.copy_(scalar.detach(), non_blocking=True)
            self._copied = torch.cuda.current_stream(scalar.device).record_event()
        else:
            self._host = scalar.detach().clone()

    def value(self) -> float:
        """The number; waits until it has been copied."""
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._host)


@dataclass
class StepResult:
    """`loss` () is the mean over this rank's samples, on the device; `extras` are further scalars of the pretext."""

    loss: Tensor
    extras: dict[str, Tensor]
    norm: HostScalar

    @property
    def grad_norm(self) -> float:
        """Norm of the gradient of all weights before clipping; on a GPU, this waits until the step has computed it."""
        return self.norm.value()

    @property
    def applied(self) -> bool:
        """False when the step was skipped because its gradient was not finite."""
        return math.isfinite(self.grad_norm)


class Stepper:
    """Takes optimizer steps on `pretext.loss`. Gradients are the same on all ranks, so all ranks skip the same steps."""

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
        # Torch's fused optimizers read a flag on the device and change nothing where it is set.
        self.skips_on_device = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        self.graph: StepGraph | None = None

    def autocast(self) -> torch.autocast:
        """The autocast context of the network; disabled for fp32 and tf32."""
        dtype = self.precision.dtype
        return torch.autocast(self.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    def use_graph(self, say: Callable[[str], None], forced: bool, exact: bool = False) -> None:
        """Replay the step as one CUDA graph from the fourth step on: where that is faster, or always if `forced`.

        Only for a fused Adam on one CUDA device. The learning rate becomes a tensor, which each replay reads again.
        """
        for group in self.optimizer.param_groups:
            group["capturable"], group["lr"] = True, torch.zeros((), device=self.device)
        self.optimizer._warned_capturable_if_run_uncaptured = True
        self.graph = StepGraph(self._device_step, self._state, say, forced, exact)

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
        loss, extras, norm = self.graph(views) if self.graph else self._device_step(views)
        return StepResult(loss, extras, HostScalar(norm))

    def warm_up_ddp(self, views: Views) -> None:
        """Run one forward and backward pass and discard it; done before the first step of every start.

        DDP rearranges its gradient buckets after the first backward pass, and with three or more ranks the order of
        additions depends on the position in a bucket: without this, the first step after a resume would differ in the
        last bits.
        """
        part = views.split(self.config.optim.accumulate)[0]  # the memory may be too small for more than one
        copy_all(self._before, self.buffers)
        with self.autocast():
            output = self.network(part.input, *part.extra_inputs)
        self.pretext.loss(output, part)[0].backward()
        self.optimizer.zero_grad(set_to_none=True)
        copy_all(self.buffers, self._before)

    def _device_step(self, views: Views) -> Outputs:
        """The part of a step that happens on the device."""
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
        """Clip and apply the gradient, or skip the update if it is not finite; returns the gradient norm ()."""
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
        """Update the weights unless `bad` (bool scalar on the device); a skipped step leaves no trace.

        The buffers are restored too: batch norm's running averages would otherwise contain NaN from then on.
        """
        optimizer: torch.optim.Optimizer | torch.optim.Adam = self.optimizer
        optimizer.grad_scale, optimizer.found_inf = None, bad.float()  # type: ignore[union-attr]
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[union-attr]
        self._update_after_step()  # it changes nothing but `buffers`, which the lines below restore if the step is skipped
        if self.device.type == "cpu":
            if bad:
                copy_all(self.buffers, self._before)
        else:
            select_all(bad, self._before, self.buffers)

    def _update_after_step(self) -> None:
        """Let the pretext update values that are not trained by gradients, such as a teacher's weights."""
        if self._after_step:
            with torch.no_grad():
                self.pretext.after_step(self.model, self._step)

    def _state(self) -> list[Tensor]:
        """Every tensor that a step changes."""
        # Torch creates the scaler's two tensors at its first use, and none if it is disabled.
        scaler = [getattr(self.scaler, name, None) for name in ("_scale", "_growth_tracker")]
        averages = [value for state in self.optimizer.state.values() for value in state.values()]
        return [
            value
            for value in (*self.parameters, *self.buffers, *averages, *scaler)
            if isinstance(value, Tensor)
        ]

    def _no_sync(self, skip: bool) -> contextlib.AbstractContextManager[None]:
        """DDP's `no_sync` context if `skip`, so that gradients are averaged in the last pass only."""
        no_sync = getattr(self.network, "no_sync", None)
        return no_sync() if skip and no_sync is not None else contextlib.nullcontext()


@torch.no_grad()
def select_all(condition: Tensor, chosen: list[Tensor], into: list[Tensor]) -> None:
    """Copy `chosen` into `into` if `condition` (bool scalar on the device) holds. The host does not wait."""
    for kind in dict.fromkeys(tensor.dtype for tensor in into):
        old = [tensor for tensor, like in zip(chosen, into, strict=True) if like.dtype == kind]
        new = [tensor for tensor in into if tensor.dtype == kind]
        both = [torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (old, new)]
        selected: Tensor = torch.where(condition, both[0], both[1])
        pieces = selected.split([tensor.numel() for tensor in new])
        torch._foreach_copy_(new, [piece.view(like.shape) for piece, like in zip(pieces, new, strict=True)])


class StepGraph:
    """Called with views, it takes one step: eagerly at first, later by a replay of the captured graph."""

    def __init__(
        self,
        device_step: Callable[[Views], Outputs],
        state: Callable[[], list[Tensor]],
        say: Callable[[str], None],
        forced: bool,
        exact: bool = False,
    ) -> None:
        """`device_step` takes a step without waiting for the device; `state` lists every tensor that it changes.

        `forced`: use the graph whatever it brings. `exact`: only where it gives the very bits of the usual step, so that a
        resumed run, whose first steps are usual ones, ends with the same bits.
        """
        self.device_step, self.state, self.say, self.forced, self.exact = (
            device_step, state, say, forced, exact,
        )  # fmt: skip
        self.calls, self.refused = 0, False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: Views | None = None
        self._outputs: Outputs | None = None

    def __call__(self, views: Views) -> Outputs:
        """One step on `views`, whose shapes must be the same at every step."""
        self.calls += 1
        if self.calls > WARM_UP_STEPS and self._graph is None and not self.refused:
            self._decide(views)
        if self._graph is None or self._inputs is None or self._outputs is None:
            return self.device_step(views)
        copy_all(tensors_of(self._inputs), tensors_of(views))
        self._graph.replay()
        loss, extras, norm = self._outputs
        return loss.clone(), {name: value.clone() for name, value in extras.items()}, norm

    def _decide(self, views: Views) -> None:
        """Capture the step, then use the graph from now on or refuse it for good."""
        inputs = clone_views(views)
        state = self.state()
        before = [tensor.detach().clone() for tensor in state]
        try:
            graph, outputs = self._capture(inputs)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            self._refuse(f"it cannot be captured ({first_line(error)})")
            copy_all(state, before)
            return
        after, times = [], []
        for step in (lambda: self.device_step(inputs), graph.replay, graph.replay):
            torch.manual_seed(0)
            times.append(_seconds(step))
            after.append([tensor.detach().clone() for tensor in state])
            copy_all(state, before)
        usual, replayed = times[0], min(times[1:])
        as_usual, repeats = _equal(after[0], after[1]), _equal(after[1], after[2])
        said = f"a step takes {1e3 * replayed:.1f} ms by the graph, {1e3 * usual:.1f} without"
        differs = "" if repeats else "two replays differ in their bits"
        if repeats and not as_usual:
            differs = "a replay differs from the usual step in its bits"
        if not self.forced and (replayed >= usual or not repeats or (self.exact and not as_usual)):
            self._refuse(f"{said}{f'; {differs}' if differs else ''}")
            return
        self._graph, self._inputs, self._outputs = graph, inputs, outputs
        torch.cuda.empty_cache()  # what steps without the graph took: it has memory of its own
        self.say(f"CUDA graph: on; {said}{f'; {differs}' if differs else ''}")

    def _refuse(self, why: str) -> None:
        self.refused = True
        torch.cuda.empty_cache()  # memory of the capture
        self.say(f"CUDA graph: off; {why}")

    def _capture(self, inputs: Views) -> tuple[torch.cuda.CUDAGraph, Outputs]:
        """Record the step without running it. Raises RuntimeError when an operation cannot be captured."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Reader threads allocate and copy in the meantime, so the rules of a capture apply to this thread alone.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = self.device_step(inputs)
        return graph, outputs


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether all tensors are equal bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _seconds(step: Callable[[], object]) -> float:
    """Mean seconds of a step, over ROUNDS steps after one step of warm-up."""
    step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(ROUNDS):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / ROUNDS


def tensors_of(views: Views) -> list[Tensor]:
    """All tensors of the views, in a fixed order."""
    mask = () if views.mask is None else (views.mask,)
    return [views.input, views.target, *mask, *views.extra_inputs]


def clone_views(views: Views) -> Views:
    """A copy in separate memory; fields that share one tensor share its copy."""
    copies = {id(tensor): tensor.clone() for tensor in tensors_of(views)}
    return replace(
        views,
        input=copies[id(views.input)],
        target=copies[id(views.target)],
        mask=None if views.mask is None else copies[id(views.mask)],
        extra_inputs=tuple(copies[id(tensor)] for tensor in views.extra_inputs),
    )


@torch.no_grad()
def copy_all(into: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """Copy `source` into `into`, with one launch for each dtype: for mixed dtypes torch would launch one for each tensor."""
    for kind in dict.fromkeys(tensor.dtype for tensor in into):
        chosen = [at for at, tensor in enumerate(into) if tensor.dtype == kind]
        torch._foreach_copy_([into[at] for at in chosen], [source[at] for at in chosen])
