"""Lung nodules of known place, size and kind, and the candidates a detector would confuse them with."""

from dataclasses import dataclass

import numpy as np

from p2w.data.phantom.canvas import Canvas
from p2w.data.phantom.frame import Floats
from p2w.data.phantom.labels import Label
from p2w.data.phantom.lungs import look_up
from p2w.data.phantom.organs import Cavity
from p2w.data.phantom.tubes import Balls

KINDS = ("solid", "ground-glass", "part-solid", "juxta-vascular", "juxta-pleural", "spiculated")


@dataclass(frozen=True)
class Spot:
    """A nodule in body mm, before it is written in the scan's own coordinates."""

    centre: Floats  # (3,)
    radius: float
    kind: str


def paint_nodules(canvas: Canvas, cavity: Cavity, forks: Balls, rng: np.random.Generator) -> list[Spot]:
    """One to five nodules, 4 to 30 mm across, inside the lungs and apart from one another."""
    spots: list[Spot] = []
    for _ in range(int(min(5, 1 + rng.poisson(1.4)))):
        kind = str(rng.choice(KINDS, p=[0.27, 0.15, 0.1, 0.2, 0.18, 0.1]))
        radius = float(np.clip(rng.lognormal(np.log(4.2), 0.5), 2.0, 15.0))
        if kind in ("ground-glass", "part-solid", "spiculated"):
            radius = max(radius, 4.0)
        centre = _place(canvas, cavity, forks, kind=kind, radius=radius, taken=spots, rng=rng)
        if centre is not None:
            spots.append(Spot(centre, radius, kind))
            _paint_nodule(canvas, spots[-1], rng)
    return spots


def _place(
    canvas: Canvas,
    cavity: Cavity,
    forks: Balls,
    *,
    kind: str,
    radius: float,
    taken: list[Spot],
    rng: np.random.Generator,
) -> Floats | None:
    """A body point where such a nodule fits, or None when the lungs have no room."""
    frame = canvas.frame
    points: Floats
    if kind == "juxta-vascular" and len(forks.points):
        usable = forks.points[(forks.radius > 0.9) & (forks.radius < 2.5)]
        points = usable[rng.permutation(len(usable))[:200]] + rng.normal(
            0, 0.5 * radius, (min(200, len(usable)), 3)
        )
    else:
        nodes = np.argwhere(cavity.lungs < -1)
        if not len(nodes):
            return None
        chosen = nodes[rng.integers(0, len(nodes), 600)] + rng.uniform(-0.5, 0.5, (600, 3))
        points = frame.to_body(chosen * np.array(frame.steps, float))
    if not len(points):
        return None
    depth = -look_up(frame, cavity.lungs, points)
    wall = -look_up(frame, cavity.cage, points)
    if kind == "juxta-pleural":
        fits = (depth > 0.5 * radius) & (depth < 0.95 * radius) & (wall < depth + 2)
    else:
        fits = depth > radius + 2
    for point in points[fits]:
        voxel = frame.to_voxel(point)
        rim = (radius + 1) / np.array(frame.spacing_mm)
        inside = bool(((voxel > rim) & (voxel < np.array(frame.shape) - 1 - rim)).all())
        if not inside or canvas.labels[tuple(np.rint(voxel).astype(int))] not in (Label.LUNG, Label.VESSEL):
            continue  # cut off by the scan's edge, or where a rib or a bronchus lies
        if all(np.linalg.norm(point - t.centre) > radius + t.radius + 8 for t in taken):
            return point
    return None


def _paint_nodule(canvas: Canvas, spot: Spot, rng: np.random.Generator) -> None:
    """A ball with bumps in the voxels round it; only lung, vessel and small airway give way to it."""
    frame = canvas.frame
    spacing = np.array(frame.spacing_mm)
    centre = frame.to_voxel(spot.centre)
    low = np.maximum(np.floor(centre - (1.9 * spot.radius + 3) / spacing), 0).astype(int)
    high = np.minimum(np.ceil(centre + (1.9 * spot.radius + 3) / spacing) + 1, frame.shape).astype(int)
    box = (slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2]))
    grid = np.meshgrid(*(np.arange(a, b) for a, b in zip(low, high, strict=True)), indexing="ij")
    offset = (np.stack(grid, axis=-1) - centre) * spacing
    gap = np.linalg.norm(offset, axis=-1)
    way = offset / (gap[..., None] + 1e-6)
    rough = {"spiculated": 0.12, "ground-glass": 0.12}.get(spot.kind, 0.06)
    bumps = sum(np.cos(way @ (rng.normal(size=3) * f) + rng.uniform(0, 6)) for f in (1.5, 2.5, 4.0))
    surface = spot.radius * (1 + rough * np.asarray(bumps))
    if spot.kind == "spiculated":
        spikes = rng.normal(size=(14, 3))
        spikes /= np.linalg.norm(spikes, axis=1, keepdims=True)
        surface = surface * (1 + 0.6 * np.clip((way @ spikes.T).max(axis=-1) - 0.9, 0, 1) / 0.1)
    cover = np.clip((surface - gap) / canvas.edge_mm + 0.5, 0, 1)
    cover[np.unravel_index(gap.argmin(), gap.shape)] = 1  # however small: the voxel of its centre is nodule
    cover *= np.isin(canvas.labels[box], (Label.LUNG, Label.VESSEL, Label.AIRWAY, Label.AIRWAY_WALL))
    here = canvas.hu[box]
    solid = float(rng.normal(35, 15) if rng.random() > 0.12 else rng.uniform(200, 500))
    value: Floats | float = solid
    if spot.kind in ("ground-glass", "part-solid"):
        glass = float(rng.uniform(-680, -480))
        core = (
            np.clip((0.5 * surface - gap) / canvas.edge_mm + 0.5, 0, 1) if spot.kind == "part-solid" else 0.0
        )
        value = np.maximum(here, glass + core * (20 - glass))
    canvas.blend(box, cover.astype(np.float32), np.asarray(value, np.float32), Label.NODULE)


def distractors(
    canvas: Canvas,
    cavity: Cavity,
    forks: Balls,
    spots: list[Spot],
    *,
    count: int,
    rng: np.random.Generator,
) -> Floats:
    """Body points (N, 3) that are no nodules: forks of vessels, places on the pleura, plain lung; off every
    nodule."""
    nodes = np.argwhere(cavity.lungs < -1)
    if not len(nodes):
        return np.zeros((0, 3))
    anywhere = canvas.frame.to_body(
        nodes[rng.integers(0, len(nodes), 8 * count)] * np.array(canvas.frame.steps, float)
    )
    near_wall = anywhere[look_up(canvas.frame, cavity.lungs, anywhere) > -6]
    thick = forks.points[forks.radius > 0.8]
    thick = thick[rng.permutation(len(thick))]
    points = np.concatenate([thick[: count * 6 // 10], near_wall[: count * 3 // 10], anywhere[:count]])
    voxel = canvas.frame.to_voxel(points)
    keep = ((voxel > 1) & (voxel < np.array(canvas.frame.shape) - 2)).all(axis=1)
    for spot in spots:
        keep &= np.linalg.norm(points - spot.centre, axis=1) > 1.3 * spot.radius + 6
    return points[keep][:count]
