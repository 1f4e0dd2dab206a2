"""Paint layers and tubes as HU and labels at full resolution, with partial volume at the edges.

A layer's distance field is interpolated slab by slab inside its own bounding box, so that the work stays in
the cache. Tubes are clouds of balls: each ball changes only the voxels around it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from p2w.phantom.body import Balls, Floats, Frame, Label

Box = tuple[slice, slice, slice]
_SLAB = 16  # slices painted at a time
_CELL_MM = 9.0  # a sheet is searched within this distance of the coarse grid's nodes
_FAR = -1e3  # depth of a voxel that no ball reaches, mm
_PAIRS = 32_768  # of a voxel and a ball, which are looked at together: they stay in the cache


@dataclass(frozen=True)
class Layer:
    """Paint `hu` where `distance` < 0; both on the coarse grid.

    shell: only that many mm inside the surface. sheet: instead, a sheet that thick where the distance is 0.
    over: only onto voxels of this label.
    """

    label: Label
    distance: Floats
    hu: Floats | float
    shell: float = 0.0
    sheet: float = 0.0
    over: Label | None = None


@dataclass(frozen=True)
class Canvas:
    """A scan that is being painted: `hu` float32 and `labels` uint8, both (z, y, x); edges are `edge_mm` wide."""

    frame: Frame
    edge_mm: float
    hu: NDArray[np.float32] = field(init=False)
    labels: NDArray[np.uint8] = field(init=False)

    def __post_init__(self) -> None:
        """Start with air everywhere."""
        object.__setattr__(self, "hu", np.full(self.frame.shape, -1000, np.float32))
        object.__setattr__(self, "labels", np.zeros(self.frame.shape, np.uint8))

    def paint(self, stack: list[Layer]) -> None:
        """Paint the layers in their order."""
        reach = [np.abs(each.distance) - _CELL_MM if each.sheet else each.distance for each in stack]
        for z0 in range(0, self.frame.shape[0], _SLAB):
            slab = slice(z0, min(z0 + _SLAB, self.frame.shape[0]))
            for layer, distance in zip(stack, reach, strict=True):
                box = self.box(distance, slab, self.edge_mm)
                if box is not None:
                    self._paint_box(layer, box)

    def _paint_box(self, layer: Layer, box: Box) -> None:
        depth = self.full(layer.distance, box)
        depth *= -1 / self.edge_mm
        if layer.sheet:
            thick = layer.sheet / self.edge_mm
            cover = np.clip(np.float32(0.5 + thick / 2) - np.abs(depth), 0, min(1.0, thick))
        else:
            cover = np.clip(depth + np.float32(0.5), 0, 1)
        if layer.shell:
            cover -= np.clip(depth + np.float32(0.5 - layer.shell / self.edge_mm), 0, 1)
        if layer.over is not None:
            cover *= self.labels[box] == layer.over
        value = layer.hu if isinstance(layer.hu, float) else self.full(layer.hu, box)
        self.blend(box, cover, value, layer.label)

    def blend(self, box: Box, cover: Floats, value: Floats | float, label: Label) -> None:
        """Blend `value` into a box by `cover` (0 … 1), and set the label where `cover` exceeds one half."""
        hu = self.hu[box]
        change = value - hu
        change *= cover
        hu += change
        np.copyto(self.labels[box], np.uint8(label), where=cover > 0.5)

    def box(self, distance: Floats, slab: slice, margin: float) -> Box | None:
        """The bounding box, within a slab, of distances below `margin`; None when there are none."""
        z, y, x = self.frame.steps
        low = slab.start // z
        near = distance[low : (slab.stop - 1) // z + 2] < margin
        rows, columns = np.flatnonzero(near.any(axis=(0, 2))), np.flatnonzero(near.any(axis=(0, 1)))
        if not rows.size:
            return None
        height, width = self.frame.shape[1:]
        across = slice(max(0, (columns[0] - 1) * x), min(width, (columns[-1] + 1) * x + 1))
        down = slice(max(0, (rows[0] - 1) * y), min(height, (rows[-1] + 1) * y + 1))
        return slab, down, across

    def full(self, coarse: Floats, box: Box) -> NDArray[np.float32]:
        """A field of the coarse grid interpolated to the voxels of a box."""
        field = coarse.astype(np.float32, copy=False)
        for axis in (2, 1, 0):  # first the axis along which memory runs, while the array is small
            step, part = self.frame.steps[axis], box[axis]
            low = part.start // step
            left, rest = np.divmod(np.arange(part.start, part.stop), step)
            if axis == 2:  # cut the other axes to what the box needs
                used = (
                    slice(p.start // s, (p.stop - 1) // s + 2)
                    for p, s in zip(box, self.frame.steps, strict=True)
                )
                field = field[tuple(used)]
            share = (rest / step).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
            ahead = np.diff(field, axis=axis)
            field = ahead.take(left - low, axis) * share + field.take(left - low, axis)
        return field

    def balls(self, balls: Balls, stretch: Floats | None = None) -> "Depth":
        """Depth of each voxel inside the union of balls, which are stretched along z, y, x by `stretch` (3,)."""
        points, radius = balls.points, balls.radius
        depth = np.full(self.hu.size, _FAR, np.float32)
        spacing = np.array(self.frame.spacing_mm) / (1.0 if stretch is None else stretch)
        voxels = self.frame.to_voxel(points)
        for flat, gap, ball in _near(self.frame.shape, voxels, radius, self.edge_mm, spacing):
            value = radius[ball].astype(np.float32) - gap
            keep = value > -self.edge_mm
            np.maximum.at(depth, flat[keep], value[keep])
        return Depth(self, np.flatnonzero(depth > -self.edge_mm), depth)

    def threads(self, voxels: Floats, radius: Floats) -> "Depth":
        """Like `balls`, for tubes that may be thinner than a voxel: their contrast falls with their cross-section.

        Balls at voxel positions (N, 3), of `radius` (N,) mm.
        """
        pixel = float(np.mean(self.frame.spacing_mm))
        thin = np.minimum(1, np.pi * radius**2 / (0.8 * pixel**2)).astype(np.float32)
        wide = np.maximum(radius, 0.5 * self.edge_mm).astype(np.float32)
        spacing = np.array(self.frame.spacing_mm)
        cover = np.zeros(self.hu.size, np.float32)
        for flat, gap, ball in _near(self.frame.shape, voxels, wide, self.edge_mm / 2, spacing):
            value = (wide[ball] - gap) * np.float32(1 / self.edge_mm) + np.float32(0.5)
            value = np.minimum(value, 1) * thin[ball]
            keep = value > 0.01
            np.maximum.at(cover, flat[keep], value[keep])
        at = np.flatnonzero(cover > 0)
        cover -= 0.5
        cover *= self.edge_mm
        return Depth(self, at, cover)


@dataclass(frozen=True)
class Depth:
    """Voxels that a cloud of balls touches: flat indices `at`, and for all voxels the `depth` in mm below its surface."""

    canvas: Canvas
    at: NDArray[np.intp]
    depth: NDArray[np.float32]

    def paint(
        self, value: Floats | float, label: Label, inset: float = 0.0, over: tuple[Label, ...] = ()
    ) -> "Depth":
        """Blend `value` where the depth exceeds `inset` mm; with `over`, only onto voxels of these labels."""
        at = self.at
        if over:
            at = at[np.isin(self.canvas.labels.reshape(-1)[at], over)]
        cover = np.clip((self.depth[at] - inset) / self.canvas.edge_mm + np.float32(0.5), 0, 1)
        hu, labels = self.canvas.hu.reshape(-1), self.canvas.labels.reshape(-1)
        hu[at] += cover * (value - hu[at])
        labels[at[cover > 0.5]] = label
        return self


def _near(
    shape: tuple[int, int, int], voxel: Floats, radius: Floats, reach: float, spacing: Floats
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.float32], NDArray[np.intp]]]:
    """Yield pairs of a voxel and a ball whose surface is within `reach` mm of it or beyond it, batch by batch, each (n,).

    Flat index of the voxel, its distance from the ball's centre in mm, number of the ball. `voxel`: centres (N, 3) as voxel
    positions; `spacing` (3,): size of a voxel, mm.
    """
    far = (radius.astype(float) + reach) * (1 + 1e-5)  # a little more: distances are float32
    low = np.ceil(voxel - far[:, None] / spacing)
    count = (
        np.floor(2 * far[:, None] / spacing).astype(int) + 1
    )  # voxels that so long a piece of an axis can hold
    inside = ((low + count > 0) & (low < np.array(shape))).all(axis=1)
    key = count @ np.array([1, 1000, 1000000])
    limit = np.square(far).astype(np.float32)
    low = low.astype(np.intp)
    for k in np.unique(key[inside]):
        group = np.flatnonzero(inside & (key == k))
        sides = count[group[0]]
        per = _PAIRS // int(np.prod(sides))
        per = per if per >= 8 else 1  # balls are the innermost axis: neither many short runs, nor much memory
        for chosen in np.array_split(group, -(-len(group) // per)):
            squares, index = [], []
            for axis, stride in enumerate((shape[1] * shape[2], shape[2], 1)):
                cell = low[chosen, axis] + np.arange(sides[axis])[:, None]
                square = (((cell - voxel[chosen, axis]) * spacing[axis]) ** 2).astype(np.float32)
                square[(cell < 0) | (cell >= shape[axis])] = np.inf
                squares.append(square)
                index.append(cell * stride)
            gap = squares[0][:, None, None] + squares[1][:, None] + squares[2]
            flat = index[0][:, None, None] + index[1][:, None] + index[2]
            near = np.flatnonzero(gap <= limit[chosen])
            yield flat.reshape(-1)[near], np.sqrt(gap.reshape(-1)[near]), chosen[near % len(chosen)]
