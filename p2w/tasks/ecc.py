"""ECC: is a candidate an embolus? CTPA scans of any format and a table of candidates.

A sample is a patch of 20 mm, resized to 64^3 voxels (docs/paper.md).

The paper's data is not public; CAD-PE, FUMPE and RSNA-PE can be brought into the table's form.
"""

import os
from dataclasses import dataclass
from typing import ClassVar, Literal

from p2w.ct.scan import read_scan
from p2w.errors import UserError
from p2w.tasks import crops, source_files
from p2w.tasks.task import (
    CLASSIFICATION,
    WINDOW_HU,
    Case,
    Cases,
    CutSamples,
    Split,
    check_folds,
    split_by_table_folds,
)


@dataclass(frozen=True)
class Ecc:
    """ECC: is a candidate an embolus? From CT scans below --source and a table patient,series,x,y,z,label,fold."""

    table: str = ""
    """The table; left out: candidates.csv in --source. `series`: the scan's file name, path below --source, or uid."""
    coordinates: Literal["lps", "ras"] = "lps"
    """World mm of x, y, z: lps as in DICOM, ITK and LUNA16; ras as in NIfTI and 3D Slicer."""
    patch_mm: tuple[float, float, float] = (20.0, 20.0, 20.0)
    """mm z y x that a sample shows; it is resized to --size."""
    folds: int = 3
    """Number of folds, to which the patients are assigned at random, where the table has no folds."""
    val_fraction: float = 0.15
    """Share of the patients of the other folds that is validated on."""
    seed: int = 0
    """Random seed of the folds that the table lacks, and of validation patients."""

    name: ClassVar[str] = "ecc"
    kind: ClassVar[str] = CLASSIFICATION
    size: ClassVar[tuple[int, int, int]] = (64, 64, 64)
    classes: ClassVar[tuple[str, ...]] = ("no embolus", "embolus")
    channel_names: ClassVar[tuple[str, ...]] = ("ct",)
    window: ClassVar[tuple[float, float]] = WINDOW_HU

    def check(self) -> None:
        """Raise UserError for options that make no data set."""
        if not all(1 <= mm <= 1000 for mm in self.patch_mm):
            raise UserError(f"--patch-mm {' '.join(map(str, self.patch_mm))}: mm z y x, each from 1 to 1000")
        check_folds(self.folds, self.val_fraction)

    def find(self, source: str, out: str) -> Cases:
        """One case for each scan that the table names."""
        table = self.table or os.path.join(source, "candidates.csv")
        if not os.path.isfile(table):
            raise UserError(
                f"{table}: no such file; {source_files.FORM} is needed: name it with --table FILE"
            )
        return source_files.cases_of(source, out, table, self.coordinates == "ras")

    def split(self, cases: list[Case]) -> Split:
        """The table's folds; without them patients are assigned to folds at random."""
        return split_by_table_folds(cases, self.folds, self.val_fraction, self.seed)

    def cut(self, case: Case, size: tuple[int, int, int]) -> CutSamples:
        """A patch around each candidate, resized."""
        scan = read_scan(case.source("ct"))
        files = [crops.file_record("ct", case.name, scan.nbytes, scan.checksum)]
        spacing = [mm / n for mm, n in zip(self.patch_mm, size, strict=True)]
        return CutSamples(
            files, crops.crop_candidates(scan.voxels, scan.grid, case.candidates, size, spacing)
        )
