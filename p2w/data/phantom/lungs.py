"""The inside of the lungs: vessels and airways."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from p2w.data.phantom.body import Body
from p2w.data.phantom.canvas import Canvas
from p2w.data.phantom.frame import Floats, Frame
from p2w.data.phantom.labels import Label
from p2w.data.phantom.organs import Cavity
from p2w.data.phantom.vessels import GreatVessels, Tree, grow

_WALL_MM = 0.8
_SIDES = (("right", -1.0), ("left", 1.0))


@dataclass(frozen=True)
class Crossings:
    """Places inside the lungs that look like something: body points (N, 3) and vessel radii (N,) mm."""

    forks: Floats
    radius: Floats


def look_up(frame: Frame, coarse: Floats, body_points: Floats) -> Floats:
    """A coarse field's values at body points (N, 3)."""
    nodes = frame.to_voxel(body_points) / np.array(frame.steps)
    return ndimage.map_coordinates(coarse, nodes.T, order=1, mode="nearest")


def paint_lungs(
    canvas: Canvas, body: Body, cavity: Cavity, great: GreatVessels, rng: np.random.Generator
) -> Crossings:
    """Draw the trees; returns the forks of the vessels."""
    frame, density = canvas.frame, rng.uniform(0.75, 1.25)
    vessels: list[tuple[Floats, Floats]] = []
    airways: list[tuple[Floats, Floats]] = []
    forks: list[tuple[Floats, Floats]] = []
    for side, sign in _SIDES:
        share = 1.1 if side == "right" else 1.0
        seeds = _seeds(frame, cavity, sign, int(2100 * density * share), rng)
        if len(seeds) < 20:
            continue
        root, out = great.roots["airway", side]
        tree = grow(rng, root, out, seeds, (0.36, 0.52))
        points, radius, branch = tree.samples(_taper(tree, 6.4), 0.8)
        beside = _beside(tree, radius, branch, np.array([0.8, -0.6, 0.25 * sign]))
        vessels.append((points + beside, radius))
        wide = tree.load >= 0.035 * tree.load[0]
        air_points, air_radius, air_branch = tree.samples(_taper(tree, 4.6), 0.8)
        airways.append((air_points[wide[air_branch]], air_radius[wide[air_branch]]))
        forks.append((tree.start[1:], _taper(tree, 6.4)[1:]))
        root, out = great.roots["vein", side]
        seeds = _seeds(frame, cavity, sign, int(1800 * density * share), rng)
        tree = grow(rng, root, out, seeds, (0.4, 0.58))
        points, radius, _ = tree.samples(_taper(tree, 6.2), 0.8)
        vessels.append((points, radius))
        forks.append((tree.start[1:], _taper(tree, 6.2)[1:]))
    if not vessels:
        return Crossings(np.zeros((0, 3)), np.zeros(0))
    _paint_trees(canvas, body, cavity, _join(vessels), _join(airways))
    return Crossings(*_join(forks))


def _paint_trees(
    canvas: Canvas,
    body: Body,
    cavity: Cavity,
    vessels: tuple[Floats, Floats],
    airways: tuple[Floats, Floats],
) -> None:
    points, radius = vessels
    inside = (look_up(canvas.frame, cavity.lungs, points) < -1.2) | (radius > 3.5)
    ground: tuple[Label, ...] = (Label.LUNG, Label.VESSEL, Label.MEDIASTINUM)
    canvas.threads(points[inside], radius[inside]).paint(
        body.blood + body.contrast, Label.VESSEL, over=ground
    )
    ground += (Label.AIRWAY_WALL, Label.AIRWAY, Label.GREAT_VESSEL)
    tube = canvas.balls(airways[0], airways[1] + _WALL_MM)
    tube.paint(20.0, Label.AIRWAY_WALL, over=ground).paint(-985.0, Label.AIRWAY, inset=_WALL_MM, over=ground)


def _seeds(frame: Frame, cavity: Cavity, sign: float, count: int, rng: np.random.Generator) -> Floats:
    """Terminal points spread evenly over one lung, off its surface and its fissures."""
    free = (cavity.lungs < -2.5) & (frame.coarse[2] * sign > 0)
    free &= (np.abs(cavity.fissures[0]) > 3) & (np.abs(cavity.fissures[1]) > 3)
    nodes = np.argwhere(free)
    if not len(nodes):
        return np.zeros((0, 3))
    chosen = nodes[rng.choice(len(nodes), count)] + rng.uniform(-0.5, 0.5, (count, 3))
    return frame.to_body(chosen * np.array(frame.steps, float))


def _taper(tree: Tree, root_mm: float) -> Floats:
    """Radius of each branch from what it feeds, near Murray's law."""
    return root_mm * (tree.load / tree.load[0]) ** 0.36


def _beside(tree: Tree, radius: Floats, branch: np.ndarray, towards: Floats) -> Floats:
    """How far an artery runs from its bronchus, per sample: out of the airway's way, across the branch."""
    way = (tree.end - tree.start)[branch]
    way /= np.linalg.norm(way, axis=1, keepdims=True) + 1e-9
    off = towards - (way @ towards)[:, None] * way
    off /= np.linalg.norm(off, axis=1, keepdims=True) + 1e-9
    far = np.where(tree.load[branch] > 0.012 * tree.load[0], radius * 1.8 + 0.4, 0.0)
    return off * far[:, None]


def _join(tubes: list[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    return np.concatenate([p for p, _ in tubes]), np.concatenate([r for _, r in tubes])
