"""Which scans belong together, so that all of one patient lie on one side of the split between training and validation.

Who a scan is of follows from DICOM's PatientID, from a table, or from the names of the files:

    --groups patients.csv                 # columns scan, patient and maybe study; scan: a path below --scans, or a folder
    --groups '^([^/]+)/'                  # a regular expression; what its first group matches in the path is the patient

No identifier is kept. It is hashed with the user's `--salt`, and what the manifest holds is a hash of that with a salt of
the set, which the manifest names: so the leak check can compare patients of two sets, and nobody can tell by two manifests
alone that they share a patient. Whoever knows both salts can try out identifiers, which are few: a `--salt` of one's own is
kept secret, and nobody else can then compare.
"""

import csv
import hashlib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from p2w.ct.dicom import salted_hash
from p2w.ct.discover import ScanListing, ScanSource
from p2w.errors import UserError

Level = Literal["patient", "study", "scan"]
UNGROUPED_RULE = "by scan: the first of the scans ordered by sha256(seed:uid) are val, the others train"
RULE = "by {0}: of the {0}s ordered by sha256(seed:{0}), the first whose scans fit into the share are val, the others train"


@dataclass(frozen=True)
class GroupingOptions:
    """Options of the sharding commands on which scans belong together."""

    group: Level | None = None
    """What is never split between training and validation: all scans of a patient, of a study, or just one scan. Unset:
    patient where DICOM or --groups tells it, else scan."""
    groups: str = ""
    """A file.csv with columns scan, patient (and study), or a regular expression whose first group matches the patient in a
    scan's path, such as '^([^/]+)/'."""
    salt: str = ""
    """Secret that is hashed with each patient's identifier; the same one for all sets whose patients shall be compared."""

    def __post_init__(self) -> None:
        """Raise UserError for an invalid regular expression."""
        if self.groups and not self.groups.lower().endswith(".csv"):
            _pattern(self.groups)

    def plain(self) -> dict[str, Any]:
        """What settings.json holds of these options: only those that differ from the default, and no path or secret."""
        named: dict[str, Any] = {} if self.group is None else {"group": self.group}
        if self.groups.lower().endswith(".csv"):
            named["groups"] = f"sha256:{hashlib.sha256(_read(self.groups).encode()).hexdigest()[:16]}"
        elif self.groups:
            named["groups"] = self.groups
        if self.salt:
            named["salt"] = f"sha256:{salted_hash('salt', self.salt)}"
        return named

    def apply(self, found: ScanListing) -> str:
        """Write the patients and studies that `groups` tells into the listing; one line on how scans are grouped.

        Raises UserError for a table that cannot be used, and where `group` asks for what nothing tells.
        """
        if self.groups:
            read = self._from_table if self.groups.lower().endswith(".csv") else self._from_paths
            found.sources = read(found.sources)
        level = self.level(found.sources)
        if level == "scan":
            known = any(source.info.patient for source in found.sources)
            return "split by scan" + (
                "" if known or self.group else ": nothing tells which are of one patient (--groups)"
            )
        groups = group_of(found.sources, level)
        alone = sum(not getattr(source.info, level) for source in found.sources)
        line = f"split by {level}: {len(found.sources)} scans of {len(set(groups.values()))} ({self._source_of_groups()})"
        return line + (f"; {alone} without one count as one each" if alone else "")

    def level(self, sources: Sequence[ScanSource]) -> Level:
        """What is never split: patient, study or scan. Raises UserError where `group` asks for what nothing tells."""
        if self.group is None:
            return "patient" if any(source.info.patient for source in sources) else "scan"
        if self.group != "scan" and not any(getattr(source.info, self.group) for source in sources):
            raise UserError(
                f"--group {self.group}: no scan says its {self.group}: name a table or a regular expression with --groups, "
                "or pass --group scan"
            )
        return self.group

    def _source_of_groups(self) -> str:
        if not self.groups:
            return "DICOM"
        return "--groups" if self.groups.lower().endswith(".csv") else f"--groups {self.groups!r}"

    def _from_paths(self, sources: Sequence[ScanSource]) -> list[ScanSource]:
        pattern, out = _pattern(self.groups), []
        for source in sources:
            match = pattern.search(source.name)
            patient = (match[1] if pattern.groups else match[0]) if match else ""
            out.append(self._tell(source, patient or "", "") if match else source)
        if not any(pattern.search(source.name) for source in sources):
            example = sources[0].name if sources else ""
            raise UserError(f"--groups {self.groups!r}: matches no scan's path, such as {example!r}")
        return out

    def _from_table(self, sources: Sequence[ScanSource]) -> list[ScanSource]:
        table, out, used = _read_table(self.groups), [], set()
        for source in sources:
            keys = [source.uid, source.name, *_above(source.name)]
            key = next((key for key in keys if key in table), None)
            used.add(key)
            out.append(source if key is None else self._tell(source, *table[key]))
        unused = [key for key in table if key not in used]
        if len(unused) == len(table):
            example = sources[0].name if sources else ""
            raise UserError(
                f"{self.groups}: not one of its {len(table)} scans is there (the first: {unused[0]!r}); write paths below "
                f"--scans, such as {example!r}, or folders above them"
            )
        return out

    def _tell(self, source: ScanSource, patient: str, study: str) -> ScanSource:
        """The source with patient and study as the user gives them; where the user gives none, DICOM's stay."""
        patient, study = salted_hash(patient, self.salt), salted_hash(study, self.salt)
        info = replace(source.info, patient=patient or source.info.patient, study=study or source.info.study)
        return replace(source, info=info)


