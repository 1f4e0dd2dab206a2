"""Before the first step: does this machine compute what it should? Two things are known to go wrong silently.

- Convolutions in bf16: oneDNN 3.12 returns garbage for some shapes (see p2w.model.conv), some cuDNN 9 are wrong or slow.
- Crop-resize, whose kernel is compiled for the card it meets.
Both are compared with arithmetic that is not in doubt: convolutions at the sizes of this run, crop-resize on a small whole.
That every convolution was found right is remembered from one start to the next (`p2w.train.verdicts`).

Shapes: B, C, D, H, W = batch, channel, slice, row, column.
"""

import contextlib
import copy
import hashlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from p2w import geometry
from p2w.config import Config, PretextConfig
from p2w.errors import UserError
from p2w.train.optim import Precision
from p2w.train.verdicts import Facts, is_remembered, machine_facts, remember
from p2w.world import World

CONVOLUTIONS = (nn.Conv3d, nn.ConvTranspose3d)
WITHIN = 0.02  # of the largest value; rounding to bf16 left 0.004 at most in all sizes tried, wrong kernels 1 to infinity
CROP_WITHIN = 1e-4  # of the window, float32 against float64
DRAWN = 2**26  # numbers drawn of a layer's input or output, 256 MiB; a larger batch repeats its first samples
Shape = tuple[int, ...]


def trusted(
    config: Config, precision: Precision, model: nn.Module, world: World, warn: Callable[[str], None]
) -> Precision:
    """The precision to train in, the same on all ranks. Where `auto` chose one that is wrong here, float32 takes its place.

    Raises UserError for what has no other way.
    """
    where = f"rank {world.rank} on {world.host}"
    crop = wrong_crop(config.pretext, world.device)
    if world.any(bool(crop)):
        raise UserError(
            f"{where}: {crop or 'crop-resize is sound here and wrong on another rank'}; {_remedy(world)}"
        )
    share = config.data.batch // world.size // config.optim.accumulate
    # A GPU chooses its kernels by the batch too.
    shape = (share if world.device.type == "cuda" else 1, 1, *config.pretext.size)
    layer = _wrong_here(model, precision, shape, world, warn)
    if not world.any(bool(layer)):
        return precision
    found = f"{where}: {layer or f'another rank computes wrongly in {precision.name}'}"
    if config.train.amp != "auto":
        raise UserError(f"{found}; pass --train.amp fp32, or auto")
    warn(f"{found}; the run computes in fp32")
    return Precision("fp32", None, f"{precision.name} is wrong on this machine")


def _remedy(world: World) -> str:
    if geometry.backend(world.device)[0] == "triton":
        return "install another triton, or none: torch then cuts the parts"
    return "install another torch"


def _wrong_here(
    model: nn.Module, precision: Precision, shape: Shape, world: World, warn: Callable[[str], None]
) -> str:
    """`wrong_convolution`, unless this machine was found sound before with the same versions, layers and sizes."""
    if not _differs_from_float32(precision, world.device):
        return ""
    meetings = meet(model, shape, CONVOLUTIONS)
    facts: Facts = {
        **machine_facts(world),
        "precision": precision.name,
        "channels_last": in_channels_last(model),
        "layers": [[repr(one.kind), _code(one.module)] for one in meetings],
    }
    if is_remembered(facts, warn):
        return ""
    wrong = _first_wrong(meetings, precision, world.device, in_channels_last(model))
    if not wrong:
        remember(facts, warn)
    return wrong


def wrong_convolution(model: nn.Module, precision: Precision, shape: Shape, device: torch.device) -> str:
    """Compare each convolution of `model`, in the run's precision, with float32; "" or what differs and by how much.

    `shape` (B, C, D, H, W) is what the network is fed. Output and both gradients of every distinct convolution are
    taken at the size it meets there, with memory around that holds NaN. The model itself is not touched.

    The precision under test computes the whole batch, by which a GPU chooses its kernels. Of a large layer only the first
    samples are drawn and computed in float32; the batch repeats them, so that every sample's output and gradient is still
    compared, and the weights' gradient is compared with the sum over the few, each times the number of its copies.
    """
    if not _differs_from_float32(precision, device):
        return ""
    return _first_wrong(meet(model, shape, CONVOLUTIONS), precision, device, in_channels_last(model))


def _differs_from_float32(precision: Precision, device: torch.device) -> bool:
    return precision.dtype is not None or (precision.name == "tf32" and device.type == "cuda")


@dataclass(frozen=True)
class Meeting:
    """A module and the shapes (B, C, D, H, W) that it meets in the network; `kind` is equal where the arithmetic is."""

    name: str
    module: Any
    given: Shape
    out: Shape

    @property
    def kind(self) -> tuple[Any, ...]:
        """Type, weight's shape, how the kernel moves, shape of the input."""
        module = self.module
        how = (module.stride, module.padding, module.output_padding, module.dilation, module.groups)
        return (type(module).__name__, tuple(module.weight.shape), module.bias is not None, *how, self.given)


