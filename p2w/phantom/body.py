"""A phantom's body: its frame in mm, labels of voxels, clouds of balls for tubes; one patient's sizes; shapes of organs.

Points are (..., 3) in z, y, x order. Body axes: z up to the head, y to the back, x to the patient's left;
origin in the middle of the chest, at the height where the trachea divides. A pose (size, rotation, shift)
and a smooth warp map body to scan, so that one description of a chest gives many different chests.

A shape is a distance field: the distance to its surface in mm, negative inside; it is nearly exact near the surface, where
painting needs it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
_BLOCK = 4096  # points that are converted together
_COARSE_MM = 5.2  # organs are smooth: their distance fields are computed on a grid this fine and interpolated


@dataclass(frozen=True)
class Frame:
    """Geometry of one phantom: `shape` (z, y, x) voxels of `spacing_mm`, the body's pose and its warp."""

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    centre_mm: Floats  # (3,) body origin, mm from the first voxel's centre
    rotation: Floats  # (3, 3) body to scan
    size: Floats  # (3,) size of this body relative to the reference
    waves: Floats  # (K, 3) warp: wave vectors, radian a mm of body
    phases: Floats  # (K,)
    sway_mm: Floats  # (K, 3) warp: amplitudes

    @classmethod
    def draw(
        cls,
        rng: np.random.Generator,
        shape: tuple[int, int, int],
        spacing_mm: tuple[float, float, float] | None,
        reach_mm: tuple[float, float, float],
    ) -> "Frame":
        """Draw a pose; without a spacing, also one with which the scan shows `reach_mm` (z, y, x) of the reference body."""
        size = rng.uniform([0.92, 0.92, 0.92], [1.08, 1.08, 1.08]) * rng.uniform(0.94, 1.06)
        margin = rng.uniform([0.95, 1.04, 1.04], [1.06, 1.24, 1.24])
        if spacing_mm is None:
            extent = np.array(reach_mm) * size * margin
            in_plane = extent[1:].max() / max(shape[1:])
            spacing_mm = (round(float(extent[0] / shape[0]), 3), *(round(float(in_plane), 6),) * 2)
        extent = np.array(spacing_mm) * (np.array(shape) - 1)
        centre = extent / 2 + rng.normal(0, [4, 4, 6]) + np.array([27.0, -8.0, 0.0]) * size
        tilt = np.radians(rng.normal(0, [2.0, 1.5, 2.0]).clip(-5, 5))  # round z, y, x
        k = 7
        direction = rng.normal(size=(k, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        length_mm = rng.uniform(110, 320, size=(k, 1))
        return cls(
            shape=shape,
            spacing_mm=spacing_mm,
            centre_mm=centre,
            rotation=_turn(0, tilt[0]) @ _turn(1, tilt[1]) @ _turn(2, tilt[2]),
            size=size,
            waves=direction * 2 * np.pi / length_mm,
            phases=rng.uniform(0, 2 * np.pi, k),
            sway_mm=rng.normal(size=(k, 3)) * 1.5 * (length_mm / 240),
        )

    def to_body(self, voxel: Floats) -> Floats:
        """Voxel positions (..., 3) to body mm (..., 3); keeps the float type."""
        spacing, centre = np.array(self.spacing_mm, voxel.dtype), self.centre_mm.astype(voxel.dtype)
        turn = self.rotation / self.size

        def convert(voxel: Floats) -> Floats:
            straight = _times(voxel * spacing[:, None] - centre[:, None], turn)
            return straight + self._warp(straight)

        return _in_blocks(convert, voxel, voxel.dtype)

    def to_voxel(self, body: Floats) -> Floats:
        """Body mm (..., 3) to voxel positions (..., 3): the inverse of `to_body` to within 0.1 mm."""
        spacing = np.array(self.spacing_mm)

        def convert(body: Floats) -> Floats:
            straight = body
            # A fixed-point iteration: the warp is weak, so each round divides the error by ten
            for _ in range(3):
                straight = body - self._warp(straight)
            mm = _times(straight * self.size[:, None], self.rotation.T) + self.centre_mm[:, None]
            return mm / spacing[:, None]

        return _in_blocks(convert, body, np.dtype(float))

    def _warp(self, straight: Floats) -> Floats:
        """The warp at points (3, N), as (3, N)."""
        kind = straight.dtype.type
        z, y, x = straight
        total = np.zeros_like(straight)
        wave, part = np.empty_like(z), np.empty_like(z)
        for (kz, ky, kx), phase, sway in zip(self.waves, self.phases, self.sway_mm, strict=True):
            np.multiply(z, kind(kz), out=wave)
            wave += np.multiply(y, kind(ky), out=part)
            np.multiply(x, kind(kx), out=part)
            part += kind(phase)
            wave += part
            np.sin(wave, out=wave)
            for axis in range(3):
                total[axis] += np.multiply(wave, kind(sway[axis]), out=part)
        return total

    @cached_property
    def steps(self) -> tuple[int, int, int]:
        """Distance of the coarse grid's nodes in voxels, z, y, x."""
        z, y, x = (max(1, min(6, round(_COARSE_MM / mm))) for mm in self.spacing_mm)
        return z, y, x

    @cached_property
    def coarse(self) -> Floats:
        """Body coordinates of the coarse grid's nodes, (3, z, y, x) float32."""
        counts = ((n - 1) // step + 2 for n, step in zip(self.shape, self.steps, strict=True))
        axes = [
            np.float32(step) * np.arange(n, dtype=np.float32)
            for n, step in zip(counts, self.steps, strict=True)
        ]
        nodes = np.moveaxis(np.stack(np.meshgrid(*axes, indexing="ij")), 0, -1)
        return np.ascontiguousarray(np.moveaxis(self.to_body(nodes), -1, 0))


def _turn(axis: int, angle: float) -> Floats:
    matrix = np.eye(3)
    i, j = (a for a in range(3) if a != axis)
    matrix[i, i] = matrix[j, j] = np.cos(angle)
    matrix[i, j], matrix[j, i] = -np.sin(angle), np.sin(angle)
    return matrix


def _times(points: Floats, matrix: Floats) -> Floats:
    """Points (3, N), each times matrix (3, 3). No BLAS: its threads slow this down, its sums differ by machine."""
    rows = matrix.astype(points.dtype)
    z, y, x = points
    return np.stack([z * rows[0, j] + y * rows[1, j] + x * rows[2, j] for j in range(3)])


def _in_blocks(convert: Callable[[Floats], Floats], points: Floats, kind: np.dtype) -> Floats:
    """Points (..., 3) by a function of (3, n), a block at a time: what is computed on the way stays in the cache."""
    flat = points.reshape(-1, 3)
    found = np.empty(flat.shape, kind)
    for start in range(0, len(flat), _BLOCK):
        part = slice(start, start + _BLOCK)
        found[part] = convert(np.ascontiguousarray(flat[part].T)).T
    return found.reshape(points.shape)


class Label(IntEnum):
    """Values of a phantom's label map (uint8). A voxel has the label of what fills more than half of it."""

    AIR = 0  # outside the patient; also the padding outside the field of view
    FAT = 1  # under the skin and between muscles; the skin itself
    MUSCLE = 2  # also the diaphragm
    BREAST = 3  # glandular tissue
    MEDIASTINUM = 4  # fat and nodes between the lungs; abdominal fat
    HEART = 5  # myocardium and chambers
    AORTA = 6
    GREAT_VESSEL = 7  # pulmonary trunk and its two branches, both venae cavae, arch branches
    OESOPHAGUS = 8
    LIVER = 9
    SPLEEN = 10
    STOMACH = 11  # wall and fluid
    GAS = 12  # in the stomach
    LUNG = 13  # parenchyma and fissures
    VESSEL = 14  # arteries and veins inside the lungs
    AIRWAY_WALL = 15
    AIRWAY = 16  # air in the trachea and bronchi
    SPINE = 17
    DISC = 18
    RIB = 19
    BONE = 20  # sternum, clavicles, scapulae, humeral heads
    CARTILAGE = 21  # of the ribs
    NODULE = 22
    TABLE = 23


LUNGS = (Label.LUNG, Label.VESSEL, Label.NODULE)  # labels of a lung mask, which leaves airways out


@dataclass(frozen=True)
class Balls:
    """Ball `points` (N, 3) in body mm (z, y, x) with `radius` (N,) mm."""

    points: Floats
    radius: Floats


def join_balls(clouds: Sequence[Balls]) -> Balls:
    """The balls of several clouds as one cloud."""
    return Balls(np.concatenate([c.points for c in clouds]), np.concatenate([c.radius for c in clouds]))


def tube(knots: Sequence[Sequence[float]], step_mm: float) -> Balls:
    """A smooth tube (Catmull-Rom) through knots (z, y, x, radius), a ball every `step_mm`."""
    nodes = np.array([[float(value) for value in knot] for knot in knots])
    before, after = 2 * nodes[:1] - nodes[1:2], 2 * nodes[-1:] - nodes[-2:-1]
    padded = np.concatenate([before, nodes, after])
    t = np.linspace(0, 1, 12, endpoint=False)[:, None]
    curve = []
    for p, q, r, s in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        linear, square, cube = (r - p) / 2, p - 2.5 * q + 2 * r - s / 2, 1.5 * (q - r) + (s - p) / 2
        curve.append(q + t * linear + t**2 * square + t**3 * cube)
    fine = np.concatenate([*curve, nodes[-1:]])
    run = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(fine[:, :3], axis=0), axis=1))])
    at = np.append(np.arange(0, run[-1], step_mm), run[-1])
    points = np.stack([np.interp(at, run, fine[:, axis]) for axis in range(4)], axis=1)
    return Balls(points[:, :3], points[:, 3])


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
    spleen: float = 48.0
    oesophagus: float = 38.0
    myocardium: float | None = None  # as muscle
    # What a varied patient has beside: `Body.varied`.
    aorta_contrast: float | None = None  # HU above plain blood in the aorta; as contrast
    abdomen_contrast: float = 0.25  # enhancement of liver and spleen as a share of contrast
    fat_hu: float = 0.0  # above the usual fat
    cartilage: float = 95.0
    vessel: float = 1.0  # radius of the vessels of the lungs, relative
    density: float = 1.0  # number of the vessels of the lungs, relative
    rib: float = 1.0  # thickness, relative
    upper: float = 0.0  # emphysema grows by this share from the base of the lungs to their tops
    fibrosis: float = 0.0  # HU of bands under the pleura of the lower lungs
    consolidation: float | None = None  # y from which the lungs are without air, mm; None: nowhere
    plaques: int = 0  # calcified, on the wall of the aorta

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

    @classmethod
    def varied(cls, rng: np.random.Generator) -> "Body":
        """Draw a patient from a population that differs more than that of `draw`, in traits that show all over the scan.

        Three hidden numbers make them hang together. Habitus: width, fat, fat in the muscles. Age: thin bones that hold
        less calcium, a bent spine, calcified cartilage and plaques. Disease of the lungs, one of none, emphysema, fibrosis,
        congestion and consolidation, which is in both lungs. Contrast agent comes in phases: none, pulmonary, aortic,
        portal.
        """
        body, u = cls.draw(rng), rng.uniform
        habitus, age = u(-1, 1), u(0, 1)
        contrast, aorta, abdomen = [
            (0.0, 0.0, 0.0),
            (u(220, 380), u(20, 110), 0.05),
            (u(90, 160), u(200, 330), 0.3),
            (u(70, 120), u(80, 130), u(0.45, 0.7)),
        ][int(rng.choice(4, p=[0.45, 0.15, 0.2, 0.2]))]
        disease = str(
            rng.choice(
                ["none", "emphysema", "fibrosis", "congestion", "consolidation"],
                p=[0.3, 0.25, 0.15, 0.15, 0.15],
            )
        )
        return replace(
            body,
            cage_width=body.cage_width * (1 + 0.08 * habitus) * u(0.93, 1.07),
            cage_depth=body.cage_depth * (1 + 0.06 * age) * u(0.93, 1.08),
            fat=float(np.clip(14 + 16 * habitus + u(-4, 4), 2, 34)),
            fat_hu=float(-8 * habitus + u(-6, 10)),
            wall=u(13, 24) + 5 * (1 - age),
            muscle=58 - 8 * habitus - 12 * age + u(-4, 4),
            heart=u(0.92, 1.2) + 0.22 * age,
            heart_turn=u(-0.4, 0.4),
            kyphosis=u(6, 16) + 20 * age,
            scoliosis=float(u(0, 5) + 14 * max(0.0, u(-2, 1))),
            aorta=u(9.5, 12.5) + 4 * age,
            arch=u(40, 60),
            marrow=280 - 170 * age + u(-25, 25),
            cortex=900 - 380 * age + u(-80, 80),
            cartilage=90 + 220 * age * u(0, 1),
            rib=1.15 - 0.3 * age + u(-0.1, 0.1),
            plaques=int(rng.poisson(max(0.0, 90 * (age - 0.45)))),
            contrast=float(contrast),
            aorta_contrast=float(aorta),
            abdomen_contrast=float(abdomen),
            liver=float(60 - 22 * max(0.0, habitus) * u(0, 1.4) + u(-8, 8)),
            lung=u(-905, -840) + (u(50, 150) if disease == "congestion" else 0.0),
            lung_slope=u(0.1, 0.6) + (0.5 if disease == "congestion" else 0.0),
            emphysema=float(u(60, 170) if disease == "emphysema" else max(0.0, u(-60, 40) * age)),
            upper=u(0, 1),
            fibrosis=float(u(120, 420) if disease == "fibrosis" else 0.0),
            consolidation=float(u(22, 55)) if disease == "consolidation" else None,
            vessel=u(0.75, 1.05) * (1.2 if disease == "congestion" else 1.0),
            density=u(0.55, 1.05) * (0.75 if disease == "emphysema" else 1.0),
        )  # fmt: skip

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
