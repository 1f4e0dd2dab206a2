"""Predictions of a fine-tuned network, or of several, on many scans: masks, probabilities, overlays and a page.

    OUT/masks/UID.nii.gz            in the scan's own geometry; UID.dcm with --format dicom-seg; of labels that may overlap
                                    UID/NAME.nii.gz
    OUT/labels.json                 which value is which class, where there are several
    OUT/probabilities/UID.nii.gz    float32 (--probabilities); of several classes UID/NAME.nii.gz
    OUT/overlays/UID.png            the mask's outline over three slices
    OUT/records/UID.json            written last: what was predicted of which files, or why a scan is bad
    OUT/predictions.json            the settings
    OUT/volumes.csv, index.html     written when all scans have their records
    OUT/answers.csv                 for a network of whole scans, instead of masks and everything made of them

Reading the next scan and writing the last one go on while the network computes. Memory for a scan of N voxels: 2 N bytes for
each of these three, 5 N for masks, or 18 N with --probabilities (12 N more for each further class), and three times a
window's height of slices as float32, of each class, and once of each channel: for 1,000 slices of 512 x 512 about 3 GiB, or
6 GiB with --probabilities, beside what reading a file takes.
"""

import base64
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from p2w.config import Amp
from p2w.ct.orientation import BadScan
from p2w.errors import UserError
from p2w.files import FileLock, canonical_json, write_atomic
from p2w.inference import predict
from p2w.inference.cohort import Cohort, CohortScan, ReadAhead, list_cohort, write_rows
from p2w.inference.drawing import draw_preview
from p2w.inference.finetuned_model import EnsembleModel, load_ensemble
from p2w.inference.mask_files import (
    DICOM_SEG,
    MASKS,
    SEG_ENDING,
    check_dicom_source,
    check_geometry,
    write_dicom_seg,
    write_volumes,
)
from p2w.inference.predict import (
    InferenceInput,
    answers_of,
    mask_of,
    probabilities_for,
    read_sources,
    segments_of,
)
from p2w.progress import Progress, say
from p2w.report.markup import Markup, document, join_markup, several, table, tag
from p2w.shards.build_folder import JobShare
from p2w.train.optim import choose_precision
from p2w.world import World

USAGE = """Predictions of a fine-tuned network for many scans.

    p2w predict runs/lcs-p2w --scans FOLDER --out OUT                        every scan below a folder
    p2w predict runs/lcs-p2w --scans scans.csv --out OUT --probabilities     a table: columns scan (or one a channel), name
    p2w predict runs/fold0 --ensemble runs/fold1 runs/fold2 --flips x y --scans FOLDER --out OUT
    p2w predict runs/lcs-p2w --scans FOLDER --out OUT --shard-of 0/4         one of four jobs; the last one writes the page

Stop and repeat: scans that are done are passed over, unless their files changed. Scans that cannot be used are named in one
line each, the others go on, and the exit code is 1. OUT/index.html shows all. One scan alone: p2w predict --help.
"""
OVERLAYS_IN_PAGE = 60  # overlays in the page; of others it has the files' names


