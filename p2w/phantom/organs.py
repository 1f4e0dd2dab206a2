"""The soft parts of a chest and its skeleton.

Soft parts are layers: distance fields on the coarse grid, painted one over the other. Over them come the bones: clouds of
balls for ribs, sternum, clavicles and scapulae; the spine as a formula.
"""

from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from p2w.phantom.body import (
    LUNGS,
    ROUND,
    Balls,
    Body,
    Floats,
    Label,
    ellipsoid,
    intersection,
    join_balls,
    smoothstep,
    tube,
    union,
)
from p2w.phantom.canvas import Canvas, Layer

_NODES = 32_768  # nodes of the coarse grid that are computed together


@dataclass(frozen=True)
class Cavity:
    """Distance fields that later steps need, all (z, y, x) on the coarse grid."""

    cage: Floats  # inner surface of the rib cage
    lungs: Floats
    fissures: tuple[Floats, Floats]  # oblique; horizontal (right lung only)


@dataclass(frozen=True)
class Ripple:
    """Smooth noise over body coordinates, of mean 0 and standard deviation 1: waves (K, 3), radian a mm, and phases (K,)."""

    waves: Floats
    phases: Floats

    @classmethod
    def draw(cls, rng: np.random.Generator, wavelength_mm: tuple[float, float], waves: int = 9) -> "Ripple":
        """Draw so many waves."""
        direction = rng.normal(size=(waves, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        k = (direction * 2 * np.pi / rng.uniform(*wavelength_mm, size=(waves, 1))).astype(np.float32)
        return cls(k, rng.uniform(0, 2 * np.pi, waves).astype(np.float32))

    def at(self, q: Floats) -> Floats:
        """The noise at q (3, z, y, x)."""
        total = np.zeros_like(q[0])
        for (kz, ky, kx), p in zip(self.waves, self.phases, strict=True):
            total += np.sin(kz * q[0] + ky * q[1] + kx * q[2] + p)
        return total * np.float32(np.sqrt(2 / len(self.phases)))


def layers(body: Body, q: Floats, rng: np.random.Generator) -> tuple[list[Layer], Cavity]:
    """All layers, outermost first, and the fields later steps need. q: body coordinates (3, z, y, x) mm.

    Slab by slab, so that the many fields they are made of stay in the cache.
    """
    ripples = Ripple.draw(rng, (28, 60)), Ripple.draw(rng, (14, 26)), Ripple.draw(rng, (90, 180), 5)
    slices = max(1, _NODES // q[0, 0].size)
    parts = [_layers(body, q[:, z : z + slices], *ripples) for z in range(0, q.shape[1], slices)]

    painted = [
        replace(
            slabs[0],
            distance=np.concatenate([slab.distance for slab in slabs]),
            hu=slabs[0].hu if isinstance(slabs[0].hu, float) else np.concatenate([slab.hu for slab in slabs]),
        )
        for slabs in zip(*(stack for stack, _ in parts), strict=True)
    ]
    cavities = [cavity for _, cavity in parts]
    fissures = [np.concatenate(sheet) for sheet in zip(*(one.fissures for one in cavities), strict=True)]
    return painted, Cavity(
        np.concatenate([one.cage for one in cavities]),
        np.concatenate([one.lungs for one in cavities]),
        (fissures[0], fissures[1]),
    )


def _layers(body: Body, q: Floats, coarse: Ripple, small: Ripple, wide: Ripple) -> tuple[list[Layer], Cavity]:
    """`layers` of a slab; noise of three wavelengths."""
    noise, fine = coarse.at(q), small.at(q)
    cage = _cage(body, q)
    below = _diaphragm(body, q)
    heart, chambers = _heart(body, q)
    lungs = intersection(intersection(cage + 1.0, below * -0.8 + 0.5, 2), -_mediastinum(body, q, heart), 9)
    myocardium = body.muscle if body.myocardium is None else body.myocardium
    painted = [
        *_trunk(body, q, cage, noise, fine),
        Layer(Label.MEDIASTINUM, cage, -96 + body.fat_hu + 5 * fine),
        Layer(Label.MUSCLE, np.maximum(below * 0.8, cage), body.muscle, shell=3.5),
        *_abdomen(body, q, np.maximum(below * 0.8, cage) + 2.5, noise),
        Layer(Label.HEART, heart, myocardium + 0.35 * body.contrast),
        Layer(Label.HEART, chambers, body.blood + body.contrast),
    ]
    fissures = _fissures(q, wide.at(q))
    air = (
        body.lung
        + body.lung_slope * (q[1] + 0.15 * (60 - q[0]))
        + 9 * noise
        + 7 * fine
        - body.emphysema
        * (1 + body.upper * smoothstep((q[0] + 60) / 140))
        * smoothstep(fine + 0.4 * noise - 0.6)
    )
    if body.fibrosis:
        below_pleura = smoothstep((lungs + 22) / 16) * smoothstep((10 - q[0]) / 70)
        air = air + body.fibrosis * below_pleura * smoothstep(0.8 * fine + 0.5)
    if body.consolidation is not None:
        air = air + (30 - air) * smoothstep((q[1] - body.consolidation + 4 * noise) / 10)
    painted.append(Layer(Label.LUNG, lungs, air))
    for sheet in fissures:
        painted.append(Layer(Label.LUNG, sheet, body.fissure, sheet=0.8, over=Label.LUNG))
    return painted, Cavity(cage, lungs, fissures)


def _cage(body: Body, q: Floats) -> Floats:
    """A super-ellipse per slice that closes to a dome at the apex."""
    z, y, x = q[0], q[1] - body.cage_centre_y(q[0]), q[2]
    up = np.maximum(z - body.bulge, 0)
    angle = np.arctan2(np.abs(x), y)
    size = (body.outline(angle) * body.cage_size(z)) ** ROUND
    sides = (np.abs(x) / body.cage_width) ** ROUND + (np.abs(y) / body.cage_depth) ** ROUND
    f = (sides / size + (up / (body.apex - body.bulge)) ** ROUND) ** (1 / ROUND)
    return np.sqrt(x * x + y * y + up * up) * (1 - 1 / np.maximum(f, 1e-2))


def _trunk(body: Body, q: Floats, cage: Floats, noise: Floats, fine: Floats) -> list[Layer]:
    """Skin, fat, breasts, muscles and the fat between them."""
    z, y, x = q[0], q[1] - body.cage_centre_y(q[0]), q[2]
    upper, side = smoothstep((z + 15) / 70), smoothstep((z + 70) / 110)
    width = body.cage_width + body.shoulder * smoothstep((z - 20) / 75)
    depth = body.cage_depth * (1 - 0.2 * smoothstep((z - 30) / 80))
    f = ((np.abs(x) / width) ** ROUND + (np.abs(y) / depth) ** ROUND) ** (1 / ROUND)
    angle = np.arctan2(np.abs(x), y)  # 0 back, pi front
    hump = [np.exp(-(((angle - a) / s) ** 2)) for a, s in ((0.25, 0.45), (2.35, 0.45), (1.15, 0.5))]
    f /= body.cage_size(z) * (0.35 + 0.65 * body.outline(angle))
    open_cage = np.hypot(x, y) * (1 - 1 / np.maximum(f, 1e-2))
    wall = np.maximum(10, body.wall * (0.55 + 1.1 * hump[0] + upper * 0.75 * hump[1] + side * 1.35 * hump[2]))
    muscle = open_cage - wall
    front = smoothstep((angle - 1) / 2)
    skin = muscle - body.fat * (0.75 + 0.35 * front + 0.6 * hump[2]) - 4
    muscle = muscle - 1.3 * noise
    breast = gland = None
    if body.female:
        size = body.breast
        at = np.stack([z, y, np.abs(x)])
        centre = (-45.0, -(body.cage_depth * 0.72 + body.wall), body.cage_width * 0.56)
        breast = ellipsoid(at, centre, (48 * size, 38 * size + body.fat * 0.5, 52 * size))
        skin = union(skin, np.maximum(breast, y), 25)
        gland = intersection(breast + 13 + 3 * noise, 6 - muscle, 8) + 3 * fine
    gap, deep = open_cage - 10 - 2.5 * noise, open_cage - 18 - 4 * fine
    faded = smoothstep(0.9 + 0.5 * fine)
    blobs = np.maximum(
        np.maximum(9 * (1.15 - noise * (0.3 + 0.7 * upper) - 0.5 * fine), 12 - cage), muscle + 4
    )
    axilla = (
        ellipsoid(np.stack([z, y, np.abs(x)]), (48, 2, body.cage_width + 3), (44, 30, 13), -0.3) + 3 * fine
    )
    blobs = np.minimum(blobs, np.maximum(np.maximum(axilla, 11 - open_cage), muscle + 3))
    painted = [
        Layer(Label.FAT, skin, -103 + body.fat_hu + 4 * fine),
        Layer(Label.FAT, skin, 5.0, shell=1.8),
        Layer(Label.MUSCLE, muscle, body.muscle + 3 * fine),
        Layer(Label.FAT, blobs, -90.0),
        Layer(Label.FAT, gap, body.muscle - 135 * faded, sheet=2.0, over=Label.MUSCLE),
        Layer(Label.FAT, deep, body.muscle - 130 * (1 - 0.7 * faded), sheet=1.7, over=Label.MUSCLE),
        Layer(Label.FAT, 11 * (noise - 0.3 * fine + 0.2), -75.0, sheet=1.6, over=Label.MUSCLE),
    ]
    if gland is not None:
        painted.insert(2, Layer(Label.BREAST, gland, 5 + 25 * noise))
    return painted


def _diaphragm(body: Body, q: Floats) -> Floats:
    """Height above the diaphragm (mm, vertical): negative below it. Two domes, falling off to the ribs."""

    def dome(peak: float, x: float) -> Floats:
        dy, dx = q[1] + 14, q[2] - x
        r2 = (dy / np.where(dy > 0, 84, 92)) ** 2 + (dx / 78) ** 2
        return peak - body.dome_drop * (0.35 * r2 + 0.65 * np.minimum(r2, 4) ** 2)

    middle = (body.dome_right + body.dome_left) / 2 - 10  # the tendon the heart rests on
    return q[0] - intersection(
        intersection(dome(body.dome_right, -60), dome(body.dome_left, 62), 20), dome(middle, 5), 14
    )


def _heart(body: Body, q: Floats) -> tuple[Floats, Floats]:
    """Distance fields of the heart: the outer surface, and the four chambers together."""
    s, t = body.heart, body.heart_turn
    z0 = body.dome_left + 25 * s

    def part(z: float, y: float, x: float, axes: tuple[float, float, float], turn: float) -> Floats:
        cos, sin = np.cos(t), np.sin(t)
        centre = (z0 + z * s, -25 + (cos * y - sin * x) * s, 14 + (sin * y + cos * x) * s)
        return ellipsoid(q, centre, tuple(a * s for a in axes), turn + t)

    ventricles = part(-2, -6, 14, (42, 40, 54), 0.55)
    atria = part(22, 22, -14, (30, 26, 42), -0.1)
    right = part(2, 0, -36, (36, 30, 22), 0.2)
    outer = union(union(ventricles, right, 5), atria, 5)
    left_ventricle = part(-4, -2, 26, (28, 19, 34), 0.55)
    right_ventricle = np.maximum(part(-6, -26, 0, (32, 17, 38), 0.35), 9 - left_ventricle)
    left_atrium = part(24, 26, -8, (22, 16, 32), 0.0)
    right_atrium = part(2, 0, -38, (31, 25, 18), 0.2)
    chambers = np.minimum(np.minimum(left_ventricle, right_ventricle), np.minimum(left_atrium, right_atrium))
    return outer, np.maximum(chambers, outer + 2.5)


def _mediastinum(body: Body, q: Floats, heart: Floats) -> Floats:
    """What lies between the lungs: heart and its fat, great vessels, oesophagus, spine, hila, and a thin
    sheet in front."""
    z, y, x = q
    spine_y, spine_x = body.spine(z)
    flare = 29 + 14 * smoothstep((z - 30) / 70)
    column = (np.hypot((x - 2) / flare, (y - spine_y * 0.1 + 8) / 50) - 1) * flare
    column = np.maximum(column, (-30 - z) * 0.7)
    spine = np.hypot(x - spine_x, (y - spine_y - 8) * 0.7) - 22
    gullet = np.hypot(x - 6, (y - 32) * 0.6) - 13
    sheet = np.abs(x - 3) - 2.2 - 15 * smoothstep((-y - 40) / 40)
    aorta = np.hypot(x - 24, y - spine_y + 16) - body.aorta - 1
    aorta = np.maximum(aorta, z - body.arch)
    cava = np.maximum(np.hypot(x + 23, y - 11) - 13, z - body.dome_left - 27 * body.heart)
    aorta = np.minimum(aorta, cava)
    hila = ellipsoid(np.stack([z, y, np.abs(x)]), (-16, 10, 31), (21, 10, 13))
    pad = ellipsoid(q, (body.dome_left - 2, -34, 18), (20, 44, 56))
    total = union(union(column, spine, 12), union(union(heart - 4, pad, 12), gullet, 10), 10)
    return union(union(total, sheet, 8), union(aorta, hila, 6), 6)


def _abdomen(body: Body, q: Floats, inside: Floats, noise: Floats) -> list[Layer]:
    """Liver, spleen, stomach with its gas, under the diaphragm; `inside`: distance to the space they
    share."""
    _, y, x = q
    left = (x - body.liver_reach - 0.55 * (-40 - y)) * 0.85 + 3 * noise
    back = (y - 40 - 0.5 * np.abs(x + 60)) * 0.9
    notch = 22 - np.hypot(x - 5, y - body.spine_y + 12)
    liver = intersection(intersection(inside, left, 8), intersection(back, notch, 10), 6)
    s = body.stomach
    top = body.dome_left
    spleen = intersection(inside + 0.5, ellipsoid(q, (top - 46, 46, 92), (46, 44, 30), 0.5), 4)
    stomach = intersection(inside + 1, ellipsoid(q, (top - 40, -14, 60), (44 * s, 56 * s, 46 * s), 0.4), 4)
    stomach = np.maximum(stomach, 4 - liver)
    gas = np.maximum(stomach + 4, y + 14 - 50 * s * body.air_level)
    enhanced = body.contrast * body.abdomen_contrast
    return [
        Layer(Label.SPLEEN, spleen, body.spleen + enhanced),
        Layer(Label.STOMACH, np.maximum(stomach, -spleen + 2), 32.0),
        Layer(Label.GAS, np.maximum(gas, -spleen + 4), -985.0),
        Layer(Label.LIVER, liver, body.liver + enhanced + 2 * noise),
    ]


def _fissures(q: Floats, noise: Floats) -> tuple[Floats, Floats]:
    """Signed distances to the sheets between lobes: oblique in both lungs, horizontal in front of it on the
    right."""
    z, y, x = q
    lean = np.where(x < 0, 0.95, 1.1).astype(np.float32)
    oblique = (z - lean * y + 25 + 0.12 * np.abs(x) + 5 * noise) * 0.7
    flat = z - 2 + 0.18 * (x + 70) + 0.12 * y + 5 * noise
    horizontal = np.where((x < 0) & (oblique > 0), flat, 99.0).astype(np.float32)
    return oblique.astype(np.float32), horizontal


class Region(IntEnum):
    """Values of a map of regions (uint8); 0 is everything else. Left and right are the patient's."""

    OTHER = 0
    LIVER = 1
    SPLEEN = 2
    HEART = 3
    AORTA = 4
    OESOPHAGUS = 5
    RIGHT_UPPER_LOBE = 6
    RIGHT_MIDDLE_LOBE = 7
    RIGHT_LOWER_LOBE = 8
    LEFT_UPPER_LOBE = 9
    LEFT_LOWER_LOBE = 10
    VERTEBRAE_UPPER = 11  # whose centre lies above the fork of the windpipe
    VERTEBRAE_MIDDLE = 12  # between the other two
    VERTEBRAE_LOWER = 13  # whose centre lies below the higher dome of the diaphragm


ORGANS = {
    Label.LIVER: Region.LIVER,
    Label.SPLEEN: Region.SPLEEN,
    Label.HEART: Region.HEART,
    Label.AORTA: Region.AORTA,
    Label.OESOPHAGUS: Region.OESOPHAGUS,
}


def anatomy(canvas: Canvas, body: Body, cavity: Cavity) -> NDArray[np.uint8]:
    """The regions (z, y, x) of a painted chest, without its table: from its labels and the body's own coordinates."""
    table = np.zeros(256, np.uint8)
    for label, region in ORGANS.items():
        table[label] = region
    regions = table[canvas.labels]
    depth, height, width = canvas.frame.shape
    everything = slice(0, depth), slice(0, height), slice(0, width)
    z, _, x = (canvas.full(field, everything) for field in canvas.frame.coarse)
    lung = np.isin(canvas.labels, LUNGS)
    oblique = canvas.full(cavity.fissures[0], everything) > 0
    flat = canvas.full(cavity.fissures[1], everything) > 0
    right = x < 0  # body coordinates grow to the patient's left
    for where, region in (
        (right & oblique & flat, Region.RIGHT_UPPER_LOBE),
        (right & oblique & ~flat, Region.RIGHT_MIDDLE_LOBE),
        (right & ~oblique, Region.RIGHT_LOWER_LOBE),
        (~right & oblique, Region.LEFT_UPPER_LOBE),
        (~right & ~oblique, Region.LEFT_LOWER_LOBE),
    ):
        regions[lung & where] = region
    spine = canvas.labels == Label.SPINE
    number = np.floor(z[spine] / body.vertebra + body.vertebra_phase)
    centre = (number + 0.5 - body.vertebra_phase) * body.vertebra
    domes = max(body.dome_right, body.dome_left)
    levels = np.where(centre < domes, Region.VERTEBRAE_LOWER, Region.VERTEBRAE_MIDDLE)
    regions[spine] = np.where(centre > body.carina, Region.VERTEBRAE_UPPER, levels)
    return regions


_RIB_STRETCH = np.array([1.7, 1.0, 1.0])  # ribs stand on edge


def paint_bones(canvas: Canvas, body: Body, rng: np.random.Generator) -> None:
    """Paint all bones over the soft tissue."""
    _paint_spine(canvas, body)
    bony, gristle = _ribs(body, rng)
    canvas.balls(gristle, _RIB_STRETCH).paint(body.cartilage, Label.CARTILAGE)
    _shell(canvas, body, bony, Label.RIB, cortex_mm=1.1, stretch=_RIB_STRETCH)
    _shell(canvas, body, _sternum_and_shoulders(body, rng), Label.BONE, cortex_mm=1.5)


def _shell(
    canvas: Canvas, body: Body, balls: Balls, label: Label, *, cortex_mm: float, stretch: Floats | None = None
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
