"""Phantoms of task ncs: chests in LIDC-IDRI's format, one DICOM series per patient and the XML of four readers."""

import uuid
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

from p2w.files import write_atomic
from p2w.phantom.body import Label
from p2w.phantom.chest import PhantomScan, make_scan

Shape = tuple[int, int, int]
READERS = 4
SPAN = (0.7, 0.65, 0.65)  # share of 300 mm that such a scan shows: nodules take voxels enough
AROUND = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))  # clockwise


def spacing_of(shape: Shape) -> tuple[float, float, float]:
    """Size of a voxel in mm, z, y, x."""
    z, y, x = (round(300 * share / n, 4) for share, n in zip(SPAN, shape, strict=True))
    return z, y, x


def write_lidc_patient(folder: Path, seed: int, number: int, shape: Shape) -> None:
    """Write LIDC-IDRI-0001/STUDY/SERIES/000001.dcm … and readings.xml."""
    rng = np.random.default_rng([seed, number, 2])
    own = int(np.random.SeedSequence([seed, number, 102]).generate_state(1)[0])
    scan = make_scan(own, shape, spacing_of(shape))
    study, series = uids("lidc", seed, number)
    patient = f"LIDC-IDRI-{number + 1:04d}"
    series_folder = folder / patient / "study" / "series"
    series_folder.mkdir(parents=True)
    write_series(series_folder, scan, {"0010|0020": patient, "0020|000d": study, "0020|000e": series})
    write_atomic(series_folder / "readings.xml", _readings(scan, series, rng).encode())


def uids(kind: str, seed: int, number: int) -> tuple[str, str]:
    """StudyInstanceUID and SeriesInstanceUID of a phantom patient: a function of kind, seed and number."""
    study, series = (
        f"2.25.{uuid.uuid5(uuid.NAMESPACE_URL, f'p2w phantom {kind} {seed} {number} {what}').int}"
        for what in ("study", "series")
    )
    return study, series


def write_series(series_folder: Path, scan: PhantomScan, tags: dict[str, str]) -> None:
    """Write one DICOM file per slice, numbered from the top down as scanners do; `tags` names patient, study and series."""
    common = {
        "0008|0060": "CT",
        "0008|0008": "ORIGINAL\\PRIMARY\\AXIAL",
        "0028|1052": "-1024",
        "0028|1053": "1",
    }
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetImageIO("GDCMImageIO")
    dz, dy, dx = scan.spacing_mm
    z0, y0, x0 = scan.origin_mm
    depth = len(scan.voxels)
    for z, values in enumerate(scan.voxels):
        image = sitk.GetImageFromArray(np.maximum(values, -1024)[None])
        image.SetSpacing((dx, dy, dz))
        image.SetOrigin((x0, y0, z0 + z * dz))
        own = {"0008|0018": f"{tags['0020|000e']}.{z + 1}", "0020|0013": str(depth - z)}
        for tag, value in (common | tags | own).items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(series_folder / f"{depth - z:06d}.dcm"))
        try:
            writer.Execute(image)
        except RuntimeError as error:  # what SimpleITK makes of a full disk or a folder it may not write
            raise OSError(f"{series_folder} cannot be written: {str(error).splitlines()[-1]}") from None


