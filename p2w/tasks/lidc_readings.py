"""LIDC-IDRI's readings: what each radiologist outlined in a series, from the XML files beside it, as masks.

Format: the collection's published description. A nodule of 3 mm or more is one outline a slice; an outline is the chain
of pixels just outside the nodule, so its interior is the nodule; one with `inclusion` FALSE is a hole. Nodules that are
smaller have one point and no outline, and are not used.
"""

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from p2w.ct.orientation import BadScan

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
