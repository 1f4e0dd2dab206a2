"""Predictions of a fine-tuned network on whole scans: reading a scan, masks, tables of candidates or of the scan."""

import csv
import io
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from p2w.config import Amp
from p2w.ct.discover import ScanSource, SearchOptions, find_scans
from p2w.ct.orientation import BadScan, Grid, to_canonical
from p2w.ct.scan import percentile_range, read_image, read_scan, stored_grid, straightened
from p2w.errors import UserError
from p2w.inference.drawing import draw_preview
from p2w.inference.finetuned_model import FineTunedModel, load_ensemble
from p2w.inference.mask_files import (
    DICOM_SEG,
    ENDING,
    MASKS,
    SEG_ENDING,
    check_dicom_source,
    check_geometry,
    publish_text,
    write_classes,
    write_dicom_seg,
    write_volumes,
)
from p2w.inference.sliding import Cut, ScaledSlices, Windows, on_scan, slices
from p2w.progress import Progress
from p2w.tasks import crops, source_files
from p2w.tasks.bms import crop_in_range, intensity_range
from p2w.tasks.crops import CropBox
from p2w.train.optim import choose_precision
from p2w.world import World

USAGE = """Predictions of a fine-tuned network for a whole scan.

    p2w predict runs/lcs-p2w --scan scan.nii.gz --out liver.nii.gz                       a mask in the scan's own geometry
    p2w predict runs/lcs-p2w/trial-03 --scan DICOMFOLDER --out liver.mha --preview liver.png
    p2w predict runs/lcs-p2w --scan DICOMFOLDER --out liver.dcm --format dicom-seg       a DICOM segmentation of the series
    p2w predict runs/bms-p2w --scan P_flair.nii.gz P_t1.nii.gz --out tumour.nii.gz       one image a channel
    p2w predict runs/sts --scan scan.nii.gz --out labels.nii.gz --probabilities labels   a label map, labels.labels.json
    p2w predict runs/ncc-p2w --scan scan.mhd --candidates candidates.csv --out scored.csv    a probability a candidate
    p2w predict runs/age --scan scan.nii.gz --out age.csv                                a prediction for the whole scan

Of a run, the trial with the lowest validation loss; of a cross-validation (p2w finetune --folds), the mean over one of each
fold. Masks: windows of the training crops' size and spacing slide over the scan and overlap; what is more probable than
--threshold is 1. A mask has the scan's size, spacing, origin and direction. Of several classes it is a label map in the
values of the training masks, with FILE.labels.json beside it; of labels that may overlap, --out is a folder that gets a mask
of each.
Many scans, an ensemble, flips, probabilities: p2w predict --scans --help.
Candidates: columns x, y, z (or coordX, coordY, coordZ) in LPS mm; with a column series or seriesuid, the rows of this scan.
"""


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
    source: ScanSource  # of the first channel

    def crop(self, crop_box: CropBox) -> NDArray[np.int16]:
        """Cut a crop (C, D, H, W) of all channels, in stored values."""
        return np.stack([cut(crop_box) for cut in self.cuts])

    def crop_batch(self, crop_boxes: Sequence[CropBox]) -> NDArray[np.int16]:
        """Cut crops (B, C, D, H, W) of one size."""
        out = np.empty((len(crop_boxes), len(self.cuts), *crop_boxes[0].size), np.int16)
        for row, crop_box in zip(out, crop_boxes, strict=True):
            for channel, cut in zip(row, self.cuts, strict=True):
                channel[...] = cut(crop_box)
        return out

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
    return InferenceInput(
        name, sources[0].uid, tuple(cuts), first, grids[0], stored_grid(sources[0]), sources[0]
    )


def _source(path: Path, in_hu: bool, resample_tilt: bool = False) -> ScanSource:
    """The scan in a file, or in a folder of DICOM; of a network that was not trained on CT, MR or PET come first."""
    if not path.exists():
        raise UserError(f"{path}: no such file; name a scan with --scan")
    if not path.is_dir():
        source = source_files.as_source(path.name, str(path))
        return straightened(source) if resample_tilt else source
    for modality in ("CT",) if in_hu else ("MR", "PT", "CT"):
        search = SearchOptions(modality=modality, resample=resample_tilt)
        # There is no such folder
        found = find_scans([str(path)], str(path / ".out"), flag="--scan", options=search)
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
    return Windows.at_spacing(
        scan.voxels.shape, crops.spacing_zyx(scan.grid), model.size, model.spacing_mm, overlap
    )


def probabilities_for(scan: InferenceInput, model: FineTunedModel) -> NDArray[np.float32]:
    """An array for the probabilities of a scan: [z,y,x], or [k,z,y,x] of several classes."""
    classes = len(model.kind.layers())
    return np.empty((*([classes] if classes else []), *scan.voxels.shape), np.float32)


