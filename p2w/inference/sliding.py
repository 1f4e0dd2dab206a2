"""A network of small crops over a whole scan: overlapping windows, Gaussian weights, finished slices as soon as they are.

Windows lie on a grid of their own, `Windows.step` voxels of the scan apart: that of the scan itself, or of the spacing that
the network was trained at. Memory holds as many slices as a window is high, not the volume. All sizes are z, y, x.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2w.tasks.crops import CropBox

Floats = NDArray[np.float32]  # volumes and slices may have an axis of classes before the others
Triple = tuple[int, int, int]
SIGMA = 1 / 8  # of a window's edge: how fast its weight falls towards the rim
LEAST = 1e-3  # weight of a window's corner voxel along an axis, so that none has no weight
CHUNK = 1 << 18  # voxels that are scaled at a time, few enough for a processor's cache
# A batch of crops to probabilities (B, D, H, W), or (B, K, D, H, W) of K classes
Predict = Callable[[list[CropBox]], Floats]
Cut = Callable[[CropBox], NDArray[np.int16]]  # one channel's crop, in stored values


@dataclass(frozen=True)
class Windows:
    """Where windows of `size` lie in a scan of `shape`: voxel i of their grid is voxel first + i * step of the scan."""

    shape: Triple  # of the scan
    size: Triple
    step: tuple[float, float, float]
    overlap: float

    @classmethod
    def at_spacing(
        cls,
        shape: Iterable[int],
        own_mm: NDArray[np.floating],
        size: Triple,
        mm: tuple[float, float, float] | None,
        overlap: float,
    ) -> "Windows":
        """Windows on a grid of voxels of `mm` over a scan of voxels of `own_mm`; None, or about the same: the scan's."""
        step = np.ones(3)
        if mm is not None:
            ratio = np.array(mm) / own_mm
            step = np.where(np.abs(ratio - 1) < 1e-3, 1.0, ratio)
        z, y, x = (int(n) for n in shape)
        return cls((z, y, x), size, (float(step[0]), float(step[1]), float(step[2])), overlap)

    @cached_property
    def extent(self) -> Triple:
        """The size of the scan in voxels of the windows' grid."""
        counts = [max(1, round(n / step)) for n, step in zip(self.shape, self.step, strict=True)]
        return counts[0], counts[1], counts[2]

    @cached_property
    def first(self) -> NDArray[np.float64]:
        """The voxel of the scan under voxel 0 of the grid; both have their middle in common."""
        step = np.array(self.step)
        return (np.array(self.shape) - 1 - (np.array(self.extent) - 1) * step) / 2

    def starts(self, axis: int) -> list[int]:
        """First voxels of the windows along an axis: evenly apart, by at most 1 - overlap; the scan in the middle of a
        single one that is larger."""
        extent, size = self.extent[axis], self.size[axis]
        if extent <= size:
            return [-((size - extent) // 2)]
        count = 1 + int(np.ceil((extent - size) / max(1.0, size * (1 - self.overlap))))
        return [round(i * (extent - size) / (count - 1)) for i in range(count)]

    def __len__(self) -> int:
        """The number of windows."""
        return int(np.prod([len(self.starts(axis)) for axis in range(3)]))

    def all_starts(self) -> Iterator[Triple]:
        """First voxels (z, y, x) of all windows, x running fastest."""
        for z in self.starts(0):
            for y in self.starts(1):
                for x in self.starts(2):
                    yield z, y, x

    def crop_box(self, start: Triple) -> CropBox:
        """A window as a crop of the scan, as the samples of a target set are cut."""
        step = np.array(self.step)
        first = self.first + np.array(start) * step
        return CropBox(np.rint(first) if (step == 1).all() else first, step, self.size)

    @property
    def on_the_scans_grid(self) -> bool:
        """Whether windows show voxels of the scan as they are, so that crops are copies."""
        return all(step == 1 for step in self.step)


class ScaledSlices:
    """The network's input for the windows of a scan that is not resampled: each slice is cut and scaled once, not once for
    each window that shows it.

    Holds as many slices as a window is high, float32 [C, D, H, W] on the network's device, as wide as windows reach.
    """

    def __init__(
        self, cuts: Sequence[Cut], windows: Windows, scale: Callable[[Tensor], object], device: torch.device
    ) -> None:
        """Cut nothing yet. There is one of `cuts` for each channel; `scale` scales stored values, float32, in place."""
        self.cuts, self.scale, self.device = cuts, scale, device
        self.size = windows.size
        starts = [windows.starts(axis) for axis in (1, 2)]
        self.first = [some[0] for some in starts]  # below 0 in a scan that is smaller than a window
        reach = [some[-1] - some[0] + size for some, size in zip(starts, windows.size[1:], strict=True)]
        self.slices = torch.empty(len(cuts), windows.size[0], *reach, device=device)
        self.z: int | None = None
        self.stack = torch.empty(0)

    def batch(self, crop_boxes: Sequence[CropBox]) -> Tensor:
        """The windows (B, C, D, H, W) of `crop_boxes`, which come level by level from the first on.

        The tensor is written anew by the next call.
        """
        if len(self.stack) < len(crop_boxes):
            self.stack = torch.empty(len(crop_boxes), len(self.slices), *self.size, device=self.device)
        _, height, width = self.size
        for row, crop_box in enumerate(crop_boxes):
            z, y, x = (int(at) for at in crop_box.first)
            if z != self.z:
                self._move_to(z)
            top, left = y - self.first[0], x - self.first[1]
            self.stack[row] = self.slices[:, :, top : top + height, left : left + width]
        return self.stack[: len(crop_boxes)]

    def _move_to(self, z: int) -> None:
        """Let the slices be those from `z` on: what is there already moves, the others are cut, some at a time."""
        depth, *reach = self.slices.shape[1:]
        kept = 0 if self.z is None else max(0, self.z + depth - z)
        for row in range(kept):
            self.slices[:, row] = self.slices[:, row + depth - kept]
        some = max(1, CHUNK // (reach[0] * reach[1]))
        for begin in range(kept, depth, some):
            size = (min(some, depth - begin), reach[0], reach[1])
            crop_box = CropBox(np.array([z + begin, *self.first]), np.ones(3), size)
            for channel, cut in zip(self.slices, self.cuts, strict=True):
                channel[begin : begin + size[0]] = torch.from_numpy(cut(crop_box)).to(self.device)
            self.scale(self.slices[:, begin : begin + size[0]])
        self.z = z


def weight(size: int) -> Floats:
    """The weights of a window's voxels along an axis, 1 in the middle."""
    at = (np.arange(size) - (size - 1) / 2) / (SIGMA * size)
    return np.maximum(np.exp(-(at**2) / 2), LEAST).astype(np.float32)


def slices(windows: Windows, predict: Predict, batch: int) -> Iterator[Floats]:
    """Probabilities (H, W), or (K, H, W), of every slice of the windows' grid, from the first on: the weighted mean of all
    windows there.

    The sum of weights at a voxel is a product of three sums along the axes, so that no volume of it is needed.
    """
    depth, height, width = windows.extent
    axes = [weight(size) for size in windows.size]
    kernel = axes[0][:, None, None] * axes[1][None, :, None] * axes[2][None, None, :]
    sums = [_summed(windows.starts(axis), axes[axis], windows.extent[axis]) for axis in range(3)]
    plane = sums[1][:, None] * sums[2][None, :]
    buffer: Floats | None = None
    weighted = np.empty(0, np.float32)
    across = [(y, x) for y in windows.starts(1) for x in windows.starts(2)]
    z_starts = windows.starts(0)
    for z, following in zip(z_starts, [*z_starts[1:], depth], strict=True):
        for begin in range(0, len(across), batch):
            some = across[begin : begin + batch]
            found = predict([windows.crop_box((z, y, x)) for y, x in some])
            if buffer is None:
                buffer = np.zeros((*found.shape[1:-3], windows.size[0], height, width), np.float32)
                weighted = np.empty(found.shape[1:], np.float32)
            for (y, x), probability in zip(some, found, strict=True):
                into, source = _overlap((0, y, x), (windows.size[0], height, width), windows.size)
                (z_at, y_at, x_at), (z_of, y_of, x_of) = into, source
                np.multiply(probability, kernel, out=weighted)
                buffer[..., z_at, y_at, x_at] += weighted[..., z_of, y_of, x_of]
        assert buffer is not None
        skipped = max(0, -z)  # rows of a window that begins above a scan smaller than it
        done = following - max(z, 0)
        for row in range(done):
            yield buffer[..., skipped + row, :, :] / (plane * sums[0][max(z, 0) + row])
        kept = windows.size[0] - done
        for row in range(kept):  # one by one: of slices that overlap NumPy would make a copy first
            buffer[..., row, :, :] = buffer[..., row + done, :, :]
        buffer[..., kept:, :, :] = 0


def _summed(starts: list[int], own: Floats, extent: int) -> Floats:
    """The sum of all windows' weights along an axis."""
    total = np.zeros(extent, np.float32)
    for start in starts:
        into, source = _overlap((start,), (extent,), (len(own),))
        total[into] += own[source]
    return total


def _overlap(
    start: Iterable[int], extent: Iterable[int], size: Iterable[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The slices where an array of `extent` and a window overlap: those of the array, and those of the window."""
    edges = [
        (max(0, at), min(whole, at + own), at) for at, whole, own in zip(start, extent, size, strict=True)
    ]
    return tuple(slice(a, b) for a, b, _ in edges), tuple(slice(a - at, b - at) for a, b, at in edges)


def on_scan(found: Iterable[Floats], windows: Windows) -> Iterator[Floats]:
    """Slices on the windows' grid -> every slice (H, W) or (K, H, W) of the scan, linear between voxels, constant at the
    ends."""
    if windows.on_the_scans_grid:
        yield from found
        return
    at = [
        np.clip((np.arange(n) - first) / step, 0, extent - 1)
        for n, first, step, extent in zip(
            windows.shape, windows.first, windows.step, windows.extent, strict=True
        )
    ]
    z = 0
    before: Floats | None = None
    for number, image in enumerate(found):
        here = _along(_along(image, at[1], -2), at[2], -1)
        while z < windows.shape[0] and at[0][z] <= number:
            share = np.float32(number - at[0][z])
            yield here if before is None or share == 0 else before * share + here * (1 - share)
            z += 1
        before = here


def _along(image: Floats, at: NDArray[np.float64], axis: int) -> Floats:
    """Values at fractional positions along an axis."""
    left = np.minimum(at.astype(int), max(0, image.shape[axis] - 2))
    right = np.minimum(left + 1, image.shape[axis] - 1)
    share = (at - left).astype(np.float32).reshape((-1, 1) if axis == -2 else (1, -1))
    below = image.take(left, axis)
    return below + (image.take(right, axis) - below) * share
