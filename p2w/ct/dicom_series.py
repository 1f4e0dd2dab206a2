"""DICOM series: which slices belong together, and whether their positions are those of one volume.

Slices are a volume when their positions lie on a line along their normal, at equal steps: no position and no step is off by
more than `TOLERANCE_MM`. Other series are refused with the reason: a gantry tilt or drift, uneven steps, missing slices,
several volumes under one uid. Volumes under one uid that headers tell apart (acquisition, time, phase, kernel) become scans
of their own.
"""

import os
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from p2w.ct.dicom import GZIP_MAGIC, Slice
from p2w.ct.dicom_pixels import hu_of_slice
from p2w.ct.orientation import TOLERANCE_MM, BadScan, Grid, check_voxel_size

# A slice may also be off its place by this share of a step, and no more: thin slices lie closer than the tolerance.
STEP_SHARE = 0.2
TURNED = 1e-3  # most that the direction cosines of one series may differ
APART_MM = 0.01  # slices that are nearer share their position
WIDE = 1.5  # times the usual step: a gap
ROW_OF_GAPS = 2  # more gaps in a row are another step, not missing slices
# What tells volumes of one series apart, and how a message names it.
PARTS: dict[str, Callable[[Slice], str]] = {
    "acquisition": lambda one: one.acquisition,
    "phase": lambda one: one.phase,
    # The phase of each field by itself: the time of the trigger may differ from slice to slice of one phase.
    "temporal position": lambda one: one.phase.split("\\")[0],
    "cardiac phase": lambda one: one.phase.split("\\")[-1],
    "time": lambda one: one.time,
    "kernel": lambda one: one.kernel,
    "kV": lambda one: one.kvp,
    "image type": lambda one: one.image_type,
    "echo": lambda one: one.echo,
    "b value": lambda one: one.b_value,
    "stack": lambda one: one.stack,
    "thickness": lambda one: f"{one.thickness:g}",
    "series number": lambda one: one.series_number,
    "description": lambda one: one.description,
    "contrast": lambda one: one.contrast,
}
UNNAMED = (
    "time",
    "b value",
    "description",
    "contrast",
)  # numbered instead: their text may tell who it is, or nothing
FEWEST = 3  # slices of a part
SAME_SCALE = 1e-3  # share by which scales of slices may differ
DEEPEST = 2  # fields that together tell volumes apart
MR_PACKAGES = (
    "acquisition",
    "time",
)  # fields in which the slices of one MR volume differ when it was measured in several passes
SIDE_BY_SIDE = 0.75  # share of their thickness by which slices of one volume are apart at least
MOST_SCOUTS = 3  # slices of another orientation that are no part of a volume
TURNED_AWAY = 0.7  # cosine of the angle of the normals, below which a slice is of another orientation


@dataclass(frozen=True)
class DicomVolume:
    """Slices in the order of their normal, their grid, and what tells the volume from others of its series.

    `positions` is empty where the slices lie as the grid says. Else they have to be resampled: it holds the position (x, y,
    z in mm) of the first pixel of every slice, and the grid is that of the first slice with the usual step.
    """

    slices: list[Slice]
    grid: Grid
    part: str = ""
    positions: tuple[tuple[float, ...], ...] = ()
    resampled: str = ""  # why its slices have to be resampled
    copies: int = 0  # files left out because they are copies of others