def mask_of(
    scan: InferenceInput,
    model: FineTunedModel,
    overlap: float,
    threshold: float,
    batch: int,
    dtype: torch.dtype | None,
    probabilities: NDArray[np.float32] | None = None,
    progress_bar: bool = True,
) -> NDArray[Any]:
    """What `TaskType.to_mask` makes of the predictions of all windows, on the canonical grid [z,y,x].

    The predictions themselves are written into `probabilities` (see `probabilities_for`), if it is given.
    `progress_bar`: whether to show one.
    """
    windows = windows_of(scan, model, overlap)
    device = next(model.network.parameters()).device
    levels, across = len(windows.starts(0)), len(windows.starts(1)) * len(windows.starts(2))
    progress = Progress(levels * math.ceil(across / batch), "batches of windows")
    scaled = ScaledSlices(scan.cuts, windows, model.scale, device) if windows.on_the_scans_grid else None

    def predict(crop_boxes: list[CropBox]) -> NDArray[np.float32]:
        if scaled is None:
            x = model.scale(torch.from_numpy(scan.crop_batch(crop_boxes)).to(device).float())
        else:
            x = scaled.batch(crop_boxes)
        found: NDArray[np.float32] = model.predictions_of_scaled(x, dtype).cpu().numpy()
        if progress_bar:
            progress.step(f"{len(windows):,} windows in all")
            progress.tick()
        return found

    mask: NDArray[Any] | None = None
    kind = model.kind
    with progress if progress_bar else nullcontext():
        for z, image in enumerate(on_scan(slices(windows, predict, batch), windows)):
            values = kind.to_mask(image, threshold)
            mask = np.zeros(windows.shape, values.dtype) if mask is None else mask
            mask[z] = values
            if probabilities is not None:
                probabilities[..., z, :, :] = image
    assert mask is not None
    return mask


def answers_of(scan: InferenceInput, model: FineTunedModel, dtype: torch.dtype | None) -> list[float]:
    """The predictions of a network of whole scans for one scan: a number for each of `TaskType.columns`."""
    device = next(model.network.parameters()).device
    box = CropBox.of_whole(model.size, scan.grid, model.spacing_mm)
    stack = torch.from_numpy(scan.crop(box)[None]).to(device)
    found: list[list[float]] = model.predictions(stack, dtype).cpu().tolist()
    return found[0]


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
        stack = torch.from_numpy(scan.crop_batch(crop_boxes)).to(device)
        found = model.predictions(stack, dtype).cpu().tolist()
        rows.writerows(
            (*at, *(f"{value:.6f}" for value in values)) for at, values in zip(some, found, strict=True)
        )
    return text.getvalue(), len(world)


@dataclass(frozen=True)
class PredictOptions:
    """Which network, which scan, and where the result is written."""

    run: tyro.conf.Positional[Path]
    """Run of p2w finetune, all folds of a cross-validation, a trial, or its model.safetensors."""
    scan: tuple[Path, ...]
    """MetaImage, NIfTI or NRRD file, or the folder of one DICOM series; several for a network of several channels."""
    out: Path
    """The mask (.nii.gz, .mha, …; .dcm with --format dicom-seg), the folder of masks, or the table (.csv)."""
    format: Literal["image", "dicom-seg"] = "image"
    """dicom-seg: of a DICOM series, write a DICOM segmentation object that refers to it."""
    candidates: Path | None = None
    """Table of candidates to classify."""
    probabilities: Path | None = None
    """Also write probabilities, float32: a file; of several classes a folder that gets a file of each."""
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
    model = load_ensemble([options.run], False, (), world.device)
    _check(options, model)
    scan = read_input(options.scan, model, options.assume_hu or model.assumes_hu, options.resample_tilt)
    kind = model.kind
    if options.format == DICOM_SEG:
        check_dicom_source(scan.source)
    elif kind.per_voxel:
        file = options.out / f"mask{ENDING}" if kind.separate_files else options.out
        check_geometry(file, scan.stored_grid)
    dtype = choose_precision(options.precision, world.device).apply().dtype
    if model.of_whole_scans:
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(("scan", *kind.columns(model.classes)))
        rows.writerow((scan.name, *(f"{value:.6f}" for value in answers_of(scan, model, dtype))))
        publish_text(options.out, text.getvalue())
        print(f"{options.out}: 1 scan, by {model.file}")
        return 0
    if not kind.per_voxel:
        assert options.candidates is not None
        table, count = scores_of(scan, model, options.candidates, options.batch, dtype)
        publish_text(options.out, table)
        print(f"{options.out}: {count} candidates")
        return 0
    found = None if options.probabilities is None else probabilities_for(scan, model)
    mask = mask_of(scan, model, options.overlap, options.threshold, options.batch, dtype, found)
    if options.format == DICOM_SEG:
        write_dicom_seg(options.out, segments_of(mask, scan, model), scan.source, "".join(model.weights()))
    else:
        write_classes(options.out, mask, scan, kind, ENDING)
    if options.probabilities is not None and found is not None:
        volumes = dict(zip(kind.layers(), found, strict=True)) if kind.layers() else {"": found}
        write_volumes(options.probabilities, volumes, scan, ENDING)
    for name, inside in kind.mask_classes(mask).items():
        count = int(np.count_nonzero(inside))
        millilitres = count * float(np.prod(scan.grid.spacing)) / 1000
        print(
            f"{options.out}: {f'{name}: ' if name else ''}{count:,} voxels, {millilitres:.1f} ml, by {model.file}"
        )
    if options.preview is not None:
        title = f"{scan.name}, {model.card['task']['task']}"
        draw_preview(options.preview, scan.voxels, mask, scan.grid, title, kind.mask_classes)
        print(f"{options.preview}: drawn")
    return 0


