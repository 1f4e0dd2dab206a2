"""Predictions of a fine-tuned network on whole scans: reading a scan, masks, tables of candidates, a preview."""

import csv
import io
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import SimpleITK as sitk
import torch
import tyro
from numpy.typing import NDArray

from p2w.config import Amp
from p2w.ct.discover import ScanSource, SearchOptions, find_scans
from p2w.ct.orientation import BadScan, Grid, to_canonical
from p2w.ct.percentiles import percentile_range
from p2w.ct.scan import read_image, read_scan, stored_grid, straightened
from p2w.errors import UserError
from p2w.inference.finetuned_model import FineTunedModel, load_finetuned
from p2w.inference.sliding import Windows, on_scan, slices
from p2w.progress import Progress
from p2w.tasks import crops, source_files
from p2w.tasks.bms import crop_in_range, intensity_range
from p2w.tasks.crops import CropBox
from p2w.train.optim import choose_precision
from p2w.world import World

USAGE = """What a fine-tuned network says of a whole scan.

    p2w predict runs/lcs-p2w --scan scan.nii.gz --out liver.nii.gz                       a mask in the scan's own geometry
    p2w predict runs/lcs-p2w/trial-03 --scan DICOMFOLDER --out liver.mha --preview liver.png
    p2w predict runs/bms-p2w --scan P_flair.nii.gz P_t1.nii.gz --out tumour.nii.gz       one image a channel
    p2w predict runs/ncc-p2w --scan scan.mhd --candidates candidates.csv --out scored.csv    a probability a candidate

Of a run, the trial with the lowest validation loss. Masks: windows of the training crops' size and spacing slide over the
scan and overlap; what is more probable than --threshold is 1. The mask has the scan's size, spacing, origin and direction.
Many scans, an ensemble, flips, probabilities: p2w predict --scans --help.
Candidates: columns x, y, z (or coordX, coordY, coordZ) in LPS mm; with a column series or seriesuid, the rows of this scan.
"""


Cut = Callable[[CropBox], NDArray[np.int16]]  # one channel's crop, in stored values
SCORED = (("x", "coordX"), ("y", "coordY"), ("z", "coordZ"), ("series", "seriesuid", "scan", ""))


@dataclass(frozen=True)
class InferenceInput:
    """A scan that was read: a function in `cuts` for each channel, a canonical `grid`, and that of the first file."""

    name: str
    uid: str
    cuts: tuple[Cut, ...]
    voxels: NDArray[Any]  # of the first channel, canonical [z,y,x]
    grid: Grid
    stored_grid: Grid

    def crop(self, crop_box: CropBox) -> NDArray[np.int16]:
        """Cut a crop (C, D, H, W) of all channels, in stored values."""
        return np.stack([cut(crop_box) for cut in self.cuts])

    def stored(self, mask: NDArray[Any]) -> NDArray[Any]:
        """A canonical volume in the order of the file."""
        _, order, flips = self.stored_grid.canonical()
        out = np.zeros(self.stored_grid.size[::-1], mask.dtype)
        to_canonical(out, order, flips)[...] = mask
        return out


def read_input(
    paths: Sequence[Path], model: FineTunedModel, assume_hu: bool = False, resample_tilt: bool = False
) -> InferenceInput:
    """Read the images of a scan, one a channel, on one grid. Raises UserError in one line for any that cannot be used.

    With `resample_tilt`, slices that lean or lie unevenly are resampled to a straight grid. That serves candidates, which
    are points in mm: a mask of such slices is refused, since no format holds it.
    """
    sources = [replace(_source(path, model.in_hu, resample_tilt), assume_hu=assume_hu) for path in paths]
    for path, source in zip(paths, sources, strict=True):
        if source.resampled and model.kind.per_voxel:
            raise UserError(
                f"{path}: {source.resampled}: no format of masks holds such slices, but equal steps along the normal "
                "alone; resample the scan to a straight grid first"
            )
    return read_sources(sources, [str(path) for path in paths], paths[0].name, model)


