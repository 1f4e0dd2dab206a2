"""Before the first step: are the crop-resize and the network's arithmetic right on this machine?

A kernel that is off by half a voxel, or a bf16 convolution that is wrong (some cuDNN 9 releases for 3D, oneDNN in torch
2.13 for the weight gradient of maps of two slices), trains without a complaint, to something else. So every start compares

- the crop-resize that will be used with the sums of p2w.geometry's docstring, as dense float64 matrices, on noise:
  CROP_BOUND of the window;
- with bf16 or fp16, the run's own network, forward and backward, with itself in float32 (no TF32): OUTPUT_BOUND for the
  output's relative difference, COSINE_BOUND for the cosine of each convolution kernel's gradient.

The network, its buffers and gradients, and torch's random numbers are left as they were, bit for bit.
"""

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from p2w import geometry
from p2w.config import PretextConfig
from p2w.errors import UserError
from p2w.geometry import Keys
from p2w.train.optim import Precision
from p2w.world import World

CROP_BOUND = 1e-5
OUTPUT_BOUND = 0.15
COSINE_BOUND = 0.5  # bf16 alone turns early gradients by 35 degrees, through the choices of max-pooling
FAINT = 1e-3  # a gradient this small beside the largest is rounding: a bias before batch norm has none


def check(
    model: nn.Module, config: PretextConfig, shape: geometry.Size, precision: Precision, world: World
) -> str:
    """One line for the log. `shape` (D, H, W) of the wholes. Raises UserError naming what differs by how much."""
    began = time.monotonic()
    name, _ = geometry.backend(world.device)
    said = [f"crop-resize ({name}) within {check_crop(config, shape, world):.0e} of float64"]
    if precision.dtype is not None:
        output, cosine = check_precision(model, config, precision, world)
        said.append(f"{precision.name} within {output:.1%} of fp32, gradients' cosine {cosine:.3f} or more")
    return f"self-check: {', '.join(said)} ({time.monotonic() - began:.1f} s)"


def check_crop(config: PretextConfig, shape: geometry.Size, world: World) -> float:
    """Largest difference, as a share of the window, of a part and its whole. Raises UserError when it is too large."""
    generator = torch.Generator().manual_seed(0)
    low, high = config.window_hu
    if world.device.type == "cpu":  # enough of a whole to find a wrong weight in
        shape = (min(shape[0], 32), min(shape[1], 48), min(shape[2], 48))
    noise = torch.rand((2, *shape), generator=generator) * 1.2 - 0.1  # some of it outside the window
    wholes = (noise * (high - low) + low).clamp(-32000, 32000).to(torch.int16)
    ids = torch.tensor([3, 5])
    boxes = geometry.sample_boxes(Keys(1, 2, ids), 0, shape, config.volume_fraction, config.aspect_range)
    out = tuple(torch.full((2, 1, *config.size), torch.nan, device=world.device) for _ in range(2))
    part, target = geometry.part_and_whole(
        wholes.to(world.device), boxes.to(world.device), config.size, window_hu=config.window_hu,
        antialias=config.antialias, out=(out[0], out[1]),
    )  # fmt: skip
    full = torch.tensor([[0.0, 0.0, 0.0, *shape]]).expand(2, 6)
    worst = 0.0
    for found, edges in ((part, boxes), (target, full)):
        expected = torch.stack([_resized(w, b, config) for w, b in zip(wholes, edges, strict=True)])
        difference = (found[:, 0].cpu().double() - expected).abs().nan_to_num(torch.inf)
        worst = max(worst, float(difference.max()))
    if not worst <= CROP_BOUND:
        name, _ = geometry.backend(world.device)
        remedy = "uninstall triton to use torch's" if name == "triton" else "install another torch"
        raise UserError(
            f"rank {world.rank} on {world.host}: self-check: the crop-resize ({name}) differs from a float64 reference by "
            f"{worst:.1e} of the window, the bound is {CROP_BOUND:g}; {remedy}, and report it"
        )
    return worst


