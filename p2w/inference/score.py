"""Predicted masks of whole scans beside the true ones: Dice, IoU, surfaces and volumes by class, intervals by patient."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray

from p2w import stats
from p2w.ct.orientation import BadScan, Grid
from p2w.errors import UserError
from p2w.files import parse_json
from p2w.finetune import metrics
from p2w.inference.cohort import write_rows
from p2w.progress import Progress, say
from p2w.report.markup import several
from p2w.tasks import crops, source_files
from p2w.tasks.label_values import LabelValues, parse_label_names, present_values

USAGE = """How good are predicted masks of whole scans?

    p2w score OUT/masks --reference labelsTr --out scores.csv                          of p2w predict --scans
    p2w score OUT/masks --predictions '*_ct.nii.gz' --reference DIR --masks '*_seg.nii.gz' --out scores.csv
    p2w score FOLDER --reference DIR --label-names body=1 tumour=2 --out scores.csv     masks of any program

A prediction NAME.nii.gz is compared with the mask of that name below --reference; of labels that may overlap,
NAME/LABEL.nii.gz with NAME/LABEL.nii.gz. The classes are those of labels.json in the folder of the
predictions or above it, else of --label-names, else all that is not 0. One row a scan and class; means over patients with
95 % intervals are printed.
Empty masks: both empty, Dice, IoU and surface Dice are 1 and there is no distance; one empty, they are 0 and the distance is
the diagonal of the scan.
"""
NAMES = ("dice", "iou", "hd95_mm", "surface_dice")


@dataclass(frozen=True)
class ScoreOptions:
    """Which predictions, which true masks."""

    predicted: tyro.conf.Positional[Path]
    """Folder of predicted masks."""
    reference: Path
    """Folder of the true masks."""
    out: Path
    """Table to write: .csv."""
    masks: str = "*"
    """What true masks are called; the one * stands for what it stands for in the prediction's name."""
    predictions: str = "*"
    """What predictions are called; others are passed over."""
    label_names: tuple[str, ...] = ()
    """NAME=VALUE of each class, or NAME=1,2 of regions, where there is no labels.json."""
    patient: str = ""
    """Regular expression whose first group, found in a scan's name, is the patient; default: each scan is one."""
    tolerance_mm: float = metrics.TOLERANCE_MM
    """Of the surface Dice."""
    allow_missing: tyro.conf.FlagCreatePairsOff[bool] = False
    """Leave out true masks without a prediction, instead of refusing them; always said."""


@dataclass(frozen=True)
class ScanScore:
    """The measures of one class in one scan."""

    scan: str
    patient: str
    of: str
    values: tuple[float, ...]  # in the order of NAMES
    predicted_ml: float
    reference_ml: float


def main(argv: list[str]) -> int:
    """Parse, pair, measure, write."""
    options = tyro.cli(ScoreOptions, args=argv, prog="p2w score", description=USAGE)
    if options.out.suffix.lower() != ".csv" or not options.out.parent.is_dir():
        raise UserError(f"--out {options.out}: has to be FILE.csv in a folder that exists")
    if not 0 < options.tolerance_mm < math.inf:
        raise UserError(f"--tolerance-mm {options.tolerance_mm}: mm, above 0")
    labels = _labels(options)
    pairs = _pairs(options)
    scores: list[ScanScore] = []
    progress = Progress(len(pairs), "masks")
    with progress:
        for name, (ours, theirs) in pairs.items():
            scores += _score_pair(name, ours, theirs, labels, options)
            progress.step(name)
            progress.tick()
    head = ("scan", "patient", "class", *NAMES, "predicted_ml", "reference_ml")
    rows = [
        (s.scan, s.patient, s.of, *("" if math.isnan(v) else f"{v:.6f}" for v in s.values),
         f"{s.predicted_ml:.3f}", f"{s.reference_ml:.3f}") for s in scores
    ]  # fmt: skip
    write_rows(options.out, head, rows)
    for line in summary(scores):
        say(line)
    say(
        f"{options.out}: {len({s.scan for s in scores})} scans of {len({s.patient for s in scores})} patients"
    )
    return 0


def _labels(options: ScoreOptions) -> LabelValues | None:
    """The classes of label maps; None: all that is not 0, or a file a structure."""
    if options.label_names:
        return parse_label_names(options.label_names)
    for path in (options.predicted / "labels.json", options.predicted.parent / "labels.json"):
        if not path.is_file():
            continue
        try:
            tree: Mapping[str, Any] = parse_json(path.read_bytes(), {})
            if "labels" not in tree:
                return None  # structures, a file each
            named = {name: own if isinstance(own, list) else [own] for name, own in tree["labels"].items()}
            classes = {name: tuple(int(value) for value in own) for name, own in named.items() if own != [0]}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: no table of labels ({error}); name them with --label-names") from error
        return LabelValues(tuple(classes), tuple(classes.values())).check(str(path))
    return None


