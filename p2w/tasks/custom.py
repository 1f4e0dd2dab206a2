"""general: your own task. Images with masks to segment, or images and a table of candidates to classify."""

import os
import re
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import tyro

from p2w.ct.discover import ScanSource, SearchOptions, find_scans
from p2w.ct.scan import read_scan, straightened
from p2w.errors import UserError
from p2w.tasks import crops, dicom_masks, source_files
from p2w.tasks.answer_tables import AnswerRow, read_answers, refuse_two_rows
from p2w.tasks.bms import TOP
from p2w.tasks.case_samples import Declared, RandomCrops, SampleCutter, read_channels, read_classes
from p2w.tasks.crops import AroundObjects, TileSettings
from p2w.tasks.dataset_folders import read_decathlon, read_nnunet, read_structures
from p2w.tasks.dicom_masks import MODALITY
from p2w.tasks.label_values import BACKGROUND, parse_label_names
from p2w.tasks.task import (
    CLASSIFICATION,
    MULTI_CLASS_SEGMENTATION,
    MULTI_LABEL_SEGMENTATION,
    SEGMENTATION,
    SPLITS,
    WINDOW_HU,
    CandidatePoint,
    Case,
    Cases,
    CutSamples,
    Split,
    by_fractions,
    check_folds,
    split_by_folds,
    split_by_table_folds,
)

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
    layout: Literal["pairs", "structures", "nnunet", "decathlon"] = "pairs"
    """pairs: --images and --masks. structures: --masks names a folder with a mask file a structure, such as
    '*/segmentations' (TotalSegmentator). nnunet, decathlon: --source holds a dataset.json of nnU-Net, or of the Medical
    Segmentation Decathlon."""
    label_names: tuple[str, ...] = ()
    """NAME=VALUE of each class in the masks, such as tumour=1 body=2: makes it multi-class. NAME=1,2 is a region; regions
    may overlap, which makes it multi-label. With --answer class: NAME=TEXT of the table's classes, in order."""
    overlapping: bool = False
    """With --layout structures: a voxel may be of several structures, up to 15 of them."""
    around: Literal["tiles", "object", "foreground", "scan"] = "tiles"
    """tiles over all that is foreground; object: crops round all of it; foreground: crops drawn at random, a share of them
    around a voxel of a class; scan: one sample of the whole scan, at --spacing."""
    jitter: float = 0.25
    """With --around object: the crop is moved at random by up to half this share of its size, along each axis."""
    crops: int = 1
    """With --around object or foreground: crops of each image."""
    foreground_share: float = 0.5
    """With --around foreground: this share of the crops lies around a voxel of a class, of each class in turn."""
    table: str = ""
    """Candidates patient,series,x,y,z,label[,fold][,split]: makes it a classification; x, y, z in LPS mm."""
    scan_table: str = ""
    """Answers for whole scans: a CSV or TSV table scan,label[,patient][,fold][,split]; a sample is the scan at --spacing."""
    answer: Literal["class", "labels", "value"] | None = None
    """The kind of answer in --table or --scan-table. class: one of several classes; labels: columns of 0, 1 or nothing
    (unknown); value: a number, for regression. Default: class for --scan-table; 0 or 1 for --table."""
    answer_columns: tuple[str, ...] = ("label",)
    """Columns of the table with the answer."""
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

    declared: Annotated[Declared, tyro.conf.Suppress] = Declared()  # noqa: RUF009 (frozen)

    name: ClassVar[str] = "general"
    size: ClassVar[tuple[int, int, int]] = (32, 64, 64)

    @property
    def kind(self) -> str:
        """Classification with a table of candidates, segmentation without, or what the source declares."""
        return self.declared.kind or (CLASSIFICATION if self.table else SEGMENTATION)

    @property
    def classes(self) -> tuple[str, ...]:
        """What 0 and 1 mean, or the classes, regions, labels or values that the source declares."""
        if self.declared.kind == MULTI_CLASS_SEGMENTATION:
            return (BACKGROUND, *self.declared.classes)
        if self.declared.kind:
            return self.declared.classes
        return ("negative", "positive") if self.table else (BACKGROUND, "foreground")

    @property
    def target(self) -> dict[str, Any]:
        """What training and predicting need to know beside the classes: values in mask files, of whole scans or crops."""
        if self.declared.values:
            return {"values": self.declared.values, "order": self.declared.order}
        return {"sample": "crop" if self.table else "scan"} if self.declared.kind else {}

    @property
    def channel_names(self) -> tuple[str, ...]:
        """Those that the source declares, else one channel, CT or another modality."""
        return self.declared.channels or ("ct" if self.values == "hu" else "image",)

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
        if self.table and self.values != "hu" and not self.answer:
            raise UserError("--table goes with CT: --values hu")
        if self.masks in MODALITY and (self.images != DICOM or self.labels):
            raise UserError(
                f"--masks {self.masks}: goes with --images dicom, and with --structures in place of --labels"
            )
        if self.images == DICOM and self.values != "hu":
            raise UserError("--images dicom: is CT, --values hu")
        self._around(self.size).check() if self.around == "object" else self._drawn(self.size).check()
        self._check_layout()
        for option, pattern in (("--structures", self.structures), ("--patient", self.patient)):
            try:
                groups = re.compile(pattern).groups
            except re.error as error:
                raise UserError(f"{option} {pattern!r}: is no regular expression ({error})") from error
            if pattern and option == "--patient" and not groups:
                raise UserError(f"--patient {pattern!r}: has no group (…) that would be the patient")

    def _check_layout(self) -> None:
        """Raise UserError for options of layouts and answers that do not go together."""
        if self.layout != "pairs" and (self.images == DICOM or self.labels or self.table or self.scan_table):
            raise UserError(
                f"--layout {self.layout}: goes without --labels, --table, --scan-table and --images dicom"
            )
        if self.overlapping and self.layout != "structures":
            raise UserError(
                "--overlapping: goes with --layout structures; regions are declared with --label-names NAME=1,2"
            )
        if self.label_names and self.layout != "pairs":
            raise UserError(f"--label-names: --layout {self.layout} names the classes itself; leave it out")
        if self.label_names and (self.labels or self.masks in MODALITY):
            raise UserError(
                "--label-names: goes with mask files that hold a value a class, and without --labels"
            )
        if self.label_names and self.answer not in ("class", None):
            raise UserError(f"--label-names: --answer {self.answer} has columns and no classes; leave it out")
        if self.table and self.label_names and self.answer is None:
            raise UserError("--label-names with --table: goes with --answer class")
        if self.table and self.scan_table:
            raise UserError("--table and --scan-table: choose one")
        if not (self.table or self.scan_table) and self.answer is not None:
            raise UserError(f"--answer {self.answer}: goes with --table or --scan-table")
        whole = "--scan-table" if self.scan_table else "--around scan" if self.around == "scan" else ""
        if whole and self.spacing is None:
            raise UserError(
                f"{whole}: name --spacing Z Y X, the mm of a sample's voxels; a sample shows --size of them in the "
                "middle of the scan"
            )

    def _drawn(self, size: tuple[int, int, int]) -> RandomCrops:
        return RandomCrops(size, self.spacing, self.crops, self.foreground_share, self.seed)

    def _around(self, size: tuple[int, int, int]) -> AroundObjects:
        return AroundObjects(size, self.spacing, self.jitter, self.crops, self.seed)

    def find(self, source: str, out: str) -> Cases:
        """One case for each image with its mask or masks, or for each scan that the table names."""
        if self.scan_table or (self.table and self.answer):
            return self._find_answers(source, out)
        if self.table:
            return source_files.cases_of(source, out, self.table, ras=False, resample=self.resample_tilt)
        if self.layout != "pairs":
            return self._find_layout(source, out)
        cases = self._find_dicom(source, out) if self.images == DICOM else self._find_pairs(source, out)
        if self.label_names:
            labels = parse_label_names(self.label_names)
            cases.task = replace(self, declared=Declared((), labels.names, labels.values, (), labels.kind))
        return cases

    def _find_layout(self, source: str, out: str) -> Cases:
        """The cases of a layout that names the classes itself."""
        if self.layout == "structures":
            found = read_structures(source, out, self.images, self.masks, self.structures, self.overlapping)
            kind = MULTI_LABEL_SEGMENTATION if self.overlapping else MULTI_CLASS_SEGMENTATION
        else:
            found = (read_nnunet if self.layout == "nnunet" else read_decathlon)(source, out)
            kind = found.labels.kind
            in_hu = [name.strip().lower() == "ct" for name in found.channels]
            if self.values == "hu" and not all(in_hu):
                raise UserError(
                    f"{source}: its channels are {', '.join(found.channels)}: --values hu is for CT alone; name --values "
                    "percentiles or min-max"
                )
        declared = Declared(found.channels, found.labels.names, found.labels.values, found.labels.order, kind)
        cases = found.cases
        cases.task = replace(self, declared=declared)
        every, cases.cases = cases.cases, []
        for case in every:
            files = tuple(
                (role, self._straight(one) if role.startswith("image") else one) for role, one in case.files
            )
            if patient := self._patient_of(case.name, case.patient, cases):
                cases.cases.append(replace(case, files=files, patient=patient))
        return cases

    def _straight(self, scan: ScanSource) -> ScanSource:
        """The scan, on a straight grid where --resample-tilt asks for it."""
        return straightened(scan) if self.resample_tilt else scan

    def _patient_of(self, name: str, otherwise: str, cases: Cases) -> str:
        """The patient in an image's name, without --patient `otherwise`; "", and a bad case, where the name has none."""
        if not self.patient:
            return otherwise
        match = re.search(self.patient, name)
        if match and match[1]:
            return match[1]
        cases.bad.append((name, f"its name does not match --patient {self.patient!r}"))
        return ""

    def _find_answers(self, source: str, out: str) -> Cases:
        """One case for each scan that a table of answers names. Raises UserError for a row whose scan is not there."""
        path, answer = self.scan_table or self.table, self.answer or "class"
        table = read_answers(path, answer, self.answer_columns, self.label_names, points=bool(self.table))
        modality = "CT" if self.values == "hu" else "MR"
        search = SearchOptions(modality=modality, assume_hu=self.assume_hu, resample=self.resample_tilt)
        found = find_scans([source], out, flag="--source", options=search)
        found.sources = [self._straight(scan) for scan in found.sources]
        names = source_files.scans_by_name(found)
        rows: dict[str, list[AnswerRow]] = {}
        for row in table.rows:
            scan = names.get(row.scan) or names.get(source_files.file_stem(row.scan))
            bad = next((why for name, why in found.bad if name == row.scan), "")
            if scan is None and not bad:
                raise UserError(
                    f"{path}, line {row.line}: scan {row.scan} is not below {source}, or several are called so: name a path "
                    "below it, or leave the row out"
                )
            if scan is not None:
                rows.setdefault(scan.uid, []).append(replace(row, scan=scan.uid))
        cases = Cases(bad=list(found.bad), left_out=list(found.left_out))
        cases.tables = {os.path.basename(path): source_files.file_checksum(path)}
        first_of: dict[str, str] = {}
        for scan in found.sources:
            own = rows.get(scan.uid)
            if own is None:
                continue
            if self.scan_table:
                refuse_two_rows(path, own)
            of = os.path.basename(path)
            marks = tuple(CandidatePoint(f"{of}:{row.line}", row.xyz, row.label, row.targets) for row in own)
            first, roles = own[0], (("image", scan),)
            if any(
                (row.patient, row.split, row.fold) != (first.patient, first.split, first.fold) for row in own
            ):
                raise UserError(
                    f"{path}, line {own[-1].line}: {scan.name} is of another patient, split or fold than in line "
                    f"{first.line}"
                )
            patient = first.patient
            if not patient:  # series of one patient stay together; its name does not give the PatientID away
                series = first_of.setdefault(scan.info.patient or scan.uid, scan.uid)
                patient = self._patient_of(scan.name, series, cases)
            if patient:
                case = Case(scan.uid, scan.name, patient, roles, (), marks, first.split, first.fold)
                cases.cases.append(case)
        if table.unanswered:
            cases.left_out.append((path, f"{table.unanswered} rows without an answer"))
        if unlisted := len(found.sources) - len(cases.cases):
            cases.left_out.append(
                (source, f"{unlisted} scans that the table does not name, or without an answer")
            )
        cases.task = replace(self, declared=Declared((), table.classes, (), (), table.kind))
        return cases

    def _find_pairs(self, source: str, out: str) -> Cases:
        """One case for each image file with its mask file."""
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
        if alone := [mask for name, mask in masks.items() if name not in images]:
            cases.left_out.append((source_files.first_of(alone), f"of no image {self.images}"))
        if others := set(files) - set(images.values()) - set(masks.values()):
            why = f"called neither like --images {self.images} nor like --masks {self.masks}"
            cases.left_out.append((source_files.first_of(others), why))
        for name, image in sorted(images.items()):
            if name not in masks:
                cases.bad.append((image, f"has no mask {self.masks.replace('*', name)}"))
                continue
            first = self._straight(source_files.as_source(image, files[image]))
            roles = (("image", first), ("mask", source_files.as_source(masks[name], files[masks[name]])))
            if patient := self._patient_of(image, name, cases):
                cases.cases.append(Case(first.uid, image, patient, roles))
        return cases

    def _find_dicom(self, source: str, out: str) -> Cases:
        """One case for each DICOM CT series that has a mask."""
        found = find_scans([source], out, flag="--source", options=SearchOptions(resample=self.resample_tilt))
        cases = Cases(bad=list(found.bad), left_out=list(found.left_out))
        series = [scan for scan in found.sources if scan.grid is not None]
        if self.masks in MODALITY:
            of = dicom_masks.masks_by_series(source, out, self.masks)
            masks = {scan.uid: of.get(scan.info.series, []) for scan in series}
            there = {scan.info.series for scan in series}
            strays = {one.name for uid, own in of.items() if uid not in there for one in own}
            strays -= {one.name for own in masks.values() for one in own}
            why = "refers to no series that is there and can be used"
            cases.left_out += [(stray, why) for stray in sorted(strays)]
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
            if len(own) != 1:
                many = f"{len(own)} masks: {', '.join(mask.name for mask in own)}" if own else "no mask"
                cases.bad.append((scan.name, f"has {many} (--masks {self.masks}), one is needed"))
            elif patient := self._patient_of(scan.name, first[scan.info.patient or scan.uid], cases):
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
        part = by_fractions(weight, self.fractions, self.seed)
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
        if self.table and not self.answer:
            scan = read_scan(replace(case.source("ct"), assume_hu=self.assume_hu))
            files = [crops.file_record("ct", case.name, scan.nbytes, scan.checksum)]
            return CutSamples(
                files, crops.crop_candidates(scan.voxels, scan.grid, case.candidates, size, self.spacing)
            )
        channels, grid, shape, files = read_channels(case, self.values, self.assume_hu)
        how = SampleCutter(size, self.around, self, self._around(size), self._drawn(size))
        if case.candidates:
            return CutSamples(files, how.of_answers(channels, grid, shape, case.candidates))
        if self.declared.kind:
            labels, more = read_classes(
                case, self.declared, self.overlapping, self.resample_masks, grid, shape
            )
            bits = len(self.declared.classes) if self.kind == MULTI_LABEL_SEGMENTATION else 0
            return CutSamples([*files, *more], how.of_classes(channels, labels, grid, case.uid, bits))
        source = case.source("mask")
        if self.masks in MODALITY:
            mask = dicom_masks.read_mask(
                source, self.masks, self.structures, case.source("image"), grid, shape
            )
            record = {"role": "mask", "file": source.name, "nbytes": os.path.getsize(source.files[0])}
            files.append(record | {"checksum": source_files.file_checksum(source.files[0])})
        else:
            read, file = source_files.read_mask(source, grid, shape, self.labels, self.resample_masks)
            mask = read.astype(np.uint8, copy=False)
            files.append(crops.file_record("mask", source.name, file.nbytes, file.checksum))
        return CutSamples(files, how.of_mask(channels, mask, grid, case.uid))
