"""NCS: which voxels are nodule? LIDC-IDRI's CT series and the outlines of its readers, at 1 mm (docs/paper.md).

How the paper chose and cut nodules is not published: here a voxel is nodule when half of all readers of the series
outlined it, and each nodule gives one crop of 1 mm voxels, moved off its middle by chance.

Readings are XML files beside a series, in the collection's published format. A nodule of 3 mm or more is one outline a
slice; an outline is the chain of pixels just outside the nodule, so its interior is the nodule; one with `inclusion` FALSE
is a hole. Nodules that are smaller have one point and no outline, and are not used.
"""

import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from p2w.ct.dicom import read_slice
from p2w.ct.discover import find_scans
from p2w.ct.orientation import BadScan, to_canonical
from p2w.ct.scan import Scan, read_scan
from p2w.ct.scan_folders import printable, walk
from p2w.errors import UserError
from p2w.files import last_part
from p2w.shards.manifest import open_manifest
from p2w.shards.manifest_schema import MANIFEST_NAME
from p2w.tasks import crops, source_files
from p2w.tasks.crops import AroundObjects, CropBox, crops_around_objects
from p2w.tasks.task import (
    SEGMENTATION,
    SPLITS,
    WINDOW_HU,
    Case,
    Cases,
    CutSamples,
    LeftOut,
    Sample,
    Split,
    by_fractions,
    shuffled_names,
)

CASES = (510, 100, 408)  # train, val and test of all 1,018
PATIENT = re.compile(r"LIDC-IDRI-\d+")


# Elements of other kinds of files; a readingSession before the series' uid means that the file has none in its head.
OTHER_FORMS = ("IdriReadMessage", "readingSession", "CXRreadingSession")
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Outline:
    """One closed chain of pixels (n, 2): column, row, from 0."""

    slice_uid: str
    z_mm: float
    inclusion: bool
    points: NDArray[np.int64]


@dataclass(frozen=True)
class Reading:
    """One nodule as one reader outlined it."""

    reader: int
    nodule: str
    outlines: tuple[Outline, ...]


@dataclass(frozen=True)
class Readings:
    """All readings of a series, and how many readers there were."""

    series: str
    readers: int
    nodules: list[Reading] = field(default_factory=list)


def series_of(path: str) -> str | None:
    """The CT series that a file has readings of; None for other XML files, such as readings of radiographs."""
    try:
        with open(
            path, "rb"
        ) as file:  # a file that iterparse opens is closed when its iterator happens to be deleted
            for event, node in ET.iterparse(file, events=("start", "end")):
                if event == "start" and _tag(node) in OTHER_FORMS:
                    return None
                if event == "end" and _tag(node) == "SeriesInstanceUid":
                    return (node.text or "").strip() or None
    except (ET.ParseError, OSError):
        return None
    return None


def _tag(node: ET.Element) -> str:
    """The name of an element without its namespace."""
    return str(node.tag).rpartition("}")[2]


def read_readings(path: str) -> Readings:
    """Parse a file. Raises BadScan when it is damaged or no reading of a CT series."""
    try:
        root = ET.parse(path).getroot()
    except ET.ParseError as error:
        raise BadScan(f"its readings cannot be read ({error})") from error
    if _tag(root) != "LidcReadMessage":
        raise BadScan(f"its readings are a {_tag(root)}, not a LidcReadMessage")
    series = next((node.text or "" for node in root.iter() if _tag(node) == "SeriesInstanceUid"), "")
    sessions = [node for node in root if _tag(node) == "readingSession"]
    found = Readings(series.strip(), len(sessions))
    try:
        for reader, session in enumerate(sessions):
            for nodule in (node for node in session if _tag(node) == "unblindedReadNodule"):
                outlines = tuple(_outline(node) for node in nodule if _tag(node) == "roi")
                outlines = tuple(outline for outline in outlines if len(outline.points) > 1)
                if outlines:
                    found.nodules.append(Reading(reader, _text(nodule, "noduleID"), outlines))
    except ValueError as error:
        raise BadScan(f"its readings hold what is no number ({error})") from error
    return found


