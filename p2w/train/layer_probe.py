"""One layer of a network alone, at the sizes and in the arithmetic that it meets in the run, to be checked or timed.

A batch of large layers repeats a few samples: then float32, which is compared with, computes the few alone, while the
precision under test computes all of them, and every sample of its output and gradient can still be compared.

Shapes: B, C, D, H, W = batch, channel, slice, row, column.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from p2w.model.forms import PLAIN, Formed
from p2w.train.optim import Precision, set_float32

DRAWN = 2**26  # numbers drawn of a layer's input or output, 256 MiB; a larger batch repeats its first samples
Shape = tuple[int, ...]
Compute = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Meeting:
    """A module and the shapes (B, C, D, H, W) of its first input and of its output in the network."""

    name: str
    module: Any
    given: Shape
    out: Shape


def meet(model: nn.Module, shape: Shape, kinds: tuple[type, ...]) -> list[Meeting]:
    """Every module of these kinds with the shapes of its first input and of its output, in the order of use.

    Found on torch's meta device, which has shapes without data; `model`, fed with `shape`, is not touched.
    """
    ghosts: dict[int, Any] = {id(one): torch.empty_like(one, device="meta") for one in model.buffers()}
    for weight in model.parameters():
        ghosts[id(weight)] = nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)
    ghost = copy.deepcopy(model, ghosts).to("meta").eval()  # a copy that takes no memory for its tensors
    real, met = dict(model.named_modules()), []
    for name, module in ghost.named_modules():
        if isinstance(module, Formed):
            module.form = PLAIN  # which the meta device has all operations of

        def note(_: nn.Module, given: tuple[Tensor, ...], out: Any, name: str = name) -> None:
            met.append(Meeting(name, real[name], tuple(given[0].shape), tuple(getattr(out, "shape", ()))))

        if isinstance(module, kinds):
            cast(nn.Module, module).register_forward_hook(note)
    with torch.no_grad():
        ghost(torch.zeros(shape, device="meta"))
    return met


def in_channels_last(model: nn.Module) -> bool:
    """Whether the network's convolutions lie in memory with channels innermost."""
    weights = [weight for weight in model.parameters() if weight.ndim == 5]
    return bool(weights) and all(
        weight.is_contiguous(memory_format=torch.channels_last_3d) for weight in weights
    )


class Draw:
    """Random numbers that `precision` holds exactly, so that only arithmetic differs, from a generator of its own.

    They are drawn on `device`; the run's random numbers stay as they are.
    """

    def __init__(self, precision: Precision, device: torch.device, channels_last: bool) -> None:
        self.device, self.dtype = device, precision.dtype or torch.float32
        self.grid = precision.dtype or torch.float16  # TF32 has as many digits
        self.layout = torch.channels_last_3d if channels_last else torch.contiguous_format
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, shape: Shape) -> Tensor:
        """Normal numbers in float32; five axes lie in memory as the network's do."""
        numbers = torch.randn(shape, generator=self.generator, device=self.device).to(self.grid).float()
        return numbers.contiguous(memory_format=self.layout) if len(shape) == 5 else numbers

    def repeat(self, part: Tensor, samples: int) -> Tensor:
        """A batch (samples, C, D, H, W) in the run's type that begins with the samples of `part` and repeats them."""
        shape = (samples, *part.shape[1:])
        whole = torch.empty(shape, dtype=self.dtype, device=self.device, memory_format=self.layout)
        for start in range(0, samples, len(part)):
            whole[start : start + len(part)].copy_(part)
        return whole


def few(samples: int, *shapes: Shape) -> int:
    """How many samples are drawn: the most that divide `samples` with at most `DRAWN` numbers in each of `shapes`."""
    most = max(2, DRAWN // max(math.prod(shape[1:]) for shape in shapes))
    return max(number for number in range(1, min(samples, most) + 1) if samples % number == 0)


def backward_scale(copies: int) -> float:
    """By what the output's gradient is multiplied where samples are repeated: sums over them stay within float16."""
    return float(2.0 ** -math.ceil(math.log2(copies)))


def forward_backward(compute: Compute, weights: Sequence[Tensor], x: Tensor, by: Tensor) -> list[Tensor]:
    """Output, and the gradients of sum(output * by) for the input and for `weights`; without those that it needs not."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        output = compute(x)
        gradients = torch.autograd.grad(output, (x, *weights), by.to(output.dtype), allow_unused=True)
    return [output.detach(), *(gradient for gradient in gradients if gradient is not None)]


@contextlib.contextmanager
def float32_arithmetic() -> Iterator[None]:
    """IEEE float32 also on CUDA, with the kernels that cuDNN proposes instead of a search for the fastest."""
    searches = torch.backends.cudnn.benchmark
    try:
        torch.backends.cudnn.benchmark = False
        with _float32("ieee"):
            yield
    finally:
        torch.backends.cudnn.benchmark = searches


@contextlib.contextmanager
def run_arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """What layers compute in during the run: autocast, or TF32, or neither; kernels are searched for as there."""
    dtype = precision.dtype or torch.bfloat16
    with (
        _float32(precision.float32),
        torch.autocast(device.type, dtype=dtype, enabled=precision.dtype is not None),
    ):
        yield


@contextlib.contextmanager
def _float32(how: str) -> Iterator[None]:
    """`set_float32` for a while."""
    before = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]  # torch's stub lacks it
    products = torch.backends.cuda.matmul.fp32_precision
    try:
        set_float32(how)
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.fp32_precision = products


def litter(device: torch.device, *like: Tensor) -> None:
    """Leave NaN in memory that is free again: what reads before it writes gives itself away.

    Small blocks, and one of the size of each tensor of `like`, which results of that size will then get.
    """
    for count in (500, 5_000, 50_000, 500_000, 2_000_000):
        torch.full((count,), float("nan"), device=device)
    held = [torch.full_like(one, float("nan")) for one in like]
    del held
