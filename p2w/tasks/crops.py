"""Crops of images: their geometry, crops of CT in HU, and crops with masks, as tiles or around objects.

Everything is z, y, x in the canonical (LPS) order of `p2w.ct.scan`, world in mm. A crop's axes are the scan's own,
oblique ones too. Its voxel at `size // 2` lies on the point asked for. If the crop is not resampled, that point is first
rounded to a voxel.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2w.ct.orientation import Grid
from p2w.ct.scan import INT16
from p2w.errors import UserError
from p2w.tasks.task import WINDOW_HU, CandidatePoint, LeftOut, Sample

Floats = NDArray[np.floating]


def affine(grid: Grid) -> tuple[Floats, Floats]:
    """Matrix (3, 3) and origin (3,) so that world = matrix @ voxel + origin; rows and columns z, y, x."""
    matrix = np.array(grid.direction, float).reshape(3, 3) * np.array(grid.spacing, float)
    return matrix[::-1, ::-1], np.array(grid.origin, float)[::-1]


def to_voxel(grid: Grid, world_mm: Floats) -> Floats:
    """World (..., 3) z, y, x mm -> voxel (..., 3), through the inverse of the full affine."""
    matrix, origin = affine(grid)
    return np.linalg.solve(matrix, (np.asarray(world_mm, float) - origin)[..., None])[..., 0]


def to_world(grid: Grid, voxel: Floats) -> Floats:
    """Voxel (..., 3) z, y, x -> world (..., 3) mm."""
    matrix, origin = affine(grid)
    return (matrix @ np.asarray(voxel, float)[..., None])[..., 0] + origin


def spacing_zyx(grid: Grid) -> Floats:
    """The edges of a voxel in mm, z, y, x."""
    return np.array(grid.spacing[::-1], float)


@dataclass(frozen=True)
class CropBox:
    """Where a crop lies in its scan: the voxel (z, y, x) under each of its voxels is first + i * step."""

    first: Floats
    step: Floats  # voxels of the scan for one of the crop
    size: tuple[int, int, int]

    @classmethod
    def around(
        cls, centre: Floats, size: tuple[int, int, int], grid: Grid, spacing_mm: Sequence[float] | None
    ) -> "CropBox":
        """A crop of `size` around a voxel; `spacing_mm` z, y, x of its voxels, None: those of the scan."""
        half = np.array(size) // 2
        if spacing_mm is None:
            return cls(np.rint(np.asarray(centre, float)) - half, np.ones(3), size)
        step = np.asarray(spacing_mm, float) / spacing_zyx(grid)
        return cls(np.asarray(centre, float) - half * step, step, size)

    @classmethod
    def of_whole(
        cls, size: tuple[int, int, int], grid: Grid, spacing_mm: Sequence[float] | None
    ) -> "CropBox":
        """A crop of `size` whose middle is the scan's: a sample of the whole scan."""
        step = np.ones(3) if spacing_mm is None else np.asarray(spacing_mm, float) / spacing_zyx(grid)
        first = (np.array(grid.size[::-1]) - 1 - (np.array(size) - 1) * step) / 2
        return cls(np.rint(first) if (step == 1).all() else first, step, size)

    @property
    def centre(self) -> Floats:
        """The voxel of the scan under the crop's voxel size // 2."""
        return self.first + np.array(self.size) // 2 * self.step

    def cut(self, image: NDArray, outside: float) -> NDArray:
        """The crop, `outside` where the image ends.

        If points fall between voxels it is interpolated, as float32; else voxels are copied and keep their type.
        """
        if (self.step == 1).all() and (self.first == np.rint(self.first)).all():
            return _copy_voxels(image, self.first.astype(int), self.size, outside)
        last = self.first + (np.array(self.size) - 0.5) * self.step
        low = np.maximum(np.floor(self.first - self.step / 2).astype(int), 0)
        high = np.minimum(np.ceil(last).astype(int) + 1, image.shape)
        if (low >= high).any():
            return np.full(self.size, outside, np.float32)
        box = image[tuple(slice(a, b) for a, b in zip(low, high, strict=True))].astype(np.float32)
        out = box
        for axis in range(3):  # the axes are the scan's: one at a time, memory stays small
            out = _resample_axis(out, axis, self.first[axis] - low[axis], self.step[axis], self.size[axis])
        inside = self.inside(image.shape)
        return out if inside is None else np.where(inside, out, np.float32(outside))

    def cut_labels(self, labels: NDArray[np.integer], bits: int = 0) -> NDArray[np.int16]:
        """The crop of a mask whose voxels hold the number of a class (0: background), or each of `bits` bits a class.

        If points fall between voxels, a voxel gets the class that most of it belongs to; of bits, each class that more than
        half of it belongs to. Background where the scan ends.
        """
        if (self.step == 1).all() and (self.first == np.rint(self.first)).all():
            return _copy_voxels(labels, self.first.astype(int), self.size, 0).astype(np.int16)
        last = self.first + (np.array(self.size) - 0.5) * self.step
        low = np.clip(np.floor(self.first - self.step / 2).astype(int), 0, None)
        high = np.minimum(np.ceil(last).astype(int) + 1, labels.shape)
        out = np.zeros(self.size, np.int16)
        if (low >= high).any():
            return out
        box = labels[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
        inside = CropBox(self.first - low, self.step, self.size)
        if bits:
            for bit in range(bits):
                if (own := (box >> bit) & 1).any():
                    out |= (inside.cut(own, 0) > HALF).astype(np.int16) << bit
            return out
        most = np.zeros(self.size, np.float32)
        for number in np.flatnonzero(np.bincount(box.ravel())):  # np.unique would sort
            share = inside.cut((box == number).astype(np.uint8), float(number == 0))
            larger = share > most  # of equal shares the lower number has it
            out[larger] = number
            most[larger] = share[larger]
        return out

    def inside(self, shape: tuple[int, ...]) -> NDArray[np.bool_] | None:
        """Which voxels of the crop lie in an image of `shape`; None: all of them."""
        axes = []
        for axis in range(3):
            at = self.first[axis] + np.arange(self.size[axis]) * self.step[axis]
            axes.append((at > -0.5 - 1e-9) & (at < shape[axis] - 0.5 + 1e-9))
        if all(axis.all() for axis in axes):
            return None
        return axes[0][:, None, None] & axes[1][None, :, None] & axes[2][None, None, :]


def _copy_voxels(
    image: NDArray, first: NDArray[np.intp], size: tuple[int, int, int], outside: float
) -> NDArray:
    """A crop of voxels as they are, `outside` where the image ends."""
    low = np.maximum(first, 0)
    high = np.minimum(first + np.array(size), image.shape)
    if (high - low == size).all():
        return np.array(image[tuple(slice(a, b) for a, b in zip(low, high, strict=True))], order="C")
    out = np.full(size, outside, image.dtype)
    if (low < high).all():
        source = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        target = tuple(slice(a, b) for a, b in zip(low - first, high - first, strict=True))
        out[target] = image[source]
    return out


def _resample_axis(box: NDArray, axis: int, first: float, step: float, size: int) -> NDArray:
    """Resample one axis linearly at the points first + i * step; beyond the ends, the end values.

    A step of more than a voxel takes the mean over points spread evenly over the step, so that fine texture does not
    alias.
    """
    points = max(1, int(np.ceil(step - 0.01)))
    shape = list(box.shape)
    shape[axis] = size
    total = np.zeros(shape, np.float32)
    for point in range(points):
        at = first + (np.arange(size) + (point + 0.5) / points - 0.5) * step
        at = np.clip(at, 0, box.shape[axis] - 1)
        left = np.minimum(at.astype(int), max(0, box.shape[axis] - 2))
        share = (at - left).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        below, above = (box.take(np.minimum(i, box.shape[axis] - 1), axis) for i in (left, left + 1))
        total += below + (above - below) * share
    return total / np.float32(points)


def tile_centres(
    low: Sequence[int], high: Sequence[int], size: tuple[int, int, int], step: Floats, stride: float
) -> list[Floats]:
    """Centres of crops that cover the voxels from `low` to below `high`; together they are centred on that range.

    `step` as in CropBox; `stride` in sizes of a crop: 1 = no overlap.
    """
    centres = []
    for axis in range(3):
        extent, width = high[axis] - low[axis], size[axis] * step[axis]
        count = 1 + max(0, int(np.ceil(round((extent - width) / (width * stride), 6))))
        covered = width * (1 + (count - 1) * stride)
        begin = low[axis] + (extent - covered) / 2 + size[axis] // 2 * step[axis]
        centres.append(begin + np.arange(count) * width * stride)
    return [np.array(c) for c in np.stack(np.meshgrid(*centres, indexing="ij"), -1).reshape(-1, 3)]


AIR = WINDOW_HU[0]


def file_record(role: str, name: str, nbytes: int, checksum: int) -> dict[str, Any]:
    """A file, as the manifest names it."""
    return {"role": role, "file": name, "nbytes": nbytes, "checksum": f"crc32c:{checksum:08x}"}


def crop_hu(voxels: NDArray, crop_box: CropBox) -> NDArray[np.int16]:
    """A crop, rounded to whole HU and clipped to the window; air where the scan ends."""
    crop = crop_box.cut(voxels, AIR)
    if crop.dtype == np.int16:  # whole HU already, in memory of its own
        return np.clip(crop, *WINDOW_HU, out=crop)
    return np.clip(np.rint(crop), *WINDOW_HU).astype(np.int16)


def make_sample(
    channels: Sequence[NDArray],
    crop_box: CropBox,
    grid: Grid,
    of: str,
    label: int,
    mask: NDArray | None = None,
    targets: tuple[float, ...] = (),
) -> Sample:
    """Make one sample from crops int16 [z,y,x] and a mask: 0 and 1, numbers of classes, or bits."""
    layers = [*channels] if mask is None else [*channels, mask.astype(np.int16)]
    spacing = crop_box.step * spacing_zyx(grid)
    centre = to_world(grid, crop_box.centre)
    first = _triple(crop_box.first)
    return Sample(np.stack(layers), of, label, first, _triple(centre), _triple(spacing), targets)


def _triple(values: NDArray) -> tuple[float, float, float]:
    z, y, x = (float(value) for value in values)
    return z, y, x


def crop_candidates(
    voxels: NDArray,
    grid: Grid,
    candidates: Iterable[CandidatePoint],
    size: tuple[int, int, int],
    spacing_mm: Sequence[float] | None,
    in_voxels: bool = False,
) -> Iterator[Sample | LeftOut]:
    """One crop around each candidate; candidates outside the scan are left out."""
    for candidate in candidates:
        given = np.array(candidate.xyz[::-1])
        centre = given if in_voxels else to_voxel(grid, given)
        if ((centre < -0.5) | (centre > np.array(voxels.shape) - 0.5)).any() or np.abs(
            centre
        ).max() > INT16.max:
            at = ", ".join(f"{value:.6g}" for value in candidate.xyz)
            where = ", ".join(f"{value:.1f}" for value in centre[::-1])
            size_xyz = " x ".join(map(str, voxels.shape[::-1]))
            yield LeftOut(f"{candidate.of}: ({at}) is voxel ({where}), outside the scan of {size_xyz}")
            continue
        crop_box = CropBox.around(centre, size, grid, spacing_mm)
        voxels_of = [crop_hu(voxels, crop_box)]
        yield make_sample(voxels_of, crop_box, grid, candidate.of, candidate.label, targets=candidate.targets)


HALF = 0.5  # a voxel belongs to the mask when more than this of it does
Channels = Callable[[CropBox], Sequence[NDArray]]  # where a crop lies -> its channels, int16 [z,y,x]
CutLabels = Callable[[CropBox], NDArray[np.int16]]  # where a crop lies -> its classes or bits [z,y,x]


@dataclass(frozen=True)
class TileSettings:
    """How a scan with a mask is cut into tiles."""

    spacing: tuple[float, float, float] | None = None
    """mm z y x of a sample's voxels; default: the scan's own."""
    stride: float = 1.0
    """Distance of neighbouring tiles in sizes of a tile: 1 = none overlap, 0.5 = half of each."""
    min_foreground: float = 0.01
    """Keep tiles with at least this share of foreground; 0: every tile with any."""
    max_tiles: int = 0
    """Tiles kept of each scan, drawn by --seed; 0: all."""
    resample_masks: bool = False
    """Resample a mask whose grid differs from its image's, by nearest neighbour, instead of refusing it."""
    seed: int = 0
    """Random seed of the choice of tiles and, where it is random, of the split."""

    def check_tiles(self) -> None:
        """Raise UserError for values that make no tiles."""
        if self.spacing is not None and not all(0.01 <= mm <= 100 for mm in self.spacing):
            raise UserError(f"--spacing {' '.join(map(str, self.spacing))}: mm z y x, each from 0.01 to 100")
        if not 0.1 <= self.stride <= 10:
            raise UserError(f"--stride {self.stride:g}: from 0.1 to 10 sizes of a tile")
        if not 0 <= self.min_foreground < 1:
            raise UserError(
                f"--min-foreground {self.min_foreground:g}: a share of the voxels, from 0 to below 1"
            )
        if self.max_tiles < 0:
            raise UserError(f"--max-tiles {self.max_tiles}: 1 or more a scan, or 0 for all")


def crops_in_tiles(
    channels: Channels,
    mask: NDArray,
    grid: Grid,
    size: tuple[int, int, int],
    how: TileSettings,
    uid: str,
    labels: CutLabels | None = None,
) -> Iterator[Sample | LeftOut]:
    """Tiles over the bounding box of the mask (0 and 1), in the order of z, y, x.

    `labels` gives what is written in place of the mask, where that has several classes.
    """
    from scipy import ndimage  # noqa: PLC0415  scipy takes long to import, and ranks need none of it

    box = ndimage.find_objects(mask)
    if not box or box[0] is None:
        yield LeftOut(f"{uid}: the mask is empty")
        return
    low, high = [part.start for part in box[0]], [part.stop for part in box[0]]
    step = np.ones(3) if how.spacing is None else np.array(how.spacing) / spacing_zyx(grid)
    kept = []
    for number, centre in enumerate(tile_centres(low, high, size, step, how.stride)):
        crop_box = CropBox.around(centre, size, grid, how.spacing)
        piece = crop_box.cut(mask, 0) > HALF
        if piece.any() and piece.mean() >= how.min_foreground:
            kept.append((number, crop_box, piece))
    if how.max_tiles and len(kept) > how.max_tiles:
        order = np.argsort([seeded_uniform(how.seed, uid, str(number)) for number, *_ in kept], kind="stable")
        kept = [kept[i] for i in sorted(order[: how.max_tiles])]
    if not kept:
        yield LeftOut(f"{uid}: no tile has {how.min_foreground:.0%} foreground")
    for number, crop_box, piece in kept:
        written = piece if labels is None else labels(crop_box)
        yield make_sample(channels(crop_box), crop_box, grid, f"tile {number}", -1, written)


@dataclass(frozen=True)
class AroundObjects:
    """How crops around one object are cut: their voxels, how many, and how far off its middle."""

    size: tuple[int, int, int]
    spacing: Sequence[float] | None  # mm of a sample's voxels, None: the scan's own
    jitter: float  # up to half of this share of a crop's size, along each axis
    crops: int
    seed: int

    def check(self) -> None:
        """Raise UserError for options that make no crops."""
        if not 0 <= self.jitter <= 0.9:
            raise UserError(f"--jitter {self.jitter:g}: from 0 (centred) to 0.9 of the crop's size")
        if not 1 <= self.crops <= 1000:
            raise UserError(f"--crops {self.crops}: from 1 to 1000 of each object")
        if self.crops > 1 and not self.jitter:
            raise UserError(f"--crops {self.crops} with --jitter 0 would be the same crop {self.crops} times")


def crops_around_objects(
    channels: Channels,
    mask: NDArray,
    grid: Grid,
    how: AroundObjects,
    name: str,
    of: str,
    full_mask: NDArray | None = None,
    labels: CutLabels | None = None,
) -> Iterator[Sample | LeftOut]:
    """Crops around the middle of the mask's bounding box, each moved at random, a function of seed and `name`.

    Without moving, a network learns that what it looks for is in the middle. `of`: what each sample shows, for the
    manifest's column of that name. `full_mask`: written to the samples in place of `mask`, where that is a part of it;
    `labels` gives what is written where the mask has several classes.
    """
    from scipy import ndimage  # noqa: PLC0415  scipy takes long to import, and ranks need none of it

    box = ndimage.find_objects(mask)
    if not box or box[0] is None:
        yield LeftOut(f"{of}: the mask is empty")
        return
    centre = np.array([(part.start + part.stop - 1) / 2 for part in box[0]])
    step = np.ones(3) if how.spacing is None else np.array(how.spacing) / spacing_zyx(grid)
    for crop in range(how.crops):
        move = np.array([seeded_uniform(how.seed, name, f"{crop} {axis}") - 0.5 for axis in "zyx"])
        crop_box = CropBox.around(
            centre + move * how.jitter * np.array(how.size) * step, how.size, grid, how.spacing
        )
        piece = crop_box.cut(mask if full_mask is None else full_mask, 0) > HALF
        if piece.any():
            written = piece if labels is None else labels(crop_box)
            yield make_sample(channels(crop_box), crop_box, grid, of, -1, written)
        else:
            yield LeftOut(f"{of}: too small to fill a voxel of the sample")


def seeded_uniform(seed: int, uid: str, what: str) -> float:
    """A number from 0 to below 1, a function of these three alone."""
    digest = hashlib.sha256(f"{seed}:{uid}:{what}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
