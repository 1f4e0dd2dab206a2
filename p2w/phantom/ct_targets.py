"""Phantoms of CT tasks: chests in LIDC-IDRI's format (ncs), abdomens in LiTS' format (lcs), CT pulmonary angiograms with
emboli (ecc), DICOM with liver masks, organs told by place.

ncs is one DICOM series per patient and the XML of four readers.

lcs uses the lower half of a chest phantom, where liver, spleen and stomach touch and have similar HU.

In ecc, vessels are filled with contrast agent. An embolus is a dark lump inside a vessel; a negative candidate is a lump of
the same HU and size at the wall of a vessel (a lymph node), poorly mixed blood (dark without an edge), or a normal vessel.
"""

import json
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
from p2w.phantom.image_files import blob, write_image
from p2w.phantom.organs import Region

Shape = tuple[int, int, int]


def write_lits_patient(folder: Path, seed: int, number: int, shape: Shape) -> None:
    """Write one volume and its segmentation."""
    rng = np.random.default_rng([seed, number, 3])
    deep = (int(shape[0] * 2), shape[1], shape[2])
    scan = make_scan(int(np.random.SeedSequence([seed, number, 103]).generate_state(1)[0]), deep)
    below = _abdomen(scan.labels == Label.LIVER, shape[0])
    hu, labels = scan.voxels[below].copy(), scan.labels[below]
    liver = labels == Label.LIVER
    segmentation = liver.astype(np.uint8)
    inside = np.argwhere(liver)
    for _ in range(int(rng.integers(1, 6)) if len(inside) else 0):
        centre = inside[rng.integers(len(inside))].astype(float)
        radius = float(np.clip(rng.lognormal(np.log(9), 0.5), 4, 28))
        box, depth = blob(hu.shape, scan.spacing_mm, centre, radius, rng)
        edge = max(scan.spacing_mm)
        cover = np.clip(depth / edge + 0.5, 0, 1) * liver[box]
        change = float(rng.choice([-1, -1, -1, 1])) * rng.uniform(18, 55)
        hu[box] = np.rint(hu[box] + cover * change).astype(np.int16)
        segmentation[box][(cover > 0.5)] = 2
    flipped = number % 4 == 1
    for name, values in (("volume", hu), ("segmentation", segmentation)):
        write_image(folder / f"{name}-{number}.nii.gz", values, scan.spacing_mm, scan.origin_mm, flipped)


def _abdomen(liver: np.ndarray, depth: int) -> slice:
    """The lowest slices of a scan, as many as requested: they show the liver."""
    return slice(0, min(depth, liver.shape[0]))


def write_dicom_patient(folder: Path, seed: int, number: int, shape: Shape) -> None:
    """Write P001/000001.dcm …, a chest as a DICOM series, and P001_liver.nii.gz, the mask of its liver."""
    scan = make_scan(int(np.random.SeedSequence([seed, number, 105]).generate_state(1)[0]), shape)
    patient = f"P{number + 1:03d}"
    study, series = uids("dicom", seed, number)
    (folder / patient).mkdir()
    tags = {"0010|0020": f"{seed}-{number + 1}", "0020|000d": study, "0020|000e": series}
    write_series(folder / patient, scan, tags)
    liver = (scan.labels == Label.LIVER).astype(np.uint8)
    write_image(folder / f"{patient}_liver.nii.gz", liver, scan.spacing_mm, scan.origin_mm, False)


EMBOLI, OTHERS = 8, 12  # candidates a patient
FOLDS = 3
# Least distance from the centre of an embolus to the vessel's wall: it must fit, and voxels must show it.
MIN_DEPTH_MM, MIN_DEPTH_VOXELS = 1.2, 1.25
BLOOD = (Label.VESSEL, Label.GREAT_VESSEL)
CHEST_SHARE_ZYX = (0.75, 0.62, 0.75)  # share of the chest that such a scan shows


