"""The anatomy of one patient: random sizes, positions and densities, and basic shapes as distance fields.

Everything is in the body frame (frame.py): mm, z up, y to the back, x to the patient's left. A distance field is the
distance to the surface of a shape in mm, negative inside; it is nearly exact near the surface, where painting needs it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from p2w.phantom.frame import Floats

ROUND = 2.3  # exponent of the rib cage's super-ellipse: 2 is an ellipse, more is squarer


@dataclass(frozen=True)
class Body:
    """Sizes in mm, positions in body mm, densities in HU."""

    female: bool
    cage_width: float  # half the inner width of the rib cage
    cage_depth: float
    apex: float  # z of the lungs' tops
    bulge: float  # z below which the cage no longer narrows upwards
    gutter: float  # how far the lungs reach back beside the spine
    taper: float  # how the cage narrows in front
    wall: float  # rib cage to the muscles' outer surface
    fat: float  # under the skin
    dome_right: float
    dome_left: float
    dome_drop: float
    heart: float  # relative size
    heart_turn: float  # radian
    spine_y: float
    kyphosis: float
    scoliosis: float
    scoliosis_phase: float
    vertebra: float  # height with its disc
    vertebra_phase: float
    aorta: float  # radius
    arch: float  # z of the aortic arch's top
    trachea: float  # radius
    carina: float
    breast: float
    liver_reach: float  # x where the left lobe ends
    stomach: float
    air_level: float
    shoulder: float
    contrast: float  # HU above plain blood in vessels and heart
    blood: float
    muscle: float
    liver: float
    lung: float
    fissure: float
    emphysema: float
    lung_slope: float  # HU a mm from front to back
    marrow: float
    cortex: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Body":
        """Draw a patient from `rng`."""
        u = rng.uniform
        return cls(
            female=bool(rng.random() < 0.5),
            cage_width=u(108, 130),
            cage_depth=u(80, 99),
            apex=u(98, 118),
            bulge=u(-30, 5),
            gutter=u(0.07, 0.16),
            taper=u(0.02, 0.11),
            wall=u(14, 27),
            fat=u(5, 24),
            dome_right=u(-106, -74),
            dome_left=u(-116, -84),
            dome_drop=u(42, 70),
            heart=u(1.0, 1.32),
            heart_turn=u(-0.25, 0.3),
            spine_y=u(56, 68),
            kyphosis=u(8, 24),
            scoliosis=u(0, 6),
            scoliosis_phase=u(0, 6.28),
            vertebra=u(22, 27),
            vertebra_phase=u(0, 1),
            aorta=u(10.5, 15),
            arch=u(42, 58),
            trachea=u(7.5, 10),
            carina=u(2, 14),
            breast=u(0.6, 1.25),
            liver_reach=u(-10, 75),
            stomach=u(0.7, 1.3),
            air_level=u(-0.5, 0.5),
            shoulder=u(20, 50),
            contrast=float(u(70, 230) if rng.random() < 0.4 else 0),
            blood=u(36, 46),
            muscle=u(46, 58),
            liver=u(45, 68),
            lung=u(-895, -845),
            emphysema=float(max(0.0, u(-110, 90))),
            fissure=u(-750, -350),
            lung_slope=u(0.2, 0.75),
            marrow=u(130, 240),
            cortex=u(480, 850),
        )

    def cage_centre_y(self, z: Floats) -> Floats:
        """The y of the rib cage's middle: leans forward towards the neck."""
        return -0.00045 * np.maximum(z, 0) ** 2 * self.kyphosis / 10 - 0.02 * z

    def spine(self, z: Any) -> tuple[Any, Any]:
        """(y, x) of the vertebral bodies' centre at height z (a number or an array)."""
        y = self.spine_y - self.kyphosis * ((z + 25) / 120) ** 2
        return y, self.scoliosis * np.sin(z / 85 + self.scoliosis_phase)

    def outline(self, angle: Floats) -> Floats:
        """Deviation of the rib cage from a super-ellipse: deeper beside the spine, flatter in front."""
        gutters = np.exp(-(((angle - 0.58) / 0.32) ** 2))
        shoulders = np.exp(-(((angle - 2.45) / 0.45) ** 2))
        return 1 + self.gutter * gutters - 0.05 * np.exp(-((angle / 0.22) ** 2)) - self.taper * shoulders

    def cage_size(self, z: Floats) -> Floats:
        """Width of the rib cage by height: it grows downwards."""
        return 1 - 0.0009 * np.clip(z, -130, None)

    def cage_radius(self, z: Floats, angle: Floats) -> Floats:
        """Distance from the cage's axis to its inner surface at height z; angle 0 = back, pi/2 = side, pi =
        front."""
        up = np.clip(np.maximum(z - self.bulge, 0) / (self.apex - self.bulge), 0, 1)
        level = self.outline(angle) * self.cage_size(z) * (1 - up**ROUND) ** (1 / ROUND)
        sides = (np.abs(np.sin(angle)) / self.cage_width) ** ROUND
        ends = (np.abs(np.cos(angle)) / self.cage_depth) ** ROUND
        return level * (sides + ends) ** (-1 / ROUND)


def ellipsoid(q: Floats, centre: tuple, axes: tuple, turn: float = 0.0) -> Floats:
    """Distance to an ellipsoid of half `axes` (z, y, x) mm at `centre`, turned by `turn` radian about z; q
    is (3, ...)."""
    z, y, x = q[0] - centre[0], q[1] - centre[1], q[2] - centre[2]
    if turn:
        cos, sin = np.cos(turn), np.sin(turn)
        y, x = cos * y - sin * x, sin * y + cos * x
    inner = np.sqrt((z / axes[0]) ** 2 + (y / axes[1]) ** 2 + (x / axes[2]) ** 2)
    outer = np.sqrt((z / axes[0] ** 2) ** 2 + (y / axes[1] ** 2) ** 2 + (x / axes[2] ** 2) ** 2)
    return inner * (inner - 1) / (outer + 1e-6)


def union(a: Floats, b: Floats, blend: float) -> Floats:
    """Smooth minimum: the union of two shapes with a fillet of about `blend` mm."""
    h = np.maximum(blend - np.abs(a - b), 0) / blend
    return np.minimum(a, b) - h * h * (blend / 4)


def intersection(a: Floats, b: Floats, blend: float) -> Floats:
    """Smooth maximum: the intersection of two shapes."""
    return -union(-a, -b, blend)


def smoothstep(t: Floats) -> Floats:
    """0 below 0, 1 above 1, smooth between."""
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)
