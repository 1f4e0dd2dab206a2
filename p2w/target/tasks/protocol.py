"""What a target task is to everything that prepares its data: finds cases, splits them by patient, cuts samples.

A task is a frozen dataclass whose fields are its options on the command line; it travels to worker processes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from p2w.data.find import Source

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Mark:
    """A place that a table names, x, y, z; `of` says which row it is."""

    of: str
    xyz: Triple
    label: int


@dataclass(frozen=True)
class Case:
    """What one shard is cut from: images, masks and what tables or readers say of them."""

    uid: str
    name: str  # what the user sees
    patient: str
    files: tuple[tuple[str, Source], ...]  # role -> image; the first is that whose uid this is
    notes: tuple[tuple[str, str], ...] = ()  # role -> path of other files: readers' XML
    marks: tuple[Mark, ...] = ()
    split: str = ""  # where the source itself says so
    fold: int = -1

    def source(self, role: str) -> Source:
        """The image of that role."""
        return dict(self.files)[role]


@dataclass
class Cases:
    """What a folder holds for a task. `bad` and `left_out` are (name, why); `tables` are files that name samples."""

    cases: list[Case] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    tables: dict[str, str] = field(default_factory=dict)  # name -> checksum

    def sort(self) -> "Cases":
        """In an order that depends on nothing else."""
        self.cases.sort(key=lambda case: case.uid)
        self.bad.sort()
        self.left_out.sort()
        return self


@dataclass(frozen=True)
class Sample:
    """One record int16 [c,z,y,x]: channels, and the mask last for segmentation; and where it was cut, z, y, x."""

    record: NDArray[np.int16]
    of: str
    label: int  # -1 for segmentation
    first_voxel: Triple
    centre_mm: Triple
    spacing_mm: Triple


@dataclass(frozen=True)
class LeftOut:
    """A sample that cannot be cut, in one line; the others of its case go on."""

    why: str


@dataclass(frozen=True)
class Cut:
    """A case that was read: what its files are (`record.FILE`), and its samples."""

    files: list[dict[str, Any]]
    samples: Iterator[Sample | LeftOut]


@dataclass(frozen=True)
class Split:
    """Who is tested on: a split for every patient, or, with folds, a fold."""

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
        """`classification` or `segmentation`."""

    @property
    def classes(self) -> tuple[str, ...]:
        """What 0 and 1 mean."""

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
        """By patient; a function of the cases and the options. Raises UserError where it cannot be done."""

    def cut(self, case: Case, size: tuple[int, int, int]) -> "Cut":
        """Read a case; its samples come one by one. Raises BadScan for a case that cannot be used."""
