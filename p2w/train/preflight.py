"""Checks before the first step: all ranks run the same program on the same data, and this machine computes correctly.

- Convolutions in the run's precision, against float32, at the sizes of this run: oneDNN 3.12 returns garbage for some
  shapes in bf16 (see p2w.model.conv), and some versions of cuDNN 9 are wrong or slow.
- Crop-resize, against float64, on a small volume: its kernel is compiled on the machine of the run.

The next start need not repeat a check that passed: `$XDG_CACHE_HOME/p2w`, or `~/.cache/p2w`, holds one small JSON file for
each; its content says which device, which versions and what was checked. A failed check is never cached. When the cache
cannot be read or written, there is a warning and the check is made again.

Shapes: B, C, D, H, W = batch, channel, slice, row, column.
"""

import contextlib
import copy
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from p2w import __version__, geometry
from p2w import rng as p2w_rng
from p2w.config import Config, PretextConfig
from p2w.errors import SharedError, UserError
from p2w.files import write_atomic
from p2w.train.isolated_layer import (
    LayerCall,
    RandomTensors,
    Shape,
    backward_scale,
    distinct_samples,
    float32_arithmetic,
    forward_backward,
    in_channels_last,
    poison_free_memory,
    run_arithmetic,
    trace_layers,
)
from p2w.train.optim import Precision
from p2w.world import World, variable


def check_rank_consistency(
    world: World, given: dict[str, Any], precision: Precision, data: str, amp: str
) -> None:
    """Raise SharedError, on all ranks, when ranks differ; its message names the rank and the settings that differ.

    `given` are this rank's settings, {option: plain value}; `data` is the fingerprint of the data set that it has opened;
    `amp` is the name of the option that chooses the precision.
    """
    if world.store is None:
        return
    mine = {"host": world.host, "p2w": __version__, "torch": torch.__version__}
    mine |= {"data set": data, "precision": precision.name}
    mine |= given
    world.store.set(f"facts/{world.rank}", json.dumps(mine))
    if world.is_main:
        everyone = [json.loads(world.store.get(f"facts/{rank}")) for rank in range(world.size)]
        world.store.set("verdict", _first_difference(everyone, amp))
    verdict = world.store.get("verdict").decode()
    world.barrier()  # without torchrun the store ends with rank 0, which must wait until all have read it
    if verdict:
        raise SharedError(verdict)


def _first_difference(everyone: list[dict[str, Any]], amp: str) -> str:
    """One line on the first rank that differs from rank 0; empty when all agree."""
    first = everyone[0]
    for rank, other in enumerate(everyone):
        differing = [name for name in first if name != "host" and other.get(name) != first[name]]
        if differing:
            theirs = ", ".join(f"{name} {other.get(name)}" for name in differing[:3])
            ours = ", ".join(f"{name} {first[name]}" for name in differing[:3])
            return (
                f"rank {rank} on {other['host']} has {theirs}; rank 0 on {first['host']} has {ours}. All ranks need the "
                f"same versions, settings and data: start every node with the same command, and pass {amp} where their "
                "devices differ"
            )
    return ""


CONVOLUTIONS = (nn.Conv3d, nn.ConvTranspose3d)
# Share of the largest value. Rounding to bf16 gave at most 0.004 at all sizes tried, wrong kernels 1 to infinity.
CONVOLUTION_TOLERANCE = 0.02
CROP_TOLERANCE = 1e-4  # share of the window, float32 against float64

CheckKey = dict[str, Any]  # plain JSON values: everything that the result of a check depends on
# Environment variables that change which instructions oneDNN uses, or whether NVIDIA's libraries use TF32.
KERNEL_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "NVIDIA_TF32_OVERRIDE")


def check_numerics(
    config: Config, precision: Precision, model: nn.Module, world: World, warn: Callable[[str], None]
) -> Precision:
    """The precision to train in, the same on all ranks: `precision`, or float32 where `auto` chose one that is wrong here.

    Raises UserError when crop-resize is wrong, or convolutions are wrong in a precision that the user asked for.
    """
    where = f"rank {world.rank} on {world.host}"
    crop = crop_resize_error(config.pretext, world.device)
    if world.any(bool(crop)):
        raise UserError(
            f"{where}: {crop or 'crop-resize is correct here and wrong on another rank'}; {_remedy(world)}"
        )
    name, why = p2w_rng.backend(world.device)
    if world.device.type == "cuda" and name != "triton":
        warn(f"parts are cut by {name}, more slowly than by the kernel: {why}")
    share = config.data.batch // world.size // config.optim.accumulate
    # On a GPU, the choice of kernels depends on the batch size as well.
    shape = (share if world.device.type == "cuda" else 1, 1, *config.pretext.size)
    layer = _cached_convolution_error(model, precision, shape, world, warn)
    if not world.any(bool(layer)):
        return precision
    found = f"{where}: {layer or f'another rank computes wrongly in {precision.name}'}"
    if config.train.precision != "auto":
        raise UserError(f"{found}; pass --train.precision fp32, or auto")
    warn(f"{found}; the run computes in fp32")
    return Precision("fp32", None, f"{precision.name} is wrong on this machine")


