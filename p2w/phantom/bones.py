"""The skeleton of the chest: clouds of balls for ribs, sternum, clavicles and scapulae; the spine as a
formula.
"""

import numpy as np

from p2w.phantom.body import Balls, Body, Floats, Label, join_balls, smoothstep, tube
from p2w.phantom.canvas import Canvas

_RIB_STRETCH = np.array([1.7, 1.0, 1.0])  # ribs stand on edge


def paint_bones(canvas: Canvas, body: Body, rng: np.random.Generator) -> None:
    """Paint all bones over the soft tissue."""
    _paint_spine(canvas, body)
    bony, gristle = _ribs(body, rng)
    canvas.balls(gristle, _RIB_STRETCH).paint(body.cartilage, Label.CARTILAGE)
    _shell(canvas, body, bony, Label.RIB, cortex_mm=1.1, stretch=_RIB_STRETCH)
    _shell(canvas, body, _sternum_and_shoulders(body, rng), Label.BONE, cortex_mm=1.5)


def _shell(
    canvas: Canvas,
    body: Body,
    balls: Balls,
    label: Label,
    *,
    cortex_mm: float,
    stretch: Floats | None = None,
) -> None:
    depth = canvas.balls(balls, stretch)
    depth.paint(body.cortex, label).paint(body.marrow + 70, label, inset=cortex_mm)


def rib_heights(body: Body) -> Floats:
    """Heights z at which the twelve ribs leave the spine."""
    first = body.apex + 4
    return first - body.vertebra * (np.arange(12) * 0.97 + 0.004 * np.arange(12) ** 2)


def _ribs(body: Body, rng: np.random.Generator) -> tuple[Balls, Balls]:
    """Twelve pairs of ribs that slope down to the front, and the cartilage between them and the sternum."""
    bony, gristle = [], []
    slope = rng.uniform(72, 108)
    for n, z in enumerate(rib_heights(body)):
        end = np.pi * (0.82 if n < 7 else 0.82 - 0.1 * (n - 6))
        drop = slope * min(1.0, 0.5 + 0.12 * n)
        for sign in (-1.0, 1.0):
            angle = np.linspace(0.28, end, 160)
            bump = rng.normal(0, 1.5) * np.sin(angle * 3 + rng.uniform(0, 6))
            low = z - drop * (angle / np.pi) ** 1.2 + bump
            points = _on_cage(body, low, angle, 5.5, sign)
            spine_y, spine_x = body.spine(float(z))
            wing = (points[0] + [2, spine_y + 21, spine_x + 34 * sign]) / 2 if n > 1 else points[0]
            neck = [(z + 3, spine_y + 3, spine_x + 19 * sign, 4), (*wing, 4), (*points[0], 4)]
            head = tube(neck, 1.0).points
            path = np.concatenate([head, points])
            bony.append(Balls(path, np.full(len(path), body.rib * rng.uniform(3.3, 4.2))))
            if n < 10:
                turn = np.linspace(end, np.pi * (0.95 if n < 7 else 0.9), 40)
                rise = low[-1] + (5 + 7 * n) * smoothstep((turn - end) / (np.pi - end))
                gristle.append(Balls(_on_cage(body, rise, turn, 6.5, sign), np.full(40, 4.0)))
    return join_balls(bony), join_balls(gristle)


def _on_cage(body: Body, z: Floats, angle: Floats, out: float, sign: float) -> Floats:
    radius = np.maximum(body.cage_radius(z, angle), 30 + 8 * np.sin(angle)) + out
    return np.stack(
        [z, body.cage_centre_y(z) + radius * np.cos(angle), sign * radius * np.sin(angle)], axis=1
    )


def _sternum_and_shoulders(body: Body, rng: np.random.Generator) -> Balls:
    top = rib_heights(body)[0] - 34
    length = rng.uniform(130, 160)
    z, x = np.meshgrid(np.linspace(top, top - length, 70), np.linspace(-1, 1, 14), indexing="ij")
    part = (top - z) / 140
    half = np.where(part < 0.3, 24 - 40 * part, 12 + 5 * np.sin(part * 9))
    front = body.cage_centre_y(z) - np.maximum(body.cage_radius(z, np.full_like(z, np.pi)), 45) - 8
    sternum = np.stack([z, front, x * half], axis=-1).reshape(-1, 3)
    parts = [Balls(sternum, np.full(len(sternum), 5.0))]
    y, lift, reach = front[0, 0], rng.uniform(15, 45), body.cage_width + rng.uniform(5, 20)
    head = np.array([top + lift + 12, 4.0, reach + 14])
    middle, tip = (top + lift, y + 40, 105, 5), (top + lift + 8, -10, reach, 5.5)
    clavicle = tube([(top + 6, y, 24, 6.5), (top + 12, y + 4, 60, 5), middle, tip], 1.5)
    humerus = tube([(*head, 14), (head[0] + 60, head[1] + 5, head[2] + 18, 11)], 2.0)
    for sign in (-1.0, 1.0):
        blade = _scapula(body, rng, top, head)
        for part_of in (clavicle, humerus, Balls(head[None], np.array([22.0])), blade):
            parts.append(Balls(part_of.points * np.array([1, 1, sign]), part_of.radius))
    return join_balls(parts)


