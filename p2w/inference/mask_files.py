"""Files of predictions in a scan's own geometry: masks, label maps with their names, volumes of probabilities, DICOM-SEG.

A DICOM-SEG is one object a scan, a segment a class, that refers to the instances of the series it is of. Every slice of the
series has a frame, also an empty one, so that readers find the segments on the series' own grid, voxel for voxel; `p2w
prepare general --masks seg` is one of them. Uids of an object follow from the series, the network and the mask: the same
prediction made again is the same object. Needs highdicom, of the extra parts2whole[dicom].
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from p2w import __version__
from p2w.ct.dicom_pixels import unpacked_files
from p2w.ct.discover import ScanSource
from p2w.ct.enhanced_dicom import drop_dicom_warnings, read_dataset
from p2w.ct.orientation import Grid
from p2w.errors import UserError
from p2w.finetune.task_interface import TaskType
from p2w.tasks import source_files

NIFTI_SIZE = 32_767  # most voxels along an axis of NIfTI-1
MASKS = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd")
ENDING = ".nii.gz"  # of files in a folder of masks or probabilities


class StoredGeometry(Protocol):
    """A scan that knows the grid and the voxel order of its file; `p2w.inference.predict.InferenceInput` is one."""

    @property
    def stored_grid(self) -> Grid:
        """The grid of the file."""

    def stored(self, mask: NDArray[Any]) -> NDArray[Any]:
        """A canonical volume in the order of the file."""


def write_classes(
    out: Path, mask: NDArray[Any], scan: StoredGeometry, kind: TaskType, ending: str = ""
) -> list[Path]:
    """Write a canonical mask of `TaskType.to_mask`, and a JSON file of its labels where it has several.

    Returns the paths of all files.

    `out` is the file; of labels that may overlap, a folder that gets a file for each, with `ending`.
    """
    files = kind.mask_files(mask)
    legend_file = out / "labels.json" if kind.separate_files else out.with_name(f"{_stem(out)}.labels.json")
    paths = write_volumes(out, files, scan, ending)
    if labels := kind.mask_legend():
        publish_text(legend_file, json.dumps(labels, indent=2) + "\n")
        paths.append(legend_file)
    return paths


def write_volumes(
    out: Path, volumes: Mapping[str, NDArray[Any]], scan: StoredGeometry, ending: str
) -> list[Path]:
    """Write canonical volumes by name in the scan's geometry: the one named "" as `out`, others into the folder `out`."""
    paths = []
    for name, volume in volumes.items():
        path = out / f"{name}{ending}" if name else out
        try:
            path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{out}: no folder can be made there ({error.strerror}); name another") from error
        write_mask(path, scan.stored(volume), scan.stored_grid)
        paths.append(path)
    return paths


def _stem(path: Path) -> str:
    """The name of a mask file without its ending."""
    ending = max((one for one in MASKS if path.name.lower().endswith(one)), key=len, default="")
    return path.name[: len(path.name) - len(ending)]


def check_geometry(path: Path, grid: Grid) -> None:
    """Raise UserError where the format of `path` cannot hold the grid, before anything is computed for it.

    A small image of the same spacing, origin and direction is written and read back; no corner of the grid may move.
    """
    image = sitk.Image([2, 2, 2], sitk.sitkUInt8)
    image.SetSpacing(grid.spacing)
    image.SetOrigin(grid.origin)
    image.SetDirection(grid.direction)
    why = ""
    with tempfile.TemporaryDirectory(prefix="p2w-") as folder:
        name = os.path.join(
            folder, "trial" + "".join(path.suffixes[-2:] if path.suffix == ".gz" else [path.suffix])
        )
        try:
            sitk.WriteImage(image, name)
            written = sitk.ReadImage(name)
            kept = Grid(grid.size, written.GetSpacing(), written.GetOrigin(), written.GetDirection())
            why = source_files.apart(grid, kept) or ""
        except RuntimeError as error:
            why = str(error).strip().splitlines()[-1]
    if path.name.lower().endswith((".nii", ".nii.gz")) and max(grid.size) > NIFTI_SIZE:
        why = f"{max(grid.size):,} voxels along an axis, NIfTI-1 holds {NIFTI_SIZE:,}"
    if why:
        raise UserError(f"{path}: its format cannot hold where the scan lies ({why}); name --out FILE.mha")