def _text(node: ET.Element, name: str) -> str:
    return next(((child.text or "").strip() for child in node if _tag(child) == name), "")


def _outline(roi: ET.Element) -> Outline:
    points = [(int(_text(p, "xCoord")), int(_text(p, "yCoord"))) for p in roi if _tag(p) == "edgeMap"]
    inclusion = _text(roi, "inclusion").upper() != "FALSE"
    z_mm = float(_text(roi, "imageZposition") or "nan")
    return Outline(_text(roi, "imageSOP_UID"), z_mm, inclusion, np.array(points, np.int64).reshape(-1, 2))


def interior(points: NDArray[np.int64], shape: tuple[int, int]) -> Bools:
    """The pixels (rows, columns) inside an outline, without the outline itself; the outline, where nothing is inside.

    Raises BadScan for points outside the slice.
    """
    from scipy import ndimage  # noqa: PLC0415  scipy takes long to import, and ranks need none of it

    if points.min() < 0 or (points >= np.array(shape[::-1])).any():
        raise BadScan(f"an outline leaves the slice of {shape[1]} x {shape[0]} pixels")
    low = points.min(axis=0)
    local = points - low
    border = np.zeros(local.max(axis=0)[::-1] + 1, bool)
    for (x, y), (to_x, to_y) in zip(local, np.roll(local, -1, axis=0), strict=True):
        steps = max(abs(to_x - x), abs(to_y - y), 1)
        along = np.arange(steps + 1) / steps
        border[np.rint(y + along * (to_y - y)).astype(int), np.rint(x + along * (to_x - x)).astype(int)] = (
            True
        )
    filled = ndimage.binary_fill_holes(border) & ~border
    out = np.zeros(shape, bool)
    rows, columns = (slice(start, start + n) for start, n in zip(low[::-1], border.shape, strict=True))
    out[rows, columns] = filled if filled.any() else border
    return out


@dataclass(frozen=True)
class ReaderMask:
    """A reading as voxels: slice of the stored scan -> its pixels."""

    reader: int
    slices: dict[int, Bools]

    def meets(self, other: "ReaderMask") -> bool:
        """Whether both mark a voxel."""
        return any((self.slices[z] & other.slices[z]).any() for z in self.slices.keys() & other.slices.keys())


def reader_mask(
    reading: Reading, index: dict[str, int], z_mm: Sequence[float], shape: tuple[int, int]
) -> ReaderMask:
    """Outlines as pixels; `index`: slice uid -> stored slice, `z_mm` of the slices. Raises BadScan."""
    slices: dict[int, Bools] = {}
    for included in (True, False):
        for outline in reading.outlines:
            if outline.inclusion is not included:
                continue
            z = index.get(outline.slice_uid, -1)
            if z < 0:
                away = np.abs(np.array(z_mm) - outline.z_mm)
                z = int(away.argmin())
                if not away[z] < 0.1:
                    raise BadScan(f"its readings name slice {outline.slice_uid}, which the series lacks")
            inside = interior(outline.points, shape)
            before = slices.get(z, np.zeros(shape, bool))
            slices[z] = before | inside if included else before & ~inside
    return ReaderMask(reading.reader, slices)


def group_by_nodule(marked: list[ReaderMask]) -> list[list[ReaderMask]]:
    """Groups of readings of one nodule: readings of different readers that share a voxel are in one group, transitively."""
    of = list(range(len(marked)))
    for i, one in enumerate(marked):
        for j in range(i):
            if one.reader != marked[j].reader and of[i] != of[j] and one.meets(marked[j]):
                of = [of[j] if group == of[i] else group for group in of]
    return [[one for one, group in zip(marked, of, strict=True) if group == name] for name in sorted(set(of))]


def consensus_mask(group: list[ReaderMask], readers: int, share: float) -> dict[int, Bools]:
    """Pixels by slice that at least `share` of all readers of the series marked."""
    found = {}
    for z in sorted({z for one in group for z in one.slices}):
        by_reader: dict[int, Bools] = {}
        for one in group:
            if z in one.slices:
                by_reader[one.reader] = by_reader.get(one.reader, False) | one.slices[z]
        votes = sum(pixels.astype(np.int16) for pixels in by_reader.values())
        agreed = np.asarray(votes) >= share * readers - 1e-9
        if agreed.any():
            found[z] = agreed
    return found


