"""Random intensity transformations of parts: equal intensity statistics of the parts of one image are a shortcut.

A part's transformation is one function of intensity, drawn from (seed, epoch, id, part), and noise: it keeps what lies
where and makes brightness, contrast and histogram differ between the parts of one whole. B, K = batch, knots of a table.
"""

import functools
import math

import torch
from torch import Tensor

from p2w import geometry
from p2w.geometry import Keys
from p2w.pretext_config import IntensityConfig

KNOTS = 256  # a table is linear in between: 8 HU of a window of 2000
STEPS = 512  # points at which a Bezier curve is computed
STREAM = 1 << 40  # draws of part p come from the stream of part STREAM + p, which no box is drawn from


def transform(parts: Tensor, keys: Keys, part: int, config: IntensityConfig) -> Tensor:
    """Parts (B, 1, d, h, w) float32 in [0, 1], number `part` of each whole -> the same, transformed, in [0, 1].

    Part p of sub-scan k in epoch e is changed by a function of (seed, e, k, p) alone. At strength 0 it is `parts` itself.
    """
    if config.strength == 0:
        return parts
    u = geometry.uniforms(keys, STREAM + part, 8).float()
    changed = look_up(parts, _tables(u, config))
    deviation = config.strength * config.noise * u[:, 7]
    if config.noise == 0:
        return changed
    noise = normals(keys, 2 * STREAM + part, parts[0].numel()).view_as(parts)
    return torch.addcmul(changed, noise, deviation.view(-1, 1, 1, 1, 1)).clamp_(0, 1)


def look_up(volumes: Tensor, tables: Tensor) -> Tensor:
    """Volumes (B, ...) in [0, 1] through functions of their own, given as tables (B, K) at K even knots from 0 to 1."""
    count = tables.shape[1]
    place = volumes.reshape(len(volumes), -1) * (count - 1)
    left = place.long().clamp_(0, count - 2)
    low = tables.gather(1, left)
    return torch.lerp(low, tables.gather(1, left + 1), place - left).view(volumes.shape)


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
    (x0, y0), (x1, y1) = (curve.gather(2, place).unbind(1) for place in (at - 1, at))
    return torch.lerp(y0, y1, ((knots - x0) / (x1 - x0).clamp(min=1e-7)).clamp_(0, 1))


@functools.cache
def _basis(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the two control points and the end weigh at each of STEPS parameters, and the knots (K,); made once a device."""
    t = torch.linspace(0, 1, STEPS, device=device, dtype=dtype)
    knots = torch.linspace(0, 1, KNOTS, device=device, dtype=dtype)
    return 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3, knots


def normals(keys: Keys, part: int, count: int) -> Tensor:
    """(B, count) float32, standard normal, from the stream of part `part`."""
    u = geometry.uniforms(keys, part, count).float().clamp_(2**-24, 1 - 2**-24)
    return torch.erfinv(2 * u - 1).mul_(math.sqrt(2))


def _tables(u: Tensor, config: IntensityConfig) -> Tensor:
    """Curve, then gamma, contrast, brightness, as one table (B, K) in [0, 1]; `u` (B, 7 or more) in [0, 1]."""
    strength = config.strength
    both = 2 * u[:, 4:7, None] - 1
    knots = _basis(u.device, u.dtype)[3]
    curve = torch.lerp(knots.expand(len(u), KNOTS), bezier(u[:, :4]), strength * config.curve)
    power = (both[:, 0] * (strength * math.log(config.gamma))).exp()
    slope, shift = 1 + both[:, 1] * (strength * config.contrast), both[:, 2] * (strength * config.brightness)
    return ((curve**power - 0.5) * slope + 0.5 + shift).clamp_(0, 1)
