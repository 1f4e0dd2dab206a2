"""The scans of a cohort: those below a folder, or the rows of a table or list; who they are of; read ahead in a thread.

    FOLDER        every MetaImage, NIfTI, NRRD file and DICOM series below it
    TABLE.csv     a column `scan` (or one column for each channel, named as the network's channels), and maybe `name`,
                  `patient`; paths are relative to the table, a folder stands for the one DICOM series in it
    LIST.txt      one path a line
    FILE          one image file

A scan's identifier is a salted hash of its uid: the path below the folder without the ending, SeriesInstanceUID of DICOM,
or what the table has in its column `name`. Without a salt of one's own, anyone who knows the names can compute the hashes.
"""

import csv
import hashlib
import os
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, TypeVar

from p2w.ct.dicom import salted_hash
from p2w.ct.discover import ScanListing, ScanSource, SearchOptions, find_scans
from p2w.ct.orientation import BadScan
from p2w.ct.scan import source_files
from p2w.ct.scan_folders import safe_uid
from p2w.errors import UserError
from p2w.files import refuse_unwritable
from p2w.shards.grouping import GroupingOptions
from p2w.tasks.source_files import as_source, file_stem, read_csv

T = TypeVar("T")
SCAN = ("scan", "path", "image", "file")  # names of the column of a table with one image a row


@dataclass(frozen=True)
class CohortScan:
    """One scan of a cohort, an image for each channel."""

    uid: str
    """Unique in the cohort, and valid as a file name."""
    name: str
    """What messages call it: the path that the user knows."""
    sources: tuple[ScanSource, ...]
    patient: str = ""
    """Salted hash of the patient's identifier; "" where it is unknown."""
    given_name: str = ""
    """The scan's name in the table's column `name`."""

    def identifier(self, salt: str) -> str:
        """16 hexadecimal digits that stand for the uid."""
        return salted_hash(self.uid, salt)

    def state(self) -> str:
        """A hash of sizes and times of its files, which changes when they do. Raises BadScan where one is gone."""
        digest = hashlib.sha256()
        for source in self.sources:
            files = source.files if source.grid is not None else source_files(source)
            for path in files:
                try:
                    status = os.stat(path)
                except OSError as error:
                    raise BadScan(f"cannot be read ({error.strerror})") from error
                digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]


@dataclass
class Cohort:
    """Scans in the order of their uids, and (name, why) of what cannot be used."""

    scans: list[CohortScan] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)


def list_cohort(
    where: str,
    *,
    out: str = "",
    channels: Sequence[str] = (),
    groups: str = "",
    salt: str = "",
    modality: str = "CT",
    assume_hu: bool = False,
) -> Cohort:
    """The cohort that `--scans` names; `out` is a folder that is not searched.

    `channels`: names of a network's channels where it has several. `groups` as for sharding: a table or a regular
    expression that gives the patients. Raises UserError where there is no scan, or a table breaks its rules.
    """
    search = SearchOptions(salt=salt, modality=modality, assume_hu=assume_hu)
    path = Path(where)
    several, is_table = len(channels) > 1, path.suffix.lower() == ".csv" and path.is_file()
    if several and path.exists() and not is_table:
        raise UserError(
            f"--scans {where}: the network takes {len(channels)} images a scan: name a table.csv with the columns "
            f"{', '.join(channels)}"
        )
    if path.is_dir():
        cohort = _of_folder(where, out, groups, search)
    elif not path.is_file():
        raise UserError(
            f"--scans {where}: no such folder or file; name a folder of scans, a table.csv or a list.txt"
        )
    elif is_table:
        cohort = _of_rows(path, _table_rows(path, channels if several else ()), groups, search)
    elif path.suffix.lower() == ".txt":
        cohort = _of_rows(path, _list_rows(path), groups, search)
    else:
        cohort = _of_rows(path, [(1, [path.name], "", "")], groups, search)
    if not cohort.scans:
        first = f"; {cohort.bad[0][0]}: {cohort.bad[0][1]}" if cohort.bad else ""
        raise UserError(f"--scans {where}: not one scan that can be used{first}")
    cohort.scans.sort(key=lambda scan: scan.uid)
    return cohort


def _of_folder(where: str, out: str, groups: str, search: SearchOptions) -> Cohort:
    found = find_scans([where], out, options=search)
    if groups:
        GroupingOptions(None, groups, search.salt).apply(found)
    scans = [CohortScan(one.uid, one.name, (one,), one.info.patient) for one in found.sources]
    return Cohort(scans, list(found.bad))


Row = tuple[int, list[str], str, str]  # line, paths, name, patient