def _remedy(world: World) -> str:
    if p2w_rng.backend(world.device)[0] == "triton":
        return "install another triton, or none: torch then cuts the parts"
    return "install another torch"


def _cached_convolution_error(
    model: nn.Module, precision: Precision, shape: Shape, world: World, warn: Callable[[str], None]
) -> str:
    """`convolution_error`, or "" at once when the check passed before with the same machine, versions, layers and sizes."""
    if not _differs_from_float32(precision, world.device):
        return ""
    calls = trace_layers(model, shape, CONVOLUTIONS)
    key: CheckKey = {
        **machine_key(world),
        "precision": precision.name,
        "channels_last": in_channels_last(model),
        "layers": [repr(convolution_kind(one)) for one in calls],
    }
    if passed_before(key, warn):
        return ""
    error = _first_error(calls, precision, world.device, in_channels_last(model))
    if not error:
        record_pass(key, warn)
    return error


def convolution_error(model: nn.Module, precision: Precision, shape: Shape, device: torch.device) -> str:
    """Compare each convolution of `model`, in the run's precision, with float32.

    Returns "" or one line that says what differs and by how much. `shape` (B, C, D, H, W) is the network's input. Output
    and both gradients of every distinct convolution are compared at the size of its input in this network, with NaN in the
    free memory. The model itself is not changed.

    The precision under test computes the whole batch, because a GPU chooses its kernels by the batch size. For a large
    layer, only a few samples are drawn and computed in float32, and the batch repeats them. Every sample's output and
    gradient is still compared, and the weights' gradient with that of the few samples times the number of copies.
    """
    if not _differs_from_float32(precision, device):
        return ""
    return _first_error(trace_layers(model, shape, CONVOLUTIONS), precision, device, in_channels_last(model))


def _differs_from_float32(precision: Precision, device: torch.device) -> bool:
    return precision.dtype is not None or (precision.name == "tf32" and device.type == "cuda")


def _first_error(
    calls: list[LayerCall], precision: Precision, device: torch.device, channels_last: bool
) -> str:
    """One line on the first convolution that is wrong, or ""; each distinct convolution is computed once."""
    once: dict[Any, LayerCall] = {}
    for one in calls:
        once.setdefault(convolution_kind(one), one)
    for one in once.values():
        for what, error in _differences(one, precision, device, channels_last):
            if not error <= CONVOLUTION_TOLERANCE:  # also true for NaN
                return (
                    f"{one.name}: {what} in {precision.name} differs from float32 by {error:.3g} of its largest value "
                    f"(rounding explains {CONVOLUTION_TOLERANCE:g}), at input {one.input_shape} on {device.type}, "
                    f"torch {torch.__version__}"
                )
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return ""


def convolution_kind(one: LayerCall) -> tuple[Any, ...]:
    """Everything a convolution's arithmetic depends on: class, shapes of weight and input, bias, stride, padding, groups."""
    module = one.module
    how = (module.stride, module.padding, module.output_padding, module.dilation, module.groups)
    return (type(module).__name__, tuple(module.weight.shape), module.bias is not None, *how, one.input_shape)


def _differences(
    one: LayerCall, precision: Precision, device: torch.device, channels_last: bool
) -> Iterator[tuple[str, float]]:
    """(what, largest difference / largest value) of output and gradients in the run's precision against float32."""
    draw, samples = RandomTensors(precision, device, channels_last), one.input_shape[0]
    number = distinct_samples(samples, one.input_shape, one.output_shape)
    copies = samples // number
    layer = copy.deepcopy(one.module).requires_grad_()  # frozen weights are checked too
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter.to(draw.value_dtype))
    x = draw.normal((number, *one.input_shape[1:]))
    by = draw.normal((number, *one.output_shape[1:])) * backward_scale(copies)
    with float32_arithmetic():
        output, inputs, weights = forward_backward(layer, [layer.weight], x, by)
    expected = (output, inputs, weights * copies)
    x, by = draw.repeat(x, samples), draw.repeat(by, samples)
    poison_free_memory(device, x, by)
    with run_arithmetic(precision, device):
        found = forward_backward(layer, [layer.weight], x, by)
    for what, value, right in zip(
        ("output", "input's gradient", "weights' gradient"), found, expected, strict=True
    ):
        yield what, _difference(value, right)


