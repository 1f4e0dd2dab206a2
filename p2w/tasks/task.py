"""The interface of a target task, its splits by patient, and the records, columns and metadata of its data sets. No torch.

A task finds cases, splits them by patient and cuts samples. The random order of patients is that of a hash of seed and
patient, so a split does not depend on the order or number of files.

A task is a frozen dataclass whose fields are its options on the command line; it travels to worker processes.

A record is one int16 array [c,z,y,x]: the channels of the crop and, where the kind has one, its mask as the last: 0 or 1,
the number of a class, or a bit for each of several classes (`SampleKind`).
Shards, manifest and folder are those of pretraining (`p2w.shards.writer`, `p2w.shards.manifest`), so a set opens with
stock webdataset and pyarrow, and every record is read in place and carries its checksum.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from p2w.ct.discover import ScanSource
from p2w.errors import UserError
from p2w.shards.manifest_schema import ManifestSchema


@dataclass(frozen=True)
class SampleKind:
    """What the samples of a kind of task hold: the data side of its class in `p2w.finetune.task_types`."""

    name: str
    """The name in manifests, run folders and cards."""
    masks: bool
    """Whether the last layer of a record is a mask; otherwise the label or the targets are what is learned."""
    labels: tuple[int, ...] | None
    """The labels that a sample may have, as int8; -1 stands for no label; None: from 0 to the number of classes - 1."""
    bits: bool = False
    """Whether bit k of a voxel of the mask says that it belongs to class k: classes may overlap. At most `MOST_BITS`."""
    targets: bool = False
    """Whether samples have `targets`, one number for each class. With a mask, the share of the voxels that the class has
    (background has none); without, what is learned, NaN where it is unknown."""

    def labels_of(self, classes: int) -> tuple[int, ...]:
        """The labels that a sample may have where there are so many classes."""
        return tuple(range(classes)) if self.labels is None else self.labels


CLASSIFICATION, SEGMENTATION = "classification", "segmentation"
MULTI_CLASS_SEGMENTATION, MULTI_LABEL_SEGMENTATION = "multi-class segmentation", "multi-label segmentation"
MULTI_CLASS, MULTI_LABEL, REGRESSION = (
    "multi-class classification",
    "multi-label classification",
    "regression",
)
SAMPLE_KINDS = {
    kind.name: kind
    for kind in (
        SampleKind(CLASSIFICATION, masks=False, labels=(0, 1)),
        SampleKind(SEGMENTATION, masks=True, labels=(-1,)),
        SampleKind(MULTI_CLASS_SEGMENTATION, masks=True, labels=(-1,), targets=True),
        SampleKind(MULTI_LABEL_SEGMENTATION, masks=True, labels=(-1,), bits=True, targets=True),
        SampleKind(MULTI_CLASS, masks=False, labels=None),
        SampleKind(MULTI_LABEL, masks=False, labels=(-1,), targets=True),
        SampleKind(REGRESSION, masks=False, labels=(-1,), targets=True),
    )
}
MOST_CLASSES, MOST_BITS, MOST_LABEL = (
    255,
    15,
    127,
)  # of a mask, of a mask whose classes overlap, of a sample's label
SPLITS = ("train", "val", "test")
WINDOW_HU = (-1000, 1000)

SAMPLE_COLUMNS = pa.schema(
    [
        ("key", pa.string()),  # UID/00012: the scan, the sample's number in it
        (
            "split",
            pa.string(),
        ),  # train | val | test; of a set with folds: the split where fold 0 is tested on
        ("fold", pa.int16()),  # in which fold the sample is tested on; -1: the set has no folds
        ("patient", pa.string()),
        ("label", pa.int8()),  # one of `SampleKind.labels`; -1: there is a mask instead
        ("shard", pa.string()),
        ("offset", pa.int64()),  # byte of the shard at which the record starts
        ("nbytes", pa.int64()),
        ("crc32c", pa.uint32()),
        ("scan_uid", pa.string()),
        ("of", pa.string()),  # what the sample is of: a row of the table of candidates, a nodule, a tile
        (
            "z",
            pa.int32(),
        ),  # the crop's first voxel, in voxels of the canonical (LPS) scan, rounded; may be negative
        ("y", pa.int32()),
        ("x", pa.int32()),
        ("centre_z", pa.float64()),  # world mm (LPS) of the voxel at size // 2
        ("centre_y", pa.float64()),
        ("centre_x", pa.float64()),
        ("spacing_z", pa.float32()),  # mm of the crop's voxels
        ("spacing_y", pa.float32()),
        ("spacing_x", pa.float32()),
        ("foreground", pa.float32()),  # share of the voxels in the mask; 0 where there is none
    ]
)
# Columns of a set whose kind has `SampleKind.targets`.
# A number a class; null: unknown
TARGET_COLUMNS = pa.schema([*SAMPLE_COLUMNS, ("targets", pa.list_(pa.float64()))])
TASK_FILE_META = {"role": str, "file": str, "nbytes": int, "checksum": str}
TASK_SOURCE_META = {"uid": str, "patient": str, "files": [TASK_FILE_META], "samples": int, "left_out": [str]}
TASK_META = {
    "task": str,
    "kind": str,
    "channels": int,
    "channel_names": [str],
    "size_zyx": [int],
    "window": [float],
    "classes": [str],
    "axis_order": str,
    "orientation": str,
    "dtype": str,
    "tool": str,
    "settings": {},
    "tables": {},
    "split": {"rule": str, "folds": int, "seed": int, "val_fraction": float, "scans": {}},
    "sources": [TASK_SOURCE_META],
    "bad_scans": [{"where": str, "why": str}],
}
SAMPLE_SCHEMA = ManifestSchema(
    SAMPLE_COLUMNS, 4, TASK_META, "p2w prepare", "make the set: p2w prepare TASK --source FOLDER --out DIR",
    TARGET_COLUMNS,
)  # fmt: skip
TARGET_SCHEMA = replace(SAMPLE_SCHEMA, schema=TARGET_COLUMNS)  # to write a set with targets

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class CandidatePoint:
    """A point (x, y, z) that a table names; `of` says which row it is. `xyz` is NaN where the row is of the whole scan."""

    of: str
    xyz: Triple
    label: int  # -1: there are targets instead
    targets: tuple[float, ...] = ()


@dataclass(frozen=True)
class Case:
    """The source of one shard: images, masks, and what tables or readers' files record about them."""

    uid: str
    name: str  # in messages
    patient: str
    files: tuple[tuple[str, ScanSource], ...]  # (role, image); the uid is that of the first image
    notes: tuple[tuple[str, str], ...] = ()  # (role, path) of other files, such as readers' XML
    candidates: tuple[CandidatePoint, ...] = ()
    split: str = ""  # where the source itself says so
    fold: int = -1

    def source(self, role: str) -> ScanSource:
        """The image of that role."""
        return dict(self.files)[role]


