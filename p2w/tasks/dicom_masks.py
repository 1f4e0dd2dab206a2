"""Masks of DICOM series: RTSTRUCT contours and DICOM-SEG segments, laid on the grid of the image that they are of.

Needs the extra parts2whole[dicom]: pydicom reads RTSTRUCT, highdicom DICOM-SEG.
"""

import os
import re
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2w.ct.dicom import GZIP_MAGIC, elements, read_slice, unpack_gzip
from p2w.ct.discover import ScanListing, ScanSource
from p2w.ct.enhanced_dicom import drop_dicom_warnings, read_dataset
from p2w.ct.orientation import BadScan, Grid, to_canonical
from p2w.ct.scan_folders import printable, safe_uid, walk
from p2w.errors import UserError, first_line
from p2w.tasks import crops, source_files

MODALITY = {"rtstruct": "RTSTRUCT", "seg": "SEG"}
SOP_CLASS = {"rtstruct": b"1.2.840.10008.5.1.4.1.1.481.3", "seg": b"1.2.840.10008.5.1.4.1.1.66.4"}
HEAD = 4096  # bytes in which a file names its SOP class
MOST_BYTES = 1 << 30  # of a mask file that is packed by gzip, unpacked
BETWEEN = 0.25  # share of a slice distance that the plane of a contour may be off a slice
ON_EDGE = 0.02  # share of the voxels of a contour that may lie on its edge with another
OFF_GRID = 0.1  # voxels that a segment's grid may be off the image's


def masks_by_series(source: str, out: str, kind: str) -> dict[str, list[ScanSource]]:
    """RTSTRUCT ("rtstruct") or DICOM-SEG ("seg") files below a folder, by the SeriesInstanceUID that they name, else "".

    Raises UserError without pydicom.
    """
    found: dict[str, list[ScanSource]] = defaultdict(list)
    for path in walk(source, out):
        name = printable(os.path.relpath(path, source))
        try:
            if not _is_of_class(path, SOP_CLASS[kind]):
                continue
            data = read_dataset(path, pixels=False)
        except (struct.error, zlib.error, OSError):  # find_scans names it
            continue
        except BadScan as error:
            if "parts2whole[dicom]" in str(error):
                raise UserError(
                    f"--masks {kind}: reading them needs pydicom and highdicom: pip install 'parts2whole[dicom]'"
                ) from error
            continue
        if getattr(data, "Modality", "") == MODALITY[kind]:
            for series in set(_referenced_series(data)) or {""}:
                found[series].append(ScanSource(safe_uid(name), name, (path,)))
    return found


def _is_of_class(path: str, sop_class: bytes) -> bool:
    """Whether a file is of a SOP class, by its first bytes: most are slices, which pydicom would read more slowly.

    Raises struct.error or zlib.error for one that ends early, of which pydicom would read a part without a word.
    """
    with open(path, "rb") as file:
        data = file.read(HEAD)
        packed = data[:2] == GZIP_MAGIC
        if sop_class not in (unpack_gzip(data, HEAD) if packed else data):
            return False
        data += file.read()
    elements(unpack_gzip(data, MOST_BYTES) if packed else data)
    return True


def _referenced_series(data: Any) -> Iterator[str]:
    """SeriesInstanceUIDs of the images that an RTSTRUCT or SEG refers to."""
    for one in getattr(data, "ReferencedSeriesSequence", None) or []:
        yield str(getattr(one, "SeriesInstanceUID", ""))
    for frame in getattr(data, "ReferencedFrameOfReferenceSequence", None) or []:
        for study in getattr(frame, "RTReferencedStudySequence", None) or []:
            for one in getattr(study, "RTReferencedSeriesSequence", None) or []:
                yield str(getattr(one, "SeriesInstanceUID", ""))


def image_names(found: ScanListing) -> dict[str, ScanSource]:
    """DICOM series by every name that a mask file may have: series uid, folder, and its last part where only one has it."""
    names: dict[str, list[ScanSource]] = defaultdict(list)
    for scan in found.sources:
        if scan.grid is None:
            continue
        folder = scan.name.partition(" (series ")[0]
        for name in {scan.uid, scan.info.series, folder, folder.rpartition("/")[2]}:
            names[name].append(scan)
    return {name: scans[0] for name, scans in names.items() if len(scans) == 1}


