"""The tubes between the lungs: windpipe, aorta, pulmonary trunk, great veins, oesophagus."""

from dataclasses import dataclass

import numpy as np

from p2w.data.phantom.body import Body
from p2w.data.phantom.frame import Floats
from p2w.data.phantom.tubes import Balls, join, tube

_TOP, _BOTTOM = 150.0, -220.0  # z: beyond any scan of a chest


@dataclass(frozen=True)
class Mediastinum:
    """The tubes, and where the trees of the lungs start: (tree, side) -> point (3,), direction (3,)."""

    windpipe: Balls
    aorta: Balls
    vessels: Balls
    oesophagus: Balls
    roots: dict[tuple[str, str], tuple[Floats, Floats]]


def lay_tubes(body: Body, rng: np.random.Generator) -> Mediastinum:
    """All tubes of one body; nobody's run the same way twice."""
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
        vessels=join([*_pulmonary(body, rng, heart_z), *_veins_and_branches(body, rng, heart_z)]),
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
    return join(parts)


def _aorta(body: Body, rng: np.random.Generator, heart_z: float) -> Balls:
    """Up from the heart, over the arch to the left and the back, down before the spine."""
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


def _pulmonary(body: Body, rng: np.random.Generator, heart_z: float) -> list[Balls]:
    """The pulmonary trunk and its two branches, before and under the bronchi."""
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
