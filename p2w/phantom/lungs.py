"""The inside of the lungs, vessels and airways as growing trees, and the tubes of the mediastinum between them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from p2w.phantom.body import Balls, Body, Floats, Frame, Label, join_balls, tube
from p2w.phantom.canvas import Canvas
from p2w.phantom.organs import Cavity


@dataclass(frozen=True)
class Tree:
    """Branches of one tree. `load` is the number of terminal points that a branch supplies."""

    start: Floats  # (M, 3) body mm
    bend: Floats  # (M, 3) control point: leaves in the parent's direction
    end: Floats  # (M, 3)
    load: NDArray[np.intp]  # (M,)
    parent: NDArray[np.intp]  # (M,) -1 for the root

    def samples(self, radius: Floats, step_mm: float) -> tuple[Balls, NDArray[np.intp]]:
        """Balls along all branches of `radius` (M,) mm, and the branch (N,) each is on."""
        length = np.linalg.norm(self.end - self.start, axis=1)
        count = np.maximum(2, np.ceil(length / np.maximum(step_mm, radius * 0.4))).astype(int)
        branch = np.repeat(np.arange(len(count)), count)
        order = np.arange(len(branch)) - np.repeat(np.cumsum(count) - count, count)
        t = (order / count[branch])[:, None]
        points = (
            (1 - t) ** 2 * self.start[branch] + 2 * t * (1 - t) * self.bend[branch] + t**2 * self.end[branch]
        )
        before = np.where(self.parent >= 0, np.minimum(radius[self.parent], radius * 1.3), radius)
        return Balls(points, before[branch] + (radius - before)[branch] * np.minimum(1, 2 * t[:, 0])), branch


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
    """For each tip the direction (3,) in which its seeds spread most, at right angles to the tip's branch."""
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


_TOP, _BOTTOM = 150.0, -220.0  # z: beyond any scan of a chest


@dataclass(frozen=True)
class Mediastinum:
    """Tubes of the mediastinum, and the roots of the lung trees: (tree, side) -> point (3,), direction (3,)."""

    windpipe: Balls
    aorta: Balls
    vessels: Balls
    oesophagus: Balls
    roots: dict[tuple[str, str], tuple[Floats, Floats]]


def lay_tubes(body: Body, rng: np.random.Generator) -> Mediastinum:
    """Draw all tubes of one body, with random variations."""
    heart_z = body.dome_left + 27 * body.heart
    carina = body.carina
    shift = rng.normal(0, 2.0, (2, 3))
    right = np.array([carina - 14, 11, -26]) + shift[0]
    left = np.array([carina - 20, 15, 32]) + shift[1]
    roots = {}
    for side, sign, end in (("right", -1.0, right), ("left", 1.0, left)):
        roots["airway", side] = (end, np.array([-0.35, 0.1, sign]))
        roots["vein", side] = (np.array([heart_z + 22, 16, 22 * sign - 2]), np.array([-0.1, 0.2, sign]))
    return Mediastinum(
        windpipe=_windpipe(body, rng, [right, left]),
        aorta=_aorta(body, rng, heart_z),
        vessels=join_balls([*_pulmonary(body, rng, heart_z), *_veins_and_branches(body, rng, heart_z)]),
        oesophagus=tube(
            [
                (_TOP, _spine(body, _TOP) - 17, 4, 6.5),
                (40, _spine(body, 40) - 20, 5, 6.5),
                (-40, _spine(body, -40) - 26, 6, 7),
                (-90, _spine(body, -90) - 34, 16, 8),
            ],
            2.0,
        ),
        roots=roots,
    )


def _spine(body: Body, z: float) -> float:
    return float(body.spine(z)[0])


def _windpipe(body: Body, rng: np.random.Generator, ends: list[Floats]) -> Balls:
    """Trachea and the two main bronchi."""
    z, wide = body.carina, body.trachea
    top = (_TOP, _spine(body, _TOP) * 0.35, rng.normal(0, 2), wide)
    parts = [tube([top, (60, _spine(body, 60) * 0.3 - 2, 1, wide), (z, 8, 1, wide)], 1.5)]
    for end in ends:
        half = (end[0] * 0.5 + z * 0.5 - 1, end[1] - 1, end[2] * 0.55, 6.5)
        parts.append(tube([(z, 8, 1, 7.0), half, (*end, 5.6)], 1.2))
    return join_balls(parts)