def _pairs(options: ScoreOptions) -> dict[str, tuple[str, str]]:
    """Name of each prediction -> its file and that of the true mask. Raises UserError where one has no partner."""
    for flag, folder in (("PREDICTED", options.predicted), ("--reference", options.reference)):
        if not folder.is_dir():
            raise UserError(f"{flag} {folder}: no such folder")
    ours = source_files.files_below(str(options.predicted), "")
    theirs = source_files.files_below(str(options.reference), "")
    named: dict[str, str] = {}
    for case, file in source_files.matching(options.masks, theirs).items():
        stem = source_files.file_stem(case)
        if stem in named:
            raise UserError(
                f"{options.reference}: {named[stem]} and {file} both are the mask {stem}: remove one"
            )
        named[stem] = theirs[file]
    pairs: dict[str, tuple[str, str]] = {}
    for case, name in source_files.matching(options.predictions, ours).items():
        stem, path = source_files.file_stem(case), ours[name]
        if stem not in named:
            raise UserError(
                f"{name}: {options.reference} holds no true mask of it: --masks PATTERN says what it is called, such as "
                "'*_seg.nii.gz'"
            )
        if stem in pairs:
            raise UserError(
                f"{options.predicted}: {pairs[stem][0]} and {name} both are the prediction {stem}: remove one"
            )
        if os.path.samefile(path, named[stem]):
            raise UserError(
                f"{name}: is the prediction and the true mask: tell them apart by --reference, --predictions and --masks"
            )
        pairs[stem] = (path, named[stem])
    if not pairs:
        raise UserError(f"{options.predicted}: holds no mask that is called {options.predictions!r}")
    alone = sorted(set(named) - set(pairs))
    if alone and not options.allow_missing:
        raise UserError(
            f"{options.reference}: {len(alone)} masks have no prediction, the first is {alone[0]}; predict them, or leave "
            "them out with --allow-missing"
        )
    if alone:
        say(f"{len(alone)} true masks without a prediction are left out, the first is {alone[0]}")
    return pairs


def _score_pair(
    name: str, ours: str, theirs: str, labels: LabelValues | None, options: ScoreOptions
) -> list[ScanScore]:
    """The measures of every class in one pair of files. Raises UserError for masks on different grids."""
    try:
        predicted, true = (
            source_files.read_labels(source_files.as_source(path, path)) for path in (ours, theirs)
        )
    except (BadScan, OSError) as error:
        raise UserError(f"{name}: {error}") from error
    for path, image in ((ours, predicted), (theirs, true)):
        if (low := image.values.min()) < 0:
            raise UserError(f"{path}: holds values from {low:g}: is it an image? masks hold none below 0")
    if said := source_files.apart(true.grid, predicted.grid):
        raise UserError(f"{ours}: {said.replace('its image', theirs)}")
    scan, _, structure = name.rpartition("/") if labels is None and "/" in name else (name, "", "")
    match = re.search(options.patient, name) if options.patient else None
    if options.patient and (match is None or not match.groups() or not match[1]):
        raise UserError(f"{name}: does not match --patient {options.patient!r}, or that has no group (…)")
    patient = match[1] if match else scan
    if labels is None:
        classes: Sequence[tuple[str, tuple[int, ...]]] = [(structure or "mask", ())]
    else:
        declared = {0, *(value for own in labels.values for value in own)}
        for path, image in ((ours, predicted), (theirs, true)):
            if stray := sorted(present_values(image.values) - declared):
                raise UserError(f"{path}: holds the value {stray[0]}, declared are {sorted(declared)}")
        classes = list(zip(labels.names, labels.values, strict=True))
    spacing = crops.spacing_zyx(true.grid)
    found = []
    for of, values in classes:
        own, right = (
            np.isin(image.values, values) if values else image.values != 0 for image in (predicted, true)
        )
        measured = measures(own, right, true.grid, options.tolerance_mm)
        litres = [int(np.count_nonzero(mask)) * float(spacing.prod()) / 1000 for mask in (own, right)]
        found.append(ScanScore(scan, patient, of, measured, *litres))
    return found


def measures(
    predicted: NDArray[np.bool_], true: NDArray[np.bool_], grid: Grid, tolerance_mm: float
) -> tuple[float, ...]:
    """The values of NAMES of two masks [z,y,x]; the distance is NaN where both are empty."""
    hit, either = int(np.count_nonzero(predicted & true)), int(np.count_nonzero(predicted | true))
    spacing = crops.spacing_zyx(grid)
    distance, near = metrics.surface_measures(predicted, true, spacing.tolist(), tolerance_mm)
    if math.isinf(distance):
        distance = float(np.linalg.norm(np.array(true.shape) * spacing))
    return (2 * hit / (either + hit) if either else 1.0), (hit / either if either else 1.0), distance, near


def summary(scores: Sequence[ScanScore]) -> list[str]:
    """A line for each class and measure: the mean over patients of the mean of their scans, and its 95 % interval."""
    lines = []
    for of in dict.fromkeys(score.of for score in scores):
        own = [score for score in scores if score.of == of]
        patients = [score.patient for score in own]
        for number, name in enumerate(NAMES):
            each = metrics.patient_means(np.array([score.values[number] for score in own]), patients)
            sound = each[np.isfinite(each)]
            if not len(sound):
                continue
            low, high = stats.mean_interval(sound)
            between = f"   [{low:.3f}, {high:.3f}]" if math.isfinite(low) else ""
            lines.append(
                f"{of:20} {name:14} {sound.mean():8.3f}{between}   ({several(len(sound), 'patient')})"
            )
    return lines