def _table_rows(table: Path, channels: Sequence[str]) -> list[Row]:
    images: list[tuple[str, ...]] = [(channel,) for channel in channels] or [SCAN]
    columns = [*images, ("name", ""), ("patient", "patientid", "")]
    rows = []
    for line, values in read_csv(str(table), columns):
        *paths, name, patient = values
        if not all(paths):
            raise UserError(f"{table}, line {line}: no path of a scan; each row names {len(images)} image(s)")
        rows.append((line, paths, name, patient))
    return rows


def _list_rows(listed: Path) -> list[Row]:
    try:
        lines = listed.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{listed}: cannot be read ({error}); name a text file with one path a line"
        ) from error
    return [(number, [line.strip()], "", "") for number, line in enumerate(lines, 1) if line.strip()]


def _of_rows(table: Path, rows: Iterable[Row], groups: str, search: SearchOptions) -> Cohort:
    cohort, lines = Cohort(), dict[str, int]()
    for line, paths, name, patient in rows:
        uid = safe_uid(name or file_stem(os.path.normpath(paths[0])))
        if uid in lines:
            raise UserError(
                f"{table}, line {line}: scan {name or paths[0]} is in line {lines[uid]} too: leave one out, or give them "
                "names of their own in a column `name`"
            )
        lines[uid] = line
        try:
            sources = tuple(_row_source(table.parent / path, path, search) for path in paths)
        except UserError as error:
            cohort.bad.append((f"{table}, line {line}", str(error)))
            continue
        patient_hash = salted_hash(patient, search.salt) or sources[0].info.patient
        cohort.scans.append(CohortScan(uid, name or paths[0], sources, patient_hash, name))
    if groups:
        _group_patients(cohort, groups, search.salt)
    return cohort


def _row_source(path: Path, name: str, search: SearchOptions) -> ScanSource:
    if not path.exists():
        raise BadScan(f"{name}: no such file or folder; paths are relative to the table")
    if path.is_file():
        return replace(as_source(name, str(path)), assume_hu=search.assume_hu)
    found = find_scans([str(path)], "", options=search)
    if len(found.sources) != 1:
        why = f"; {found.bad[0][0]}: {found.bad[0][1]}" if found.bad else ""
        raise BadScan(f"{name}: {len(found.sources)} scans in this folder, one is needed{why}")
    return found.sources[0]


def _group_patients(cohort: Cohort, groups: str, salt: str) -> None:
    """Give the scans of a table their patients from `--groups`, where the table itself names none."""
    named = [replace(scan.sources[0], uid=scan.uid, name=scan.name) for scan in cohort.scans]
    listing = ScanListing(sources=named)
    GroupingOptions(None, groups, salt).apply(listing)
    patients = {source.uid: source.info.patient for source in listing.sources}
    cohort.scans = [replace(scan, patient=scan.patient or patients[scan.uid]) for scan in cohort.scans]


def identifiers_of(text: str, salt: str) -> tuple[str, ...]:
    """The identifiers that a name in a table may stand for: the identifier itself, or the hash of a path, uid or name."""
    clean = text.strip()
    uids = dict.fromkeys((safe_uid(file_stem(os.path.normpath(clean))), safe_uid(clean)))
    return (clean, *(salted_hash(uid, salt) for uid in uids))


def write_rows(path: Path, head: Sequence[object], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV table. Raises UserError where it cannot be written."""
    with refuse_unwritable(path, "name another file"), open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(head)
        writer.writerows(rows)


class ReadAhead(Generic[T]):
    """Iterates over `items` in a thread, at most `depth` items ahead of the reader; use it in a `with` block.

    An item is made only when one of `depth` slots is free, so at most `depth` items are in memory beside the one that the
    reader works on. An error of the iterator is raised to the reader where the item would have come.
    """

    def __init__(self, items: Iterable[T], depth: int = 1) -> None:
        self._items, self._slots = iter(items), threading.Semaphore(depth)
        self._ready: queue.SimpleQueue[tuple[str, T | BaseException | None]] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="p2w-read-ahead", daemon=True)

    def __enter__(self) -> "ReadAhead[T]":
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop after the item under way."""
        self._stopped.set()
        self._slots.release()
        self._thread.join()

    def _work(self) -> None:
        try:
            while True:
                self._slots.acquire()
                if self._stopped.is_set():
                    return
                self._ready.put(("item", next(self._items)))
        except StopIteration:
            self._ready.put(("end", None))
        except BaseException as error:
            self._ready.put(("error", error))

    def __iter__(self) -> Iterator[T]:
        """The items, in order."""
        while True:
            kind, item = self._ready.get()
            if kind == "end":
                return
            if isinstance(item, BaseException) and kind == "error":
                raise item
            self._slots.release()  # the next item is made while the reader works on this one
            yield item  # type: ignore[misc]