@dataclass(frozen=True)
class PredictCohortOptions:
    """Which networks, which scans, and where the results are written."""

    run: tyro.conf.Positional[Path]
    """Run of p2w finetune (its best trial), all folds of a cross-validation, a trial, or its model.safetensors; of a task of
    segmentation, or of whole scans."""
    scans: str
    """Folder of scans, table.csv, list.txt with one path a line, or one image file."""
    out: Path
    """Folder of the results, new or of the same settings."""
    ensemble: tuple[Path, ...] = ()
    """Further runs or trials of the same task, such as its other folds: probabilities are averaged."""
    all_trials: tyro.conf.FlagCreatePairsOff[bool] = False
    """Average all finished trials of each run, not the best alone."""
    flips: tuple[Literal["z", "y", "x"], ...] = ()
    """Axes along which windows are mirrored too, in all combinations: one axis doubles the time, three take eight times."""
    probabilities: tyro.conf.FlagCreatePairsOff[bool] = False
    """Also write the probabilities, float32."""
    ending: str = ".nii.gz"
    """Format of masks and probabilities: .nii.gz, .nii, .mha, .mhd or .nrrd."""
    format: Literal["image", "dicom-seg"] = "image"
    """dicom-seg: of DICOM series, write masks as DICOM segmentation objects that refer to them."""
    overlays: bool = True
    """Draw the mask's outline over three slices of each scan."""
    overlap: float = 0.5
    """Share of a window's edge that neighbouring windows have in common, from 0 to 0.9."""
    threshold: float = 0.5
    """Probability above which a voxel is 1."""
    batch: int = 4
    """Windows at a time."""
    precision: Annotated[Amp, tyro.conf.arg(name="precision")] = "fp32"
    """Precision of the network's arithmetic."""
    shard_of: str = "0/1"
    """i/n: the i-th of n shares of the scans (i from 0), as one task of a job array."""
    assume_hu: tyro.conf.FlagCreatePairsOff[bool] = False
    """Take the scans' values for HU without a test, as where the task's data was prepared so."""


def main(argv: list[str]) -> int:
    """One scan (`--scan`), or many (`--scans`)."""
    if not any(argument.partition("=")[0] == "--scans" for argument in argv):
        return predict.main(argv)
    if {"-h", "--help"} & set(argv):
        argv = ["--help"]
    options = tyro.cli(PredictCohortOptions, args=argv, prog="p2w predict", description=USAGE)
    share = JobShare.parse(options.shard_of)
    _check(options)
    world = World.from_env()
    model = load_ensemble([options.run, *options.ensemble], options.all_trials, options.flips, world.device)
    if not model.kind.per_voxel and not model.of_whole_scans:
        raise UserError(
            f"{model.file}: classifies candidates: --scans is for segmentation; name one scan with --scan"
        )
    if options.format == DICOM_SEG and not model.kind.per_voxel:
        raise UserError(f"--format {DICOM_SEG}: {model.file} makes no mask; leave it out")
    if options.probabilities and not model.kind.per_voxel:
        raise UserError("--probabilities: is for segmentation; answers.csv holds those of whole scans")
    model.check_threshold(options.threshold, PredictCohortOptions.threshold)
    precision = choose_precision(options.precision, world.device)
    names = tuple(model.card["task"].get("channel_names") or ())
    if model.channels > 1 and len(names) != model.channels:
        names = tuple(f"image{number}" for number in range(model.channels))
    modality = "CT" if model.in_hu else "MR"
    assume_hu = options.assume_hu or model.assumes_hu
    cohort = list_cohort(
        options.scans, out=str(options.out), channels=names, modality=modality, assume_hu=assume_hu
    )
    folder = (PredictionFolder if model.kind.per_voxel else AnswerFolder)(options, model, precision.name)
    folder.prepare()
    networks, passes = several(1 + len(model.others), "network"), several(model.passes, "pass", "passes")
    say(f"{several(len(cohort.scans), 'scan')}; {networks}, {passes} a window")
    for name, why in cohort.bad:
        say(f"bad: {name}: {why}")
    bad = predict_scans(share.of(cohort.scans), model, folder, options, precision.apply().dtype)
    sound = folder.finish(cohort)
    return 1 if bad or cohort.bad or not sound else 0


def _check(options: PredictCohortOptions) -> None:
    predict.check_windows(options.overlap, options.threshold, options.batch)
    if options.ending not in MASKS:
        raise UserError(f"--ending {options.ending}: one of {', '.join(MASKS)}")
    if not options.out.parent.is_dir() or (options.out.exists() and not options.out.is_dir()):
        raise UserError(f"--out {options.out}: has to be a folder, below one that exists")


