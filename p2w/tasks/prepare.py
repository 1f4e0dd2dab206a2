"""Samples of a target task, cut from its cases into a data set: options, records, dry run and manifest. No torch."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import tyro

from p2w.ct.scan import source_files
from p2w.errors import UserError
from p2w.files import canonical_json, last_part, parse_json
from p2w.progress import say
from p2w.shards.build import BuildOptions, build_data_set, single
from p2w.shards.build_folder import BuildFolder, BuildForecast, CutSource, DataSetContent, SourceListing
from p2w.shards.manifest_schema import MANIFEST_VERSION
from p2w.tasks.case_samples import IN_PART
from p2w.tasks.task import (
    CLASSIFICATION,
    REGRESSION,
    SAMPLE_COLUMNS,
    SAMPLE_KINDS,
    SAMPLE_SCHEMA,
    SPLITS,
    TARGET_COLUMNS,
    TARGET_SCHEMA,
    TASK_FILE_META,
    Case,
    CutSamples,
    LeftOut,
    Sample,
    Split,
    Task,
    split_of_fold,
)

RECORD_HEAD = 4096  # bytes beside the voxels, at most

ROW = {
    "key": str, "label": int, "scan_uid": str, "of": str, "z": int, "y": int, "x": int, "centre_z": float,
    "centre_y": float, "centre_x": float, "spacing_z": float, "spacing_y": float, "spacing_x": float,
    "foreground": float, "patient": str, "offset": int, "nbytes": int, "crc32c": int,
}  # fmt: skip
TARGET_ROW = {**ROW, "targets": [(float, None)]}
NAMED = {"uid": str, "name": str}
FINISHED = {
    "nbytes": int,
    "files": [TASK_FILE_META],
    "left_out": [str],
    "rows": [ROW],
    "shard": (None, {"nbytes": int, "crc32c": int}),
}


# Options of tasks, and their defaults, that folders of earlier versions were cut without.
OPTIONS_ADDED: dict[str, Any] = {
    "structures": "", "assume_hu": False, "resample_tilt": False, "layout": "pairs", "label_names": (), "overlapping": False,
    "scan_table": "",
    "answer": None, "answer_columns": ("label",), "foreground_share": 0.5,
    "declared": {"channels": (), "classes": (), "values": (), "order": (), "kind": ""},
}  # fmt: skip


@dataclass(frozen=True)
class PreparationOptions:
    """Options that every task has."""

    source: str
    """Folder that holds the data as it is published."""
    out: str
    """Folder to write, new or of an earlier run of the same settings."""
    size: Annotated[tuple[int, int, int] | None, tyro.conf.arg(metavar="Z Y X")] = None
    """Voxels of a stored sample, which is the network's input; default: the paper's."""
    format: Literal["tar", "arrow"] = "tar"
    """tar opens with webdataset, arrow with pyarrow; both are read alike."""
    build: Annotated[BuildOptions, tyro.conf.arg(name="")] = BuildOptions()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        """Raise UserError for a size out of range."""
        if self.size and not all(4 <= n <= 1024 for n in self.size):
            raise UserError(f"--size {' '.join(map(str, self.size))}: voxels z y x, each from 4 to 1024")


@dataclass(frozen=True)
class TargetSettings:
    """All that decides what the finished folder holds, besides the images themselves."""

    task: str
    options: dict[str, Any]
    size: tuple[int, int, int]  # z, y, x
    format: str
    tables: dict[str, str]  # tables that name samples, by the checksum of each
    whole_paths: bool = False  # whether the folder is of an earlier version, which wrote whole paths

    @property
    def portable_options(self) -> dict[str, Any]:
        """The options as the set's files record them: of a path the last part alone, since the files are given to others."""
        if self.whole_paths or not self.options.get("pretrained_on"):
            return self.options
        return self.options | {"pretrained_on": last_part(self.options["pretrained_on"])}

    def plain(self) -> dict[str, Any]:
        """The settings as JSON writes them."""
        fixed = {"schema": MANIFEST_VERSION, "task": self.task, "size_zyx": self.size, "format": self.format}
        added = OPTIONS_ADDED  # options that folders of earlier versions lack
        options = {
            f"option {name}": value
            for name, value in self.portable_options.items()
            if name not in added or value != added[name]
        }
        return json.loads(
            canonical_json(fixed | options | {f"table {name}": crc for name, crc in self.tables.items()})
        )