def _aorta(body: Body, rng: np.random.Generator, heart_z: float) -> Balls:
    """The aorta: up from the heart, over the arch to the left and back, and down in front of the spine."""
    top, r = body.arch, body.aorta
    j = rng.normal(0, 2.0, 3)
    rise = [
        (heart_z + 22, -12, 10, r * 1.15),
        (heart_z + 45, -22, -8, r * 1.2),
        (top - 26, -18, -12, r * 1.15),
        (top - 3 - r, -6 + j[0], 2 + j[1], r * 1.05),
        (top - r - 5, 16 + j[2], 18, r),
    ]
    fall = [
        (z, _spine(body, z) - 14 + rng.normal(), 20 + rng.normal() - (10 if z < -110 else 0), r * 0.9)
        for z in np.linspace(top - 22, _BOTTOM, 7)
    ]
    return tube([*rise, *fall], 2.0)


def plaques(body: Body, aorta: Balls, rng: np.random.Generator) -> Balls:
    """Calcified plaques on the wall of the aorta, from its arch downwards."""
    low = np.flatnonzero(aorta.points[:, 0] < body.arch - body.aorta)
    at = low[rng.integers(0, len(low), body.plaques)]
    way = rng.normal(size=(body.plaques, 3)) * [0.0, 1.0, 1.0]
    way /= np.linalg.norm(way, axis=1, keepdims=True)
    wall = aorta.points[at] + way * (aorta.radius[at, None] - 1.0)
    return Balls(wall, rng.uniform(1.2, 3.2, body.plaques))


def _pulmonary(body: Body, rng: np.random.Generator, heart_z: float) -> list[Balls]:
    """The pulmonary trunk and its two branches, in front of and below the bronchi."""
    z = body.carina
    fork = np.array([z - 14, -12, 12]) + rng.normal(0, 2.0, 3)
    return [
        tube([(heart_z + 12, -44, 16, 13), (heart_z + 34, -36, 18, 13), (*fork, 12)], 2.0),
        tube([(*fork, 10), (z - 15, -2, -10, 9.5), (z - 17, 2, -36, 7.5)], 1.6),
        tube([(*fork, 10), (z - 10, 4, 26, 9.5), (z - 14, 12, 40, 8)], 1.6),
    ]


def _veins_and_branches(body: Body, rng: np.random.Generator, heart_z: float) -> list[Balls]:
    """Both venae cavae, the left brachiocephalic vein and the three arteries of the arch."""
    z, top, start = body.carina, body.arch, body.arch - body.aorta
    lean = rng.normal(0, 2.0)
    upper = [
        (heart_z + 20, -8, -30, 9.5),
        (z, -8, -26, 9),
        (top, lean - 12, -24, 8),
        (top + 30, -14, -20, 7.5),
    ]
    across = [(top + 26, -14, -20, 6.5), (top + 12, -20, 0, 6), (top + 26, -14, 28, 6), (_TOP, -10, 42, 5.5)]
    return [
        tube([*upper, (_TOP, -10, -34, 6)], 2.0),
        tube(across, 1.6),
        tube([(start, -8, 0, 6), (top + 25, -6, -10, 5.5), (_TOP, -2, -20, 4.5)], 1.6),
        tube([(start, 0, 6, 4.5), (top + 25, 2, 14, 4), (_TOP, 4, 18, 3.5)], 1.6),
        tube([(start, 10, 14, 5), (top + 25, 14, 24, 5), (_TOP, 12, 34, 4.5)], 1.6),
        tube([(heart_z - 16, 8, -26, 11.5), (heart_z - 60, 14, -18, 11.5), (_BOTTOM, 22, -16, 11)], 2.0),
    ]


_WALL_MM = 0.8
_SIDES = (("right", -1.0), ("left", 1.0))


def look_up(frame: Frame, coarse: Floats, body_points: Floats) -> Floats:
    """A coarse field's values at body points (N, 3)."""
    return _at_voxels(frame, coarse, frame.to_voxel(body_points))


def _at_voxels(frame: Frame, coarse: Floats, voxels: Floats) -> Floats:
    """A coarse field's values at voxel positions (N, 3)."""
    nodes = voxels / np.array(frame.steps)
    return ndimage.map_coordinates(coarse, nodes.T, order=1, mode="nearest")