@dataclass(frozen=True)
class Ncs:
    """NCS: which voxels are nodule? From LIDC-IDRI: --source holds its DICOM series and readers' XML, in any folders."""

    consensus: float = 0.5
    """Share of all readers of a series that must have outlined a voxel for it to be nodule."""
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """mm z y x of a sample's voxels."""
    jitter: float = 0.25
    """How far the crop may lie from the nodule's middle, as a share of its size: 0 = centred."""
    crops: int = 1
    """Crops of each nodule, each moved by chance."""
    cases: tuple[int, int, int] = CASES
    """Cases to train on, validate and test on; with fewer or more cases than these: in their proportions."""
    pretrained_on: str = ""
    """Shards that encoders are pretrained on: no patient in them is tested on. LUNA16's scans are LIDC-IDRI's: beside its
    subsets 0-6, 395 of 1,018 cases stay, and 408 are the paper's."""
    seed: int = 0
    """Draws the split and the jitter."""

    name: ClassVar[str] = "ncs"
    kind: ClassVar[str] = SEGMENTATION
    size: ClassVar[tuple[int, int, int]] = (32, 64, 64)
    classes: ClassVar[tuple[str, ...]] = ("background", "nodule")
    channel_names: ClassVar[tuple[str, ...]] = ("ct",)
    window: ClassVar[tuple[float, float]] = WINDOW_HU

    def check(self) -> None:
        """Raise UserError for options that make no data set."""
        if not 0 < self.consensus <= 1:
            raise UserError(f"--consensus {self.consensus:g}: a share of the readers, above 0 and up to 1")
        if not all(0.01 <= mm <= 100 for mm in self.spacing):
            raise UserError(f"--spacing {' '.join(map(str, self.spacing))}: mm z y x, each from 0.01 to 100")
        self._around(self.size).check()
        if min(self.cases) < 0 or not self.cases[0]:
            raise UserError(
                f"--cases {' '.join(map(str, self.cases))}: train, val and test, train at least 1"
            )

    def _around(self, size: tuple[int, int, int]) -> AroundObjects:
        return AroundObjects(size, self.spacing, self.jitter, self.crops, self.seed)

    def find(self, source: str, out: str) -> Cases:
        """One case for each CT series that has readings."""
        found = find_scans([source], out, flag="--source")
        cases = Cases(bad=list(found.bad), left_out=list(found.left_out))
        if self.pretrained_on:
            open_manifest(self.pretrained_on)
            cases.tables[MANIFEST_NAME] = source_files.file_checksum(
                os.path.join(self.pretrained_on, MANIFEST_NAME)
            )
        readings: dict[str, str] = {}
        for path in walk(source, out):
            if path.lower().endswith(".xml") and (series := series_of(path)):
                if series in readings:
                    name = printable(os.path.relpath(path, source))
                    cases.bad.append(
                        (name, f"has readings of series {series}, as {readings[series]} has: remove one")
                    )
                readings.setdefault(series, path)
        if not readings:
            raise UserError(
                f"{source}: no readers' XML (LidcReadMessage) below it: put LIDC-IDRI's XML there"
            )
        for scan in found.sources:
            note = readings.pop(scan.info.series, None) if scan.info.series else None
            if note is None:
                cases.left_out.append((scan.name, "has no readers' XML"))
                continue
            match = PATIENT.search(scan.name)
            patient = match[0] if match else scan.name.partition("/")[0]
            cases.cases.append(Case(scan.uid, scan.name, patient, (("ct", scan),), (("readings", note),)))
        for series, path in sorted(readings.items()):
            cases.left_out.append(
                (printable(os.path.relpath(path, source)), f"its series {series} is not there")
            )
        return cases

    def split(self, cases: list[Case]) -> Split:
        """Split by patient, in the paper's numbers of cases or their proportions."""
        weight: dict[str, int] = {}
        for case in cases:
            weight[case.patient] = weight.get(case.patient, 0) + 1
        if self.pretrained_on:
            return self._unseen(cases, weight)
        part = by_fractions(weight, self.cases, self.seed)
        rule = f"by patient: {' / '.join(map(str, self.cases))} cases or in these proportions, by sha256(seed:patient)"
        return Split(rule, {name: SPLITS[i] for name, i in part.items()}, seed=self.seed)

    def _unseen(self, cases: list[Case], weight: dict[str, int]) -> Split:
        """The same split, but tested only on patients that were not pretrained on, as far as there are enough."""
        scans = {one["uid"] for one in open_manifest(self.pretrained_on).meta["sources"]}
        seen = {case.patient for case in cases if case.uid in scans}
        wanted, test = round(len(cases) * self.cases[2] / sum(self.cases)), list[str]()
        for patient in shuffled_names(set(weight) - seen, self.seed):
            if sum(weight[name] for name in test) < wanted:
                test.append(patient)
        rest = {patient: n for patient, n in weight.items() if patient not in test}
        part = by_fractions(rest, self.cases[:2], self.seed)
        counts, of_set = " / ".join(map(str, self.cases)), last_part(self.pretrained_on)
        rule = f"by patient: {counts} in proportion, tested on none in {of_set}"
        of = {name: SPLITS[i] for name, i in part.items()} | dict.fromkeys(test, "test")
        return Split(rule, of, seed=self.seed)

    def cut(self, case: Case, size: tuple[int, int, int]) -> CutSamples:
        """A crop round each nodule that enough readers outlined."""
        source, path = case.source("ct"), dict(case.notes)["readings"]
        readings = read_readings(path)
        scan = read_scan(source)
        files = [crops.file_record("ct", case.name, scan.nbytes, scan.checksum)]
        files.append({"role": "readings", "file": os.path.basename(path), "nbytes": os.path.getsize(path)})
        files[-1]["checksum"] = source_files.file_checksum(path)
        return CutSamples(files, self._samples(case, scan, readings, size))

    def _samples(
        self, case: Case, scan: Scan, readings: Readings, size: tuple[int, int, int]
    ) -> Iterator[Sample | LeftOut]:
        grid = case.source("ct").grid
        assert grid is not None  # a DICOM series has one
        _, order, flips = grid.canonical()
        stored = np.zeros(grid.size[::-1], np.uint8)
        own = np.zeros_like(stored)
        everything, mask = (to_canonical(array, order, flips) for array in (stored, own))

        def channels(crop_box: CropBox) -> list[NDArray[np.int16]]:
            return [crops.crop_hu(scan.voxels, crop_box)]

        nodules = self._nodules(case, readings, stored.shape)
        for _, slices in nodules:
            for z, pixels in slices.items():
                stored[z] |= pixels
        for number, (readers, slices) in enumerate(nodules):
            of = f"nodule {number}, {readers} of {readings.readers} readers"
            if not slices:
                yield LeftOut(f"{of}: no voxel was outlined by {self.consensus:.0%} of them")
                continue
            for z, pixels in slices.items():
                own[z] = pixels
            name = f"{case.uid} {number}"
            yield from crops_around_objects(
                channels, mask, scan.grid, self._around(size), name, of, everything
            )
            for z in slices:
                own[z] = 0

    def _nodules(
        self, case: Case, readings: Readings, shape: tuple[int, ...]
    ) -> list[tuple[int, dict[int, Bools]]]:
        """For each nodule: how many readers outlined it, and by stored slice the pixels that they agree on."""
        index: dict[str, int] = {}
        z_mm = []
        for z, path in enumerate(case.source("ct").files):
            one = read_slice(path)
            if one is None:
                raise BadScan(f"{os.path.basename(path)} is no DICOM image any more")
            index[one.instance] = z
            z_mm.append(one.position[2])
        marked = [reader_mask(reading, index, z_mm, (shape[1], shape[2])) for reading in readings.nodules]
        found = []
        for group in group_by_nodule(marked):
            agreed = consensus_mask(group, readings.readers, self.consensus)
            found.append((len({one.reader for one in group}), agreed))
        return found