def group_of(sources: Sequence[ScanSource], level: Level) -> dict[str, str]:
    """Uid -> what is never split: patient or study (a hash), or the uid where nothing tells them."""
    return {
        source.uid: source.uid if level == "scan" else getattr(source.info, level) or source.uid
        for source in sources
    }


def split_groups(groups: dict[str, str], val_fraction: float, seed: int) -> set[str]:
    """The uids of the validation scans, of `groups` uid -> group: always the same for the same scans.

    Groups are taken in the order of sha256(seed:group) where all their scans still fit into the share; at least one group,
    and not all, where there are two. With a group for each scan these are the first of the scans in that order.
    """
    members: dict[str, list[str]] = {}
    for uid, group in groups.items():
        members.setdefault(group, []).append(uid)
    order = sorted(members, key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest())
    room = round(val_fraction * len(groups))
    if val_fraction > 0:
        room = min(max(room, 1), len(groups) - 1)
    val: set[str] = set()
    for group in order:
        if len(members[group]) <= room - len(val):
            val.update(members[group])
    if not val and room > 0 and len(members) > 1:
        val.update(members[min(order, key=lambda group: len(members[group]))])
    return val


def set_salt(uids: Sequence[str]) -> str:
    """The salt of a set, which follows from its scans: 16 hexadecimal digits."""
    return hashlib.sha256("\n".join(sorted(uids)).encode()).hexdigest()[:16]


def identity_in_set(hashed: str, salt: str) -> str:
    """What the manifest of a set with this salt calls a patient or study, whose `hashed` identifier is `SeriesInfo`'s."""
    return salted_hash(hashed, salt)


def _above(name: str) -> list[str]:
    """The folders above a scan's path, the nearest first: a/b/c.nii -> a/b, a."""
    parts = name.split("/")
    return ["/".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def _pattern(text: str) -> "re.Pattern[str]":
    try:
        return re.compile(text)
    except re.error as error:
        raise UserError(
            f"--groups {text!r}: neither a file.csv nor a regular expression ({error}); write e.g. '^([^/]+)/'"
        ) from error


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(
            f"--groups {path}: cannot be read ({why}): name a CSV file with columns scan, patient"
        ) from error


def _read_table(path: str) -> dict[str, tuple[str, str]]:
    """{scan: (patient, study)} as in the table. Raises UserError for a file that is no such table."""
    try:
        return _table_of(path, csv.DictReader(io.StringIO(_read(path)), strict=True))
    except csv.Error as error:
        raise UserError(
            f"{path}: is no CSV table ({error}): it must have the columns scan, patient"
        ) from error


def _table_of(path: str, rows: "csv.DictReader[str]") -> dict[str, tuple[str, str]]:
    """The entries of an open table; raises csv.Error too."""
    if not {"scan", "patient"} <= set(rows.fieldnames or ()):
        there = ", ".join(rows.fieldnames or ["nothing"])
        raise UserError(
            f"{path}: its first line has {there}: it must name the columns scan, patient, and maybe study"
        )
    if twice := [name for name in rows.fieldnames or () if list(rows.fieldnames or ()).count(name) > 1]:
        raise UserError(f"{path}: has the column {twice[0]} twice: remove one")
    table: dict[str, tuple[str, str]] = {}
    for row in rows:
        number = rows.line_num
        if None in row:
            raise UserError(
                f"{path}: line {number}: has more values than the first line; a comma in a path needs quotes round it"
            )
        scan, patient = ((row[name] or "").strip() for name in ("scan", "patient"))
        scan = os.path.normpath(scan).replace(os.sep, "/") if scan else ""
        if not scan or not patient:
            raise UserError(f"{path}: line {number}: scan {scan!r}, patient {patient!r}: both are needed")
        entry = (patient, (row.get("study") or "").strip())
        if table.setdefault(scan, entry) != entry:
            raise UserError(
                f"{path}: line {number}: scan {scan!r} is there twice, with other patients or studies"
            )
    if not table:
        raise UserError(f"{path}: has no line below the first")
    return table