@dataclass
class Cases:
    """What a folder holds for a task. `bad` and `left_out` are (name, why); `tables` are files that name samples.

    `task` is the task with what the source itself says of its channels and classes; None: as the options say.
    """

    cases: list[Case] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    tables: dict[str, str] = field(default_factory=dict)  # name -> checksum
    task: "Task | None" = None

    @property
    def sources(self) -> list[Case]:
        """The cases, under the name that every listing has."""
        return self.cases

    def sort(self) -> "Cases":
        """Bring them into an order that depends on nothing but their names."""
        self.cases.sort(key=lambda case: case.uid)
        self.bad.sort()
        self.left_out.sort()
        return self


@dataclass(frozen=True)
class Sample:
    """One record int16 [c,z,y,x], the channels and maybe a mask as the last; and where it was cut, z, y, x."""

    record: NDArray[np.int16]
    of: str
    label: int  # -1: there is a mask instead
    first_voxel: Triple
    centre_mm: Triple
    spacing_mm: Triple
    targets: tuple[float, ...] = ()  # of a kind without a mask; those of a mask are counted in it


@dataclass(frozen=True)
class LeftOut:
    """A sample that cannot be cut, in one line; the others of its case go on."""

    why: str


@dataclass(frozen=True)
class CutSamples:
    """A case that was read: the records of its files (`task.TASK_FILE_META`), and its samples."""

    files: list[dict[str, Any]]
    samples: Iterator[Sample | LeftOut]


@dataclass(frozen=True)
class Split:
    """The split of every patient, or, with folds, the fold that the patient is tested in."""

    rule: str
    of: dict[str, str] = field(default_factory=dict)  # patient -> train | val | test
    fold_of: dict[str, int] = field(default_factory=dict)
    folds: int = 0
    seed: int = 0
    val_fraction: float = 0.0


class Task(Protocol):
    """One target task. Class attributes say what its samples are."""

    name: ClassVar[str]
    size: ClassVar[tuple[int, int, int]]  # z, y, x: the paper's

    @property
    def kind(self) -> str:
        """The kind of the task: a name in `SAMPLE_KINDS`."""

    @property
    def classes(self) -> tuple[str, ...]:
        """What the labels 0, 1, … mean, or the values of a mask."""

    @property
    def channel_names(self) -> tuple[str, ...]:
        """What the channels of a sample are."""

    @property
    def window(self) -> tuple[float, float]:
        """Stored values that become 0 and 1."""

    def check(self) -> None:
        """Raise UserError for options that make no data set."""

    def find(self, source: str, out: str) -> Cases:
        """All cases below a folder. Raises UserError when there are none, or a table cannot be read."""

    def split(self, cases: list[Case]) -> Split:
        """Divide the cases by patient, as a function of cases and options alone. Raises UserError where it cannot."""

    def cut(self, case: Case, size: tuple[int, int, int]) -> "CutSamples":
        """Read a case; its samples come one by one. Raises BadScan for a case that cannot be used."""