def read_sources(
    sources: Sequence[ScanSource], paths: Sequence[str], name: str, model: FineTunedModel
) -> InferenceInput:
    """Read the images `sources` of one scan, one a channel, on one grid; messages call them `paths`, and the scan `name`.

    Raises UserError as `read_input`.
    """
    cuts: list[Cut] = []
    grids: list[Grid] = []
    first: NDArray[Any] | None = None
    for path, source in zip(paths, sources, strict=True):
        try:
            voxels, grid, cut = _channel(source, model)
        except (BadScan, OSError) as error:
            raise UserError(f"{path}: {error}") from error
        cuts.append(cut)
        grids.append(grid)
        first = voxels if first is None else first
        if said := source_files.apart(grids[0], grid):
            raise UserError(f"{path}: {said.replace('its image', paths[0])}")
    assert first is not None
    return InferenceInput(name, sources[0].uid, tuple(cuts), first, grids[0], stored_grid(sources[0]))


def _source(path: Path, in_hu: bool, resample_tilt: bool = False) -> ScanSource:
    """The scan in a file, or in a folder of DICOM; of a network that was not trained on CT, MR or PET come first."""
    if not path.exists():
        raise UserError(f"{path}: no such file; name a scan with --scan")
    if not path.is_dir():
        source = source_files.as_source(path.name, str(path))
        return straightened(source) if resample_tilt else source
    for modality in ("CT",) if in_hu else ("MR", "PT", "CT"):
        search = SearchOptions(modality=modality, resample=resample_tilt)
        found = find_scans(
            [str(path)], str(path / ".out"), flag="--scan", options=search
        )  # there is no such folder
        if found.sources:
            break
    if len(found.sources) != 1:
        why = f"; {found.bad[0][0]}: {found.bad[0][1]}" if found.bad else ""
        raise UserError(f"{path}: {len(found.sources)} scans in it, one is needed{why}")
    return found.sources[0]


def _channel(source: ScanSource, model: FineTunedModel) -> tuple[NDArray[Any], Grid, Cut]:
    """Read one channel: its voxels, its grid, and a function that cuts crops as the task's data was prepared."""
    if model.in_hu:
        scan = read_scan(source)
        return scan.voxels, scan.grid, lambda crop_box: crops.crop_hu(scan.voxels, crop_box)
    image = read_image(source)
    low, high = percentile_range(image.values) if model.by_percentiles else intensity_range("image", image)
    return image.values, image.grid, lambda crop_box: crop_in_range(image.values, crop_box, low, high)


def windows_of(scan: InferenceInput, model: FineTunedModel, overlap: float) -> Windows:
    """The windows of a scan, at the spacing that the network was trained at."""
    z, y, x = (int(n) for n in scan.voxels.shape)
    step = (1.0, 1.0, 1.0)
    if model.spacing_mm is not None:
        ratio = np.array(model.spacing_mm) / crops.spacing_zyx(scan.grid)
        near = np.where(np.abs(ratio - 1) < 1e-3, 1.0, ratio)
        step = (float(near[0]), float(near[1]), float(near[2]))
    return Windows((z, y, x), model.size, step, overlap)


def mask_of(
    scan: InferenceInput,
    model: FineTunedModel,
    overlap: float,
    threshold: float,
    batch: int,
    dtype: torch.dtype | None,
    probabilities: NDArray[np.float32] | None = None,
    shown: bool = True,
) -> NDArray[np.uint8]:
    """What `TaskType.to_mask` makes of the predictions of all windows, on the canonical grid [z,y,x].

    The predictions themselves are written into `probabilities` [z,y,x], if it is given. `shown`: with a progress bar.
    """
    windows = windows_of(scan, model, overlap)
    device = next(model.network.parameters()).device
    levels, across = len(windows.starts(0)), len(windows.starts(1)) * len(windows.starts(2))
    progress = Progress(levels * math.ceil(across / batch), "batches of windows")

    def predict(crop_boxes: list[CropBox]) -> NDArray[np.float32]:
        stack = torch.from_numpy(np.stack([scan.crop(crop_box) for crop_box in crop_boxes]))
        found: NDArray[np.float32] = model.predictions(stack.to(device), dtype).cpu().numpy()
        if shown:
            progress.step(f"{len(windows):,} windows in all")
            progress.tick()
        return found

    mask = np.zeros(windows.shape, np.uint8)
    with progress if shown else nullcontext():
        for z, image in enumerate(on_scan(slices(windows, predict, batch), windows)):
            mask[z] = model.kind.to_mask(image, threshold)
            if probabilities is not None:
                probabilities[z] = image
    return mask