def meet(model: nn.Module, shape: Shape, kinds: tuple[type[nn.Module], ...]) -> list[Meeting]:
    """Every module of these kinds with the shapes of its first input and of its output, in the order of use.

    Found on torch's meta device, which has shapes without data; `model`, fed with `shape`, is not touched.
    """
    ghosts: dict[int, Any] = {id(one): torch.empty_like(one, device="meta") for one in model.buffers()}
    for weight in model.parameters():
        ghosts[id(weight)] = nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)
    ghost = copy.deepcopy(model, ghosts).to("meta").eval()  # a copy that takes no memory for its tensors
    real, met = dict(model.named_modules()), []
    for name, module in ghost.named_modules():
        if isinstance(module, kinds):

            def note(_: nn.Module, given: tuple[Tensor, ...], out: Tensor, name: str = name) -> None:
                met.append(Meeting(name, real[name], tuple(given[0].shape), tuple(out.shape)))

            module.register_forward_hook(note)
    with torch.no_grad():
        ghost(torch.zeros(shape, device="meta"))
    return met


def in_channels_last(model: nn.Module) -> bool:
    """Whether the network's convolutions lie in memory with channels innermost."""
    weights = [weight for weight in model.parameters() if weight.ndim == 5]
    return bool(weights) and all(
        weight.is_contiguous(memory_format=torch.channels_last_3d) for weight in weights
    )


def _first_wrong(
    meetings: list[Meeting], precision: Precision, device: torch.device, channels_last: bool
) -> str:
    """What is wrong with the first convolution that is; each distinct one is computed once."""
    once: dict[Any, Meeting] = {}
    for one in meetings:
        once.setdefault(one.kind, one)
    for one in once.values():
        for what, error in _differences(one, precision, device, channels_last):
            if not error <= WITHIN:  # NaN is not
                return (
                    f"{one.name}: {what} in {precision.name} differs from float32 by {error:.3g} of its largest value "
                    f"(rounding explains {WITHIN:g}), at input {one.given} on {device.type}, torch {torch.__version__}"
                )
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return ""


