"""The inside of the lungs: vessels and airways."""

import numpy as np
from scipy import ndimage

from p2w.data.phantom.body import Body
from p2w.data.phantom.canvas import Canvas
from p2w.data.phantom.frame import Floats, Frame
from p2w.data.phantom.labels import Label
from p2w.data.phantom.mediastinum import Mediastinum
from p2w.data.phantom.organs import Cavity
from p2w.data.phantom.trees import Tree, grow
from p2w.data.phantom.tubes import Balls, join

_WALL_MM = 0.8
_SIDES = (("right", -1.0), ("left", 1.0))


def look_up(frame: Frame, coarse: Floats, body_points: Floats) -> Floats:
    """A coarse field's values at body points (N, 3)."""
    nodes = frame.to_voxel(body_points) / np.array(frame.steps)
    return ndimage.map_coordinates(coarse, nodes.T, order=1, mode="nearest")


def paint_lungs(
    canvas: Canvas, body: Body, cavity: Cavity, middle: Mediastinum, rng: np.random.Generator
) -> Balls:
    """Draw the trees; returns the forks of the vessels, each with the vessel's radius."""
    density = rng.uniform(0.75, 1.25)
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
        arteries, branch = tree.samples(_taper(tree, 6.4), 0.8)
        beside = _beside(tree, arteries.radius, branch, np.array([0.8, -0.6, 0.25 * sign]))
        vessels.append(Balls(arteries.points + beside, arteries.radius))
        forks.append(Balls(tree.start[1:], _taper(tree, 6.4)[1:]))
        seeds = _seeds(canvas.frame, cavity, sign, int(0.9 * count), rng)
        tree = grow(rng, *middle.roots["vein", side], seeds, (0.4, 0.58))
        vessels.append(tree.samples(_taper(tree, 6.2), 0.8)[0])
        forks.append(Balls(tree.start[1:], _taper(tree, 6.2)[1:]))
    if not vessels:
        return Balls(np.zeros((0, 3)), np.zeros(0))
    _paint_trees(canvas, body, cavity, join(vessels), join(airways))
    return join(forks)


def _paint_trees(canvas: Canvas, body: Body, cavity: Cavity, vessels: Balls, airways: Balls) -> None:
    inside = (look_up(canvas.frame, cavity.lungs, vessels.points) < -1.2) | (vessels.radius > 3.5)
    ground: tuple[Label, ...] = (Label.LUNG, Label.VESSEL, Label.MEDIASTINUM)
    blood = canvas.threads(Balls(vessels.points[inside], vessels.radius[inside]))
    blood.paint(body.blood + body.contrast, Label.VESSEL, over=ground)
    ground += (Label.AIRWAY_WALL, Label.AIRWAY, Label.GREAT_VESSEL)
    rings = canvas.balls(Balls(airways.points, airways.radius + _WALL_MM))
    rings.paint(20.0, Label.AIRWAY_WALL, over=ground).paint(-985.0, Label.AIRWAY, inset=_WALL_MM, over=ground)


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