def without_scouts(slices: list[Slice]) -> list[Slice]:
    """The slices without up to three that are turned away from all others, such as a scout that no tag calls so.

    Where there are more, or slices lack their orientation, all are given: then `volumes_of` says what is wrong.
    """
    if len({one.orientation for one in slices}) == 1:
        return slices
    if not all(
        len(one.orientation) == 6 and np.any(np.cross(*np.array(one.orientation).reshape(2, 3)))
        for one in slices
    ):
        return slices
    kinds: list[tuple[NDArray[np.float64], list[Slice]]] = []
    for one in slices:
        normal = _normal(one)
        near = next((own for other, own in kinds if abs(float(normal @ other)) > TURNED_AWAY), None)
        if near is None:
            kinds.append((normal, [one]))
        else:
            near.append(one)
    most = max((own for _, own in kinds), key=len)
    scouts = len(slices) - len(most)
    return most if scouts <= min(MOST_SCOUTS, len(most) // 4) else slices


def people_apart(slices: Sequence[Slice]) -> list[list[Slice]]:
    """Slices of one SeriesInstanceUID by patient, study and frame of reference: anonymizers give one uid to several.

    A slice that lacks an identifier which all others share belongs to them.
    """
    groups = [list(slices)]
    for identifier in (lambda one: one.patient, lambda one: one.study, lambda one: one.frame_of_reference):
        groups = [part for group in groups for part in _by_identifier(group, identifier)]
    return groups


def _by_identifier(slices: list[Slice], identifier: Callable[[Slice], object]) -> list[list[Slice]]:
    found: dict[object, list[Slice]] = defaultdict(list)
    for one in slices:
        found[identifier(one)].append(one)
    named = [value for value in found if value]
    # An identifier that one or two slices share does not count: an anonymizer or converter made a new one for each file.
    if len(named) < 2 or len(found) > len(slices) // FEWEST:
        return [slices]
    return list(found.values())


def volumes_of(slices: list[Slice], allow_gaps: bool, resample: bool = False) -> list[DicomVolume]:
    """The volumes of a series: one, or several that its headers tell apart. Raises BadScan when they are none.

    With `resample`, slices that lean away from their normal or lie at uneven steps are a volume to be resampled.
    """
    slices = _with_rescale(slices)
    _check_headers(slices)
    kept = _without_copies(slices)
    copies = len(slices) - len(kept)
    try:
        first, *others = _volumes(kept, allow_gaps, tuple(PARTS), DEEPEST)
    except BadScan as why:
        overlap = slices[0].modality != "MR" and _interleaved(kept, ("acquisition", "phase", "kernel"))
        if resample and not overlap and (leaning := _to_resample(kept, allow_gaps)):
            return [replace(leaning, resampled=str(why).partition(";")[0].partition(" (")[0], copies=copies)]
        raise
    return [replace(first, copies=copies), *others]


def _volumes(
    slices: list[Slice], allow_gaps: bool, names: tuple[str, ...], deepest: int
) -> list[DicomVolume]:
    """One volume, or several that up to `deepest` of the fields `names` tell apart. Raises BadScan where they are none."""
    for mixed in _interleaved(slices, names) if deepest else ():
        if mixed in MR_PACKAGES and _is_side_by_side(slices, allow_gaps):
            continue
        if found := _split(slices, allow_gaps, mixed, names, deepest):
            return found
    try:
        return [DicomVolume(*order_series(slices, allow_gaps))]
    except BadScan:
        for name in names if deepest else ():
            if found := _split(slices, allow_gaps, name, names, deepest):
                return found
        raise


def _is_side_by_side(slices: list[Slice], allow_gaps: bool) -> bool:
    """Whether slices of MR are one volume of slices that do not overlap, measured in several interleaved passes."""
    thickness = slices[0].thickness
    if slices[0].modality != "MR" or thickness <= 0:
        return False
    try:
        _, grid = order_series(slices, allow_gaps)
    except BadScan:
        return False
    return grid.spacing[2] >= SIDE_BY_SIDE * thickness


def _split(
    slices: list[Slice], allow_gaps: bool, name: str, names: tuple[str, ...], deepest: int
) -> list[DicomVolume]:
    """The volumes that a header field tells apart; none where what it tells apart are not all volumes."""
    parts: dict[str, list[Slice]] = defaultdict(list)
    for one in slices:
        parts[PARTS[name](one)].append(one)
    if len(parts) < 2 or min(map(len, parts.values())) < FEWEST:
        return []
    others = tuple(other for other in names if other != name)
    found = []
    try:
        for number, (key, part) in enumerate(sorted(parts.items())):
            label = f"{name} {_part_label(name, key, number)}"
            for volume in _volumes(part, allow_gaps, others, deepest - 1):
                found.append(replace(volume, part=f"{label}, {volume.part}" if volume.part else label))
    except BadScan:
        return []
    return found


def _part_label(name: str, key: str, number: int) -> str:
    """What a volume is called among those of its series."""
    return str(number + 1) if name in UNNAMED else key or "none"


def _with_rescale(slices: list[Slice]) -> list[Slice]:
    """The slices; MR slices without a rescale get the one that changes nothing, since their values have no unit."""
    if any(one.rescale or one.modality != "MR" for one in slices):
        return slices
    return [replace(one, rescale=(1.0, 0.0)) for one in slices]


def _check_headers(slices: list[Slice]) -> None:
    """Raise BadScan where slices lack what a volume needs, or differ in what has to be equal."""
    _check_equal("sizes", Counter(f"{one.columns}x{one.rows}" for one in slices))
    _check_equal("pixel spacings", Counter(str([round(s, 4) for s in one.spacing]) for one in slices))
    first = slices[0]
    if len(first.orientation) != 6 or len(first.spacing) != 2:
        raise BadScan("lacks its orientation or pixel spacing (ImageOrientationPatient, PixelSpacing)")
    if not all(
        len(one.orientation) == 6
        and np.allclose(one.orientation, first.orientation, rtol=0, atol=TURNED)
        for one in slices
    ):  # fmt: skip
        kinds = Counter(str([round(v, 3) + 0.0 for v in one.orientation]) for one in slices)
        if len(kinds) == 1:
            kinds = Counter(str(list(one.orientation)) for one in slices)
        _check_equal("orientations", kinds)
    if min(first.spacing) <= 0:
        raise BadScan(f"pixel spacing {first.spacing} mm (PixelSpacing): has to be above 0")
    bare = sum(len(one.rescale) < 2 for one in slices)
    if bare:
        raise BadScan(
            f"no rescale: RescaleSlope or RescaleIntercept is missing in {bare} of {len(slices)} slices"
        )
    if any(one.rescale[0] == 0 for one in slices):
        raise BadScan("RescaleSlope is 0")
    scales = [one.philips_scale * one.rescale[0] for one in slices if one.philips_scale > 0]
    if first.modality == "MR" and scales and max(scales) > (1 + SAME_SCALE) * min(map(abs, scales)):
        raise BadScan(
            "scale slopes of Philips (2005,100E) that RescaleSlope does not follow from slice to slice, so their values do "
            "not compare: convert it to NIfTI (dcm2niix)"
        )
    if lost := sum(len(one.position) != 3 for one in slices):
        raise BadScan(
            f"{lost} of {len(slices)} slices without a position in space (ImagePositionPatient): export the series from its "
            "archive again"
        )
    row, column = np.array(first.orientation).reshape(2, 3)
    lengths = [float(np.linalg.norm(row)), float(np.linalg.norm(column))]
    if max(abs(length - 1) for length in lengths) > TURNED or abs(float(row @ column)) > TURNED:
        raise BadScan(
            f"ImageOrientationPatient {list(first.orientation)}: has to be two unit vectors at a right angle"
        )


def _check_equal(what: str, kinds: Counter[str]) -> None:
    if len(kinds) > 1:
        listing = ", ".join(f"{count} of {kind}" for kind, count in sorted(kinds.items()))
        raise BadScan(f"slices of different {what} in one series: {listing}")


def _without_copies(slices: list[Slice]) -> list[Slice]:
    """The slices without copies of a file: the same SOPInstanceUID and position, and the same values.

    Archives may change headers and transfer syntaxes of files that they send again.

    Images of one SOPInstanceUID that lie apart are all kept: an anonymizer gave them one. Raises BadScan for images of one
    SOPInstanceUID and one position that are not the same.
    """
    first: dict[tuple[str, tuple[float, ...], int], Slice] = {}
    kept = []
    for one in slices:
        other = first.setdefault((one.instance, one.position, one.frame), one)
        if other is one:
            kept.append(one)
        elif _content(one) != _content(other) and not _same_image(one, other):
            names = " and ".join(os.path.basename(path.path) for path in (other, one))
            raise BadScan(f"two different images have one SOPInstanceUID and one position: {names}")
    return kept


def _content(one: Slice) -> bytes:
    with open(one.path, "rb") as file:
        data = file.read()
    return zlib.decompress(data, 31) if data[:2] == GZIP_MAGIC else data


def _same_image(one: Slice, other: Slice) -> bool:
    """Whether two files of one slice hold the same HU, whatever else their headers say."""
    alike = ("rows", "columns", "spacing", "orientation", "rescale", "photometric")
    if one.has_groups or any(getattr(one, name) != getattr(other, name) for name in alike):
        return False
    first, second = (hu_of_slice(path.path, path.rows, path.columns) for path in (one, other))
    return first is not None and second is not None and np.array_equal(first, second)


def _normal(one: Slice) -> NDArray[np.float64]:
    row, column = np.array(one.orientation).reshape(2, 3)
    normal: NDArray[np.float64] = np.cross(row, column)
    return normal / np.linalg.norm(normal)


def _interleaved(slices: list[Slice], names: tuple[str, ...]) -> list[str]:
    """The header fields among `names` of which slices of one value, or of none, lie between those of another.

    Two acquisitions may be interleaved at equal steps, so equal steps alone prove nothing.
    """
    normal = _normal(slices[0])
    ordered = sorted(slices, key=lambda one: float(normal @ one.position))
    found = []
    for name in names:
        values = [PARTS[name](one) for one in ordered]
        runs = 1 + sum(a != b for a, b in pairwise(values))
        kinds = len(set(values))
        if 1 < kinds <= len(ordered) // FEWEST and runs > kinds:
            found.append(name)
    return found


def order_series(slices: list[Slice], allow_gaps: bool) -> tuple[list[Slice], Grid]:
    """Slices of equal size and orientation sorted along their normal, and their grid.

    Raises BadScan when their positions are not those of one volume.
    """
    normal = _normal(slices[0])
    slices = sorted(slices, key=lambda one: float(normal @ one.position))
    along = np.array([normal @ one.position for one in slices])
    _check_line(slices, normal)
    grid = grid_of(slices, normal, _step(slices, along, allow_gaps))
    check_voxel_size(grid.spacing)
    return slices, grid


def grid_of(slices: list[Slice], normal: NDArray[np.float64], step: float) -> Grid:
    """The grid whose first slice is the first of these."""
    first = slices[0]
    row, column = np.array(first.orientation).reshape(2, 3)
    return Grid(
        size=(first.columns, first.rows, len(slices)),
        spacing=(first.spacing[1], first.spacing[0], step),
        origin=(first.position[0], first.position[1], first.position[2]),
        direction=tuple(np.stack([row, column, normal], axis=1).ravel().tolist()),
    )


def _check_line(slices: list[Slice], normal: NDArray[np.float64]) -> None:
    """Raise BadScan when positions leave the line along the normal: the gantry was tilted, or the slices drift."""
    offset = np.array([one.position for one in slices]) - np.array(slices[0].position)
    along = offset @ normal
    aside = np.linalg.norm(offset - along[:, None] * normal, axis=1)
    most = float(aside.max())
    if most > TOLERANCE_MM:
        last = int(aside.argmax())
        angle = np.degrees(np.arctan2(most, abs(float(along[last]))))
        raise BadScan(
            f"gantry tilt or drift: positions leave the normal of the slices by up to {most:.1f} mm ({angle:.1f} degrees; "
            f"{TOLERANCE_MM:g} mm are tolerated); --resample-tilt straightens it"
        )


def _step(slices: list[Slice], along: NDArray[np.float64], allow_gaps: bool) -> float:
    """Distance of adjacent slices in mm. Raises BadScan where slices are missing, share a position or lie unevenly."""
    if len(slices) < 2:
        step = slices[0].step or slices[0].thickness
        if step <= 0:
            raise BadScan(
                "one slice alone, whose header tells no SliceThickness: nothing says how thick it is"
            )
        return step
    steps = np.diff(along)
    usual = float(np.median(steps))
    if (steps < APART_MM).any():
        count = int((steps < APART_MM).sum())
        folders = sorted({os.path.basename(os.path.dirname(one.path)) for one in slices})
        where = f" (in {len(folders)} folders: {', '.join(folders[:4])})" if len(folders) > 1 else ""
        raise BadScan(f"4-D: {count} slices share their position with another slice of the series{where}")
    mean = float(along[-1] - along[0]) / (len(slices) - 1)
    # Positions are often rounded, so that no step is the true one: then the mean is.
    step = usual if abs(usual - mean) * (len(slices) - 1) <= TOLERANCE_MM / 10 else mean
    off = along - along[0] - step * np.arange(len(slices))
    off -= (off.max() + off.min()) / 2
    if max(np.abs(off).max(), np.abs(steps - step).max()) <= min(TOLERANCE_MM, STEP_SHARE * step):
        return step
    wide = np.flatnonzero(steps > WIDE * usual)
    if wide.size and _only_gaps(steps, usual):
        if allow_gaps:
            return usual
        at = int(wide[0])
        missing = int(sum(round(float(steps[i]) / usual) - 1 for i in wide))
        names = " and ".join(os.path.basename(one.path) for one in slices[at : at + 2])
        raise BadScan(
            f"{missing} slices missing, {wide.size} gaps: the first is {steps[at]:.2f} mm between {names}, "
            f"elsewhere {usual:.2f} mm; --allow-gaps cuts it all the same"
        )
    raise BadScan(
        f"uneven steps: adjacent slices are {steps.min():.2f} to {steps.max():.2f} mm apart "
        f"({TOLERANCE_MM:g} mm off their place are tolerated); --resample-tilt resamples it to equal steps"
    )


def _only_gaps(steps: NDArray[np.float64], usual: float) -> bool:
    """Whether the steps are equal but for a few that leave out whole slices."""
    times = np.maximum(1, np.rint(steps / usual))
    near = np.abs(steps - times * usual) <= min(TOLERANCE_MM, STEP_SHARE * usual)
    row = longest = 0
    for gap in times > 1:
        row = row + 1 if gap else 0
        longest = max(longest, row)
    return bool(near.all()) and longest <= ROW_OF_GAPS


def _to_resample(slices: list[Slice], allow_gaps: bool) -> DicomVolume | None:
    """A volume of slices that lean or lie unevenly, to be resampled at the usual step; None where two share a height.

    Raises BadScan where slices are missing: what lies between them would be made up.
    """
    normal = _normal(slices[0])
    slices = sorted(slices, key=lambda one: float(normal @ one.position))
    along = np.array([normal @ one.position for one in slices])
    steps = np.diff(along)
    if len(slices) < 2 or (steps < APART_MM).any():
        return None
    around = np.pad(steps, 1)
    holes = np.flatnonzero(steps > WIDE * np.maximum(around[:-2], around[2:]))
    if holes.size and len(steps) > 1 and not allow_gaps:
        at = int(holes[0])
        names = " and ".join(os.path.basename(one.path) for one in slices[at : at + 2])
        raise BadScan(
            f"slices missing: {steps[at]:.2f} mm between {names}, {float(np.median(steps)):.2f} mm elsewhere, and "
            "--resample-tilt makes nothing up; --allow-gaps takes it all the same"
        )
    grid = grid_of(slices, normal, float(np.median(steps)))
    return DicomVolume(slices, grid, positions=tuple(one.position for one in slices))
