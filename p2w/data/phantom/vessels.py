"""Trees that fill the lungs: bronchi with arteries beside them, veins between; and the great vessels they
come from."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2w.data.phantom.body import Body
from p2w.data.phantom.frame import Floats


@dataclass(frozen=True)
class Tree:
    """Branches of one tree. `load`: how many terminal points a branch feeds."""

    start: Floats  # (M, 3) body mm
    bend: Floats  # (M, 3) control point: leaves in the parent's direction
    end: Floats  # (M, 3)
    load: NDArray[np.intp]  # (M,)
    parent: NDArray[np.intp]  # (M,) -1 for the root

    def samples(self, radius: Floats, step_mm: float) -> tuple[Floats, Floats, NDArray[np.intp]]:
        """Points along all branches: positions (N, 3), radii (N,), branch numbers (N,). radius: (M,) at the
        branch."""
        length = np.linalg.norm(self.end - self.start, axis=1)
        count = np.maximum(2, np.ceil(length / np.maximum(step_mm, radius * 0.4))).astype(int)
        branch = np.repeat(np.arange(len(count)), count)
        order = np.arange(len(branch)) - np.repeat(np.cumsum(count) - count, count)
        t = (order / count[branch])[:, None]
        points = (
            (1 - t) ** 2 * self.start[branch] + 2 * t * (1 - t) * self.bend[branch] + t**2 * self.end[branch]
        )
        before = np.where(self.parent >= 0, np.minimum(radius[self.parent], radius * 1.3), radius)
        return points, before[branch] + (radius - before)[branch] * np.minimum(1, 2 * t[:, 0]), branch


def grow(
    rng: np.random.Generator, root: Floats, direction: Floats, seeds: Floats, step: tuple[float, float]
) -> Tree:
    """A tree from `root` that reaches all `seeds` (N, 3): each branch goes part of the way to the middle of
    its seeds and parts them.

    The volume-filling rule of Tawhai et al. (2000, doi 10.1114/1.1289457), all branches of a generation at
    once.
    """
    owner = np.zeros(len(seeds), np.intp)
    tips, heads = root[None].astype(float), direction[None] / np.linalg.norm(direction)
    number = np.array([-1])  # of the branch that ends in each tip
    parts: list[tuple[Floats, Floats, Floats, NDArray[np.intp], NDArray[np.intp]]] = []
    made = 0
    for _ in range(40):
        count = np.bincount(owner, minlength=len(tips))
        middle = _mean(seeds, owner, count)
        away = middle - tips
        reach = np.linalg.norm(away, axis=1, keepdims=True) + 1e-6
        heading = away / reach + 0.3 * heads + rng.normal(0, 0.07, away.shape)
        heading /= np.linalg.norm(heading, axis=1, keepdims=True)
        last = (count == 1)[:, None]
        length = reach * np.where(last, 0.9, rng.uniform(*step, size=(len(tips), 1)))
        length = np.maximum(length, 2.0)
        ends = tips + np.where(last, away / reach, heading) * length
        parts.append((tips, tips + heads * length * 0.4, ends, count, number))
        mine = np.arange(made, made + len(tips))
        made += len(tips)
        go_on = count[owner] > 1
        seeds, owner = seeds[go_on], owner[go_on]
        if not len(seeds):
            break
        axis = _split_axes(seeds, owner, middle, ends - tips, tips=len(tips), rng=rng)
        side = ((seeds - middle[owner]) * axis[owner]).sum(axis=1) > 0
        alive, owner = np.unique(owner * 2 + side, return_inverse=True)
        tips, number, heads = ends[alive // 2], mine[alive // 2], heading[alive // 2]
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Tree(*columns)


def _mean(points: Floats, owner: NDArray[np.intp], count: NDArray[np.intp]) -> Floats:
    sums = [np.bincount(owner, points[:, a], len(count)) for a in range(3)]
    return np.stack(sums, axis=1) / np.maximum(count, 1)[:, None]


def _split_axes(
    seeds: Floats,
    owner: NDArray[np.intp],
    middle: Floats,
    ways: Floats,
    *,
    tips: int,
    rng: np.random.Generator,
) -> Floats:
    """For each tip the direction (3,) in which its seeds spread most, across the way it came."""
    off = seeds - middle[owner]
    spread = np.empty((tips, 3, 3))
    for i in range(3):
        for j in range(i, 3):
            spread[:, i, j] = spread[:, j, i] = np.bincount(owner, off[:, i] * off[:, j], tips)
    way = ways / np.linalg.norm(ways, axis=1, keepdims=True)
    across = np.eye(3) - 0.8 * way[:, :, None] * way[:, None, :]
    axis = np.linalg.eigh(across @ spread @ across)[1][:, :, 2]
    axis *= np.sign(axis[np.arange(tips), np.abs(axis).argmax(axis=1)])[:, None]  # eigh leaves the sign open
    return axis + rng.normal(0, 0.12, axis.shape)


def along(
    knots: list[tuple[float, float, float]], step_mm: float, radius: list[float]
) -> tuple[Floats, Floats]:
    """A smooth tube through body points: positions (N, 3) and radii (N,)."""
    nodes = np.array(knots)
    if len(nodes) > 2:  # Catmull-Rom
        padded = np.concatenate([2 * nodes[:1] - nodes[1:2], nodes, 2 * nodes[-1:] - nodes[-2:-1]])
        t = np.linspace(0, 1, 12, endpoint=False)[:, None]
        curve = []
        for p, q, r, s in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
            curve.append(
                q
                + t * (r - p) / 2
                + t**2 * (p - 2.5 * q + 2 * r - s / 2)
                + t**3 * (1.5 * (q - r) + (s - p) / 2)
            )
        fine = np.concatenate([*curve, nodes[-1:]])
        widths = np.interp(np.arange(len(fine)) / 12, np.arange(len(nodes)), radius)
    else:
        fine, widths = nodes, np.array(radius, float)
    run = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(fine, axis=0), axis=1))])
    at = np.arange(0, run[-1] + step_mm, step_mm).clip(max=run[-1])
    return np.stack([np.interp(at, run, fine[:, a]) for a in range(3)], axis=1), np.interp(at, run, widths)


@dataclass(frozen=True)
class GreatVessels:
    """Tubes in the mediastinum, each as positions (N, 3) and radii (N,), and where the lungs' trees start."""

    trachea: tuple[Floats, Floats]
    aorta: tuple[Floats, Floats]
    others: tuple[Floats, Floats]
    oesophagus: tuple[Floats, Floats]
    roots: dict[tuple[str, str], tuple[Floats, Floats]]  # (tree, side) -> point, direction