def _scapula(body: Body, rng: np.random.Generator, top: float, head: Floats) -> Balls:
    """The scapula: a bent triangle behind the ribs with a ridge, thick at its outer border."""
    v, u = np.meshgrid(np.linspace(0, 1, 90), np.linspace(0, 1, 60), indexing="ij")
    z = top + 15 - 115 * v
    angle = 0.62 + (0.72 * u + 0.1 * np.sin(3 * u)) * (1 - 0.75 * v)
    radius = np.maximum(body.cage_radius(np.minimum(z, 40), angle), 60) + 16 + 7 * np.sin(np.pi * u)
    sheet = np.stack([z, body.cage_centre_y(z) + radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    thick = 1.7 + 2.6 * smoothstep((u - 0.75) * 4) + rng.uniform(0, 0.5)
    ridge = sheet[18] + np.array([12.0, 14.0, 4.0]) * np.linspace(0.2, 1, 60)[:, None]
    neck = tube([(*sheet[10, -1], 6), (head[0] - 6, head[1] + 4, head[2] - 14, 9)], 1.5)
    points = np.concatenate([sheet.reshape(-1, 3), ridge, (sheet[18] + ridge) / 2, neck.points])
    radii = np.concatenate([thick.reshape(-1), np.full(60, 3.0), np.full(60, 2.2), neck.radius])
    return Balls(points, radii)


def _paint_spine(canvas: Canvas, body: Body) -> None:
    """Vertebral bodies with end plates and discs, canal, arch, processes: a formula in the spine's own
    coordinates."""
    q = canvas.frame.coarse
    y0, x0 = body.spine(q[0])
    around = np.maximum(np.abs(q[2] - x0) - 42, np.abs(q[1] - y0 - 18) - 42)
    for z0 in range(0, canvas.frame.shape[0], 16):
        slab = slice(z0, min(z0 + 16, canvas.frame.shape[0]))
        box = canvas.box(around, slab, 0.0)
        if box is None:
            continue
        z, y, x = (canvas.full(f, box) for f in (q[0], q[1] - y0, q[2] - x0))
        bone, marrow, disc, canal = _vertebra(body, z, y, x)
        edge = canvas.edge_mm
        for distance, value, label in (
            (disc, 85.0, Label.DISC),
            (bone, body.cortex * 0.85, Label.SPINE),
            (marrow, body.marrow, Label.SPINE),
            (canal, 28.0, Label.MUSCLE),
        ):
            canvas.blend(box, np.clip(0.5 - distance / edge, 0, 1), value, label)


def _vertebra(body: Body, z: Floats, y: Floats, x: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Distances to bone, its marrow, disc and canal; y, x from the centre of the vertebral body."""
    size = 1 - 0.0011 * z  # smaller towards the neck
    height = body.vertebra
    phase = z / height + body.vertebra_phase
    phase -= np.floor(phase)
    ends = (np.abs(phase - 0.5) - 0.40) * height  # distance to the end plates
    waist = 1.3 * np.cos((phase - 0.5) * np.pi) ** 2
    drum = (np.hypot(x / 1.22, np.where(y > 0, y * 1.25, y)) - 13.2 * size + waist) * 1.0
    solid = np.maximum(drum, ends)
    back = y - (13.2 + 6.2) * size  # from the canal's centre
    side = np.abs(x)
    roof = 0.72 * side + 0.78 * np.maximum(back, 0)  # the canal's cross-section: a house, roof to the back
    around = (
        np.maximum(side, 1.05 * np.abs(back)) ** 4 * (back < 0) + (side**4 + roof**4) * (back >= 0)
    ) ** 0.25
    ring = np.maximum(np.abs(around - 10.0 * size) - 2.6, np.abs(phase - 0.62) * height - 8)
    tail = z + 0.75 * np.maximum(back - 10, 0)
    tail_phase = tail / height + body.vertebra_phase
    tail_phase -= np.floor(tail_phase)
    spinous = np.maximum(
        np.maximum(side - 2.6, 9 - back), np.maximum(back - 36, np.abs(tail_phase - 0.55) * height - 6)
    )
    wing = np.hypot(back - 2 - 0.3 * (side - 12), (phase - 0.62) * height) - 4.6
    wing = np.maximum(wing, np.maximum(side - 31, 9 - side))
    arch = np.minimum(np.minimum(ring, spinous), wing)
    arch = np.maximum(arch, 7.6 * size - around)
    bone = np.minimum(solid, arch)
    marrow = np.minimum(np.maximum(drum + 1.4, ends + 1.6), arch + 1.7)
    disc = np.maximum(drum - 0.3, -ends)
    return bone, marrow, disc, around - 6.9 * size