def prepare_samples(task: Task, options: PreparationOptions) -> int:
    """Cut the samples of a task; the exit code: 0, or 1 when a case was bad. Raises UserError when it cannot go on."""
    task.check()
    source, out = options.source, options.out
    if not os.path.isdir(source):
        raise UserError(f"{source}: no such folder; name the folder of the data with --source DIR")
    if os.path.realpath(source) == os.path.realpath(out):
        raise UserError(
            f"{out}: the set gets a folder of its own, not that of the data: name it with --out DIR"
        )
    say(f"looking through {source}")
    cases = task.find(source, out).sort()
    if not cases.cases:
        first = (
            f"; {len(cases.bad)} bad, the first: {cases.bad[0][0]}: {cases.bad[0][1]}" if cases.bad else ""
        )
        raise UserError(f"{source}: nothing for task {task.name} there that can be used{first}")
    task = cases.task or task
    task.split(cases.cases)  # refuses what cannot be split before anything is cut
    size, plain = options.size or task.size, asdict(task)  # type: ignore[call-overload]
    settings = TargetSettings(task.name, plain, size, options.format, cases.tables)
    return build_data_set(TargetFolder(out, settings, task), cases, options.build)


class TargetFolder(BuildFolder[TargetSettings, Case]):
    """The folder of a task's samples that are cut from its cases."""

    source_noun, part_noun = "case", "sample"
    form = (NAMED | {"bad": str}, NAMED | FINISHED)
    columns = pa.schema([SAMPLE_COLUMNS.field(name) for name in ROW])
    schema = SAMPLE_SCHEMA

    def __init__(self, root: str, settings: TargetSettings, task: Task) -> None:
        """Name the folder; nothing is read or written before `prepare`."""
        super().__init__(root, settings)
        self.task = task
        self.kind = SAMPLE_KINDS[task.kind]
        self.masks = self.kind.masks
        if self.kind.targets:
            self.schema, row = TARGET_SCHEMA, TARGET_ROW
            self.form = (NAMED | {"bad": str}, NAMED | FINISHED | {"rows": [row]})
            self.columns = pa.schema([TARGET_COLUMNS.field(name) for name in row])
        self.note = {
            "task": task.name,
            "window": list(task.window),
            "channels": list(task.channel_names),
            "axis_order": "czyx",
            "orientation": "LPS",
            "spacing": "mm",
        }

    def adopt_version(self, theirs: bytes) -> None:
        """Go on with a folder of an earlier version, whose settings hold the whole path of `--pretrained-on`."""
        asked = self.settings.options.get("pretrained_on")
        try:
            there = parse_json(theirs, {}).get("option pretrained_on")
        except ValueError:
            return
        if asked and there == asked:
            self.settings = replace(self.settings, whole_paths=True)

    def nbytes(self, source: Case) -> int:
        """Total size in bytes of all files of a case."""
        images = [path for _, one in source.files for path in source_files(one)]
        return sum(os.path.getsize(path) for path in [*images, *(path for _, path in source.notes)])

    def cut(self, source: Case) -> CutSource:
        """Read a case; its samples come one by one. Raises BadScan for one that cannot be used."""
        cut = self.task.cut(source, self.settings.size)
        record = {"nbytes": self.nbytes(source), "files": cut.files, "left_out": []}
        return CutSource(record, self._samples(cut, source, record))

    def _samples(
        self, cut: CutSamples, case: Case, record: dict[str, Any]
    ) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """Row and voxels of each sample; what is left out is noted in the record."""
        number = 0
        for sample in cut.samples:
            if isinstance(sample, LeftOut):
                record["left_out"].append(sample.why)
            else:
                yield self._row(number, case, sample), np.ascontiguousarray(sample.record, "<i2")
                number += 1

    def _row(self, number: int, case: Case, sample: Sample) -> dict[str, Any]:
        row: dict[str, Any] = {
            "key": f"{case.uid}/{number:05d}",
            "scan_uid": case.uid,
            "patient": case.patient,
            "of": sample.of,
            "label": sample.label,
            "foreground": single((sample.record[-1] != 0).mean()) if self.masks else 0.0,
        }
        if self.kind.targets:
            row["targets"] = [None if math.isnan(value) else value for value in self._targets(sample)]
        for axis, first, centre, spacing in zip(
            "zyx", sample.first_voxel, sample.centre_mm, sample.spacing_mm, strict=True
        ):
            row |= {axis: round(first), f"centre_{axis}": float(centre), f"spacing_{axis}": single(spacing)}
        return row

    def _targets(self, sample: Sample) -> list[float]:
        """What the column of that name holds: of a mask, the share of the voxels that each class has."""
        if not self.masks:
            return list(sample.targets)
        mask, count = sample.record[-1], len(self.task.classes)
        if self.kind.bits:
            return [float(((mask >> bit) & 1).mean()) for bit in range(count)]
        return (np.bincount(mask.ravel(), minlength=count)[1:] / mask.size).tolist()

    def remark(self, record: dict[str, Any]) -> str | None:
        """The first sample that was left out, and how many more there are."""
        left_out = record["left_out"]
        if not left_out:
            return None
        more = f" (and {len(left_out) - 1} more, see report.json)" if len(left_out) > 1 else ""
        return f"left out: {record['name']}: {left_out[0]}{more}"

    def forecast(self, listing: SourceListing[Case], sources: list[Case], workers: int) -> BuildForecast:
        """Samples as far as tables name them, at least one for each case, and their bytes; cases by split."""
        del workers
        task, cases = self.task, listing.sources
        depth, height, width = self.settings.size
        one = 2 * (len(task.channel_names) + self.masks) * depth * height * width + RECORD_HEAD
        known = sum(max(1, len(case.candidates)) for case in sources)
        marks = [candidate.label for case in sources for candidate in case.candidates]
        what = f"{len(marks):,} candidates" if marks else "samples from masks"
        many = "as many as the masks give; they are read when cutting"
        if marks:
            positive = sum(label == 1 for label in marks)
            classes = f", {positive:,} positive" if task.kind == CLASSIFICATION else ""
            many = f"{len(marks):,}{classes}; {len(marks) * one / 2**30:.2f} GiB into {self.root}"
        patients = {case.patient for case in cases}
        lines = [
            f"task           {task.name}: {task.kind}, {', '.join(task.channel_names)}; {' | '.join(task.classes)}",
            f"cases          {len(cases):,} of {len(patients):,} patients, besides {len(listing.bad)} bad ones",
            *(
                f"  {name:13}{count}"
                for name, count in _counts(cases, task.split(cases), task.kind == CLASSIFICATION).items()
            ),
            f"sample         {depth} x {height} x {width} voxels (z, y, x), {one / 2**20:.2f} MiB",
            f"samples        {many}",
        ]
        least = known * one
        return BuildForecast(f"{what}, {least / 2**30:.1f} GiB or more", lines, least)

    def content(self, listing: SourceListing[Case], good: list[dict[str, Any]]) -> DataSetContent:
        """Rows with their split and fold, and the metadata: task, split and cases."""
        task, split = self.task, self.task.split(listing.sources)
        patient = {case.uid: case.patient for case in listing.sources}
        # Of DICOM, the hash of the PatientID, by which p2w.tasks.leak compares patients with those of pretraining.
        hashes = {case.uid: case.files[0][1].info.patient for case in listing.sources if case.files}
        of, fold_of = _split_and_fold(split, {patient[record["uid"]] for record in good if record["rows"]})
        rows = [
            row | {"split": of[row["patient"]], "fold": fold_of.get(row["patient"], -1)}
            for record in good
            for row in record["rows"]
        ]
        refuse_missing_classes(rows, task, split)
        if in_part := sum(row["of"].endswith(IN_PART) for row in rows):
            say(f"{in_part} of {len(rows)} scans are larger than a sample, which shows their middle")
        channels, size = len(task.channel_names), list(self.settings.size)
        meta: dict[str, Any] = {
            "task": task.name,
            "kind": task.kind,
            "shape": [channels + self.masks, *size],
            "channels": channels,
            "channel_names": list(task.channel_names),
            "size_zyx": size,
            "spacing_mm": _spacing(rows),
            "window": list(task.window),
            "classes": list(task.classes),
            "axis_order": "czyx",
            "settings": self.settings.portable_options,
            "tables": self.settings.tables,
            "split": {
                "rule": split.rule,
                "seed": split.seed,
                "folds": split.folds,
                "val_fraction": split.val_fraction,
                "samples": {name: sum(row["split"] == name for row in rows) for name in SPLITS},
                "scans": _scans(rows, split.folds),
            },
            "sources": [
                {"uid": record["uid"], "patient": patient[record["uid"]], "files": record["files"]}
                | {"left_out": record["left_out"], "samples": len(record["rows"])}
                | ({"patient_hash": hashed} if (hashed := hashes.get(record["uid"])) else {})
                for record in good
            ],
        }
        if target := getattr(task, "target", {}):  # what a kind of task needs beside the names of the classes
            meta["target"] = target
        lists = {}
        if not split.folds:
            shards = {name: {row["scan_uid"] for row in rows if row["split"] == name} for name in SPLITS}
            ending = self.settings.format
            lists = {
                f"{name}.txt": sorted(f"{uid}.{ending}" for uid in uids) for name, uids in shards.items()
            }
        left_out = [(record["name"], why) for record in good for why in record["left_out"]]
        return DataSetContent(rows, meta, lists, left_out)

    def summary(self, meta: dict[str, Any]) -> list[str]:
        """Lines on samples, split and size of the finished set."""
        samples = sum(source["samples"] for source in meta["sources"])
        size = sum(shard["nbytes"] for shard in meta["shards"]) / 2**30
        by_split = meta["split"]["samples"]
        counts = ", ".join(f"{name} {count:,}" for name, count in by_split.items())
        tested = " where fold 0 is tested on" if meta["split"]["folds"] else ""
        return [f"{self.root}: {samples:,} samples, {size:.2f} GiB; {counts}{tested}"] + [
            f"no samples for {name}: too few patients, or a fraction of 0"
            for name, count in by_split.items()
            if not count
        ]


