"""BMS: where is the brain tumour? BraTS' patients in four modalities; labels 1, 2 and 4 are the whole tumour.

Each channel is scaled by its patient's own smallest and largest value to 0 … 32,767, so that int16 holds it; that range is
the set's window. The paper's crop of 100 x 100 x 50 voxels (x, y, z) of 1 mm is a setting in mm; where it lies is not
published.
"""

import os
import re
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from p2w.ct.orientation import BadScan
from p2w.ct.scan import ImageVolume, read_image
from p2w.errors import UserError
from p2w.tasks import crops, source_files
from p2w.tasks.crops import AroundObjects, CropBox, crops_around_objects
from p2w.tasks.task import SEGMENTATION, Case, Cases, CutSamples, Split, check_folds, split_by_folds

TUMOUR = (1, 2, 4)
TOP = 32767
NAME = re.compile(r"(.+)_(flair|t1|t1ce|t2|seg)\.nii(?:\.gz)?", re.IGNORECASE)
Modality = Literal["flair", "t1", "t1ce", "t2"]


@dataclass(frozen=True)
class Bms:
    """BMS: where is the brain tumour? From BraTS: --source holds ID_flair.nii.gz … ID_seg.nii.gz, in any folders."""

    channels: tuple[Modality, ...] = ("flair",)
    """Modalities, one or several, in this order; they are the channels of a sample."""
    crop_mm: tuple[float, float, float] = (50.0, 100.0, 100.0)
    """mm z y x that a sample shows; it is resized to --size."""
    jitter: float = 0.25
    """How far the crop may lie from the tumour's middle, as a share of its size: 0 = centred."""
    crops: int = 1
    """Crops of each patient, each moved by chance."""
    folds: int = 3
    """Number of folds, to which the patients are assigned at random; each fold is tested on once."""
    val_fraction: float = 0.15
    """Share of the patients of the other folds that is validated on."""
    resample_masks: bool = False
    """Lay a mask whose geometry is not its image's over it by nearest neighbour, instead of refusing it."""
    seed: int = 0
    """Random seed of folds, validation patients and jitter."""

    name: ClassVar[str] = "bms"
    kind: ClassVar[str] = SEGMENTATION
    size: ClassVar[tuple[int, int, int]] = (32, 64, 64)
    classes: ClassVar[tuple[str, ...]] = ("background", "whole tumour")
    window: ClassVar[tuple[float, float]] = (0, TOP)

    @property
    def channel_names(self) -> tuple[str, ...]:
        """The modalities."""
        return self.channels

    def check(self) -> None:
        """Raise UserError for options that make no data set."""
        if not self.channels or len(set(self.channels)) < len(self.channels):
            raise UserError(
                f"--channels {' '.join(self.channels)}: one or more of flair, t1, t1ce, t2, each once"
            )
        if not all(1 <= mm <= 1000 for mm in self.crop_mm):
            raise UserError(f"--crop-mm {' '.join(map(str, self.crop_mm))}: mm z y x, each from 1 to 1000")
        self._around(self.size).check()
        check_folds(self.folds, self.val_fraction)

    def _around(self, size: tuple[int, int, int]) -> AroundObjects:
        spacing = [mm / n for mm, n in zip(self.crop_mm, size, strict=True)]
        return AroundObjects(size, spacing, self.jitter, self.crops, self.seed)

    def find(self, source: str, out: str) -> Cases:
        """One case for each patient that has a segmentation and all channels asked for."""
        files = source_files.files_below(source, out)
        found: dict[str, dict[str, str]] = {}
        for name in files:
            if match := NAME.fullmatch(os.path.basename(name)):
                found.setdefault(match[1], {}).setdefault(match[2].lower(), name)
        if not found:
            raise UserError(f"{source}: no ID_flair.nii.gz … ID_seg.nii.gz below it: name BraTS' folder")
        cases = Cases()
        for patient, own in sorted(found.items()):
            lacks = [role for role in (*self.channels, "seg") if role not in own]
            if lacks:
                cases.bad.append((next(iter(own.values())), f"its {', '.join(lacks)} is missing"))
                continue
            roles = [
                (role, source_files.as_source(own[role], files[own[role]]))
                for role in (*self.channels, "seg")
            ]
            uid = source_files.as_source(patient, "").uid
            cases.cases.append(Case(uid, own[self.channels[0]], patient, tuple(roles)))
        return cases

    def split(self, cases: list[Case]) -> Split:
        """Folds of equal numbers of patients, drawn by the seed."""
        return split_by_folds(cases, self.folds, self.val_fraction, self.seed)

    def cut(self, case: Case, size: tuple[int, int, int]) -> CutSamples:
        """Crops around the tumour."""
        images = [read_image(case.source(role)) for role in self.channels]
        first = images[0]
        for role, image in zip(self.channels, images, strict=True):
            if apart := source_files.apart(first.grid, image.grid):
                raise BadScan(f"{role} {apart.replace('its image', self.channels[0])}")
        shape = first.values.shape
        mask, file = source_files.read_mask(
            case.source("seg"), first.grid, shape, TUMOUR, self.resample_masks
        )
        read = [*zip(self.channels, images, strict=True), ("seg", file)]
        files = [
            crops.file_record(role, case.source(role).name, image.nbytes, image.checksum)
            for role, image in read
        ]
        scales = [intensity_range(role, image) for role, image in zip(self.channels, images, strict=True)]

        def channels(crop_box: CropBox) -> list[NDArray[np.int16]]:
            return [
                crop_in_range(image.values, crop_box, *own) for image, own in zip(images, scales, strict=True)
            ]

        how = self._around(size)
        return CutSamples(
            files, crops_around_objects(channels, mask, first.grid, how, case.patient, "tumour")
        )


def intensity_range(role: str, image: ImageVolume) -> tuple[float, float]:
    """Smallest and largest value of a patient's image."""
    low, high = float(image.values.min()), float(image.values.max())
    if not low < high:
        raise BadScan(f"{role}: one value everywhere, {low:g}")
    return low, high


def crop_in_range(values: NDArray, crop_box: CropBox, low: float, high: float) -> NDArray[np.int16]:
    """A crop as int16 0 … 32,767, low at 0 and high at the top; low beyond the image."""
    crop = crop_box.cut(values, low).astype(np.float64)
    return np.rint(np.clip((crop - low) / (high - low), 0, 1) * TOP).astype(np.int16)