def scores_of(
    scan: InferenceInput, model: FineTunedModel, table: Path, batch: int, dtype: torch.dtype | None
) -> tuple[str, int]:
    """CSV x,y,z and the kind's columns, a row for each candidate of this scan in the table's order; and how many.

    Raises UserError for a candidate outside the scan, or none in it.
    """
    device = next(model.network.parameters()).device
    world: list[tuple[float, float, float]] = []
    for line, (x, y, z, series) in source_files.read_csv(str(table), SCORED):
        if series and series not in (scan.uid, source_files.file_stem(scan.name), scan.name):
            continue
        at = [
            source_files.parse_number(str(table), line, name, text)
            for name, text in zip("xyz", (x, y, z), strict=True)
        ]
        voxel = crops.to_voxel(scan.grid, np.array(at[::-1]))
        if ((voxel < -0.5) | (voxel > np.array(scan.voxels.shape) - 0.5)).any():
            where = ", ".join(f"{value:.1f}" for value in voxel[::-1])
            raise UserError(
                f"{table}, line {line}: voxel ({where}) is outside {scan.name}; x, y, z are LPS mm"
            )
        world.append((at[0], at[1], at[2]))
    if not world:
        raise UserError(f"{table}: names no candidate of {scan.name}")
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("x", "y", "z", *model.kind.columns(model.classes)))
    for start in range(0, len(world), batch):
        some = world[start : start + batch]
        centres = [crops.to_voxel(scan.grid, np.array(at[::-1])) for at in some]
        crop_boxes = [CropBox.around(one, model.size, scan.grid, model.spacing_mm) for one in centres]
        stack = torch.from_numpy(np.stack([scan.crop(crop_box) for crop_box in crop_boxes])).to(device)
        found = model.predictions(stack, dtype).cpu().tolist()
        rows.writerows(
            (*at, *(f"{value:.6f}" for value in values)) for at, values in zip(some, found, strict=True)
        )
    return text.getvalue(), len(world)


AXES = ("axial, patient's left on the right", "coronal", "sagittal, front on the left")


def draw_preview(path: Path, voxels: NDArray[Any], mask: NDArray[np.uint8], grid: Grid, title: str) -> None:
    """A PNG of the axial slice with most of the mask, and the coronal and sagittal slices through the middle of it.

    `voxels`, `mask`: canonical [z,y,x]; without any mask, the middle of the scan. Raises UserError where it cannot write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    where = _middle(mask)
    spacing = grid.spacing[::-1]
    figure = Figure(figsize=(13, 5), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, panel in enumerate(figure.subplots(1, 3)):
        index: list[Any] = [slice(None)] * 3
        index[axis] = where[axis]
        image, outline = voxels[tuple(index)], mask[tuple(index)]
        rows, columns = (number for number in range(3) if number != axis)
        low, high = np.percentile(voxels[::4, ::8, ::8], (1, 99.5))
        panel.imshow(
            image, cmap="gray", vmin=low, vmax=high, aspect=spacing[rows] / spacing[columns],
            origin="upper" if axis == 0 else "lower", interpolation="nearest",
        )  # fmt: skip
        if outline.any():
            panel.contour(outline, levels=[0.5], colors="#ff3b30", linewidths=1.2)
        panel.set_title(f"{AXES[axis]}: {'zyx'[axis]} = {where[axis]}", fontsize=9)
        panel.set_axis_off()
    millilitres = int(mask.sum()) * float(np.prod(spacing)) / 1000
    figure.suptitle(f"{title}: {millilitres:.1f} ml", fontsize=11)
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise UserError(f"{path}: not written ({error.strerror}); name another --preview") from error


def _middle(mask: NDArray[np.uint8]) -> tuple[int, int, int]:
    """The z with most of the mask, and y and x in the middle of the mask there."""
    areas = mask.sum((1, 2), dtype=np.int64)
    if not areas.any():
        return mask.shape[0] // 2, mask.shape[1] // 2, mask.shape[2] // 2
    z = int(areas.argmax())
    y, x = (int(np.median(at)) for at in np.nonzero(mask[z]))
    return z, y, x


NIFTI_SIZE = 32_767  # most voxels along an axis of NIfTI-1
MASKS = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd")


@dataclass(frozen=True)
class PredictOptions:
    """Which network, which scan, and where the result is written."""

    run: tyro.conf.Positional[Path]
    """Run of p2w finetune, a trial of it, or its model.safetensors."""
    scan: tuple[Path, ...]
    """MetaImage, NIfTI or NRRD file, or the folder of one DICOM series; several for a network of several channels."""
    out: Path
    """The mask (.nii.gz, .mha, …), or the table (.csv)."""
    candidates: Path | None = None
    """Table of candidates to classify."""
    preview: Path | None = None
    """Also draw the mask's outline over three slices of the scan: a PNG."""
    overlap: float = 0.5
    """Share of a window's edge that neighbouring windows have in common, from 0 to 0.9."""
    threshold: float = 0.5
    """Probability above which a voxel is 1."""
    batch: int = 4
    """Windows at a time."""
    precision: Annotated[Amp, tyro.conf.arg(name="precision")] = "fp32"
    """Precision of the network's arithmetic."""
    assume_hu: bool = False
    """Take the scan's values for HU without a test, as where the task's data was prepared so."""
    resample_tilt: bool = False
    """With --candidates: take a scan of tilted, uneven or sheared slices too, resampled to a straight grid. Masks of such
    slices fit into no format and are refused."""