def segments_of(
    mask: NDArray[Any], scan: "InferenceInput", model: FineTunedModel
) -> dict[str, NDArray[np.bool_]]:
    """The segments of a canonical mask by name, in the stored order of the scan; they may overlap."""
    single = model.classes[-1] if model.classes else "foreground"
    return {name or single: scan.stored(inside) for name, inside in model.kind.mask_classes(mask).items()}


def check_windows(overlap: float, threshold: float, batch: int) -> None:
    """Raise UserError for values that no windows can be predicted with."""
    if not 0 <= overlap <= 0.9 or not 0 < threshold < 1 or batch < 1:
        raise UserError(
            f"--overlap {overlap} --threshold {threshold} --batch {batch}: from 0 to 0.9; between 0 and 1; at least 1"
        )


def _check(options: PredictOptions, model: FineTunedModel) -> None:
    """Raise UserError for options that do not go together."""
    if model.kind.per_voxel:
        _check_masks(options, model)
    else:
        _check_answers(options, model)
    check_windows(options.overlap, options.threshold, options.batch)
    if len(options.scan) != model.channels:
        names = model.card["task"].get("channel_names") or []
        raise UserError(
            f"--scan names {len(options.scan)} image(s), the network takes {model.channels}: {', '.join(names)}"
        )
    written = {"--out": options.out, "--preview": options.preview, "--probabilities": options.probabilities}
    for flag, path in written.items():
        if path is not None and not path.parent.is_dir():
            raise UserError(f"{flag} {path}: no folder {path.parent}; make it, or name another")


def _check_answers(options: PredictOptions, model: FineTunedModel) -> None:
    """`_check` for a network that classifies candidates or whole scans."""
    if options.format == DICOM_SEG:
        raise UserError(f"--format {DICOM_SEG}: {model.file} makes no mask; leave it out")
    is_table = options.out.name.lower().endswith(".csv")
    if model.of_whole_scans and (options.candidates is not None or not is_table):
        raise UserError(f"{model.file}: is of whole scans: leave --candidates out, and name --out FILE.csv")
    if not model.of_whole_scans and (options.candidates is None or not is_table):
        raise UserError(
            f"{model.file}: classifies candidates: name their table with --candidates, and --out FILE.csv"
        )
    for flag, path in (("--preview", options.preview), ("--probabilities", options.probabilities)):
        if path is not None:
            raise UserError(f"{flag} {path}: {model.file} makes no mask; leave it out")


def _check_masks(options: PredictOptions, model: FineTunedModel) -> None:
    """`_check` for a network that segments."""
    model.check_threshold(options.threshold, PredictOptions.threshold)
    name, layers = options.out.name.lower(), model.kind.layers()
    if options.format == DICOM_SEG:
        if options.candidates is not None or not name.endswith(SEG_ENDING):
            raise UserError(
                f"{model.file}: segments: leave --candidates out, and name --out FILE{SEG_ENDING}"
            )
    elif model.kind.separate_files:
        if options.candidates is not None or name.endswith((*MASKS, ".csv")) or options.out.is_file():
            raise UserError(
                f"{model.file}: its labels may overlap, each gets a mask: leave --candidates out, and name a folder with "
                "--out"
            )
    elif options.candidates is not None or not name.endswith(MASKS):
        raise UserError(
            f"{model.file}: segments: leave --candidates out, and name --out with one of {', '.join(MASKS)}"
        )
    into = options.probabilities
    if into is not None and bool(layers) == into.name.lower().endswith(MASKS):
        folder = f"a folder, which gets a file for each of {len(layers)} classes"
        rule = folder if layers else f"one of {', '.join(MASKS)}"
        raise UserError(f"--probabilities {into}: name {rule}")
