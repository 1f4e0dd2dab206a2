"""Operations on batches of volumes that several pretexts share: resize, flip, cubes, random intensity.

B, D, H, W = batch, slice, row, column; d, h, w = of the network's input. N = cubes, numbered z, y, x; x runs fastest.

A part's transformation is one function of intensity, drawn from (seed, epoch, id, part), and noise: it keeps what lies
where and makes brightness, contrast and histogram differ between the parts of one whole. B, K = batch, knots of a table.
"""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2w import geometry, rng
from p2w.geometry import Size
from p2w.pretext.settings import Bounds, PretextConfig
from p2w.rng import SampleKeys, standard_normals


def resized_whole(batch_BDHW: Tensor, config: PretextConfig, real: Tensor | None = None) -> Tensor:
    """Wholes, int16 HU (B, D, H, W) -> (B, 1, d, h, w) in [0, 1]: all of each, resized to `config.size`.

    Of wholes that were filled up with air, their real part: `real` (B, 3) is `keys.real`.
    """
    boxes = geometry.whole_boxes(batch_BDHW, real)
    return geometry.crop_resize(
        batch_BDHW, boxes, config.size, window_hu=config.window_hu, antialias=config.antialias
    )


def flipped(volumes: Tensor, axes: Tensor) -> Tensor:
    """Volumes (N, d, h, w), each flipped along the axes of its own that `axes` (N, 3) bool names."""
    for axis in range(3):
        volumes = torch.where(axes[:, axis].view(-1, 1, 1, 1), volumes.flip(axis + 1), volumes)
    return volumes


def split_cubes(volumes: Tensor, grid: Size) -> Tensor:
    """(B, 1, d, h, w) -> its cubes, (B, N, d / grid, h / grid, w / grid)."""
    batch, _, *edges = volumes.shape
    a, b, c = grid
    d, h, w = (edge // count for edge, count in zip(edges, grid, strict=True))
    return volumes.reshape(batch, a, d, b, h, c, w).permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, -1, d, h, w)


def join_cubes(cubes: Tensor, grid: Size) -> Tensor:
    """The inverse of `split_cubes`."""
    batch, _, d, h, w = cubes.shape
    a, b, c = grid
    whole = cubes.view(batch, a, b, c, d, h, w).permute(0, 1, 4, 2, 5, 3, 6)
    return whole.reshape(batch, 1, a * d, b * h, c * w)


def turn_cubes(cubes: Tensor, flags: Tensor) -> Tensor:
    """Cubes (B, N, d, h, w), each turned by 180° about z where flags[..., 0], and about y where flags[..., 1].

    Both together are a turn about x: the two flags name all four orientations that half turns lead to. Quarter turns
    would need cubes of equal edges.
    """
    about_z, about_y = flags.unbind(-1)
    axes = torch.stack((about_y, about_z, about_z ^ about_y), -1)  # a half turn flips the other two axes
    return flipped(cubes.flatten(0, 1), axes.flatten(0, 1)).view_as(cubes)


@functools.cache
def cube_permutations(count: int) -> NDArray[np.int64]:
    """(count, 8): orders of eight cubes far from one another, always the same ones.

    From the identity on, the next is the one whose smallest Hamming distance to those before is largest; among equals
    the one with the largest sum of distances, then the first in lexicographic order.
    """
    every = np.array(list(itertools.permutations(range(8))), np.int8)
    chosen, nearest, total = [0], np.full(len(every), 9), np.zeros(len(every), np.int64)
    while len(chosen) < count:
        distance = (every != every[chosen[-1]]).sum(1)
        nearest, total = np.minimum(nearest, distance), total + distance
        chosen.append(int(np.argmax(nearest * (9 * len(chosen)) + total)))
    return every[chosen].astype(np.int64)


@dataclass(frozen=True)
class IntensityConfig:
    """Intensities of what the network sees are changed, those of the target are not: the paper's future work.

    Read by the proxies that cut parts (parts2whole, autoencoder, the contrastive ones). Limits hold at strength 1 and shrink
    with it [?].
    """

    strength: Annotated[float, Bounds(0, 1)] = 0.0
    """0 leaves parts as they are, 1 changes them as far as the limits below allow."""
    curve: Annotated[float, Bounds(0, 1)] = 1.0
    """Weight of a random increasing Bezier curve against the identity, 0 to 1."""
    gamma: Annotated[float, Bounds(1, 10)] = 2.0
    """Intensities to a power, log-uniform between 1 / this and this; 1 none."""
    contrast: Annotated[float, Bounds(0, 0.99)] = 0.5
    """Distances from mid-grey times 1 plus or minus up to this, below 1."""
    brightness: Annotated[float, Bounds(0, 1)] = 0.2
    """Plus or minus up to this, as a share of the window."""
    noise: Annotated[float, Bounds(0, 1)] = 0.05
    """White Gaussian noise of a standard deviation up to this, as a share of the window."""


