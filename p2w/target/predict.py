"""What a fine-tuned network says of a whole scan.

    p2w predict runs/lcs-p2w --scan scan.nii.gz --out liver.nii.gz                       a mask in the scan's own geometry
    p2w predict runs/lcs-p2w/trial-03 --scan DICOMFOLDER --out liver.mha --preview liver.png
    p2w predict runs/bms-p2w --scan P_flair.nii.gz P_t1.nii.gz --out tumour.nii.gz       one image a channel
    p2w predict runs/ncc-p2w --scan scan.mhd --candidates candidates.csv --out scored.csv    a probability a candidate

Of a run, the trial with the lowest validation loss. Masks: windows of the training crops' size and spacing slide over the
scan and overlap; what is more probable than --threshold is 1. The mask has the scan's size, spacing, origin and direction.
Candidates: columns x, y, z (or coordX, coordY, coordZ) in LPS mm; with a column series or seriesuid, the rows of this scan.
"""

import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import SimpleITK as sitk
import tyro

from p2w.config import Amp
from p2w.data.grid import Grid
from p2w.errors import UserError
from p2w.target.fitted import Fitted, load_fitted
from p2w.target.looked_at import Subject, mask_of, read_subject, scores_of
from p2w.target.preview import draw
from p2w.train.optim import choose_precision
from p2w.world import World

MASKS = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd")


@dataclass(frozen=True)
class Options:
    """What to look at, and where the answer goes."""

    run: tyro.conf.Positional[Path]
    """Run of launch/transfer.py, a trial of it, or its model.safetensors."""
    scan: tuple[Path, ...]
    """MetaImage, NIfTI or NRRD file, or the folder of one DICOM series; several for a network of several channels."""
    out: Path
    """The mask (.nii.gz, .mha, …), or the table (.csv)."""
    candidates: Path | None = None
    """Table of places to classify."""
    preview: Path | None = None
    """Also draw the mask's outline over three slices of the scan: a PNG."""
    overlap: float = 0.5
    """Share of a window's edge that neighbouring windows have in common, from 0 to 0.9."""
    threshold: float = 0.5
    """Probability above which a voxel is 1."""
    batch: int = 4
    """Windows at a time."""
    amp: Annotated[Amp, tyro.conf.arg(name="amp")] = "fp32"
    """Precision of the network's arithmetic."""


def main(argv: list[str]) -> int:
    """Parse, read, predict, write."""
    options = tyro.cli(Options, args=argv, prog="p2w predict", description=__doc__)
    world = World.place()
    fitted = load_fitted(options.run, world.device)
    _check(options, fitted)
    subject = read_subject(options.scan, fitted)
    dtype = choose_precision(options.amp, world.device).apply().dtype
    if fitted.kind == "classification":
        assert options.candidates is not None
        table, count = scores_of(subject, fitted, options.candidates, options.batch, dtype)
        _publish_text(options.out, table)
        print(f"{options.out}: {count} candidates")
        return 0
    mask = mask_of(subject, fitted, options.overlap, options.threshold, options.batch, dtype)
    write_mask(options.out, subject.stored(mask), subject.stored_grid)
    millilitres = int(mask.sum()) * float(np.prod(subject.grid.spacing)) / 1000
    print(f"{options.out}: {int(mask.sum()):,} voxels, {millilitres:.1f} ml, by {fitted.file}")
    if options.preview is not None:
        draw(
            options.preview,
            subject.shown(),
            mask,
            subject.grid,
            f"{subject.name}, {fitted.card['task']['task']}",
        )
        print(f"{options.preview}: drawn")
    return 0


def _check(options: Options, fitted: Fitted) -> None:
    """Raise UserError for options that do not go together."""
    name = options.out.name.lower()
    if fitted.kind == "classification":
        if options.candidates is None or not name.endswith(".csv"):
            raise UserError(
                f"{fitted.file}: classifies candidates: name their table with --candidates, and --out FILE.csv"
            )
        if options.preview is not None:
            raise UserError(f"--preview {options.preview}: {fitted.file} makes no mask to draw; leave it out")
    elif options.candidates is not None or not name.endswith(MASKS):
        raise UserError(
            f"{fitted.file}: segments: leave --candidates out, and name --out with one of {', '.join(MASKS)}"
        )
    if not 0 <= options.overlap <= 0.9 or not 0 < options.threshold < 1 or options.batch < 1:
        raise UserError(
            f"--overlap {options.overlap} --threshold {options.threshold} --batch {options.batch}: from 0 to 0.9; between 0 "
            "and 1; at least 1"
        )
    if len(options.scan) != fitted.channels:
        names = fitted.card["task"].get("channel_names") or []
        raise UserError(
            f"--scan names {len(options.scan)} image(s), the network takes {fitted.channels}: {', '.join(names)}"
        )
    for flag, path in (("--out", options.out), ("--preview", options.preview)):
        if path is not None and not path.parent.is_dir():
            raise UserError(f"{flag} {path}: no folder {path.parent}; make it, or name another")


def write_mask(path: Path, mask: np.ndarray, grid: Grid) -> None:
    """Write uint8 [z,y,x] in the grid's geometry, beside and then renamed. Raises UserError where it cannot be written."""
    image = sitk.GetImageFromArray(mask)
    image.SetSpacing(grid.spacing)
    image.SetOrigin(grid.origin)
    image.SetDirection(grid.direction)
    try:
        with tempfile.TemporaryDirectory(prefix=".p2w-", dir=path.parent) as beside:
            sitk.WriteImage(image, os.path.join(beside, path.name), useCompression=True)
            for written in sorted(
                os.listdir(beside), key=lambda name: name == path.name
            ):  # voxels, then the header
                os.replace(os.path.join(beside, written), path.parent / written)
    except (OSError, RuntimeError) as error:
        said = str(error).strip().splitlines()[-1]
        raise UserError(f"{path}: not written ({said}); name another --out") from error


def _publish_text(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    try:
        beside.write_text(text)
        os.replace(beside, path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise UserError(f"{path}: not written ({error.strerror}); name another --out") from error


__all__ = ["Subject", "main", "write_mask"]
