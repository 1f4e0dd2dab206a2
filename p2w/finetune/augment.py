"""Augmentation of a batch of samples on its device: random numbers by keys, then deterministic transforms.

Each transform has a probability; 0 leaves it out. In this order: mirror; rotate and scale, in one resampling pass;
brightness, contrast, gamma, blur, low resolution, noise; then values are limited to [0, 1] again. What is drawn for a sample
depends on (seed, epoch, number of the sample in the epoch) alone, not on ranks, restarts or which other transforms are on.
All channels of a sample are treated alike. Masks move along with the image, each voxel with the value of the nearest voxel.

Shapes: B, C, D, H, W = batch, channel, slice, row, column; axes are z, y, x; images in [0, 1].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, pad

from p2w.errors import UserError
from p2w.rng import SampleKeys, standard_normals, uniforms

DRAWS, NOISE = 0, 1  # which stream draws what
AXES = "zyx"


@dataclass(frozen=True)
class Augmentation:
    """Probability of each transform, and how far it goes. The defaults change nothing."""

    flip: float = 0.0
    """Probability of mirroring along each axis of flip_axes."""
    flip_axes: str = "zyx"
    """Axes along which samples may be mirrored; leave out x where left and right are different classes."""
    rotation: float = 0.0
    """Probability of a rotation about the sample's centre, in mm."""
    rotation_degrees: float = 30.0
    """Largest angle about each of the three axes."""
    scaling: float = 0.0
    """Probability of making everything in a sample larger or smaller."""
    scaling_factor: float = 1.4
    """Largest factor, at least 1; log-uniform from its inverse to it."""
    brightness: float = 0.0
    """Probability of adding a constant."""
    brightness_shift: float = 0.025
    """Largest constant, either way, as a share of the window: 0.025 is 50 HU of [-1000, 1000]."""
    contrast: float = 0.0
    """Probability of multiplying the distances from the mean of each channel."""
    contrast_change: float = 0.25
    """Factor: uniform within 1 - this and 1 + this."""
    gamma: float = 0.0
    """Probability of raising values to a power; each channel keeps its mean and deviation."""
    gamma_factor: float = 1.5
    """Largest power, at least 1; log-uniform from its inverse to it."""
    blur: float = 0.0
    """Probability of a Gaussian blur."""
    blur_voxels: float = 1.0
    """Largest standard deviation, voxels; uniform from half of it."""
    low_resolution: float = 0.0
    """Probability of taking fewer voxels (the nearest) along each axis, and interpolating linearly between them."""
    low_resolution_share: float = 0.5
    """Smallest share of the voxels of an edge, above 0; uniform up to 1."""
    noise: float = 0.0
    """Probability of Gaussian noise."""
    noise_std: float = 0.025
    """Largest standard deviation, as a share of the window: 0.025 is 50 HU of [-1000, 1000]; uniform from 0."""

    @property
    def on(self) -> bool:
        """Whether any transform has a probability above 0."""
        return any(getattr(self, name) > 0 for name in PROBABILITIES)

    def check(self, where: str = "--recipe.augment") -> None:
        """Raise UserError naming setting, rule and value where a number makes no sense."""
        lowest = {
            "scaling_factor": 1.0,
            "gamma_factor": 1.0,
            "low_resolution_share": 1e-3,
            "blur_voxels": 1e-3,
        }
        highest = {
            "rotation_degrees": 180.0,
            "scaling_factor": 10.0,
            "gamma_factor": 100.0,
            "blur_voxels": 10.0,
        }
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            option = f"{where}.{name.replace('_', '-')} {value}"
            if name == "flip_axes":
                if not value or set(value) - set(AXES) or len(set(value)) < len(value):
                    raise UserError(f"{option}: some of the letters z, y and x, each once, such as yx")
                continue
            low, high = lowest.get(name, 0.0), highest.get(name, 1.0)
            if not low <= value <= high:  # NaN among them
                raise UserError(f"{option}: must be from {low:g} to {high:g}")


PROBABILITIES = (
    "flip", "rotation", "scaling", "brightness", "contrast", "gamma", "blur", "low_resolution", "noise",
)  # fmt: skip

USUAL = Augmentation(
    rotation=0.2, scaling=0.2, brightness=0.15, contrast=0.15, gamma=0.3, blur=0.2, low_resolution=0.25, noise=0.1,
)  # fmt: skip
"""nnU-Net's probabilities (Isensee et al. 2021) without mirroring; ranges for values in [0, 1] are our choice.

Scans are brought to one orientation, so that no mirrored body is ever predicted, and learning those took more steps than
short trials have (docs/finetune_recipes.md)."""


@dataclass(frozen=True)
class Drawn:
    """What was drawn for a batch: (B,) bool whether a transform is applied, and (B,) or (B, 3) float64 how."""

    flips: Tensor  # (B, 3) bool, z, y, x
    moved: Tensor  # rotated or scaled
    angles: Tensor  # (B, 3) radians about z, y, x
    factor: Tensor  # by which everything gets larger
    amount: dict[str, tuple[Tensor, Tensor]]  # of the others by name: applied, and how much
    keys: SampleKeys