class PredictionFolder:
    """The folder of the results: files and records of each scan, the settings, and the page."""

    def __init__(self, options: PredictCohortOptions, model: EnsembleModel, precision: str) -> None:
        """Nothing is read or written before `prepare`."""
        self.root, self.ending, self.task = options.out, options.ending, str(model.card["task"]["task"])
        self.model, self.type, self.dicom = model, model.kind, options.format == DICOM_SEG
        self.in_folders = {
            "masks": self.type.separate_files and not self.dicom,
            "probabilities": bool(self.type.layers()),
        }  # of each scan
        self.kinds = ["masks"] + ["probabilities"] * options.probabilities + ["overlays"] * options.overlays
        self.settings: dict[str, Any] = {
            "weights": model.weights(), "flips": sorted(model.flips), "overlap": options.overlap,
            "threshold": options.threshold, "precision": precision, "ending": options.ending,
        }  # fmt: skip
        if self.dicom:
            self.settings["format"] = DICOM_SEG
        if options.assume_hu or model.assumes_hu:  # folders of earlier versions lack it
            self.settings["assume_hu"] = True

    def prepare(self) -> None:
        """Make the folders. Raises UserError when predictions of other settings are there, or nothing can be written."""
        file = self.root / "predictions.json"
        try:
            for kind in (*self.kinds, "records"):
                (self.root / kind).mkdir(parents=True, exist_ok=True)
            if file.is_file():
                there = json.loads(file.read_bytes())
                keys = dict.fromkeys((*self.settings, "format", *({"assume_hu"} & set(there))))
                other = [key for key in keys if there.get(key) != self.settings.get(key)]
                if other:
                    raise UserError(
                        f"{self.root}: holds predictions of other settings ({other[0]}: {there.get(other[0])!r}, now "
                        f"{self.settings.get(other[0])!r}); name another --out"
                    )
            write_atomic(file, canonical_json(self.settings, 2))
            if legend := self.type.mask_legend():
                write_atomic(self.root / "labels.json", canonical_json(legend, 2))
        except (OSError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.root}: cannot be used ({error}); name another --out") from error

    def path(self, kind: str, scan: CohortScan) -> Path:
        """The file of a scan: of `masks`, `probabilities`, `overlays` or `records`."""
        others = {"overlays": ".png", "records": ".json"} | ({"masks": SEG_ENDING} if self.dicom else {})
        ending = "" if self.in_folders.get(kind) else others.get(kind, self.ending)
        return self.root / kind / f"{scan.uid}{ending}"

    def record(self, scan: CohortScan) -> dict[str, Any] | None:
        """The record of a scan, if it fits the settings and, for a scan that could be used, the scan's files; else None."""
        try:
            found = json.loads(self.path("records", scan).read_bytes())
            fits = found["settings"] == self.settings
            if "bad" not in found:
                fits &= found["state"] == scan.state()
                fits &= all(self.path(kind, scan).exists() for kind in self.kinds)
        except (OSError, ValueError, LookupError, TypeError, BadScan):
            return None
        return found if fits else None

    def write_record(self, scan: CohortScan, values: dict[str, Any]) -> None:
        """Record a scan, after its files."""
        record = {**values, "name": scan.name, "settings": self.settings}
        write_atomic(self.path("records", scan), canonical_json(record))

    def finish(self, cohort: Cohort) -> bool:
        """Write table and page when all scans have records, else say how many have none. False where some are bad."""
        lock = FileLock(
            self.root / "records" / ".lock", "two shares may write the page at once, with the same content"
        )
        lock.acquire(wait=True)
        try:
            records = [(scan, self.record(scan)) for scan in cohort.scans]
            missing = sum(record is None for _, record in records)
            if missing:
                say(f"{self.root}: {missing} scans of other shares are missing; the page comes with the last")
                return True
            found = [(scan, record) for scan, record in records if record is not None]
            good = [(scan, record) for scan, record in found if "bad" not in record]
            bad = [(scan.name, str(record["bad"])) for scan, record in found if "bad" in record]
            self.publish(good, [*cohort.bad, *bad])
        except OSError as error:
            raise UserError(f"{self.root}: cannot be written ({error}); repeat the command") from error
        finally:
            lock.release()
        say(f"{self.root}/{self.published}: {several(len(good), 'scan')}, {len(bad) + len(cohort.bad)} bad")
        return not bad

    published = "index.html"

    def publish(
        self, good: Sequence[tuple[CohortScan, dict[str, Any]]], bad: Sequence[tuple[str, str]]
    ) -> None:
        """Write the table of volumes, in all and of each class, and the page."""
        names = list(self.type.mask_classes(np.zeros(1, np.uint16)))
        names = names if names != [""] else []
        head = ("scan", "mask", "voxels", "ml", *(f"ml:{name}" for name in names))
        rows = []
        for s, record in good:
            each = [f"{record['classes'][name]:.3f}" for name in names]
            rows.append((s.name, self.path("masks", s).name, record["voxels"], f"{record['ml']:.3f}", *each))
        write_rows(self.root / "volumes.csv", head, rows)
        write_atomic(self.root / "index.html", self.page(good, bad))

    def compute(
        self,
        scan: CohortScan,
        image: InferenceInput,
        state: str,
        options: PredictCohortOptions,
        dtype: torch.dtype | None,
    ) -> Callable[[], None]:
        """Predict a scan; returns a function that writes its files and then its record."""
        found = probabilities_for(image, self.model) if options.probabilities else None
        mask = mask_of(
            image, self.model, options.overlap, options.threshold, options.batch, dtype, found, progress_bar=False,
        )  # fmt: skip
        return _writer(self, scan, state, image, mask, found, options.overlays)

    def page(self, good: Sequence[tuple[CohortScan, dict[str, Any]]], bad: Sequence[tuple[str, str]]) -> str:
        """An HTML page that needs no network: a table of volumes, what is bad, and overlays."""
        millilitres = [record["ml"] for _, record in good]
        middle = f", median {np.median(millilitres):.1f} ml" if good else ""
        empty = sum(record["voxels"] == 0 for _, record in good)
        rows = []
        for s, record in good:
            shape = " x ".join(map(str, record["shape_zyx"]))
            rows.append((s.name, shape, f"{record['voxels']:,}", f"{record['ml']:.1f}"))
        pictures = []
        for number, (scan, record) in enumerate(good if "overlays" in self.kinds else ()):
            caption = f"{scan.name}: {record['ml']:.1f} ml"
            if number >= OVERLAYS_IN_PAGE:
                break
            data = base64.b64encode(self.path("overlays", scan).read_bytes()).decode()
            image = tag("img", src=f"data:image/png;base64,{data}", alt=caption)
            pictures.append(tag("figure", image, tag("figcaption", caption)))
        more = len(good) - len(pictures) if pictures else 0
        sections = [
            tag("section", tag("h2", "Volumes"), tag("p", f"{several(len(good), 'scan')}{middle}; {empty} without a voxel"),
                table(("scan", "voxels z y x", "predicted voxels", "ml"), rows)),
            tag("section", tag("h2", "Not used"), table(("scan", "why"), bad)) if bad else "",
            tag("section", tag("h2", "Overlays"), tag("div", *pictures, class_="pictures"),
                tag("p", f"{more} more in overlays/." if more else "", class_="note")) if pictures else "",
        ]  # fmt: skip
        head = tag("header", tag("h1", f"{self.task}: predictions of {several(len(good), 'scan')}"))
        return document(f"{self.task}: predictions", Markup(join_markup([head, *sections])))


