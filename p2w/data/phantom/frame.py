"""Where things are: voxels of the scan, and a body frame in mm that every organ is described in.

Points are (..., 3) in z, y, x order. Body axes: z up to the head, y to the back, x to the patient's left;
origin in the middle of the chest, at the height where the trachea divides. A pose (size, rotation, shift)
and a smooth warp lie between the two, so that no two scans share an outline, and one description of a chest
gives many chests.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
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
        """A pose from `rng`; without a spacing, one that lets the scan hold `reach_mm` (z, y, x) of
        reference body."""
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
        mm = voxel * np.array(self.spacing_mm, voxel.dtype) - self.centre_mm.astype(voxel.dtype)
        straight = _times(mm, self.rotation / self.size)
        return straight + self._warp(straight)

    def to_voxel(self, body: Floats) -> Floats:
        """Body mm (..., 3) to voxel positions (..., 3): the inverse of `to_body` to within 0.1 mm."""
        straight = body
        for _ in range(3):  # the warp bends little: each round is ten times closer
            straight = body - self._warp(straight)
        mm = _times(straight * self.size, self.rotation.T) + self.centre_mm
        return mm / np.array(self.spacing_mm)

    def _warp(self, straight: Floats) -> Floats:
        kind = straight.dtype.type
        z, y, x = np.moveaxis(straight, -1, 0)
        total = np.zeros((3, *z.shape), kind)
        for (kz, ky, kx), phase, sway in zip(self.waves, self.phases, self.sway_mm, strict=True):
            wave = np.sin(kind(kz) * z + kind(ky) * y + (kind(kx) * x + kind(phase)))
            for axis in range(3):
                total[axis] += kind(sway[axis]) * wave
        return np.moveaxis(total, 0, -1)

    @cached_property
    def steps(self) -> tuple[int, int, int]:
        """Voxels between two nodes of the coarse grid, z, y, x."""
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
    """points (..., 3) @ matrix (3, 3), without BLAS: its threads cost more than they give, and its sums are
    its own."""
    rows = matrix.astype(points.dtype)
    z, y, x = np.moveaxis(points, -1, 0)
    return np.moveaxis(np.stack([z * rows[0, j] + y * rows[1, j] + x * rows[2, j] for j in range(3)]), 0, -1)
