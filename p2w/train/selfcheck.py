"""Before the first step: does this machine compute what it should? Two things are known to go wrong silently.

- Convolutions in bf16: oneDNN 3.12 returns garbage for some shapes (see p2w.model.conv), some cuDNN 9 are wrong or slow.
- Crop-resize, whose kernel is compiled for the card it meets.
Both are compared with arithmetic that is not in doubt: convolutions at the sizes of this run, crop-resize on a small whole.
"""

import copy
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from p2w import geometry
from p2w.config import Config, PretextConfig
from p2w.errors import UserError
from p2w.train.optim import Precision
from p2w.world import World

CONVOLUTIONS = (nn.Conv3d, nn.ConvTranspose3d)
WITHIN = 0.02  # of the largest value; rounding to bf16 left 0.004 at most in all sizes tried, wrong kernels 1 to infinity
CROP_WITHIN = 1e-4  # of the window, float32 against float64
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
            f"{where}: {crop or 'crop-resize is sound here and wrong on another rank'}; install another triton, or none: "
            "torch then cuts the parts"
        )
    share = (
        config.data.batch // world.size // config.optim.accumulate
    )  # a GPU chooses its kernels by the batch too
    shape = (share if world.device.type == "cuda" else 1, 1, *config.pretext.size)
    layer = wrong_convolution(model, precision, shape, world.device)
    if not world.any(bool(layer)):
        return precision
    found = f"{where}: {layer or f'another rank computes wrongly in {precision.name}'}"
    if config.train.amp != "auto":
        raise UserError(f"{found}; pass --train.amp fp32, or auto")
    warn(f"{found}; the run computes in fp32")
    return Precision("fp32", None, f"{precision.name} is wrong on this machine")


def wrong_convolution(model: nn.Module, precision: Precision, shape: Shape, device: torch.device) -> str:
    """Compare each convolution of `model`, in the run's precision, with float32; "" or what differs and by how much.

    `shape` (B, C, D, H, W) is what the network is fed. Output and both gradients of every distinct convolution are
    taken at the size it meets there, with memory around that holds no zeros. The model itself is not touched.
    """
    if precision.dtype is None:
        return ""
    seen = set()
    for name, module, size in _convolutions(model, shape):
        kind = (type(module), module.weight.shape, module.stride, module.padding, size)
        if kind in seen:
            continue
        seen.add(kind)
        for what, error in _differences(module, size, precision.dtype, device):
            if not error <= WITHIN:  # NaN is not
                return (
                    f"{name}: {what} in {precision.name} differs from float32 by {error:.3g} of its largest value "
                    f"(rounding explains {WITHIN:g}), at input {size} on {device.type}, torch {torch.__version__}"
                )
    return ""


def _convolutions(model: nn.Module, shape: Shape) -> list[tuple[str, Any, Shape]]:
    """Name, module and input shape of each convolution, found on torch's meta device: shapes without data."""
    ghost = copy.deepcopy(model).to("meta").eval()
    real, met = dict(model.named_modules()), []
    for name, module in ghost.named_modules():
        if isinstance(module, CONVOLUTIONS):

            def note(_: nn.Module, given: tuple[Tensor, ...], name: str = name) -> None:
                met.append((name, real[name], tuple(given[0].shape)))

            module.register_forward_pre_hook(note)
    with torch.no_grad():
        ghost(torch.zeros(shape, device="meta"))
    return met


def _differences(
    module: Any, size: Shape, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, float]]:
    """(what, largest difference / largest value): of numbers that `dtype` holds exactly, so that only arithmetic differs."""
    draw = torch.Generator().manual_seed(0)  # its own: the run's random numbers stay as they are

    def rounded(shape: Shape) -> Tensor:
        return torch.randn(shape, generator=draw).to(dtype).float().to(device)

    layer = copy.deepcopy(module).requires_grad_()  # also of what the run keeps frozen
    x = rounded(size)
    if module.weight.is_contiguous(memory_format=torch.channels_last_3d):
        x = x.contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter.to(dtype))
        by = rounded(tuple(layer(x).shape))
    expected = _pass(layer, x, by)
    _litter(device)
    with torch.autocast(device.type, dtype=dtype):
        found = _pass(layer, x, by)
    for what, value, right in zip(
        ("output", "input's gradient", "weights' gradient"), found, expected, strict=True
    ):
        yield what, float((value - right).abs().max() / right.abs().max().clamp(min=1e-30))


def _pass(layer: Any, x: Tensor, by: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient of the input and of the weights, float32, of sum(output * by)."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        output = layer(x)
        gradients = torch.autograd.grad(output, (x, layer.weight), by.to(output.dtype))
    return output.detach().float(), gradients[0].float(), gradients[1].float()


def _litter(device: torch.device) -> None:
    """Leave NaN in memory that is free again: what reads before it writes gives itself away."""
    for count in (500, 5_000, 50_000, 500_000, 2_000_000):
        torch.full((count,), float("nan"), device=device)


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
