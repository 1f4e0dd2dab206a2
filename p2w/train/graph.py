"""A training step as one CUDA graph: one launch by the host instead of hundreds, so that the GPU does not wait for it.

The first steps run eagerly, while libraries initialise. Then the step is captured. Unless the graph is forced, it is
compared with eager steps, and state is restored afterwards: the graph is used only if it is faster and two replays give
the same bits.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from p2w.pretext.protocol import Views

Outputs = tuple[Tensor, dict[str, Tensor], Tensor]  # loss, further scalars, gradient norm; all on the device
WARM_UP_STEPS = 3
ROUNDS = 5  # steps that are timed, for the graph and for eager steps


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
            device_step,
            state,
            say,
            forced,
            exact,
        )
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
            self._refuse(f"it cannot be captured ({str(error).partition(chr(10))[0]})")
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
