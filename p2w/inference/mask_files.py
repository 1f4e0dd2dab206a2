"""Files of predictions in a scan's own geometry: masks, label maps with their names, volumes of probabilities."""

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