def read_mask(
    source: ScanSource, kind: str, structures: str, image: ScanSource, grid: Grid, shape: tuple[int, ...]
) -> NDArray[np.uint8]:
    """The mask (0 and 1) on an image's canonical grid [z,y,x]: all structures whose names match the expression, "" for all.

    Raises BadScan where none matches, or they do not lie on the image's slices, or in another frame of reference.
    """
    try:
        _check_frame_of_reference(source, image)
        if kind == "rtstruct":
            return _contours(source, structures, grid, shape)
        return _segments(source, structures, grid, shape)
    except BadScan as error:
        raise BadScan(f"mask {source.name}: {error}") from error
    except (AttributeError, TypeError, ValueError, LookupError) as error:
        said = first_line(error)[:200]
        raise BadScan(
            f"mask {source.name}: is damaged ({type(error).__name__}: {said}): export it again"
        ) from error


def _check_frame_of_reference(source: ScanSource, image: ScanSource) -> None:
    """Raise BadScan where mask and image name different frames of reference for their coordinates."""
    first = read_slice(image.files[0], image.info.modality)
    own = first.frame_of_reference if first is not None else ""
    data = read_dataset(source.files[0], pixels=False)
    references = [data, *(getattr(data, "ReferencedFrameOfReferenceSequence", None) or [])]
    uids = {str(getattr(one, "FrameOfReferenceUID", "") or "") for one in references} - {""}
    if own and uids and own not in uids:
        raise BadScan("its FrameOfReferenceUID is not its image's, so its coordinates are others")


def _chosen(names: dict[int, str], structures: str) -> list[int]:
    chosen = [number for number, name in names.items() if re.search(structures, name, re.IGNORECASE)]
    if not chosen:
        raise BadScan(
            f"no structure is called like {structures!r}: it has {', '.join(sorted(names.values())) or 'none'}"
        )
    return chosen