def draw(settings: Augmentation, keys: SampleKeys) -> Drawn:
    """The random numbers of a batch, on the device of `keys.ids`.

    Every number has a place of its own in a sample's stream, so that none changes when another transform is switched on.
    """
    u = uniforms(keys, DRAWS, 21)
    flips = [u[:, k] < settings.flip * (axis in settings.flip_axes) for k, axis in enumerate(AXES)]
    rotated, scaled = u[:, 3] < settings.rotation, u[:, 7] < settings.scaling
    angles = (2 * u[:, 4:7] - 1) * (math.radians(settings.rotation_degrees) * rotated[:, None])
    factor = ((2 * u[:, 8] - 1) * (math.log(settings.scaling_factor) * scaled)).exp()
    ranges: dict[str, Callable[[Tensor], Tensor]] = {
        "brightness": lambda v: (2 * v - 1) * settings.brightness_shift,
        "contrast": lambda v: 1 + (2 * v - 1) * settings.contrast_change,
        "gamma": lambda v: ((2 * v - 1) * math.log(settings.gamma_factor)).exp(),
        "blur": lambda v: (0.5 + 0.5 * v) * settings.blur_voxels,
        "low_resolution": lambda v: settings.low_resolution_share + v * (1 - settings.low_resolution_share),
        "noise": lambda v: v * settings.noise_std,
    }
    amount = {
        name: (u[:, at] < getattr(settings, name), how(u[:, at + 1]))
        for at, (name, how) in zip(range(9, 21, 2), ranges.items(), strict=True)
        if getattr(settings, name) > 0
    }
    return Drawn(torch.stack(flips, 1), rotated | scaled, angles, factor, amount, keys)


