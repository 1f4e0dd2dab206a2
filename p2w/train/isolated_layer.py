"""Runs single layers of a network outside it, at the input sizes and in the precision of the run, to check or time them.

For a large layer, only a few different samples are drawn, and the batch repeats them. The float32 reference then computes
only those few, while the precision under test computes the whole batch; every sample can still be compared.

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

# Random values of one input or output, 256 MiB; a larger batch repeats its first samples
MAX_DRAWN_VALUES = 2**26
Shape = tuple[int, ...]
LayerFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LayerCall:
    """One call of a module in the network, with the shapes (B, C, D, H, W) of its first input and of its output."""

    name: str
    module: Any
    input_shape: Shape
    output_shape: Shape


def trace_layers(model: nn.Module, shape: Shape, kinds: tuple[type, ...]) -> list[LayerCall]:
    """Every call of a module of these classes when `model` gets an input of `shape` (B, C, D, H, W), in order.

    A copy on torch's meta device is run, which has shapes without data; `model` itself is not changed.
    """
    ghosts: dict[int, Any] = {id(one): torch.empty_like(one, device="meta") for one in model.buffers()}
    for weight in model.parameters():
        ghosts[id(weight)] = nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)
    ghost = copy.deepcopy(model, ghosts).to("meta").eval()  # a copy that takes no memory for its tensors
    real, calls = dict(model.named_modules()), []
    for name, module in ghost.named_modules():
        if isinstance(module, Formed):
            module.form = PLAIN  # the meta device has all operations of this form

        def note(_: nn.Module, inputs: tuple[Tensor, ...], output: Any, name: str = name) -> None:
            shapes = tuple(inputs[0].shape), tuple(getattr(output, "shape", ()))
            calls.append(LayerCall(name, real[name], *shapes))

        if isinstance(module, kinds):
            cast(nn.Module, module).register_forward_hook(note)
    with torch.no_grad():
        ghost(torch.zeros(shape, device="meta"))
    return calls


def in_channels_last(model: nn.Module) -> bool:
    """Whether the network's convolution weights are in the channels-last memory format."""
    weights = [weight for weight in model.parameters() if weight.ndim == 5]
    return bool(weights) and all(
        weight.is_contiguous(memory_format=torch.channels_last_3d) for weight in weights
    )


class RandomTensors:
    """Draws random tensors on `device`, from a generator of its own: the run's random state does not change.

    Their values can be represented exactly in `precision`, so that only the arithmetic differs.
    """

    def __init__(self, precision: Precision, device: torch.device, channels_last: bool) -> None:
        self.device, self.dtype = device, precision.dtype or torch.float32
        self.value_dtype = precision.dtype or torch.float16  # TF32 has as many mantissa bits
        self.layout = torch.channels_last_3d if channels_last else torch.contiguous_format
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, shape: Shape) -> Tensor:
        """Normally distributed float32 values; a tensor of five axes has the network's memory format."""
        numbers = (
            torch.randn(shape, generator=self.generator, device=self.device).to(self.value_dtype).float()
        )
        return numbers.contiguous(memory_format=self.layout) if len(shape) == 5 else numbers

    def repeat(self, part: Tensor, samples: int) -> Tensor:
        """A batch (samples, C, D, H, W) in the run's dtype that repeats the samples of `part`."""
        shape = (samples, *part.shape[1:])
        whole = torch.empty(shape, dtype=self.dtype, device=self.device, memory_format=self.layout)
        for start in range(0, samples, len(part)):
            whole[start : start + len(part)].copy_(part)
        return whole


def distinct_samples(samples: int, *shapes: Shape) -> int:
    """How many different samples to draw: the largest divisor of `samples` that keeps within MAX_DRAWN_VALUES.

    `shapes` (B, C, D, H, W) are those of the tensors to draw.
    """
    most = max(2, MAX_DRAWN_VALUES // max(math.prod(shape[1:]) for shape in shapes))
    return max(number for number in range(1, min(samples, most) + 1) if samples % number == 0)


def backward_scale(copies: int) -> float:
    """Factor of the output's gradient where samples are repeated, so that sums over them stay within float16."""
    return float(2.0 ** -math.ceil(math.log2(copies)))


def forward_backward(
    compute: LayerFunction, weights: Sequence[Tensor], x: Tensor, by: Tensor
) -> list[Tensor]:
    """The output, and the gradients of sum(output * by) for the input and for `weights`; unused weights have none."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        output = compute(x)
        gradients = torch.autograd.grad(output, (x, *weights), by.to(output.dtype), allow_unused=True)
    return [output.detach(), *(gradient for gradient in gradients if gradient is not None)]


@contextlib.contextmanager
def float32_arithmetic() -> Iterator[None]:
    """IEEE float32 also on CUDA, with cuDNN's default kernels instead of a search for the fastest ones."""
    searches = torch.backends.cudnn.benchmark
    try:
        torch.backends.cudnn.benchmark = False
        with _float32("ieee"):
            yield
    finally:
        torch.backends.cudnn.benchmark = searches


@contextlib.contextmanager
def run_arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """The arithmetic of the run: autocast, TF32 or neither, with cuDNN's search for kernels as the run has it."""
    dtype = precision.dtype or torch.bfloat16
    with (
        _float32(precision.float32),
        torch.autocast(device.type, dtype=dtype, enabled=precision.dtype is not None),
    ):
        yield


@contextlib.contextmanager
def _float32(how: str) -> Iterator[None]:
    """Apply `set_float32(how)`, and restore what was set before."""
    before = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]  # torch's stub lacks it
    products = torch.backends.cuda.matmul.fp32_precision
    try:
        set_float32(how)
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.fp32_precision = products


def poison_free_memory(device: torch.device, *like: Tensor) -> None:
    """Fill memory with NaN and free it, so that a kernel that reads memory before it has written it gives NaN.

    Small blocks, and one block of the size of each tensor of `like`: the allocator hands these to results of that size.
    """
    for count in (500, 5_000, 50_000, 500_000, 2_000_000):
        torch.full((count,), float("nan"), device=device)
    blocks = [torch.full_like(one, float("nan")) for one in like]
    del blocks
