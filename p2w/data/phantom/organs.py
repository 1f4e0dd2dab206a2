"""The soft parts of a chest as layers: distance fields on the coarse grid, painted one over the other."""

from dataclasses import dataclass

import numpy as np

from p2w.data.phantom.body import ROUND, Body, both, ellipsoid, smoothstep, union
from p2w.data.phantom.frame import Floats
from p2w.data.phantom.labels import Label


@dataclass(frozen=True)
class Layer:
    """Paint `hu` where `distance` < 0 (with `shell`: only that many mm inside the surface); both on the
    coarse grid."""

    label: Label
    distance: Floats
    hu: Floats | float
    shell: float = 0.0


@dataclass(frozen=True)
class Cavity:
    """Distance fields that others than the painter need, all (z, y, x) on the coarse grid."""

    cage: Floats  # inner surface of the rib cage
    lungs: Floats
    fissures: tuple[Floats, Floats]  # oblique; horizontal (right lung only)


def ripple(q: Floats, rng: np.random.Generator, wavelength_mm: tuple[float, float], waves: int = 9) -> Floats:
    """Smooth noise of mean 0 and standard deviation 1 over body coordinates q (3, z, y, x)."""
    direction = rng.normal(size=(waves, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    k = (direction * 2 * np.pi / rng.uniform(*wavelength_mm, size=(waves, 1))).astype(np.float32)
    phase = rng.uniform(0, 2 * np.pi, waves).astype(np.float32)
    total = np.zeros_like(q[0])
    for (kz, ky, kx), p in zip(k, phase, strict=True):
        total += np.sin(kz * q[0] + ky * q[1] + kx * q[2] + p)
    return total * np.float32(np.sqrt(2 / waves))


def layers(body: Body, q: Floats, rng: np.random.Generator) -> tuple[list[Layer], Cavity]:
    """All layers, outermost first, and the fields later steps need. q: body coordinates (3, z, y, x) mm."""
    noise = ripple(q, rng, (28, 60))
    fine = ripple(q, rng, (14, 26))
    cage = _cage(body, q)
    below = _diaphragm(body, q)
    heart, chambers = _heart(body, q)
    lungs = both(both(cage + 1.0, below * -0.8 + 0.5, 2), -_mediastinum(body, q, heart), 5)
    painted = [
        *_trunk(body, q, cage, noise, fine),
        Layer(Label.MEDIASTINUM, cage, -96 + 5 * fine),
        Layer(Label.MUSCLE, np.maximum(below * 0.8, cage), body.muscle, shell=3.5),
        *_abdomen(body, q, np.maximum(below * 0.8, cage) + 3.5, noise),
        Layer(Label.HEART, heart, body.muscle + 0.35 * body.contrast),
        Layer(Label.HEART, chambers, body.blood + body.contrast),
    ]
    fissures = _fissures(body, q, noise)
    air = body.lung + body.lung_slope * (q[1] + 0.15 * (60 - q[0])) + 9 * noise + 7 * fine
    painted.append(Layer(Label.LUNG, lungs, air))
    return painted, Cavity(cage, lungs, fissures)


def _cage(body: Body, q: Floats) -> Floats:
    """A super-ellipse per slice that closes to a dome at the apex."""
    z, y, x = q[0], q[1] - body.cage_centre_y(q[0]), q[2]
    up = np.maximum(z - body.bulge, 0)
    sides = (np.abs(x) / body.cage_width) ** ROUND + (np.abs(y) / body.cage_depth) ** ROUND
    f = (sides + (up / (body.apex - body.bulge)) ** ROUND) ** (1 / ROUND)
    return np.sqrt(x * x + y * y + up * up) * (1 - 1 / np.maximum(f, 1e-2))


def _trunk(body: Body, q: Floats, cage: Floats, noise: Floats, fine: Floats) -> list[Layer]:
    """Skin, fat, breasts, muscles and the fat between them."""
    z, y, x = q[0], q[1] - body.cage_centre_y(q[0]), q[2]
    upper = smoothstep((z + 15) / 70)
    width = body.cage_width + body.shoulder * smoothstep((z - 20) / 75)
    depth = body.cage_depth * (1 - 0.2 * smoothstep((z - 30) / 80))
    f = ((np.abs(x) / width) ** ROUND + (np.abs(y) / depth) ** ROUND) ** (1 / ROUND)
    open_cage = np.hypot(x, y) * (1 - 1 / np.maximum(f, 1e-2))
    angle = np.arctan2(np.abs(x) / width, y / depth)  # 0 back, pi front
    hump = [np.exp(-(((angle - a) / s) ** 2)) for a, s in ((0.25, 0.45), (2.35, 0.45), (1.0, 0.5))]
    wall = body.wall * (0.8 + 0.95 * hump[0] + upper * (0.6 * hump[1] + 0.6 * hump[2]))
    muscle = open_cage - wall - 1.2 * noise
    front = smoothstep((angle - 1) / 2)
    skin = muscle - body.fat * (0.75 + 0.35 * front + 0.5 * (1 - upper) * hump[2] + 0.1 * noise) - 3
    breast = gland = None
    if body.female:
        size = body.breast
        at = np.stack([z, y, np.abs(x)])
        centre = (-45.0, -(body.cage_depth * 0.72 + body.wall), body.cage_width * 0.56)
        breast = ellipsoid(at, centre, (48 * size, 38 * size + body.fat * 0.5, 52 * size))
        skin = union(skin, np.maximum(breast, y), 25)
        gland = np.maximum(breast + 11 + 4 * fine, muscle * -1 + 6) + 5 * noise
    gap = np.maximum(open_cage - 9 - 2.5 * noise, muscle + 1.5)
    deep = np.maximum(open_cage - 17 - 4 * fine, muscle + 1.5)
    faded = smoothstep(0.9 + 0.5 * fine)
    blobs = np.maximum(
        np.maximum(9 * (0.75 - noise * (0.4 + 0.6 * upper) - 0.5 * fine), 12 - cage), muscle + 4
    )
    painted = [
        Layer(Label.FAT, skin, -103 + 4 * fine),
        Layer(Label.FAT, skin, 5.0, shell=1.8),
        Layer(Label.MUSCLE, muscle, body.muscle + 3 * fine),
        Layer(Label.FAT, blobs, -90.0),
        Layer(Label.FAT, gap, body.muscle - 135 * faded, shell=2.0),
        Layer(Label.FAT, deep, body.muscle - 120 * (1 - 0.7 * faded), shell=1.6),
    ]
    if gland is not None:
        painted.insert(2, Layer(Label.BREAST, gland, 22 + 10 * fine))
    return painted


def _diaphragm(body: Body, q: Floats) -> Floats:
    """Height above the diaphragm (mm, vertical): negative below it. Two domes, falling off to the ribs."""

    def dome(peak: float, x: float) -> Floats:
        dy, dx = q[1] + 14, q[2] - x
        fall = (dy / np.where(dy > 0, 72, 95)) ** 2 + (dx / 70) ** 2
        return peak - body.dome_drop * fall

    return q[0] - both(dome(body.dome_right, -60), dome(body.dome_left, 62), 22)


def _heart(body: Body, q: Floats) -> tuple[Floats, Floats]:
    """Outer surface; the four chambers together."""
    s, t = body.heart, body.heart_turn
    z0 = body.dome_left + 36 * s

    def part(z: float, y: float, x: float, axes: tuple[float, float, float], turn: float) -> Floats:
        cos, sin = np.cos(t), np.sin(t)
        centre = (z0 + z * s, -12 + (cos * y - sin * x) * s, 12 + (sin * y + cos * x) * s)
        return ellipsoid(q, centre, tuple(a * s for a in axes), turn + t)

    ventricles = part(-2, -8, 14, (42, 36, 54), 0.55)
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
    column = np.hypot((x - 2) / 27, (y - spine_y * 0.1 + 3) / 40)
    column = (column - 1) * 27
    column = np.maximum(column, (-30 - z) * 0.7)
    spine = np.hypot(x - spine_x, (y - spine_y - 8) * 0.7) - 22
    gullet = np.hypot(x - 6, (y - 32) * 0.6) - 13
    sheet = np.abs(x - 3) - 3.5
    aorta = np.hypot(x - 24, y - spine_y + 16) - body.aorta - 3
    aorta = np.maximum(aorta, z - body.arch)
    hila = ellipsoid(np.stack([z, y, np.abs(x)]), (-16, 12, 34), (24, 13, 15))
    total = union(union(column, spine, 12), union(heart - 4, gullet, 10), 10)
    return union(union(total, sheet, 8), union(aorta, hila, 6), 6)


def _abdomen(body: Body, q: Floats, inside: Floats, noise: Floats) -> list[Layer]:
    """Liver, spleen, stomach with its gas, under the diaphragm; `inside`: distance to the space they
    share."""
    _, y, x = q
    left = (x - body.liver_reach - 0.55 * (-40 - y)) * 0.85 + 3 * noise
    back = (y - 40 - 0.5 * np.abs(x + 60)) * 0.9
    notch = 22 - np.hypot(x - 5, y - body.spine_y + 12)
    liver = both(both(inside + 1.5, left, 14), both(back, notch, 10), 10)
    s = body.stomach
    top = body.dome_left
    spleen = both(inside + 2, ellipsoid(q, (top - 42, 42, 92), (40, 40, 24), 0.5), 4)
    stomach = both(inside + 3, ellipsoid(q, (top - 36, -14, 60), (34 * s, 44 * s, 36 * s), 0.4), 4)
    stomach = np.maximum(stomach, 4 - liver)
    gas = np.maximum(stomach + 4, y + 14 - 44 * s * body.air_level)
    enhanced = body.contrast * 0.25
    return [
        Layer(Label.SPLEEN, spleen, 48 + enhanced),
        Layer(Label.STOMACH, np.maximum(stomach, -spleen + 2), 32.0),
        Layer(Label.GAS, np.maximum(gas, -spleen + 4), -985.0),
        Layer(Label.LIVER, liver, body.liver + enhanced + 2 * noise),
    ]


def _fissures(body: Body, q: Floats, noise: Floats) -> tuple[Floats, Floats]:
    """Signed distances to the sheets between lobes: oblique in both lungs, horizontal in front of it on the
    right."""
    z, y, x = q
    lean = np.where(x < 0, 0.95, 1.1).astype(np.float32)
    oblique = (z - lean * y + 25 + 0.12 * np.abs(x) + 3 * noise) * 0.7
    flat = z - 2 + 0.18 * (x + 70) + 0.12 * y + 3 * noise
    horizontal = np.where((x < 0) & (oblique > 0), flat, 99.0).astype(np.float32)
    return oblique.astype(np.float32), horizontal
