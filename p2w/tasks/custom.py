"""general: your own task. Images with masks to segment, or images and a table of candidates to classify."""

import os
import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from p2w.ct.discover import SearchOptions, find_scans
from p2w.ct.orientation import Grid
from p2w.ct.percentiles import percentile_range
from p2w.ct.scan import read_image, read_scan, straightened
from p2w.errors import UserError
from p2w.tasks import crops, dicom_masks, source_files, splits
from p2w.tasks.bms import TOP, crop_in_range, intensity_range
from p2w.tasks.crops import AroundObjects, Channels, TileSettings, crops_around_objects, crops_in_tiles
from p2w.tasks.dicom_masks import MODALITY
from p2w.tasks.splits import check_folds, split_by_folds, split_by_table_folds
from p2w.tasks.task import CLASSIFICATION, SEGMENTATION, SPLITS, WINDOW_HU, Case, Cases, CutSamples, Split

DICOM = "dicom"  # in place of a pattern of images


@dataclass(frozen=True)
class Custom(TileSettings):
    """general: your own task. Image and mask pairs below --source, or, with --table, scans and candidates."""

    images: str = "*_image.nii.gz"
    """Pattern of the images' names; its one * stands for the case. dicom: all DICOM CT series."""
    masks: str = "*_mask.nii.gz"
    """Pattern of the masks' names; its * stands for the same text as in the image's name, of a DICOM series
    its uid or folder. rtstruct, seg: DICOM files that refer to the series."""
    structures: str = ""
    """With --masks rtstruct or seg: regular expression of the names of structures that are foreground; default: all."""
    assume_hu: bool = False
    """Take values for HU without a test: for CT without air, such as brains without skull or cropped organs."""
    resample_tilt: bool = False
    """Resample DICOM series of tilted or unevenly spaced slices, and sheared images, to a straight grid; masks have to
    lie on that grid, or --resample-masks lays them over it."""
    labels: tuple[int, ...] = ()
    """Values of a mask that are foreground; default: every value except 0."""
    around: Literal["tiles", "object"] = "tiles"
    """tiles over all that is foreground, or one crop round it."""
    jitter: float = 0.25
    """With --around object: the crop is moved at random by up to half this share of its size, along each axis."""
    crops: int = 1
    """With --around object: crops of each image, each moved at random."""
    table: str = ""
    """Candidates patient,series,x,y,z,label[,fold][,split]: makes it a classification; x, y, z in LPS mm."""
    values: Literal["hu", "min-max", "percentiles"] = "hu"
    """hu: CT, clipped to [-1000, 1000]. min-max: any modality, scaled by each image's own smallest and largest value;
    percentiles: by its percentiles 0.5 and 99.5, as `p2w shard --modality mr` scales what is pretrained on."""
    patient: str = ""
    """Regular expression whose first group, found in an image's name, is the patient; default: each case is a patient."""
    fractions: tuple[float, float, float] = (0.6, 0.1, 0.3)
    """Shares of train, val and test, by patient."""
    split_table: str = ""
    """CSV with the columns patient and split, in place of --fractions."""
    folds: int = 0
    """Number of folds, to which patients are assigned, in place of --fractions."""
    val_fraction: float = 0.15
    """With folds: of the patients outside the test fold, this share is for validation."""

    name: ClassVar[str] = "general"
    size: ClassVar[tuple[int, int, int]] = (32, 64, 64)

    @property
    def kind(self) -> str:
        """With a table of candidates, classification; without, segmentation."""
        return CLASSIFICATION if self.table else SEGMENTATION

    @property
    def classes(self) -> tuple[str, ...]:
        """What 0 and 1 mean."""
        return ("negative", "positive") if self.table else ("background", "foreground")

    @property
    def channel_names(self) -> tuple[str, ...]:
        """One channel, CT or another modality."""
        return ("ct" if self.values == "hu" else "image",)

    @property
    def window(self) -> tuple[float, float]:
        """Stored values that become 0 and 1."""
        return WINDOW_HU if self.values == "hu" else (0, TOP)

    def check(self) -> None:
        """Raise UserError for options that make no data set."""
        self.check_tiles()
        if not (all(0 <= share <= 1 for share in self.fractions) and abs(sum(self.fractions) - 1) < 1e-6):
            raise UserError(f"--fractions {' '.join(map(str, self.fractions))}: three shares that make 1")
        if self.folds:
            check_folds(self.folds, self.val_fraction)
        if self.folds and self.split_table:
            raise UserError("--folds and --split-table: choose one")
        if self.table and self.values != "hu":
            raise UserError("--table goes with CT: --values hu")
        if self.masks in MODALITY and (self.images != DICOM or self.labels):
            raise UserError(
                f"--masks {self.masks}: goes with --images dicom, and with --structures in place of --labels"
            )
        if self.images == DICOM and self.values != "hu":
            raise UserError("--images dicom: is CT, --values hu")
        self._around(self.size).check()
        try:
            re.compile(self.structures)
        except re.error as error:
            raise UserError(
                f"--structures {self.structures!r}: is no regular expression ({error})"
            ) from error
        try:
            if self.patient and re.compile(self.patient).groups < 1:
                raise UserError(f"--patient {self.patient!r}: has no group (…) that would be the patient")
        except re.error as error:
            raise UserError(f"--patient {self.patient!r}: is no regular expression ({error})") from error

    def _around(self, size: tuple[int, int, int]) -> AroundObjects:
        return AroundObjects(size, self.spacing, self.jitter, self.crops, self.seed)

    def find(self, source: str, out: str) -> Cases:
        """One case for each image with its mask, or for each scan that the table names."""
        if self.table:
            return source_files.cases_of(source, out, self.table, ras=False, resample=self.resample_tilt)
        if self.images == DICOM:
            return self._find_dicom(source, out)
        files = source_files.files_below(source, out)
        masks = source_files.matching(self.masks, files)
        images = {
            case: n
            for case, n in source_files.matching(self.images, files).items()
            if n not in masks.values()
        }
        if not images:
            raise UserError(
                f"{source}: no image there is called like {self.images!r}: name a pattern with --images"
            )
        cases = Cases()
        for name, image in sorted(images.items()):
            if name not in masks:
                cases.bad.append((image, f"has no mask {self.masks.replace('*', name)}"))
                continue
            match = re.search(self.patient, image) if self.patient else None
            if self.patient and (match is None or not match[1]):
                cases.bad.append((image, f"its name does not match --patient {self.patient!r}"))
                continue
            first = source_files.as_source(image, files[image])
            first = straightened(first) if self.resample_tilt else first
            roles = (("image", first), ("mask", source_files.as_source(masks[name], files[masks[name]])))
            cases.cases.append(Case(first.uid, image, match[1] if match else name, roles))
        return cases

    def _find_dicom(self, source: str, out: str) -> Cases:
        """One case for each DICOM CT series that has a mask."""
        found = find_scans([source], out, flag="--source", options=SearchOptions(resample=self.resample_tilt))
        cases = Cases(bad=list(found.bad), left_out=list(found.left_out))
        series = [scan for scan in found.sources if scan.grid is not None]
        if self.masks in MODALITY:
            of = dicom_masks.masks_by_series(source, out, self.masks)
            masks = {scan.uid: of.get(scan.info.series, []) for scan in series}
        else:
            names = dicom_masks.image_names(found)
            masks = {scan.uid: [] for scan in series}
            files = source_files.files_below(source, out)
            for name, mask in source_files.matching(self.masks, files).items():
                if name in names:
                    masks[names[name].uid].append(source_files.as_source(mask, files[mask]))
                else:
                    cases.bad.append((mask, f"there is no DICOM series or folder {name!r} that it is of"))
        # A patient is named after a series, so that nothing in the set can be traced to the PatientID.
        first: dict[str, str] = {}
        for scan in series:
            first.setdefault(scan.info.patient or scan.uid, scan.uid)
        for scan in series:
            own = masks[scan.uid]
            match = re.search(self.patient, scan.name) if self.patient else None
            if len(own) != 1:
                many = f"{len(own)} masks: {', '.join(mask.name for mask in own)}" if own else "no mask"
                cases.bad.append((scan.name, f"has {many} (--masks {self.masks}), one is needed"))
            elif self.patient and (match is None or not match[1]):
                cases.bad.append(
                    (scan.name, f"its name holds no patient as --patient {self.patient!r} wants it")
                )
            else:
                patient = match[1] if match else first[scan.info.patient or scan.uid]
                cases.cases.append(Case(scan.uid, scan.name, patient, (("image", scan), ("mask", own[0]))))
        return cases

    def split(self, cases: list[Case]) -> Split:
        """Split as the table of candidates says, else as --split-table, --folds or --fractions do."""
        if any(case.split for case in cases):
            if not all(case.split for case in cases):
                raise UserError(f"{self.table}: some patients have a split and others have none")
            return Split("as the table of candidates says", {case.patient: case.split for case in cases})
        if self.folds or any(case.fold >= 0 for case in cases):
            if any(case.fold >= 0 for case in cases):
                return split_by_table_folds(cases, self.folds, self.val_fraction, self.seed)
            return split_by_folds(cases, self.folds, self.val_fraction, self.seed)
        if self.split_table:
            return self._split_by_table(cases)
        weight: dict[str, int] = {}
        for case in cases:
            weight[case.patient] = weight.get(case.patient, 0) + 1
        part = splits.by_fractions(weight, self.fractions, self.seed)
        train, val, test = self.fractions
        rule = (
            f"by patient: train {train:g}, val {val:g}, test {test:g}, in the order of sha256(seed:patient)"
        )
        return Split(rule, {name: SPLITS[i] for name, i in part.items()}, seed=self.seed)

    def _split_by_table(self, cases: list[Case]) -> Split:
        """Split as --split-table says."""
        of: dict[str, str] = {}
        for line, (patient, split) in source_files.read_csv(
            self.split_table, (("patient", "case"), ("split",))
        ):
            if split not in SPLITS or of.setdefault(patient, split) != split:
                raise UserError(
                    f"{self.split_table}, line {line}: {patient} {split}: one of {', '.join(SPLITS)}, and one only"
                )
        lacks = sorted({case.patient for case in cases} - set(of))
        if lacks:
            raise UserError(f"{self.split_table}: has no split for patient {lacks[0]}")
        crc = source_files.file_checksum(self.split_table)
        return Split(f"as {os.path.basename(self.split_table)} ({crc}) says", of)

    def cut(self, case: Case, size: tuple[int, int, int]) -> CutSamples:
        """Crops with masks, or crops around candidates."""
        if self.table:
            scan = read_scan(replace(case.source("ct"), assume_hu=self.assume_hu))
            files = [crops.file_record("ct", case.name, scan.nbytes, scan.checksum)]
            return CutSamples(
                files, crops.crop_candidates(scan.voxels, scan.grid, case.candidates, size, self.spacing)
            )
        channels, grid, shape, file_record = self._image(case)
        source = case.source("mask")
        if self.masks in MODALITY:
            mask = dicom_masks.read_mask(
                source, self.masks, self.structures, case.source("image"), grid, shape
            )
            record = {"role": "mask", "file": source.name, "nbytes": os.path.getsize(source.files[0])}
            files = [file_record, record | {"checksum": source_files.file_checksum(source.files[0])}]
        else:
            mask, file = source_files.read_mask(source, grid, shape, self.labels, self.resample_masks)
            files = [file_record, crops.file_record("mask", source.name, file.nbytes, file.checksum)]
        if self.around == "tiles":
            return CutSamples(files, crops_in_tiles(channels, mask, grid, size, self, case.uid))
        return CutSamples(
            files, crops_around_objects(channels, mask, grid, self._around(size), case.uid, "object")
        )

    def _image(self, case: Case) -> tuple[Channels, Grid, tuple[int, ...], dict[str, Any]]:
        """A function that cuts the image's channels, its grid, its shape, and what its file is."""
        if self.values == "hu":
            scan = read_scan(replace(case.source("image"), assume_hu=self.assume_hu))
            record = crops.file_record("image", case.name, scan.nbytes, scan.checksum)
            return (
                lambda crop_box: [crops.crop_hu(scan.voxels, crop_box)],
                scan.grid,
                scan.voxels.shape,
                record,
            )
        image = read_image(case.source("image"))
        by_percentiles = self.values == "percentiles"
        low, high = percentile_range(image.values) if by_percentiles else intensity_range("image", image)
        record = crops.file_record("image", case.name, image.nbytes, image.checksum)
        return (
            lambda crop_box: [crop_in_range(image.values, crop_box, low, high)],
            image.grid,
            image.values.shape,
            record,
        )