class AnswerFolder(PredictionFolder):
    """The folder of predictions for whole scans: a record of each, and answers.csv."""

    published = "answers.csv"

    def __init__(self, options: PredictCohortOptions, model: EnsembleModel, precision: str) -> None:
        super().__init__(options, model, precision)
        self.kinds = []

    def publish(
        self, good: Sequence[tuple[CohortScan, dict[str, Any]]], bad: Sequence[tuple[str, str]]
    ) -> None:
        """Write the table."""
        rows = [(scan.name, *(f"{value:.6f}" for value in record["answers"])) for scan, record in good]
        write_rows(self.root / self.published, ("scan", *self.type.columns(self.model.classes)), rows)

    def compute(
        self,
        scan: CohortScan,
        image: InferenceInput,
        state: str,
        options: PredictCohortOptions,
        dtype: torch.dtype | None,
    ) -> Callable[[], None]:
        """Predict a scan; returns a function that writes its record."""
        answers = answers_of(image, self.model, dtype)
        return lambda: self.write_record(scan, {"state": state, "answers": answers})


# A scan's voxels, and the state of its files; or None and why it is bad
Read = tuple[CohortScan, InferenceInput | None, str]


def _read_scans(
    scans: Sequence[CohortScan], model: EnsembleModel, folder: PredictionFolder
) -> Iterator[Read]:
    for scan in scans:
        try:
            state = scan.state()
            names = [source.name for source in scan.sources]
            image = read_sources(scan.sources, names, scan.name, model)
            if folder.dicom:
                check_dicom_source(image.source)
            if model.kind.per_voxel and (not folder.dicom or "probabilities" in folder.kinds):
                check_geometry(folder.root / f"mask{folder.ending}", image.stored_grid)
            yield scan, image, state
        except (UserError, OSError) as error:
            yield scan, None, str(error).removeprefix(f"{scan.name}: ")