KNOTS = 256  # a table is linear in between: 8 HU of a window of 2000
STEPS = 512  # points at which a Bezier curve is computed
STREAM = 1 << 40  # draws of part p come from the stream of part STREAM + p, which no box is drawn from


def intensity_transform(parts: Tensor, keys: SampleKeys, part: int, config: IntensityConfig) -> Tensor:
    """Parts (B, 1, d, h, w) float32 in [0, 1], number `part` of each whole -> the same, transformed, in [0, 1].

    Part p of sub-scan k in epoch e is changed by a function of (seed, e, k, p) alone. At strength 0 it is `parts` itself.
    """
    if config.strength == 0:
        return parts
    u = rng.uniforms(keys, STREAM + part, 8).float()
    changed = apply_tables(parts, _tables(u, config))
    deviation = config.strength * config.noise * u[:, 7]
    if config.noise == 0:
        return changed
    noise = standard_normals(keys, 2 * STREAM + part, parts[0].numel()).view_as(parts)
    return torch.addcmul(changed, noise, deviation.view(-1, 1, 1, 1, 1)).clamp_(0, 1)


def apply_tables(volumes: Tensor, tables: Tensor) -> Tensor:
    """Volumes (B, ...) in [0, 1] through functions of their own, given as tables (B, K) at K even knots from 0 to 1."""
    count = tables.shape[1]
    position = volumes.reshape(len(volumes), -1) * (count - 1)
    left = position.long().clamp_(0, count - 2)
    low = tables.gather(1, left)
    return torch.lerp(low, tables.gather(1, left + 1), position - left).view(volumes.shape)


def bezier(u: Tensor) -> Tensor:
    """Tables (B, K) of increasing cubic Bezier curves from (0, 0) to (1, 1); `u` (B, 4) in [0, 1]: x, y, x, y of the two
    control points. With those in the unit square both coordinates rise with the parameter, so the curve is a function."""
    first, second, third, knots = _basis(u.device, u.dtype)
    both = u.view(-1, 2, 2, 1)  # control point, then coordinate
    curve = both[:, 0] * first + both[:, 1] * second + third
    curve = curve.cummax(2).values  # (B, 2, STEPS), rising to the last bit
    knots = knots.expand(len(u), KNOTS)
    right = torch.searchsorted(curve[:, 0].contiguous(), knots.contiguous()).clamp_(1, STEPS - 1)
    at = right[:, None].expand(-1, 2, -1)
    (x0, y0), (x1, y1) = (curve.gather(2, index).unbind(1) for index in (at - 1, at))
    return torch.lerp(y0, y1, ((knots - x0) / (x1 - x0).clamp(min=1e-7)).clamp_(0, 1))


@functools.cache
def _basis(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of the two control points and the end at each of STEPS parameters, and the knots (K,); made once a device."""
    t = torch.linspace(0, 1, STEPS, device=device, dtype=dtype)
    knots = torch.linspace(0, 1, KNOTS, device=device, dtype=dtype)
    return 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3, knots


def _tables(u: Tensor, config: IntensityConfig) -> Tensor:
    """Curve, then gamma, contrast, brightness, as one table (B, K) in [0, 1]; `u` (B, 7 or more) in [0, 1]."""
    strength = config.strength
    both = 2 * u[:, 4:7, None] - 1
    knots = _basis(u.device, u.dtype)[3]
    curve = torch.lerp(knots.expand(len(u), KNOTS), bezier(u[:, :4]), strength * config.curve)
    power = (both[:, 0] * (strength * math.log(config.gamma))).exp()
    slope, shift = 1 + both[:, 1] * (strength * config.contrast), both[:, 2] * (strength * config.brightness)
    return ((curve**power - 0.5) * slope + 0.5 + shift).clamp_(0, 1)