def _readings(scan: PhantomScan, series: str, rng: np.random.Generator) -> str:
    """Four reading sessions: a reader misses some nodules and draws others larger or smaller."""
    parts, _ = ndimage.label(scan.labels == Label.NODULE, np.ones((3, 3, 3)))
    fields = [_distance(parts == number, scan) for number in range(1, int(parts.max()) + 1)]
    sessions = []
    for reader in range(READERS):
        nodules = []
        for number, (low, inside) in enumerate(fields):
            if rng.random() < 0.12:
                continue
            sway = ndimage.gaussian_filter(rng.normal(size=inside.shape), 1.5) * 1.5 + rng.normal(0, 0.25)
            outlined = inside + sway * 0.6 * scan.spacing_mm[2] > 0
            rois = [_roi(scan, series, low[0] + z, image, low[1:]) for z, image in enumerate(outlined)]
            if any(rois):
                name = f"reader {reader} nodule {number}"
                nodules.append(
                    f"<unblindedReadNodule><noduleID>{escape(name)}</noduleID>"
                    "<characteristics><subtlety>4</subtlety><malignancy>3</malignancy></characteristics>"
                    f"{''.join(rois)}</unblindedReadNodule>"
                )
        small = _point(scan, series, rng)
        sessions.append(
            "<readingSession><annotationVersion>3.12</annotationVersion>"
            f"<servicingRadiologistID>anon-{reader}</servicingRadiologistID>{''.join(nodules)}{small}</readingSession>"
        )
    head = f"<ResponseHeader><Version>1.8.1</Version><SeriesInstanceUid>{series}</SeriesInstanceUid></ResponseHeader>"
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<LidcReadMessage xmlns="http://www.nih.gov" '
        f'uid="1.3.6.1.4.1.14519.5.2.1.6279.6001.1307390068.0">{head}{"".join(sessions)}</LidcReadMessage>\n'
    )


def _distance(nodule: NDArray[np.bool_], scan: PhantomScan) -> tuple[tuple[int, ...], NDArray]:
    """First voxel of a box around a nodule, and the depth in mm inside its surface there."""
    where = ndimage.find_objects(nodule.astype(np.uint8))[0]
    box = tuple(
        slice(max(0, p.start - 3), min(n, p.stop + 3)) for p, n in zip(where, nodule.shape, strict=True)
    )
    own = nodule[box]
    inside = ndimage.distance_transform_edt(own, scan.spacing_mm)
    outside = ndimage.distance_transform_edt(~own, scan.spacing_mm)
    return tuple(part.start for part in box), np.where(own, inside - scan.spacing_mm[2] / 2, -outside)


def _roi(scan: PhantomScan, series: str, z: int, image: NDArray[np.bool_], low: tuple[int, ...]) -> str:
    """One outline: the pixels just outside the largest component of a slice; "" where there is none."""
    pieces, count = ndimage.label(image)
    if not count:
        return ""
    largest = pieces == 1 + int(np.argmax(np.bincount(pieces.ravel())[1:]))
    wide = np.pad(ndimage.binary_dilation(np.pad(largest, 1)), 1)
    chain = trace(wide) - 2 + np.array(low)
    height, width = scan.voxels.shape[1:]
    if (chain < 0).any() or (chain >= (height, width)).any():
        return ""
    edges = "".join(f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>" for y, x in chain)
    return f"<roi>{_slice(scan, series, z)}<inclusion>TRUE</inclusion>{edges}</roi>"


def _slice(scan: PhantomScan, series: str, z: int) -> str:
    at = scan.origin_mm[0] + z * scan.spacing_mm[0]
    return f"<imageZposition>{at:.4f}</imageZposition><imageSOP_UID>{series}.{z + 1}</imageSOP_UID>"


def _point(scan: PhantomScan, series: str, rng: np.random.Generator) -> str:
    """A nodule below 3 mm, marked by one point without an outline."""
    z, y, x = (int(rng.integers(n // 4, 3 * n // 4)) for n in scan.voxels.shape)
    edge = f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>"
    roi = f"<roi>{_slice(scan, series, z)}<inclusion>TRUE</inclusion>{edge}</roi>"
    return f"<unblindedReadNodule><noduleID>small</noduleID>{roi}</unblindedReadNodule>"


def trace(piece: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The outer border of a connected component that does not touch the edge: pixels (n, 2) row, column, clockwise."""
    start = tuple(int(n) for n in np.argwhere(piece)[0])  # the topmost, and of these the leftmost
    chain, at, previous = [start], start, 6  # as if from its left
    for _ in range(8 * piece.size):
        for turn in range(1, 9):
            direction = (previous + turn) % 8
            step = (at[0] + AROUND[direction][0], at[1] + AROUND[direction][1])
            if piece[step]:
                break
        else:
            return np.array(chain)  # a single pixel
        at, previous = step, (direction + 4) % 8
        chain.append(at)
        if len(chain) > 2 and chain[-1] == chain[1] and chain[-2] == chain[0]:
            return np.array(chain[:-2])
    raise AssertionError("a border without an end")