def _difference(value: Tensor, right: Tensor) -> float:
    """The largest difference, over the largest value of `right`; `value` may repeat `right`. NaN if `value` has a NaN."""
    pieces = value.split(len(right))
    worst = torch.stack([(piece.float() - right).abs().max() for piece in pieces]).max()
    return float(worst / right.abs().max().clamp(min=1e-30))


def crop_resize_error(config: PretextConfig, device: torch.device) -> str:
    """Compare crop-resize on `device` with separate float64 code; "" or one line on what differs and by how much.

    Four volumes of (9, 21, 18) voxels, a box with fractional edges in each, and outputs that contain NaN before. Both
    results, part and whole, are compared.
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
        if not error <= CROP_TOLERANCE:
            name, why = p2w_rng.backend(device)
            return (
                f"crop-resize by {name} ({why}) differs from float64 by {error:.3g} of the window (up to "
                f"{CROP_TOLERANCE:g} is rounding), in the {what}; {_versions()}"
            )
    return ""


def _crop(
    voxels: NDArray[np.int16], box: NDArray[np.float32], size: Shape, config: PretextConfig
) -> NDArray[np.float64]:
    """One part (d, h, w) in [0, 1] by the convention that p2w.geometry states, with a dense matrix for each axis."""
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


def cache_folder() -> Path:
    """The folder of the cache. Raises OSError when the user has no home folder."""
    chosen = Path(variable("XDG_CACHE_HOME"))
    if chosen.is_absolute():  # the XDG specification says to ignore a relative path
        return chosen / "p2w"
    try:
        return Path.home() / ".cache" / "p2w"
    except RuntimeError as error:
        raise FileNotFoundError(0, "this user has no home folder", "~/.cache/p2w") from error


def machine_key(world: World) -> CheckKey:
    """What decides which kernels torch uses on this rank's device: device, versions, torch's switches."""
    cudnn, device = torch.backends.cudnn, world.device
    key: CheckKey = {
        "p2w": __version__,
        "torch": torch.__version__,
        "code": _source_hash(),
        # The text names oneDNN's version and more.
        "build": hashlib.sha256(torch.__config__.show().encode()).hexdigest()[:16],
        "cudnn": cudnn.version(),
        "triton": "",
        "search": cudnn.benchmark,
        "deterministic": [cudnn.deterministic, torch.are_deterministic_algorithms_enabled()],
        "environment": {name: variable(name) for name in KERNEL_VARIABLES},
    }
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        key["triton"] = importlib.metadata.version("triton")
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        key["device"] = [gpu.name, gpu.major, gpu.minor, gpu.multi_processor_count]
    else:
        key["device"] = [
            world.machine()["device"],
            torch.backends.cpu.get_cpu_capability(),
            torch.get_num_threads(),
        ]
    return key


def _source_hash() -> str:
    """Hash of the source of all networks and kernels, so that changed code is checked again."""
    package = Path(__file__).parents[1]
    files = [*package.glob("model/**/*.py"), *package.glob("kernels/**/*.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:16]


def passed_before(key: CheckKey, warn: Callable[[str], None]) -> bool:
    """Whether the check with this key passed before. A broken cache file goes to `warn`."""
    try:
        path = _path(key)
        text = path.read_bytes()
    except OSError:  # no file yet, or a folder that cannot be used: `record_pass` will warn of that
        return False
    try:
        return bool(json.loads(text) == json.loads(_text(key)))
    except (ValueError, RecursionError) as error:
        warn(f"{path}: is broken ({error}); the check is made again")
        return False


def record_pass(key: CheckKey, warn: Callable[[str], None]) -> None:
    """Store that the check with this key passed. Processes may do so at the same time. Failures go to `warn`."""
    path: Path | str = "~/.cache/p2w"
    try:
        path = _path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}")  # other ranks write the same file
        write_atomic(temporary, _text(key))
        os.replace(temporary, path)
    except OSError as error:
        warn(
            f"{path}: cannot be written ({_reason(error)}); the next start repeats a check of some seconds. "
            "Set XDG_CACHE_HOME to a folder that you may write"
        )


def _path(key: CheckKey) -> Path:
    name = hashlib.sha256(_text(key).encode()).hexdigest()[:16]
    return cache_folder() / f"selfcheck-{name}.json"


def _text(key: CheckKey) -> str:
    return json.dumps({"sound": key}, sort_keys=True)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