def great_vessels(body: Body, rng: np.random.Generator, top: float, bottom: float) -> GreatVessels:
    """The mediastinum's tubes between heights `bottom` and `top`."""
    j = lambda: rng.normal(0, 2.0)  # noqa: E731  # nobody's vessels run the same way twice
    c, a, r = body.carina, body.arch, body.aorta
    spine = lambda z: float(body.spine(np.float64(z))[0])  # noqa: E731
    z0 = body.dome_left + 27 * body.heart
    bronchi = {"right": (c - 14 + j(), 11 + j(), -26 + j()), "left": (c - 20 + j(), 15 + j(), 32 + j())}
    wind = [
        along(
            [(top, spine(top) * 0.35, 0 + j()), (60, spine(60) * 0.3 - 2, 1), (c, 8, 1)],
            1.5,
            [body.trachea] * 3,
        )
    ]
    wind += [
        along([(c, 8, 1), (b[0] * 0.5 + c * 0.5 - 1, b[1] - 1, b[2] * 0.55), b], 1.2, [7.0, 6.5, 5.6])
        for b in bronchi.values()
    ]
    down = [
        (z, spine(z) - 14 + j() * 0.5, 20 + j() * 0.5 - 10 * (z < -110))
        for z in np.linspace(a - 22, bottom, 6)
    ]
    aorta = along(
        [
            (z0 + 22, -8, 10),
            (z0 + 45, -20, -8),
            (a - 26, -18, -12),
            (a - 3 - r, -6 + j(), 2 + j()),
            (a - r - 5, 16 + j(), 18),
            *down,
        ],
        2.0,
        [r * 1.15, r * 1.2, r * 1.15, r * 1.05, r, *[r * 0.9] * 6],
    )
    fork = (c - 14 + j(), -12 + j(), 12 + j())
    tubes = [
        along([(z0 + 12, -42, 16), (z0 + 34, -34, 18), fork], 2.0, [13, 13, 12]),
        along([fork, (c - 15, -2, -10), (c - 17, 2, -36)], 1.6, [10, 9.5, 7.5]),
        along([fork, (c - 10, 4, 26), (c - 14, 12, 40)], 1.6, [10, 9.5, 8]),
        along(
            [(z0 + 20, -6, -30), (c, -8, -26), (a, -12 + j(), -24), (a + 30, -14, -20), (top, -10, -34)],
            2.0,
            [9.5, 9, 8, 7.5, 6],
        ),
        along(
            [(a + 26, -14, -20), (a + 12, -20, 0), (a + 26, -14, 28), (top, -10, 42)], 1.6, [6.5, 6, 6, 5.5]
        ),
        along([(a - r, -8, 0), (a + 25, -6, -10), (top, -2, -20)], 1.6, [6, 5.5, 4.5]),
        along([(a - r, 0, 6), (a + 25, 2, 14), (top, 4, 18)], 1.6, [4.5, 4, 3.5]),
        along([(a - r, 10, 14), (a + 25, 14, 24), (top, 12, 34)], 1.6, [5, 5, 4.5]),
        along([(z0 - 16, 8, -26), (z0 - 60, 14, -18), (bottom, 22, -16)], 2.0, [11.5, 11.5, 11]),
    ]
    gullet = along(
        [
            (top, spine(top) - 17, 4),
            (40, spine(40) - 20, 5),
            (-40, spine(-40) - 26, 6),
            (-90, spine(-90) - 34, 16),
        ],
        2.0,
        [6.5, 6.5, 7, 8],
    )
    roots = {}
    for side, sign in (("right", -1.0), ("left", 1.0)):
        out = np.array([-0.35, 0.1, sign])
        roots["airway", side] = (np.array(bronchi[side]), out)
        roots["vein", side] = (np.array([z0 + 22.0, 16.0, 22.0 * sign - 2]), np.array([-0.1, 0.2, sign]))
    return GreatVessels(_join(wind), aorta, _join(tubes), gullet, roots)


def _join(tubes: list[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    return np.concatenate([p for p, _ in tubes]), np.concatenate([r for _, r in tubes])