def write_ctpa_patient(folder: Path, seed: int, number: int, shape: Shape) -> None:
    """Write one scan, and its candidates in note.json."""
    rng = np.random.default_rng([seed, number, 4])
    own = int(np.random.SeedSequence([seed, number, 104]).generate_state(1)[0])
    spacing = tuple(
        round(mm * share / n, 4) for mm, n, share in zip((300, 300, 300), shape, CHEST_SHARE_ZYX, strict=True)
    )
    scan = make_scan(own, shape, (spacing[0], spacing[1], spacing[2]), contrast=float(rng.uniform(180, 330)))
    hu, marks = _candidates(scan, rng)
    write_image(folder / f"PA{number:03d}.nii.gz", hu, scan.spacing_mm, scan.origin_mm, number % 4 == 2)
    rows = []
    for mm, label in marks:
        x, y, z = (round(float(value), 4) for value in mm[::-1])
        rows.append([f"patient{number:03d}", f"PA{number:03d}", x, y, z, label, number % FOLDS])
    write_atomic(folder / "note.json", json.dumps(rows).encode())


def write_candidate_table(out: Path, parts: list[Path]) -> None:
    """Write candidates.csv from the note.json of all patients."""
    lines = ["patient,series,x,y,z,label,fold"]
    for part in parts:
        lines += [",".join(map(str, row)) for row in json.loads((part / "note.json").read_text())]
    write_atomic(out / "candidates.csv", "\n".join([*lines, ""]).encode())


def _candidates(
    scan: PhantomScan, rng: np.random.Generator
) -> tuple[NDArray[np.int16], list[tuple[NDArray, int]]]:
    """Paint emboli and similar lumps into a scan; returns world mm (z, y, x) and label of each candidate."""
    step = np.array(scan.spacing_mm)
    blood = np.isin(scan.labels, BLOOD)
    depth = ndimage.distance_transform_edt(blood, step)
    edge = float(step.mean())
    deep = depth > max(MIN_DEPTH_MM, MIN_DEPTH_VOXELS * edge)
    level = float(np.median(scan.voxels[deep])) if deep.any() else 250.0
    hu = scan.voxels.astype(np.float32)
    positions = np.argwhere(deep)
    marks: list[tuple[NDArray, int]] = []
    taken: list[NDArray] = []
    for index in range(EMBOLI + OTHERS):
        centre = _free(positions, taken, step, rng)
        if centre is None:
            break
        taken.append(centre)
        depth_here = float(depth[tuple(centre.astype(int))])
        clot = float(rng.uniform(25, 75))
        radius = float(rng.uniform(0.55, 0.95) * min(depth_here, 8.0) + 0.6)
        kind = (
            "embolus" if index < EMBOLI else str(rng.choice(["node", "mixing", "plain"], p=[0.45, 0.3, 0.25]))
        )
        if kind == "embolus":
            box, inside = blob(hu.shape, step, centre, radius, rng)
            cover = np.clip(inside / edge + 0.5, 0, 1) * blood[box]
            hu[box] += cover * (clot - level)
        elif kind == "node":
            centre = _beside(centre, depth, step, radius)
            box, inside = blob(hu.shape, step, centre, radius, rng)
            cover = np.clip(inside / edge + 0.5, 0, 1) * ~blood[box]
            hu[box] += cover * (clot - hu[box])
        elif kind == "mixing":
            box, inside = blob(hu.shape, step, centre, 2.5 * radius, rng)
            soft = np.clip(0.5 + inside / (3.5 * radius), 0, 1) * blood[box]
            hu[box] += soft * rng.uniform(0.4, 0.75) * (clot - level)
        at = centre + rng.normal(0, 0.6, 3) / step
        marks.append((at * step + np.array(scan.origin_mm), int(kind == "embolus")))
    return np.rint(np.clip(hu, -3024, 3071)).astype(np.int16), marks


