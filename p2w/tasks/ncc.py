"""NCC: is a candidate a nodule? LUNA16's scans and its table of candidates, by Models Genesis' protocol (docs/paper.md)."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from p2w.ct.discover import find_luna, parse_subsets
from p2w.ct.scan import read_scan
from p2w.errors import UserError
from p2w.tasks import crops, source_files
from p2w.tasks.task import (
    CLASSIFICATION,
    WINDOW_HU,
    CandidatePoint,
    Case,
    Cases,
    CutSamples,
    Split,
    shuffled_names,
)

TABLES = {"V1": "candidates.csv", "V2": "candidates_V2.csv"}
COLUMNS = (("seriesuid",), ("coordX",), ("coordY",), ("coordZ",), ("class",))


@dataclass(frozen=True)
class Ncc:
    """NCC: is a candidate a nodule? From LUNA16: --source holds subset0 … subset9 and the table of candidates."""

    candidates: Literal["auto", "V1", "V2"] = "auto"
    """V1: candidates.csv, which Models Genesis used. V2: candidates_V2.csv, which LUNA16 asks for. auto: V2 where it is."""
    train_subsets: str = "0-4"
    """LUNA16 subsets to train on."""
    val_subsets: str = "5-6"
    """Subsets to validate on."""
    test_subsets: str = "7-9"
    """Subsets to test on."""
    max_negatives: int = 0
    """Negative candidates kept of each scan, drawn by --seed; 0: all of them (V1: 551,065 candidates take 144 GB)."""
    seed: int = 0
    """Draws the negatives that are kept."""

    name: ClassVar[str] = "ncc"
    kind: ClassVar[str] = CLASSIFICATION
    size: ClassVar[tuple[int, int, int]] = (32, 64, 64)
    classes: ClassVar[tuple[str, ...]] = ("no nodule", "nodule")
    channel_names: ClassVar[tuple[str, ...]] = ("ct",)
    window: ClassVar[tuple[float, float]] = WINDOW_HU

    def check(self) -> None:
        """Raise UserError for options that make no data set."""
        self._split_of()
        if self.max_negatives < 0:
            raise UserError(f"--max-negatives {self.max_negatives}: 1 or more a scan, or 0 for all")

    def find(self, source: str, out: str) -> Cases:
        """One case for each scan that has candidates; candidates of other scans are counted."""
        found, absent = find_luna(source, sorted(self._split_of()), "--source")
        path = self._table(source)
        candidates = self._candidates(path)
        cases = Cases(bad=list(found.bad), tables={os.path.basename(path): source_files.file_checksum(path)})
        split_of = self._split_of()
        cases.left_out += [(f"subset{n}", f"is not there, to {split_of[n]} on") for n in absent]
        for scan in found.sources:
            own = candidates.pop(os.path.splitext(os.path.basename(scan.files[0]))[0], None)
            if own is None:
                cases.left_out.append((scan.name, f"has no candidate in {os.path.basename(path)}"))
                continue
            split = split_of[scan.subset]
            kept = tuple(self._thin(scan.uid, own))
            cases.cases.append(
                Case(scan.uid, scan.name, scan.uid, (("ct", scan),), candidates=kept, split=split)
            )
        if candidates:
            many = sum(map(len, candidates.values()))
            cases.left_out.append(
                (os.path.basename(path), f"{many:,} candidates of {len(candidates)} scans that are not there")
            )
        return cases

    def split(self, cases: list[Case]) -> Split:
        """Split by LUNA16's subsets; LUNA16 has one scan a patient."""
        rule = f"LUNA16 subsets: train {self.train_subsets}, val {self.val_subsets}, test {self.test_subsets}"
        return Split(rule, of={case.patient: case.split for case in cases})

    def cut(self, case: Case, size: tuple[int, int, int]) -> CutSamples:
        """A crop of the scan's own voxels round each candidate."""
        scan = read_scan(case.source("ct"))
        files = [crops.file_record("ct", case.name, scan.nbytes, scan.checksum)]
        return CutSamples(files, crops.crop_candidates(scan.voxels, scan.grid, case.candidates, size, None))

    def _split_of(self) -> dict[int, str]:
        """Subset -> split. Raises UserError when one is in two."""
        of: dict[int, str] = {}
        for name, text in (
            ("train", self.train_subsets),
            ("val", self.val_subsets),
            ("test", self.test_subsets),
        ):
            for subset in parse_subsets(text):
                if of.setdefault(subset, name) != name:
                    raise UserError(
                        f"subset {subset} is in --{of[subset]}-subsets and in --{name}-subsets: choose one"
                    )
        return of

    def _table(self, source: str) -> str:
        for version in ("V2", "V1") if self.candidates == "auto" else (self.candidates,):
            path = os.path.join(source, TABLES[version])
            if os.path.isfile(path):
                return path
        wanted = " or ".join(TABLES.values()) if self.candidates == "auto" else TABLES[self.candidates]
        raise UserError(f"{source}: no {wanted} there: put LUNA16's table beside its subsets")

    def _candidates(self, path: str) -> dict[str, list[CandidatePoint]]:
        """Candidates of every scan, by uid."""
        found: dict[str, list[CandidatePoint]] = {}
        for line, (uid, x, y, z, text) in source_files.read_csv(path, COLUMNS):
            at = tuple(
                source_files.parse_number(path, line, f"coord{a}", v)
                for a, v in zip("XYZ", (x, y, z), strict=True)
            )
            of = f"{os.path.basename(path)}:{line}"
            found.setdefault(uid, []).append(
                CandidatePoint(of, (at[0], at[1], at[2]), source_files.parse_label(path, line, text))
            )
        if not found:
            raise UserError(f"{path}: has no candidate")
        return found

    def _thin(self, uid: str, candidates: Sequence[CandidatePoint]) -> list[CandidatePoint]:
        """All positives, and as many negatives as are asked for, in the table's order."""
        if not self.max_negatives:
            return list(candidates)
        negatives = [candidate.of for candidate in candidates if candidate.label == 0]
        kept = set(shuffled_names(negatives, self.seed, uid)[: self.max_negatives])
        return [candidate for candidate in candidates if candidate.label == 1 or candidate.of in kept]