def _contours(source: ScanSource, structures: str, grid: Grid, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Filled contours of an RTSTRUCT: a voxel is inside where its centre is; contours within one another are holes.

    Raises BadScan for contours that do not lie on the image's slices, cross one another, or leave slices out.
    """
    data = read_dataset(source.files[0], pixels=False)
    names = {
        int(one.ROINumber): str(one.ROIName) for one in getattr(data, "StructureSetROISequence", None) or []
    }
    chosen = _chosen(names, structures)
    mask = np.zeros(shape, np.uint8)
    for roi in getattr(data, "ROIContourSequence", None) or []:
        if int(roi.ReferencedROINumber) not in chosen:
            continue
        name, own = names[int(roi.ReferencedROINumber)], np.zeros(shape, np.uint8)
        slices: dict[tuple[int, int], list[tuple[NDArray[Any], bool]]] = defaultdict(list)
        for contour in getattr(roi, "ContourSequence", None) or []:
            kind = str(getattr(contour, "ContourGeometricType", "CLOSED_PLANAR"))
            if kind in ("POINT", "OPEN_PLANAR", "OPEN_NONPLANAR"):
                continue  # marks, which enclose nothing
            points = np.array(contour.ContourData, np.float64).reshape(-1, 3)
            if not np.isfinite(points).all():
                raise BadScan("a contour has points that are no numbers")
            slice_key, flat = _on_slice(crops.to_voxel(grid, points[:, ::-1]), shape, name)
            slices[slice_key].append((flat, kind.endswith("XOR")))
        _check_levels(slices, name)
        for (axis, level), contours in slices.items():
            _fill(np.moveaxis(own, axis, 0)[level], contours, name)
        mask |= own
    if not mask.any():
        raise BadScan("its contours enclose no voxel of the image")
    return mask


def _on_slice(
    points: NDArray[Any], shape: tuple[int, ...], name: str
) -> tuple[tuple[int, int], NDArray[Any]]:
    """Axis and number of the slice of a polygon, and its points (n, 2) there; `points` (n, 3) in voxels z, y, x."""
    spread = np.ptp(points, axis=0)
    axis = int(spread.argmin())
    level = float(points[:, axis].mean())
    if spread[axis] > BETWEEN or abs(level - round(level)) > BETWEEN:
        raise BadScan(
            f"a contour of {name} lies between the slices of the image, at {'zyx'[axis]} = {level:.2f}"
        )
    if not 0 <= round(level) < shape[axis]:
        raise BadScan(f"a contour of {name} lies outside the image, at {'zyx'[axis]} = {level:.1f}")
    return (axis, round(level)), np.delete(points, axis, axis=1)


def _check_levels(slices: Iterable[tuple[int, int]], name: str) -> None:
    """Raise BadScan where a structure has contours on every second or third slice alone: it was drawn on thicker slices."""
    for axis in range(3):
        steps = np.diff(sorted(level for other, level in slices if other == axis))
        if len(steps) > 1 and steps.min() > 1 and np.median(steps) == steps.min():
            raise BadScan(
                f"{name} has contours on every {steps.min()}. slice of the image alone, and nothing says what is between: "
                "interpolate them where they were drawn, or use the series that they were drawn on"
            )


def _fill(plane: NDArray[np.uint8], contours: Sequence[tuple[NDArray[Any], bool]], name: str) -> None:
    """Set the voxels of a slice [y,x] that lie inside its contours, each (n, 2) in voxels; a contour in another is a hole.

    A contour that is there twice counts once. Raises BadScan where two cross, unless they say themselves that what is in
    both is outside (CLOSEDPLANAR_XOR).
    """
    filled: list[NDArray[np.bool_]] = []
    for flat, xor in contours:
        inside = _inside(plane.shape, flat, name)
        if not xor and any(np.array_equal(inside, other) for other in filled):
            continue
        nested = xor
        for other in filled:
            both, least = np.count_nonzero(inside & other), min(map(np.count_nonzero, (inside, other)))
            nested |= 0 < both == least
            if not xor and ON_EDGE * least < both < least:
                raise BadScan(
                    f"two contours of {name} cross, so nothing says what is inside: draw them as one"
                )
        plane[:] = plane ^ inside if nested else plane | inside
        filled.append(inside)


def _inside(shape: tuple[int, ...], flat: NDArray[Any], name: str) -> NDArray[np.bool_]:
    """The voxels of a slice [y,x] whose centres lie inside a polygon (n, 2). Raises BadScan where that lies beside it."""
    from matplotlib.path import Path  # noqa: PLC0415  (slow to import)

    plane = np.zeros(shape, bool)
    low = np.maximum(np.ceil(flat.min(axis=0)), 0).astype(int)
    high = np.minimum(np.floor(flat.max(axis=0)) + 1, plane.shape).astype(int)
    if (flat.max(axis=0) < -0.5).any() or (flat.min(axis=0) > np.array(plane.shape) - 0.5).any():
        raise BadScan(f"a contour of {name} lies beside the image")
    if (high <= low).any():
        return plane
    box = np.stack(np.meshgrid(*map(np.arange, low, high), indexing="ij"), axis=-1)
    inside = Path(flat).contains_points(box.reshape(-1, 2)).reshape(box.shape[:2])
    plane[low[0] : high[0], low[1] : high[1]] = inside
    return plane


def _segments(source: ScanSource, structures: str, grid: Grid, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The voxels of chosen segments of a DICOM-SEG; of fractional ones, those of at least one half."""
    try:
        from highdicom.seg import segread  # noqa: PLC0415  (an extra)
    except ImportError as error:
        raise BadScan("needs highdicom: pip install 'parts2whole[dicom]'") from error
    drop_dicom_warnings()
    try:
        segmentation = segread(source.files[0])
        names = {
            n: str(segmentation.get_segment_description(n).SegmentLabel) for n in segmentation.segment_numbers
        }
        volume = segmentation.get_volume(segment_numbers=_chosen(names, structures))
    except BadScan:
        raise
    except Exception as error:  # highdicom raises whatever its parsers do
        said = first_line(error)[:200]
        raise BadScan(f"cannot be read: {type(error).__name__}: {said}") from error
    array = np.array((np.asarray(volume.array) >= 0.5).any(axis=-1), np.uint8)
    affine = np.asarray(volume.affine, float)  # from slice, row and column to x, y, z in mm
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    axes = (affine[:3, :3] / spacing)[:, ::-1]
    own = Grid(
        array.shape[::-1], tuple(spacing[::-1].tolist()), tuple(affine[:3, 3].tolist()), tuple(axes.ravel().tolist())
    )  # fmt: skip
    canonical, order, flips = own.canonical()
    return _paste(to_canonical(array, order, flips), canonical, grid, shape)


def _paste(part: NDArray[np.uint8], own: Grid, grid: Grid, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """A mask of some slices of an image in the whole image. Raises BadScan where its voxels are not the image's."""
    last = np.array(part.shape) - 1
    ends = crops.to_voxel(grid, crops.to_world(own, np.stack([np.zeros(3), last])))
    start = np.rint(ends[0]).astype(int)
    if np.abs(ends - np.stack([start, start + last])).max() > OFF_GRID or source_files.apart(
        Grid((2, 2, 2), grid.spacing, grid.origin, grid.direction),
        Grid((2, 2, 2), own.spacing, grid.origin, own.direction),
    ):
        raise BadScan("its voxels are not those of the image: export it on the image's own grid")
    if (start < 0).any() or (start + part.shape > np.array(shape)).any():
        raise BadScan("reaches beyond the image")
    mask = np.zeros(shape, np.uint8)
    z, y, x = (slice(first, first + count) for first, count in zip(start, part.shape, strict=True))
    mask[z, y, x] = part
    return mask
