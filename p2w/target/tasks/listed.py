"""Tables of candidates `patient,series,x,y,z,label[,fold][,split]`, matched with the scans of a folder."""

import os
from dataclasses import dataclass, field

from p2w.data.find import Found, Source, find_scans
from p2w.errors import UserError
from p2w.target.record import SPLITS
from p2w.target.tasks import pairs, tables
from p2w.target.tasks.protocol import Case, Cases, Mark, Triple

COLUMNS = (
    ("series", "seriesuid", "scan"), ("x", "coordX"), ("y", "coordY"), ("z", "coordZ"), ("label", "class"),
    ("patient", "patientid", ""), ("fold", ""), ("split", ""),
)  # fmt: skip
FORM = "a table patient,series,x,y,z,label,fold"


@dataclass
class Series:
    """What the table says of one scan."""

    line: int
    patient: str
    fold: int
    split: str
    marks: list[Mark] = field(default_factory=list)


def cases_of(source: str, out: str, table: str, ras: bool) -> Cases:
    """One case for each scan below `source` that the table names. Raises UserError for a table that breaks its rules."""
    listed = read_table(table, ras)
    found = find_scans([source], out)
    cases = Cases(bad=list(found.bad), left_out=list(found.left_out))
    cases.tables = {os.path.basename(table): tables.checksum(table)}
    names = _names(found)
    for series, said in sorted(listed.items()):
        scan = names.get(series)
        if scan is None:
            cases.bad.append((series, f"is not below {source}, but in line {said.line} of the table"))
            continue
        marks = tuple(said.marks)
        files = (("ct", scan),)
        cases.cases.append(Case(scan.uid, scan.name, said.patient, files, (), marks, said.split, said.fold))
    unlisted = len(found.sources) - len(cases.cases)
    if unlisted:
        cases.left_out.append((source, f"{unlisted} scans that the table does not name"))
    return cases


def _names(found: Found) -> dict[str, Source]:
    """By all that a table may call a scan: uid, name below the folder, and bare name where it is the only one."""
    names: dict[str, list[Source]] = {}
    for scan in found.sources:
        stem = pairs.stem(scan.name)
        series = scan.name.rpartition("(series ")[2].rstrip(")") if scan.grid is not None else scan.uid
        for name in {scan.uid, series, scan.name, stem, os.path.basename(stem), os.path.basename(scan.name)}:
            names.setdefault(name, []).append(scan)
    return {name: scans[0] for name, scans in names.items() if len(scans) == 1}


def read_table(path: str, ras: bool) -> dict[str, Series]:
    """Series -> its candidates, world mm in LPS. Raises UserError where a series or patient is in two folds or splits."""
    listed: dict[str, Series] = {}
    place: dict[str, tuple[int, str, int]] = {}
    for line, (series, x, y, z, label, patient, fold, split) in tables.read(path, COLUMNS):
        if not series:
            raise UserError(f"{path}, line {line}: no series")
        own = patient or series
        at = _fold(path, line, fold), _split(path, line, split)
        said = listed.setdefault(series, Series(line, own, *at))
        if said.patient != own:
            raise UserError(
                f"{path}, line {line}: series {series} is of patient {own}, in line {said.line} of another"
            )
        before = place.setdefault(own, (*at, line))
        if before[:2] != at:
            raise UserError(f"{path}, line {line}: patient {own} is in fold or split {fold or split}, in line "
                            f"{before[2]} in another: a patient has one")  # fmt: skip
        mm = [tables.number(path, line, axis, text) for axis, text in zip("xyz", (x, y, z), strict=True)]
        xyz: Triple = (-mm[0], -mm[1], mm[2]) if ras else (mm[0], mm[1], mm[2])
        said.marks.append(Mark(f"{os.path.basename(path)}:{line}", xyz, tables.label(path, line, label)))
    if not listed:
        raise UserError(f"{path}: has no candidate; {FORM} is needed")
    return listed


def _fold(path: str, line: int, text: str) -> int:
    if text in ("", "-1"):
        return -1
    if not text.isdecimal() or int(text) > 99:
        raise UserError(f"{path}, line {line}: fold {text!r}: a number from 0, or nothing in all lines")
    return int(text)


def _split(path: str, line: int, text: str) -> str:
    if text and text not in SPLITS:
        raise UserError(
            f"{path}, line {line}: split {text!r}: one of {', '.join(SPLITS)}, or nothing in all lines"
        )
    return text