def _differences(
    one: Meeting, precision: Precision, device: torch.device, channels_last: bool
) -> Iterator[tuple[str, float]]:
    """(what, largest difference / largest value): of numbers that both precisions hold exactly: only arithmetic differs."""
    draw = torch.Generator(device).manual_seed(0)  # its own: the run's random numbers stay as they are
    grid = precision.dtype or torch.float16  # TF32 has as many digits
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format

    def rounded(shape: Shape) -> Tensor:
        numbers = torch.randn(shape, generator=draw, device=device)
        return numbers.to(grid).float().contiguous(memory_format=layout)

    samples = one.given[0]
    few = min(samples, max(2, DRAWN // max(math.prod(one.given[1:]), math.prod(one.out[1:]))))
    copies = torch.tensor([len(range(first, samples, few)) for first in range(few)], device=device)
    layer = copy.deepcopy(one.module).requires_grad_()  # also of what the run keeps frozen
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter.to(grid))
    # A power of two less for each doubling of the batch: the weights' gradient stays within float16.
    smaller = 2 ** math.ceil(math.log2(samples / few))
    x, by = rounded((few, *one.given[1:])), rounded((few, *one.out[1:])) / smaller
    with float32_arithmetic():
        expected = _pass(layer, x, by, by * copies.view(-1, 1, 1, 1, 1))
    x, by = (_repeated(part, samples, precision.dtype or torch.float32, layout) for part in (x, by))
    _litter(device, x, by)
    with run_arithmetic(precision, device):
        found = _pass(layer, x, by, by)
    for what, value, right in zip(
        ("output", "input's gradient", "weights' gradient"), found, expected, strict=True
    ):
        yield what, relative_difference(value, right)


def relative_difference(value: Tensor, right: Tensor) -> float:
    """The largest difference over the largest value of `right`; NaN where `value` holds one.

    `value` may have a longer first axis: then it is compared piece by piece with `right`.
    """
    pieces = (value[start : start + len(right)] for start in range(0, len(value), len(right)))
    worst = torch.stack([(piece.float() - right[: len(piece)]).abs().max() for piece in pieces]).max()
    return float(worst / right.abs().max().clamp(min=1e-30))


def _pass(layer: Any, x: Tensor, by: Tensor, by_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient of the input of sum(output * by), and of the weights of sum(output * by_weights)."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        output = layer(x)
        (inputs,) = torch.autograd.grad(output, x, by.to(output.dtype), retain_graph=True)
        (weights,) = torch.autograd.grad(output, layer.weight, by_weights.to(output.dtype))
    return output.detach(), inputs, weights


def _repeated(part: Tensor, samples: int, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    """A batch (samples, C, D, H, W) of `dtype` that begins with the samples of `part` and goes on with them again."""
    whole = torch.empty((samples, *part.shape[1:]), dtype=dtype, device=part.device, memory_format=layout)
    for start in range(0, samples, len(part)):
        here = whole[start : start + len(part)]
        here.copy_(part[: len(here)])
    return whole


@contextlib.contextmanager
def float32_arithmetic() -> Iterator[None]:
    """Float32 convolutions in IEEE float32 also on CUDA, with the kernel that cuDNN proposes instead of a search for one."""
    cudnn, before = torch.backends.cudnn, (torch.backends.cudnn.benchmark, _tf32())
    try:
        cudnn.benchmark = False
        _set_tf32("ieee")
        yield
    finally:
        cudnn.benchmark = before[0]
        _set_tf32(before[1])


def _tf32() -> str:
    return str(torch.backends.cudnn.conv.fp32_precision)  # type: ignore[attr-defined]  # torch's stub lacks it


def _set_tf32(name: str) -> None:
    torch.backends.cudnn.conv.fp32_precision = name  # type: ignore[attr-defined]


@contextlib.contextmanager
def run_arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """What the network's layers compute in, in the run: autocast, or TF32, or neither; kernels are searched for as there."""
    before = _tf32()
    try:
        if precision.dtype is None:
            _set_tf32("tf32" if precision.name == "tf32" else "ieee")
        dtype = precision.dtype or torch.bfloat16
        with torch.autocast(device.type, dtype=dtype, enabled=precision.dtype is not None):
            yield
    finally:
        _set_tf32(before)


def _litter(device: torch.device, *like: Tensor) -> None:
    """Leave NaN in memory that is free again: what reads before it writes gives itself away.

    Small blocks, and one of the size of each tensor of `like`, which results of that size will then get.
    """
    for count in (500, 5_000, 50_000, 500_000, 2_000_000):
        torch.full((count,), float("nan"), device=device)
    held = [torch.full_like(one, float("nan")) for one in like]
    del held


def _code(module: nn.Module) -> str:
    """A hash of the source of the module's classes, torch's aside: changed code is checked again."""
    own = [kind for kind in type(module).__mro__ if kind.__module__.partition(".")[0] in ("p2w", "__main__")]
    with contextlib.suppress(OSError, TypeError):  # source that is not at hand
        return hashlib.sha256("".join(map(inspect.getsource, own)).encode()).hexdigest()[:8]
    return ""


def wrong_crop(config: PretextConfig, device: torch.device) -> str:
    """Compare crop-resize on `device` with float64 of other code; "" or what differs and by how much.

    A whole of (9, 21, 18) voxels, four boxes with fractions, outputs that held NaN before; part and whole alike.
    """
    rng, size, shape = np.random.default_rng(0), (4, 11, 7), (9, 21, 18)
    low, high = (int(edge) for edge in config.window_hu)
    voxels = rng.integers(low - 100, high + 100, (4, *shape)).clip(-32768, 32767).astype(np.int16)
    start = rng.uniform(0, 0.4, (4, 3))
    boxes = (np.concatenate((start, start + rng.uniform(0.3, 0.6, (4, 3))), 1) * np.tile(shape, 2)).astype(
        np.float32
    )
    poisoned = tuple(torch.full((4, 1, *size), float("nan"), device=device) for _ in range(2))
    part, whole = geometry.part_and_whole(
        torch.from_numpy(voxels).to(device), torch.from_numpy(boxes).to(device), size,
        window_hu=config.window_hu, antialias=config.antialias, out=(poisoned[0], poisoned[1]),
    )  # fmt: skip
    everything = np.tile(np.array([0, 0, 0, *shape], np.float32), (4, 1))
    for what, found, crops in (("part", part, boxes), ("whole", whole, everything)):
        right = np.stack([_crop(v, c, size, config) for v, c in zip(voxels, crops, strict=True)])
        error = float(np.abs(found[:, 0].cpu().double().numpy() - right).max())
        if not error <= CROP_WITHIN:
            name, why = geometry.backend(device)
            return (
                f"crop-resize by {name} ({why}) differs from float64 by {error:.3g} of the window (up to "
                f"{CROP_WITHIN:g} is rounding), in the {what}; {_versions()}"
            )
    return ""


def _crop(
    voxels: NDArray[np.int16], box: NDArray[np.float32], size: Shape, config: PretextConfig
) -> NDArray[np.float64]:
    """One part (d, h, w) in [0, 1], by a dense matrix for each axis, from the convention that p2w.geometry states."""
    low, high = config.window_hu
    values = (voxels.astype(np.float64).clip(low, high) - low) / (high - low)
    for axis in range(3):
        begin, end, n = float(box[axis]), float(box[axis + 3]), values.shape[axis]
        scale = (end - begin) / size[axis]
        reach = max(1.0, scale) if config.antialias else 1.0
        centre = begin + (np.arange(size[axis]) + 0.5) * scale
        weights = np.maximum(0.0, 1 - np.abs(np.arange(n) + 0.5 - centre[:, None]) / reach)
        weights[:, : int(np.floor(begin))] = 0
        weights[:, int(np.ceil(end)) :] = 0
        weights /= weights.sum(1, keepdims=True)
        values = np.moveaxis(np.tensordot(weights, values, (1, axis)), 0, axis)
    return values


def _versions() -> str:
    triton = importlib.util.find_spec("triton")
    where = f", triton in {triton.submodule_search_locations}" if triton else ""
    return f"torch {torch.__version__}{where}"