def _free(
    positions: NDArray, taken: list[NDArray], step: NDArray, rng: np.random.Generator
) -> NDArray | None:
    """A voxel deep in a vessel, away from the scan's edge and other candidates; None when there is none."""
    if not len(positions):
        return None
    low, high = positions.min(0) + 2, positions.max(0) - 2
    for apart in (14.0, 8.0):
        for position in positions[rng.integers(0, len(positions), 80)].astype(float):
            near = [np.linalg.norm((position - other) * step) for other in taken]
            if (position >= low).all() and (position <= high).all() and min(near, default=99.0) > apart:
                return position
    return None


def _beside(centre: NDArray, depth: NDArray, step: NDArray, radius: float) -> NDArray:
    """Move out of a vessel along its depth's gradient, until only the edge of a lump would touch it."""
    at = centre.copy()
    gradient = np.stack(np.gradient(ndimage.gaussian_filter(_around(depth, centre), 1.0)))
    way = -gradient[:, 3, 3, 3] / step
    way = way / (np.linalg.norm(way) + 1e-9) if np.linalg.norm(way) > 1e-6 else np.array([0.0, 1.0, 0.0])
    for _ in range(60):
        index = np.clip(np.rint(at).astype(int), 0, np.array(depth.shape) - 1)
        if depth[tuple(index)] <= 0:
            return at + way * 0.7 * radius / step
        at = at + 0.5 * way / step
    return at


def _around(depth: NDArray, centre: NDArray) -> NDArray:
    """The 7 x 7 x 7 voxels around a point."""
    padded = np.pad(depth[tuple(slice(max(0, int(c) - 3), int(c) + 4) for c in centre)], 0)
    if padded.shape == (7, 7, 7):
        return padded
    return np.pad(padded, [(0, 7 - n) for n in padded.shape], mode="edge")


def write_organs_patient(folder: Path, seed: int, number: int, shape: Shape) -> None:
    """Write a chest and a map of its regions (p2w.phantom.organs.Region), in nnU-Net's layout.

    Liver, spleen, heart, vessels and oesophagus have the same HU; lobes and levels of the spine never differ in theirs. A
    mask of them asks where in the body a voxel lies, and not how bright it is.
    """
    rng = np.random.default_rng([seed, number, 6])
    own = int(np.random.SeedSequence([seed, number, 106]).generate_state(1)[0])
    _write_regions(folder, make_scan(own, shape, equal_hu=float(rng.uniform(38, 58)), regions=True), number)


def write_anatomy_patient(folder: Path, seed: int, number: int, shape: Shape) -> None:
    """As `write_organs_patient`, of patients and scanners that differ more; organs are of one HU, enhanced or not."""
    rng = np.random.default_rng([seed, number, 7])
    own = int(np.random.SeedSequence([seed, number, 107]).generate_state(1)[0])
    level = float(rng.uniform(35, 60) if rng.random() < 0.5 else rng.uniform(90, 160))
    _write_regions(folder, make_scan(own, shape, equal_hu=level, regions=True, varied=True), number)


def _write_regions(folder: Path, scan: PhantomScan, number: int) -> None:
    """Write a scan and its map of regions."""
    assert scan.regions is not None
    for part, values, name in (
        ("imagesTr", scan.voxels, f"organs_{number:04d}_0000.nii.gz"),
        ("labelsTr", scan.regions, f"organs_{number:04d}.nii.gz"),
    ):
        (folder / part).mkdir(parents=True)
        write_image(folder / part / name, values, scan.spacing_mm, scan.origin_mm)


def write_organs_table(out: Path, parts: list[Path]) -> None:
    """Write dataset.json, as nnU-Net wants it."""
    names = {
        ("background" if region is Region.OTHER else region.name.lower()): int(region) for region in Region
    }
    table = {
        "channel_names": {"0": "CT"},
        "labels": names,
        "numTraining": len(parts),
        "file_ending": ".nii.gz",
    }
    write_atomic(out / "dataset.json", (json.dumps(table, indent=1) + "\n").encode())


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
        "0008|0020": "20000101",  # date and time of the study: GDCM would write today's
        "0008|0030": "120000",
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