def _counts(cases: list[Case], split: Split, binary: bool) -> dict[str, str]:
    """How many cases, patients and candidates each split or fold has."""
    found: dict[str, list[Case]] = {}
    for case in cases:
        name = f"fold {split.fold_of[case.patient]}" if split.folds else split.of[case.patient]
        found.setdefault(name, []).append(case)
    order = ["train", "val", "test", *(f"fold {i}" for i in range(split.folds))]
    counts = {}
    for name in order:
        own = found.get(name, [])
        if not own and split.folds and name in ("train", "val", "test"):
            continue
        candidates = [candidate for case in own for candidate in case.candidates]
        positive = sum(mark.label == 1 for mark in candidates)
        many = f", {len(candidates):,} marks" if candidates else ""
        if candidates and binary:
            many += f", {positive:,} positive"
        counts[name] = f"{len(own):,} cases of {len({case.patient for case in own}):,} patients{many}"
    return counts


def _split_and_fold(split: Split, patients: set[str]) -> tuple[dict[str, str], dict[str, int]]:
    """Split (of fold 0, where there are folds) and fold of every patient that has samples."""
    if not split.folds:
        return {patient: split.of[patient] for patient in patients}, {}
    fold_of = {patient: split.fold_of[patient] for patient in patients}
    empty = sorted(set(range(split.folds)) - set(fold_of.values()))
    if empty and patients:
        raise UserError(f"fold {empty[0]} of {split.folds} has no patient with samples: ask for fewer folds")
    return split_of_fold(fold_of, 0, split.val_fraction, split.seed), fold_of


