"""From one case of `p2w.tasks.custom` to its samples: images, masks of several classes, answers. No torch.

`RandomCrops` draws crops of a scan: a share of them around voxels of the classes, the others anywhere.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2w.ct.orientation import BadScan, Grid
from p2w.ct.scan import percentile_range, read_image, read_scan
from p2w.errors import UserError
from p2w.tasks import crops, source_files
from p2w.tasks.bms import crop_in_range, intensity_range
from p2w.tasks.crops import (
    AroundObjects,
    Channels,
    CropBox,
    TileSettings,
    crops_around_objects,
    crops_in_tiles,
    make_sample,
    seeded_uniform,
    spacing_zyx,
)
from p2w.tasks.dataset_folders import STRUCTURE
from p2w.tasks.label_values import LabelValues, WrongLabels, present_values
from p2w.tasks.task import CandidatePoint, Case, LeftOut, Sample

IN_PART = " (larger than the sample, which shows its middle)"
FileRecord = dict[str, Any]


@dataclass(frozen=True)
class Declared:
    """The channels, classes and kind of task that a source itself declares, read before anything is cut."""

    channels: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    values: tuple[tuple[int, ...], ...] = ()  # of a mask file, for each class
    order: tuple[int, ...] = ()  # of regions, see `LabelValues`
    kind: str = ""


def read_channels(
    case: Case, values: str, assume_hu: bool
) -> tuple[Channels, Grid, tuple[int, ...], list[FileRecord]]:
    """A function that cuts the channels of all images of a case, their grid, its shape, and the records of their files.

    `values`: hu, min-max or percentiles. Raises BadScan for images on grids of their own.
    """
    every = [_channel(case, role, values, assume_hu) for role, _ in case.files if role.startswith("image")]
    cut, grid, shape, record = every[0]
    for _, other, _, file in every[1:]:
        if said := source_files.apart(grid, other):
            raise BadScan(f"{file['file']} {said.replace('its image', record['file'])}")
    if len(every) == 1:
        return cut, grid, shape, [record]
    return (
        lambda crop_box: [channel for own, *_ in every for channel in own(crop_box)],
        grid,
        shape,
        [file for *_, file in every],
    )


def _channel(
    case: Case, role: str, values: str, assume_hu: bool
) -> tuple[Channels, Grid, tuple[int, ...], FileRecord]:
    """A function that cuts one image, its grid, its shape, and the record of its file."""
    name = case.name if role == "image" else case.source(role).name
    if values == "hu":
        scan = read_scan(replace(case.source(role), assume_hu=assume_hu))
        record = crops.file_record(role, name, scan.nbytes, scan.checksum)
        return lambda crop_box: [crops.crop_hu(scan.voxels, crop_box)], scan.grid, scan.voxels.shape, record
    image = read_image(case.source(role))
    low, high = percentile_range(image.values) if values == "percentiles" else intensity_range(role, image)
    record = crops.file_record(role, name, image.nbytes, image.checksum)
    return (
        lambda crop_box: [crop_in_range(image.values, crop_box, low, high)],
        image.grid,
        image.values.shape,
        record,
    )


def read_classes(
    case: Case, declared: Declared, overlapping: bool, resample: bool, grid: Grid, shape: tuple[int, ...]
) -> tuple[NDArray[np.int16], list[FileRecord]]:
    """The classes of a case on its image's grid, as numbers or bits, and the records of their files.

    Raises WrongLabels for values that are not declared, and for structures that overlap and may not.
    """
    own = [(role, source) for role, source in case.files if role.startswith(STRUCTURE)]
    if not own:
        source = case.source("mask")
        image = source_files.read_labels(source)
        found = LabelValues(declared.classes, declared.values, declared.order).encode(
            image.values, source.name
        )
        on_image = source_files.on_grid(found, image.grid, source, grid, shape, resample)
        record = crops.file_record("mask", source.name, image.nbytes, image.checksum)
        return on_image.astype(np.int16, copy=False), [record]
    labels, files = np.zeros(shape, np.int16), []
    for number, (role, source) in enumerate(own):
        image = source_files.read_labels(source)
        values = present_values(image.values)
        if len(values - {0}) > 1:
            listed = ", ".join(map(str, sorted(values)[:5]))
            raise BadScan(
                f"mask {source.name}: holds the values {listed}: the mask of a structure holds 0 and one other"
            )
        inside = (image.values != 0).astype(np.uint8)
        mask = source_files.on_grid(inside, image.grid, source, grid, shape, resample).astype(bool)
        files.append(crops.file_record("mask", source.name, image.nbytes, image.checksum))
        if overlapping:
            labels |= mask.astype(np.int16) << number
            continue
        if (twice := labels[mask]).any():
            other = declared.classes[int(twice.max()) - 1]
            raise WrongLabels(
                f"masks {other} and {role.removeprefix(STRUCTURE)} overlap in {np.count_nonzero(twice):,} voxels; with "
                "--overlapping they may"
            )
        labels[mask] = number + 1
    return labels, files


@dataclass(frozen=True)
class RandomCrops:
    """How many crops are drawn of each scan, and how many of them around a voxel of a class."""

    size: tuple[int, int, int]
    spacing: Sequence[float] | None  # mm of a sample's voxels, None: the scan's own
    crops: int
    foreground_share: float
    seed: int

    def check(self) -> None:
        """Raise UserError for numbers that make no crops."""
        if not 1 <= self.crops <= 1000:
            raise UserError(f"--crops {self.crops}: from 1 to 1000 of each scan")
        if not 0 <= self.foreground_share <= 1:
            raise UserError(f"--foreground-share {self.foreground_share:g}: from 0 to 1")

    def cut(
        self, channels: Channels, labels: NDArray[np.integer], grid: Grid, uid: str, bits: int = 0
    ) -> Iterator[Sample]:
        """The crops of a scan, a function of seed and `uid`. `labels`: numbers of classes [z,y,x], or `bits` bits.

        The first ceil(share x crops) lie around a random voxel of one of the classes in turn, so that a small class gets as
        many as a large one. A crop stays inside the scan where it fits.
        """
        present = [number for number, _ in self._classes(labels, bits)]
        around = int(np.ceil(self.crops * self.foreground_share - 1e-9)) if present else 0
        start = int(self._uniform(uid, "class") * max(1, len(present)))
        step = np.ones(3) if self.spacing is None else np.array(self.spacing) / spacing_zyx(grid)
        extent, room = np.array(labels.shape), np.array(self.size) * step
        for crop in range(self.crops):
            if crop < around:
                number = present[(start + crop) % len(present)]
                mask = (labels >> number) & 1 if bits else labels == number
                centre = nth_voxel(mask, self._uniform(uid, f"{crop} voxel"))
                of = f"crop {crop}, around class {number + bool(bits)}"
            else:
                centre = np.array([self._uniform(uid, f"{crop} {axis}") for axis in "zyx"]) * extent
                of = f"crop {crop}, anywhere"
            first = np.where(extent > room, np.clip(centre - room / 2, 0, extent - room), (extent - room) / 2)
            box = CropBox.around(first + np.array(self.size) // 2 * step, self.size, grid, self.spacing)
            yield make_sample(channels(box), box, grid, of, -1, box.cut_labels(labels, bits))

    def _uniform(self, uid: str, what: str) -> float:
        return seeded_uniform(self.seed, uid, f"random crop {what}")

    def _classes(self, labels: NDArray[np.integer], bits: int) -> list[tuple[int, int]]:
        """The classes that a volume has, as (number, or bit; voxels)."""
        counts = np.zeros(1 << 16, np.int64)
        for image in labels:
            counts += np.bincount(image.ravel(), minlength=1 << 16)
        if not bits:
            return [(int(number), int(counts[number])) for number in np.flatnonzero(counts) if number]
        values = np.arange(len(counts))
        own = [(bit, int(counts[(values >> bit) & 1 == 1].sum())) for bit in range(bits)]
        return [(bit, count) for bit, count in own if count]


def nth_voxel(mask: NDArray, share: float) -> NDArray[np.float64]:
    """The voxel (z, y, x) of a mask that lies at `share` (0 to below 1) of all its voxels in the order of memory."""
    levels = np.array([np.count_nonzero(image) for image in mask])
    number = int(share * levels.sum())
    z = int(np.searchsorted(np.cumsum(levels), number, side="right"))
    y, x = np.nonzero(mask[z])
    at = number - int(levels[:z].sum())
    return np.array([z, y[at], x[at]], float)


@dataclass(frozen=True)
class SampleCutter:
    """How a case becomes samples of `size`: tiles, crops around objects, random crops, or one sample of the whole scan."""

    size: tuple[int, int, int]
    around: str  # tiles, object, foreground or scan
    tiles: TileSettings
    objects: AroundObjects
    drawn: RandomCrops

    def of_mask(
        self, channels: Channels, mask: NDArray[np.uint8], grid: Grid, uid: str
    ) -> Iterator[Sample | LeftOut]:
        """Samples of a mask of 0 and 1."""
        if self.around == "tiles":
            return crops_in_tiles(channels, mask, grid, self.size, self.tiles, uid)
        if self.around == "object":
            return crops_around_objects(channels, mask, grid, self.objects, uid, "object")
        return self.of_classes(channels, mask.astype(np.int16), grid, uid, 0)

    def of_classes(
        self, channels: Channels, labels: NDArray[np.int16], grid: Grid, uid: str, bits: int
    ) -> Iterator[Sample | LeftOut]:
        """Samples of a mask of class numbers, or of `bits` bits."""
        if self.around == "foreground":
            return self.drawn.cut(channels, labels, grid, uid, bits)
        if self.around == "scan":
            box = CropBox.of_whole(self.size, grid, self.tiles.spacing)
            of = "the scan" + self._in_part(box, labels.shape)
            return iter([make_sample(channels(box), box, grid, of, -1, box.cut_labels(labels, bits))])

        def cut(crop_box: CropBox) -> NDArray[np.int16]:
            return crop_box.cut_labels(labels, bits)

        any_class = (labels != 0).astype(np.uint8)
        if self.around == "tiles":
            return crops_in_tiles(channels, any_class, grid, self.size, self.tiles, uid, cut)
        return crops_around_objects(channels, any_class, grid, self.objects, uid, "object", labels=cut)

    def of_answers(
        self, channels: Channels, grid: Grid, shape: Sequence[int], marks: Iterable[CandidatePoint]
    ) -> Iterator[Sample | LeftOut]:
        """A sample of the scan, or one around each point, with its answer; points outside the scan are left out."""
        for mark in marks:
            if math.isnan(mark.xyz[0]):
                box = CropBox.of_whole(self.size, grid, self.tiles.spacing)
                of = mark.of + self._in_part(box, shape)
                yield make_sample(channels(box), box, grid, of, mark.label, targets=mark.targets)
                continue
            centre = crops.to_voxel(grid, np.array(mark.xyz[::-1]))
            if ((centre < -0.5) | (centre > np.array(shape) - 0.5)).any():
                at = ", ".join(f"{value:.6g}" for value in mark.xyz)
                yield LeftOut(f"{mark.of}: ({at}) is outside the scan; x, y, z are LPS mm")
                continue
            box = CropBox.around(centre, self.size, grid, self.tiles.spacing)
            yield make_sample(channels(box), box, grid, mark.of, mark.label, targets=mark.targets)

    def _in_part(self, box: CropBox, shape: Sequence[int]) -> str:
        beyond = np.array(shape) > np.array(self.size) * box.step + 1e-6
        return IN_PART if beyond.any() else ""