def shuffled_names(names: Iterable[str], seed: int, salt: str = "") -> list[str]:
    """The distinct names, in an order that the seed draws."""
    distinct = sorted(set(names))
    return sorted(distinct, key=lambda name: hashlib.sha256(f"{seed}:{salt}:{name}".encode()).digest())


def by_fractions(weight: dict[str, int], fractions: Sequence[float], seed: int) -> dict[str, int]:
    """Patient -> part, so that part i holds fractions[i] of all the scans; `weight`: scans of each patient.

    Parts fill up in the order of the seed; a patient with several scans goes where they fit. Every part that is to
    hold something gets a patient while there are enough of them.
    """
    total, share = sum(weight.values()), sum(fractions)
    ends = [round(total * sum(fractions[: i + 1]) / share) for i in range(len(fractions))]
    room = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    wanted = [i for i, fraction in enumerate(fractions) if fraction > 0]
    if len(weight) >= len(wanted):
        for i in wanted:
            if room[i] == 0:
                room[max(range(len(room)), key=room.__getitem__)] -= 1
                room[i] = 1
    part: dict[str, int] = {}
    for patient in sorted(shuffled_names(weight, seed), key=lambda name: -weight[name]):
        fits = [i for i in wanted if room[i] >= weight[patient]]
        chosen = fits[0] if fits else max(wanted, key=room.__getitem__)
        part[patient] = chosen
        room[chosen] -= weight[patient]
    return part


def assign_folds(patients: Iterable[str], folds: int, seed: int) -> dict[str, int]:
    """Patient -> fold, folds of equal numbers of patients to within one."""
    return {patient: i % folds for i, patient in enumerate(shuffled_names(patients, seed))}


def split_of_fold(fold_of: dict[str, int], fold: int, val_fraction: float, seed: int) -> dict[str, str]:
    """Patient -> train, val or test where `fold` is tested on: val is carved from the other patients."""
    others = shuffled_names(
        (name for name, own in fold_of.items() if own != fold), seed, f"val of fold {fold}"
    )
    count = round(val_fraction * len(others))
    if val_fraction > 0 and len(others) > 1:
        count = min(max(count, 1), len(others) - 1)
    split = {name: "test" for name, own in fold_of.items() if own == fold}
    return split | {name: "val" if i < count else "train" for i, name in enumerate(others)}


def check_folds(folds: int, val_fraction: float) -> None:
    """Raise UserError for numbers that make no folds."""
    if not 2 <= folds <= 100:
        raise UserError(f"--folds {folds}: from 2 to 100")
    if not 0 <= val_fraction < 1:
        raise UserError(f"--val-fraction {val_fraction:g}: a share of the patients, from 0 to below 1")


def split_by_folds(cases: list[Case], folds: int, val_fraction: float, seed: int) -> Split:
    """Random folds. Raises UserError for fewer patients than folds."""
    patients = {case.patient for case in cases}
    if len(patients) < folds:
        raise UserError(f"{len(patients)} patients cannot be divided into --folds {folds}")
    rule = f"{folds} folds by patient, dealt in the order of sha256(seed:patient); val from the rest alike"
    fold_of = assign_folds(patients, folds, seed)
    return Split(rule, fold_of=fold_of, folds=folds, seed=seed, val_fraction=val_fraction)


def split_by_table_folds(cases: list[Case], folds: int, val_fraction: float, seed: int) -> Split:
    """The folds that a table names for every case, or as many as asked for. Raises UserError for a table in between."""
    without = [case for case in cases if case.fold < 0]
    if len(without) == len(cases):
        return split_by_folds(cases, folds, val_fraction, seed)
    if without:
        raise UserError(f"series {without[0].name} has no fold in the table and others have: all or none")
    fold_of = {case.patient: case.fold for case in cases}
    count = max(fold_of.values()) + 1
    if set(fold_of.values()) != set(range(count)) or count < 2:
        raise UserError(
            f"the table's folds are {sorted(set(fold_of.values()))}: 0, 1, … without gaps, two or more"
        )
    rule = (
        f"{count} folds by patient, as the table says; val from the rest in the order of sha256(seed:patient)"
    )
    return Split(rule, fold_of=fold_of, folds=count, seed=seed, val_fraction=val_fraction)