def _scans(rows: list[dict[str, Any]], folds: int) -> dict[str, list[str]]:
    """Scans by split, or by the fold they are tested on: what a pretraining set must not hold is here."""
    if folds:
        names = {str(i): {row["scan_uid"] for row in rows if row["fold"] == i} for i in range(folds)}
    else:
        names = {name: {row["scan_uid"] for row in rows if row["split"] == name} for name in SPLITS}
    return {name: sorted(uids) for name, uids in names.items()}


def _spacing(rows: list[dict[str, Any]]) -> list[list[float]] | None:
    """mm z, y, x: [smallest, largest] along each axis; None without samples."""
    if not rows:
        return None
    return [
        [min(row[f"spacing_{axis}"] for row in rows), max(row[f"spacing_{axis}"] for row in rows)]
        for axis in "zyx"
    ]


def refuse_missing_classes(rows: list[dict[str, Any]], task: Task, split: Split) -> None:
    """Raise UserError for a class that no sample has, or no training sample.

    Of a set with folds, the training samples are checked when a fold is fine-tuned on.
    """
    kind, classes = SAMPLE_KINDS[task.kind], task.classes
    if not rows or (not kind.targets and kind.labels is not None):
        return
    names = classes if kind.bits or not kind.masks else classes[1:]

    def counts_in(some: list[dict[str, Any]]) -> list[int]:
        """How many samples have each class, or of regression a value."""
        if not kind.targets:
            return [sum(row["label"] == label for row in some) for label in range(len(names))]
        at_least = -math.inf if task.kind == REGRESSION else 1e-12
        return [
            sum(row["targets"][k] is not None and row["targets"][k] > at_least for row in some)
            for k in range(len(names))
        ]

    training = [row for row in rows if split.folds or row["split"] == "train"]
    for name, count, trained in zip(names, counts_in(rows), counts_in(training), strict=True):
        what = "value" if task.kind == REGRESSION else "case"
        if not count:
            raise UserError(f"{name}: has no {what} in any sample; declare only what the data holds")
        if not trained and training:
            raise UserError(
                f"{name}: has no {what} in the training split, {count} elsewhere: another --seed, --fractions or "
                "--split-table, or --folds"
            )