def _resized(whole: Tensor, box: Tensor, config: PretextConfig) -> Tensor:
    """Box (6,) of whole (D, H, W) as p2w.geometry words it: a dense matrix an axis, float64, on the CPU."""
    low, high = config.window_hu
    levels = (whole.double().clamp(low, high) - low) / (high - low)
    matrices = []
    for axis, (size, length) in enumerate(zip(config.size, whole.shape, strict=True)):
        start, end = float(box[axis]), float(box[axis + 3])
        scale = (end - start) / size
        reach = max(1.0, scale) if config.antialias else 1.0
        centre = start + (torch.arange(size, dtype=torch.float64)[:, None] + 0.5) * scale
        voxel = torch.arange(length, dtype=torch.float64)
        weight = (1 - (voxel + 0.5 - centre).abs() / reach).clamp(min=0)
        weight *= (voxel + 1 > start) & (voxel < end)  # voxels that the box touches
        matrices.append(weight / weight.sum(1, keepdim=True))
    z, y, x = matrices
    return torch.einsum("az,by,zyc->abc", z, y, levels @ x.T)


def check_precision(
    model: nn.Module, config: PretextConfig, precision: Precision, world: World
) -> tuple[float, float]:
    """(relative difference of the output, lowest cosine of a convolution kernel's gradient) of `precision` and float32.

    Raises UserError when either is out of bounds.
    """
    # A GPU's convolutions are chosen by shape, so there it is the run's own; on a CPU that would take seconds.
    size = config.size if world.device.type == "cuda" else tuple(min(edge, 16) for edge in config.size)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand((4, 1, *(edge // 8 + 1 for edge in size)), generator=generator)
    smooth = nn.functional.interpolate(coarse, size, mode="trilinear", align_corners=True).to(world.device)
    images, wanted = smooth[:2], smooth[2:]
    with _untouched(model):
        exact, gradients = _pass(model, images, wanted, None)
        output, found = _pass(model, images, wanted, precision.dtype)
    spread = (exact - exact.mean()).norm()
    difference = float((output - exact).norm() / spread)
    largest = max(float(gradient.norm()) for gradient in gradients.values())
    cosines = {
        name: float(torch.cosine_similarity(gradient.flatten(), found[name].flatten(), dim=0))
        for name, gradient in gradients.items()
        if gradient.ndim == 5 and float(gradient.norm()) > FAINT * largest
    }
    worst = min(cosines, key=lambda name: cosines[name] if cosines[name] == cosines[name] else -2.0)
    if not (difference <= OUTPUT_BOUND and cosines[worst] >= COSINE_BOUND):
        raise UserError(
            f"rank {world.rank} on {world.host}: self-check: the network in {precision.name} differs from fp32: output by "
            f"{difference:.1%} (bound {OUTPUT_BOUND:.0%}), gradient of {worst} has cosine {cosines[worst]:.3f} (bound "
            f"{COSINE_BOUND}); pass --train.amp fp32, or install another cuDNN or torch"
        )
    return difference, cosines[worst]


def _pass(
    model: nn.Module, images: Tensor, wanted: Tensor, dtype: torch.dtype | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and gradient by parameter, of one forward and backward pass, in float32 on the device."""
    model.zero_grad(set_to_none=True)
    kind = images.device.type
    with torch.autocast(kind, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        output = model(images)
    scale = 2.0**10 if dtype == torch.float16 else 1.0  # as GradScaler does, or small gradients vanish
    ((output.float() - wanted).square().mean() * scale).backward()
    gradients = {name: p.grad.float() / scale for name, p in model.named_parameters() if p.grad is not None}
    return output.detach().float(), gradients


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Put buffers, gradients, mode, random numbers and TF32 back as they were."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gradients = [(p, p.grad) for p in model.parameters()]
    training, matmul = model.training, torch.backends.cuda.matmul.allow_tf32
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        torch.backends.cuda.matmul.allow_tf32 = False
        with torch.random.fork_rng(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            model.train()
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul
        model.train(training)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for parameter, gradient in gradients:
            parameter.grad = gradient