def write_mask(path: Path, mask: np.ndarray, grid: Grid) -> None:
    """Write a volume [z,y,x] in the grid's geometry, under another name first. Raises UserError where that fails."""
    image = sitk.GetImageFromArray(mask)
    image.SetSpacing(grid.spacing)
    image.SetOrigin(grid.origin)
    image.SetDirection(grid.direction)
    try:
        with tempfile.TemporaryDirectory(prefix=".p2w-", dir=path.parent) as beside:
            sitk.WriteImage(image, os.path.join(beside, path.name), useCompression=True)
            # Voxels, then the header
            for written in sorted(os.listdir(beside), key=lambda name: name == path.name):
                os.replace(os.path.join(beside, written), path.parent / written)
    except (OSError, RuntimeError) as error:
        said = str(error).strip().splitlines()[-1]
        raise UserError(f"{path}: not written ({said}); name another --out") from error


def publish_text(path: Path, text: str) -> None:
    """Write a text file under another name first. Raises UserError where that fails."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        beside.write_text(text)
        os.replace(beside, path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise UserError(f"{path}: not written ({error.strerror}); name another --out") from error


SEG_ENDING = ".dcm"
DICOM_SEG = "dicom-seg"
SERIES_NUMBER = 300  # beside a study's own, which begin at 1
LABEL = 64  # characters that DICOM allows in a segment's label
# Attributes that readers of the object ask for, and that anonymized series may lack; an empty value says "not known".
MAY_BE_EMPTY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime", "AccessionNumber",
    "ReferringPhysicianName", "PositionReferenceIndicator",
)  # fmt: skip
NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPInstanceUID")


def check_dicom_source(source: ScanSource) -> None:
    """Raise UserError, before anything is computed, where a DICOM-SEG of this scan cannot be written."""
    if source.grid is None:
        raise UserError(
            f"{source.name}: --format {DICOM_SEG} is for DICOM series, and this is none; leave --format out"
        )
    if source.positions:
        raise UserError(
            f"{source.name}: --format {DICOM_SEG}: its slices were resampled ({source.resampled}), so no voxel of the mask "
            "is one of theirs; leave --format out"
        )
    try:
        import highdicom  # noqa: F401, PLC0415  (an extra)
    except ImportError as error:
        raise UserError(f"--format {DICOM_SEG} needs highdicom: pip install 'parts2whole[dicom]'") from error
    with unpacked_files(source.files[:1]) as names:
        header = read_dataset(names[0], pixels=False)
    if source.frames and (len(source.files) > 1 or int(header.NumberOfFrames) != len(source.frames)):
        raise UserError(
            f"{source.name}: --format {DICOM_SEG}: its slices are some of the frames of its files, or of several files; "
            "leave --format out"
        )
    missing = [name for name in NEEDED if not getattr(header, name, None)]
    if missing:
        raise UserError(
            f"{source.name}: --format {DICOM_SEG}: its files have no {missing[0]}, which the mask has to refer to"
        )


def write_dicom_seg(path: Path, masks: Mapping[str, NDArray[Any]], source: ScanSource, weights: str) -> None:
    """Write masks [z,y,x] by class, True or above 0 inside, in the stored order of `source`; they may overlap.

    `weights` stands for the network in the object's uids. Raises UserError where the object cannot be made or written.
    """
    from pydicom.uid import generate_uid  # noqa: PLC0415  (an extra)

    drop_dicom_warnings()
    frames = np.stack([np.asarray(mask) > 0 for mask in masks.values()], -1).astype(np.uint8)
    digest = hashlib.sha256(np.packbits(frames).tobytes()).hexdigest()
    headers = _headers(source)
    entropy = [*(str(header.SOPInstanceUID) for header in headers), digest, weights, *masks, __version__]
    series, instance = (generate_uid(entropy_srcs=[*entropy, what]) for what in ("series", "instance"))
    try:
        made = _segmentation(headers, _in_order_of_frames(frames, source), list(masks), series, instance)
    except Exception as error:  # highdicom raises whatever its checks do
        said = (str(error).splitlines() or [""])[0][:200]
        raise UserError(
            f"{source.name}: no DICOM-SEG can be made of it ({type(error).__name__}: {said})"
        ) from error
    try:
        with tempfile.TemporaryDirectory(prefix=".p2w-", dir=path.parent) as beside:
            written = os.path.join(beside, path.name)
            made.save_as(written)
            os.replace(written, path)
    except OSError as error:
        raise UserError(f"{path}: not written ({error.strerror}); name another --out") from error


def _headers(source: ScanSource) -> list[Any]:
    """The data sets of the series' files without pixels, in the order of `source.files`."""
    with unpacked_files(source.files) as names:
        headers = [read_dataset(name, pixels=False) for name in names]
    for header in headers:
        for name in MAY_BE_EMPTY:
            if name not in header:
                setattr(header, name, "")
        for holder in _pixel_measures(header) if source.frames else [header]:
            if not getattr(holder, "SliceThickness", None):
                assert source.grid is not None
                # The step; highdicom asks for a number
                holder.SliceThickness = f"{source.grid.spacing[2]:.6g}"
    return headers