@torch.no_grad()
def augment(
    x: Tensor, target: Tensor, settings: Augmentation, keys: SampleKeys, spacing_mm: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Images (B, C, D, H, W) float32 in [0, 1] and their targets -> the same, augmented.

    Targets of five axes are masks or label maps (B, K, D, H, W) and move with the image; others stay. `spacing_mm` (B, 3)
    is that of the voxels along z, y, x: rotations are rigid in mm. None: voxels are cubes.
    """
    drawn = draw(settings, keys)
    maps = target.ndim == 5
    if settings.flip > 0:
        x = mirrored(x, drawn.flips)
        target = mirrored(target, drawn.flips) if maps else target
    if settings.rotation > 0 or settings.scaling > 0:
        matrix = source_matrix(drawn, spacing_mm)
        if maps:
            target = resampled(target, matrix, drawn.moved, "nearest")
        x = resampled(x, matrix, drawn.moved, "bilinear")
    for name, (chosen, how) in drawn.amount.items():
        if name == "noise":
            x = _noisy(x, chosen, how, keys)
        else:
            radius = math.ceil(3 * settings.blur_voxels)
            x = _where(chosen, x, INTENSITIES[name] if name != "blur" else _blur_of(radius), how)
    return (x.clamp(0, 1) if drawn.amount else x), target


def mirrored(volumes: Tensor, flips: Tensor) -> Tensor:
    """Volumes (B, C, D, H, W) of any type mirrored along the axes that `flips` (B, 3) says; exact."""
    for axis in range(3):
        volumes = torch.where(_column(flips[:, axis]), volumes.flip(axis + 2), volumes)
    return volumes


def source_matrix(drawn: Drawn, spacing_mm: Tensor | None) -> Tensor:
    """(B, 3, 3) float64: offset z, y, x in voxels from the centre of the result -> offset from the centre of the source.

    The rotation is about z, then y, then x, right-handed in mm; the inverse of what happens to the image.
    """
    sine, cosine = drawn.angles.sin(), drawn.angles.cos()
    zero, one = torch.zeros_like(sine[:, 0]), torch.ones_like(sine[:, 0])
    rotation = None
    for k, (first, second) in enumerate(((1, 2), (2, 0), (0, 1))):  # the plane that turns about z, y, x
        rows = [[one if i == j else zero for j in range(3)] for i in range(3)]
        rows[first][first] = rows[second][second] = cosine[:, k]
        rows[first][second], rows[second][first] = sine[:, k], -sine[:, k]
        turn = torch.stack([torch.stack(row, -1) for row in rows], -2)
        rotation = turn if rotation is None else turn @ rotation
    assert rotation is not None
    back = rotation.transpose(1, 2) / drawn.factor[:, None, None]
    if spacing_mm is None:
        return back
    spacing = spacing_mm.to(back)
    return back * spacing[:, None, :] / spacing[:, :, None]


def resampled(volumes: Tensor, matrix: Tensor, moved: Tensor, mode: str) -> Tensor:
    """Volumes (B, C, D, H, W) where voxel c + o takes the value at c + matrix o of its source, c the centre.

    Those that `moved` (B,) does not name stay as they are.

    `mode` is "bilinear" (between eight voxels) or "nearest". Beyond the border lies the value of the border's voxel.
    """

    def resample(part: Tensor, its: Tensor) -> Tensor:
        half = [max(edge - 1, 1) / 2 for edge in part.shape[2:]]  # offsets become shares of half an edge
        # torch's order is x, y, z
        rows = [[its[:, i, j] * (half[j] / half[i]) for j in (2, 1, 0)] for i in (2, 1, 0)]
        theta = torch.stack([torch.stack([*row, torch.zeros_like(row[0])], 1) for row in rows], 1)
        grid = affine_grid(theta.float(), list(part.shape), align_corners=True)
        found = grid_sample(part.float(), grid, mode=mode, padding_mode="border", align_corners=True)
        return found.to(part.dtype)

    return _where(moved, volumes, resample, matrix)


def _brightness(x: Tensor, shift: Tensor) -> Tensor:
    return x + shift


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = x.mean((2, 3, 4), keepdim=True)
    return (x - mean) * factor + mean


def _gamma(x: Tensor, power: Tensor) -> Tensor:
    made = x.clamp(0, 1) ** power
    (mean, deviation), (before, spread) = _moments(made), _moments(x)
    return (made - mean) * (spread / deviation.clamp(min=1e-6)) + before


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (B, C, 1, 1, 1) of each channel."""
    mean = x.mean((2, 3, 4), keepdim=True)
    return mean, (x - mean).square().mean((2, 3, 4), keepdim=True).sqrt()


def _blur_of(radius: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A blur by standard deviations (B, 1, 1, 1, 1) voxels, cut off after `radius` voxels; beyond the border its value."""

    def blur(x: Tensor, sigma: Tensor) -> Tensor:
        offsets = torch.arange(-radius, radius + 1, device=x.device)
        weights = (-(offsets**2) / (2 * sigma.double() ** 2)).exp()  # (B, 1, 1, 1, taps)
        weights = (weights / weights.sum(-1, keepdim=True)).float()
        for axis in (2, 3, 4):
            around = [0, 0, 0, 0, 0, 0]
            around[2 * (4 - axis)] = around[2 * (4 - axis) + 1] = radius
            wide, edge = pad(x, around, mode="replicate"), x.shape[axis]
            parts = (wide.narrow(axis, k, edge) * weights[..., k : k + 1] for k in range(2 * radius + 1))
            x = sum(parts, torch.zeros_like(x))
        return x

    return blur


def _low_resolution(x: Tensor, share: Tensor) -> Tensor:
    """Along each axis of n voxels: m = share n of them, and linear interpolation. Indices are exact whole numbers."""
    for axis in (2, 3, 4):
        n = x.shape[axis]
        m = (share.double().flatten() * n + 0.5).floor().long().clamp(1, n)[:, None]
        # 2 n times the index among the m
        at = ((2 * torch.arange(n, device=x.device) + 1) * m - n).clamp(min=0)
        at = torch.minimum(at, 2 * n * (m - 1))
        low = at // (2 * n)
        weight = ((at - low * 2 * n).double() / (2 * n)).float()
        shape = [len(x), 1, 1, 1, 1]
        shape[axis] = n
        low, high, weight = (v.view(shape) for v in (low, torch.minimum(low + 1, m - 1), weight))
        of = m.view(-1, 1, 1, 1, 1)
        near = [(2 * node + 1) * n // (2 * of) for node in (low, high)]
        below, above = (x.gather(axis, index.expand_as(x)) for index in near)
        x = below + (above - below) * weight
    return x


INTENSITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": _brightness,
    "contrast": _contrast,
    "gamma": _gamma,
    "low_resolution": _low_resolution,
}


def _noisy(x: Tensor, chosen: Tensor, std: Tensor, keys: SampleKeys) -> Tensor:
    """Add noise, drawn for the chosen samples alone on a CPU; on a GPU choosing would wait for it."""
    if x.device.type == "cpu":
        rows = chosen.nonzero()[:, 0]
        if not len(rows):
            return x
        names = SampleKeys(keys.seed, keys.epoch, keys.ids[rows])
        made = x.clone()
        made[rows] += (
            standard_normals(names, NOISE, x[0].numel()).view_as(x[rows]) * _column(std[rows]).float()
        )
        return made
    drawn = standard_normals(keys, NOISE, x[0].numel()).view_as(x)
    return torch.where(_column(chosen), x + drawn * _column(std).float(), x)


def _where(chosen: Tensor, x: Tensor, transform: Callable[[Tensor, Tensor], Tensor], how: Tensor) -> Tensor:
    """`transform(x, how)` of the chosen samples; the others keep their bits. `how` (B,) is given as (B, 1, 1, 1, 1)."""
    how = how if how.ndim > 1 else _column(how).float()
    if x.device.type == "cpu":
        rows = chosen.nonzero()[:, 0]
        if not len(rows):
            return x
        made = x.clone()
        made[rows] = transform(x[rows], how[rows])
        return made
    return torch.where(_column(chosen), transform(x, how), x)


def _column(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1, 1)