def predict_scans(
    scans: Sequence[CohortScan],
    model: EnsembleModel,
    folder: PredictionFolder,
    options: PredictCohortOptions,
    dtype: torch.dtype | None,
) -> int:
    """Write files and record of every scan that has none yet; return how many scans cannot be used.

    One thread reads the next scan, another writes the last one.
    """
    todo = [scan for scan in scans if "bad" in (folder.record(scan) or {"bad": ""})]
    if len(todo) < len(scans):
        say(f"{len(scans) - len(todo)} scans are done already")
    progress, bad = Progress(len(todo), "scans"), 0
    writing: Future[None] | None = None
    with (
        progress,
        ThreadPoolExecutor(1, "p2w-write") as pool,
        ReadAhead(_read_scans(todo, model, folder)) as reading,
    ):
        for scan, image, said in reading:
            if image is None:
                say(f"bad: {scan.name}: {said}")
                folder.write_record(scan, {"bad": said})
                bad += 1
                progress.step("one bad")
                continue
            begin = time.monotonic()
            write = folder.compute(scan, image, said, options, dtype)
            if writing is not None:
                writing.result()  # so that no more than one scan waits to be written
            writing = pool.submit(write)
            del image, write
            progress.step(f"{time.monotonic() - begin:.1f} s of computing for the last")
            progress.tick()
        if writing is not None:
            writing.result()
    return bad


def _writer(
    folder: PredictionFolder,
    scan: CohortScan,
    state: str,
    image: InferenceInput,
    mask: NDArray[Any],
    found: NDArray[np.float32] | None,
    overlays: bool,
) -> Callable[[], None]:
    """A function that writes the files of a scan and then its record."""

    def write() -> None:
        kind, layers = folder.type, folder.type.layers()
        if folder.dicom:
            segments = segments_of(mask, image, folder.model)
            write_dicom_seg(
                folder.path("masks", scan), segments, image.source, "".join(folder.settings["weights"])
            )
        else:
            write_volumes(folder.path("masks", scan), kind.mask_files(mask), image, folder.ending)
        if found is not None:
            volumes = dict(zip(layers, found, strict=True)) if layers else {"": found}
            write_volumes(folder.path("probabilities", scan), volumes, image, folder.ending)
        count, voxel = int(np.count_nonzero(mask)), float(np.prod(image.grid.spacing)) / 1000
        millilitres = count * voxel
        classes = {name: np.count_nonzero(own) * voxel for name, own in kind.mask_classes(mask).items()}
        if overlays:
            title = f"{scan.name}, {folder.task}"
            png = folder.path("overlays", scan)
            draw_preview(png, image.voxels, mask, image.grid, title, kind.mask_classes)
        shape = [int(n) for n in mask.shape]
        record = {"state": state, "voxels": count, "ml": millilitres, "shape_zyx": shape, "classes": classes}
        folder.write_record(scan, record)

    return write
