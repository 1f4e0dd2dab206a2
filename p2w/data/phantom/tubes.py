"""Clouds of balls: what tubes, sheets and bones are made of."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from p2w.data.phantom.frame import Floats


@dataclass(frozen=True)
class Balls:
    """Ball `points` (N, 3) in body mm (z, y, x) with `radius` (N,) mm."""

    points: Floats
    radius: Floats


def join(clouds: Sequence[Balls]) -> Balls:
    """All the balls of several clouds."""
    return Balls(np.concatenate([c.points for c in clouds]), np.concatenate([c.radius for c in clouds]))


def tube(knots: Sequence[Sequence[float]], step_mm: float) -> Balls:
    """A smooth tube (Catmull-Rom) through knots (z, y, x, radius), a ball every `step_mm`."""
    nodes = np.array([[float(value) for value in knot] for knot in knots])
    before, after = 2 * nodes[:1] - nodes[1:2], 2 * nodes[-1:] - nodes[-2:-1]
    padded = np.concatenate([before, nodes, after])
    t = np.linspace(0, 1, 12, endpoint=False)[:, None]
    curve = []
    for p, q, r, s in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        linear, square, cube = (r - p) / 2, p - 2.5 * q + 2 * r - s / 2, 1.5 * (q - r) + (s - p) / 2
        curve.append(q + t * linear + t**2 * square + t**3 * cube)
    fine = np.concatenate([*curve, nodes[-1:]])
    run = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(fine[:, :3], axis=0), axis=1))])
    at = np.append(np.arange(0, run[-1], step_mm), run[-1])
    points = np.stack([np.interp(at, run, fine[:, axis]) for axis in range(4)], axis=1)
    return Balls(points[:, :3], points[:, 3])