def main(argv: list[str]) -> int:
    """Parse, read, predict, write."""
    options = tyro.cli(PredictOptions, args=argv, prog="p2w predict", description=USAGE)
    world = World.from_env()
    model = load_finetuned(options.run, world.device)
    _check(options, model)
    scan = read_input(options.scan, model, options.assume_hu or model.assumes_hu, options.resample_tilt)
    if model.kind.per_voxel:
        check_geometry(options.out, scan.stored_grid)
    dtype = choose_precision(options.precision, world.device).apply().dtype
    if not model.kind.per_voxel:
        assert options.candidates is not None
        table, count = scores_of(scan, model, options.candidates, options.batch, dtype)
        _publish_text(options.out, table)
        print(f"{options.out}: {count} candidates")
        return 0
    mask = mask_of(scan, model, options.overlap, options.threshold, options.batch, dtype)
    write_mask(options.out, scan.stored(mask), scan.stored_grid)
    millilitres = int(mask.sum()) * float(np.prod(scan.grid.spacing)) / 1000
    print(f"{options.out}: {int(mask.sum()):,} voxels, {millilitres:.1f} ml, by {model.file}")
    if options.preview is not None:
        draw_preview(
            options.preview,
            scan.voxels,
            mask,
            scan.grid,
            f"{scan.name}, {model.card['task']['task']}",
        )
        print(f"{options.preview}: drawn")
    return 0


def _check(options: PredictOptions, model: FineTunedModel) -> None:
    """Raise UserError for options that do not go together."""
    name = options.out.name.lower()
    if not model.kind.per_voxel:
        if options.candidates is None or not name.endswith(".csv"):
            raise UserError(
                f"{model.file}: classifies candidates: name their table with --candidates, and --out FILE.csv"
            )
        if options.preview is not None:
            raise UserError(f"--preview {options.preview}: {model.file} makes no mask to draw; leave it out")
    elif options.candidates is not None or not name.endswith(MASKS):
        raise UserError(
            f"{model.file}: segments: leave --candidates out, and name --out with one of {', '.join(MASKS)}"
        )
    if not 0 <= options.overlap <= 0.9 or not 0 < options.threshold < 1 or options.batch < 1:
        raise UserError(
            f"--overlap {options.overlap} --threshold {options.threshold} --batch {options.batch}: from 0 to 0.9; between 0 "
            "and 1; at least 1"
        )
    if len(options.scan) != model.channels:
        names = model.card["task"].get("channel_names") or []
        raise UserError(
            f"--scan names {len(options.scan)} image(s), the network takes {model.channels}: {', '.join(names)}"
        )
    for flag, path in (("--out", options.out), ("--preview", options.preview)):
        if path is not None and not path.parent.is_dir():
            raise UserError(f"{flag} {path}: no folder {path.parent}; make it, or name another")


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