def _pixel_measures(header: Any) -> list[Any]:
    """The functional groups of a multi-frame file that say how large a pixel is, shared or of each frame."""
    names = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
    groups = [group for name in names for group in getattr(header, name, None) or []]
    return [one for group in groups for one in getattr(group, "PixelMeasuresSequence", None) or []]


def _in_order_of_frames(frames: NDArray[np.uint8], source: ScanSource) -> NDArray[np.uint8]:
    """Slices [z,y,x,k] as the files hold them: those of a multi-frame file in its order, others as they are."""
    if not source.frames:
        return frames
    found = np.empty_like(frames)
    for z, (_, frame) in enumerate(source.frames):
        found[frame] = frames[z]
    return found


def _segmentation(
    headers: list[Any], frames: NDArray[np.uint8], names: list[str], series: str, instance: str
) -> Any:
    """Make the object: binary, with a frame for every slice; its segments are by an algorithm, of the category tissue."""
    from highdicom import AlgorithmIdentificationSequence  # noqa: PLC0415  (an extra)
    from highdicom.seg import (  # noqa: PLC0415
        SegmentAlgorithmTypeValues,
        SegmentationTypeValues,
        SegmentDescription,
    )
    from highdicom.seg import Segmentation as DicomSegmentation  # noqa: PLC0415
    from pydicom.sr.codedict import codes  # noqa: PLC0415

    algorithm = AlgorithmIdentificationSequence("p2w", codes.DCM.ArtificialIntelligence, __version__)
    tissue = codes.SCT.Tissue
    segments = [
        SegmentDescription(
            segment_number=number,
            segment_label=name[:LABEL],
            segmented_property_category=tissue,
            segmented_property_type=tissue,
            algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, name in enumerate(names, 1)
    ]
    return DicomSegmentation(
        source_images=headers,
        pixel_array=frames,
        segmentation_type=SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        series_instance_uid=series,
        series_number=SERIES_NUMBER,
        sop_instance_uid=instance,
        instance_number=1,
        manufacturer="p2w",
        manufacturer_model_name="p2w predict",
        software_versions=__version__,
        device_serial_number="0",
        series_description="p2w predict",
        omit_empty_frames=False,
    )
