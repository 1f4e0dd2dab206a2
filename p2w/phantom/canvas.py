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
        for flat, gap, chosen in _near(self.frame, points, radius, self.edge_mm, spacing):
            value = radius[chosen].astype(np.float32)[:, None] - gap
            keep = value > -self.edge_mm
            np.maximum.at(depth, flat[keep], value[keep])
        return Depth(self, np.flatnonzero(depth > -self.edge_mm), depth)

    def threads(self, balls: Balls) -> "Depth":
        """Like `balls`, for tubes that may be thinner than a voxel: their contrast falls with their cross-section."""
        points, radius = balls.points, balls.radius
        pixel = float(np.mean(self.frame.spacing_mm))
        thin = np.minimum(1, np.pi * radius**2 / (0.8 * pixel**2)).astype(np.float32)
        wide = np.maximum(radius, 0.5 * self.edge_mm).astype(np.float32)
        spacing = np.array(self.frame.spacing_mm)
        cover = np.zeros(self.hu.size, np.float32)
        for flat, gap, chosen in _near(self.frame, points, wide, self.edge_mm / 2, spacing):
            value = (wide[chosen, None] - gap) * np.float32(1 / self.edge_mm) + np.float32(0.5)
            value = np.minimum(value, 1) * thin[chosen, None]
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
    frame: Frame, points: Floats, radius: Floats, reach: float, spacing: Floats
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.float32], NDArray[np.intp]]]:
    """Yield batches of balls of similar size: flat voxel indices (n, m), distances in mm (n, m), ball numbers (n,)."""
    voxel = frame.to_voxel(points)
    size = np.ceil((radius[:, None] + reach) / spacing).astype(int)
    inside = ((voxel > -size) & (voxel < np.array(frame.shape) - 1 + size)).all(axis=1)
    key = size @ np.array([1, 100, 10000])
    for k in np.unique(key[inside]):
        group = np.flatnonzero(inside & (key == k))
        offsets = [np.arange(-n, n + 1) for n in size[group[0]]]
        per = max(1, 400_000 // int(np.prod([len(o) for o in offsets])))
        for chosen in np.array_split(group, -(-len(group) // per)):
            squares, index, valid = [], [], []
            for axis, stride in enumerate((frame.shape[1] * frame.shape[2], frame.shape[2], 1)):
                cell = np.rint(voxel[chosen, axis]).astype(np.intp)[:, None] + offsets[axis]
                squares.append((((cell - voxel[chosen, axis, None]) * spacing[axis]) ** 2).astype(np.float32))
                valid.append((cell >= 0) & (cell < frame.shape[axis]))
                index.append(cell * stride)
            gap = squares[0][:, :, None, None] + squares[1][:, None, :, None] + squares[2][:, None, None, :]
            flat = index[0][:, :, None, None] + index[1][:, None, :, None] + index[2][:, None, None, :]
            if not all(v.all() for v in valid):
                ok = valid[0][:, :, None, None] & valid[1][:, None, :, None] & valid[2][:, None, None, :]
                gap[~ok], flat[~ok] = np.inf, 0
            np.sqrt(gap, out=gap)
            yield flat.reshape(len(chosen), -1), gap.reshape(len(chosen), -1), chosen