def paint_lungs(
    canvas: Canvas, body: Body, cavity: Cavity, middle: Mediastinum, rng: np.random.Generator
) -> Balls:
    """Draw the trees; returns the forks of the vessels, each with the vessel's radius."""
    density = body.density * rng.uniform(0.75, 1.25)
    vessels, airways, forks = [], [], []
    for side, sign in _SIDES:
        count = 2000 * density * (1.1 if side == "right" else 1.0)
        seeds = _seeds(canvas.frame, cavity, sign, int(count), rng)
        if len(seeds) < 20:  # hardly any lung in this scan
            continue
        tree = grow(rng, *middle.roots["airway", side], seeds, (0.36, 0.52))
        wide = np.flatnonzero(tree.load >= 0.035 * tree.load[0])
        bronchi, branch = tree.samples(_taper(tree, 4.6), 0.8)
        shown = np.isin(branch, wide)
        airways.append(Balls(bronchi.points[shown], bronchi.radius[shown]))
        arteries, branch = tree.samples(_taper(tree, 6.4 * body.vessel), 0.8)
        beside = _beside(tree, arteries.radius, branch, np.array([0.8, -0.6, 0.25 * sign]))
        vessels.append(Balls(arteries.points + beside, arteries.radius))
        forks.append(Balls(tree.start[1:], _taper(tree, 6.4 * body.vessel)[1:]))
        seeds = _seeds(canvas.frame, cavity, sign, int(0.9 * count), rng)
        tree = grow(rng, *middle.roots["vein", side], seeds, (0.4, 0.58))
        vessels.append(tree.samples(_taper(tree, 6.2 * body.vessel), 0.8)[0])
        forks.append(Balls(tree.start[1:], _taper(tree, 6.2 * body.vessel)[1:]))
    if not vessels:
        return Balls(np.zeros((0, 3)), np.zeros(0))
    _paint_trees(canvas, body, cavity, join_balls(vessels), join_balls(airways))
    return join_balls(forks)


def _paint_trees(canvas: Canvas, body: Body, cavity: Cavity, vessels: Balls, airways: Balls) -> None:
    voxels = canvas.frame.to_voxel(vessels.points)  # of 100,000 points: it takes as long as painting them
    inside = (_at_voxels(canvas.frame, cavity.lungs, voxels) < -1.2) | (vessels.radius > 3.5)
    ground: tuple[Label, ...] = (Label.LUNG, Label.VESSEL, Label.MEDIASTINUM)
    blood = canvas.threads(voxels[inside], vessels.radius[inside])
    blood.paint(body.blood + body.contrast, Label.VESSEL, over=ground)
    ground += (Label.AIRWAY_WALL, Label.AIRWAY, Label.GREAT_VESSEL)
    rings = canvas.balls(Balls(airways.points, airways.radius + _WALL_MM))
    rings.paint(20.0, Label.AIRWAY_WALL, over=ground).paint(-985.0, Label.AIRWAY, inset=_WALL_MM, over=ground)


def _seeds(frame: Frame, cavity: Cavity, sign: float, count: int, rng: np.random.Generator) -> Floats:
    """Terminal points spread evenly over one lung, away from its surface and its fissures."""
    free = (cavity.lungs < -2.5) & (frame.coarse[2] * sign > 0)
    free &= (np.abs(cavity.fissures[0]) > 3) & (np.abs(cavity.fissures[1]) > 3)
    nodes = np.argwhere(free)
    if not len(nodes):
        return np.zeros((0, 3))
    chosen = nodes[rng.choice(len(nodes), count)] + rng.uniform(-0.5, 0.5, (count, 3))
    return frame.to_body(chosen * np.array(frame.steps, float))


def _taper(tree: Tree, root_mm: float) -> Floats:
    """Radius of each branch from its load, close to Murray's law."""
    return root_mm * (tree.load / tree.load[0]) ** 0.36


def _beside(tree: Tree, radius: Floats, branch: np.ndarray, towards: Floats) -> Floats:
    """Offset of an artery from its bronchus, per sample, at right angles to the branch."""
    way = (tree.end - tree.start)[branch]
    way /= np.linalg.norm(way, axis=1, keepdims=True) + 1e-9
    off = towards - (way @ towards)[:, None] * way
    off /= np.linalg.norm(off, axis=1, keepdims=True) + 1e-9
    far = np.where(tree.load[branch] > 0.012 * tree.load[0], radius * 1.8 + 0.4, 0.0)
    return off * far[:, None]
