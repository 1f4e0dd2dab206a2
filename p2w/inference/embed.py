"""Pooled features of a pretrained encoder for every scan of a cohort, and for every window of it.

Windows lie on a grid of the spacing that the encoder was trained at, evenly apart, and cover the scan. Of the coarsest
features in a window the mean, the largest value and the deviation are kept; those of a scan are taken over all voxels of
all its windows. A window whose voxels all have one value (air, after clipping) is left out.

    OUT.parquet               a row a scan: scan, name, patient, windows, left_out, shape_zyx, spacing_mm_zyx, mean, max, std
    OUT.windows.parquet       a row a window: scan, centre_mm_zyx (LPS), mean, max, std
    OUT.parts/                a file for each scan, from which both are put together; may be removed afterwards

Memory: the scan that is computed, the next one, which is read meanwhile, and `--batch` windows.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro
from numpy.typing import NDArray

from p2w import __version__
from p2w.config import Amp
from p2w.ct.orientation import BadScan
from p2w.ct.scan import Scan, read_scaled, read_scan
from p2w.errors import UserError
from p2w.files import FileLock, canonical_json, write_atomic
from p2w.inference.cohort import Cohort, CohortScan, ReadAhead, list_cohort
from p2w.inference.embeddings import KINDS, features_of, salt_check
from p2w.inference.encoder_input import EncoderInput, EncoderOptions, load_encoder_input
from p2w.inference.sliding import Windows
from p2w.progress import Progress, say
from p2w.shards.build_folder import JobShare
from p2w.tasks import crops
from p2w.tasks.crops import CropBox
from p2w.tasks.task import WINDOW_HU
from p2w.train.optim import choose_precision
from p2w.world import World

USAGE = """Pooled features of a pretrained encoder for every scan of a cohort, without training.

    p2w embed runs/paper --scans FOLDER --out embeddings.parquet          window, spacing and size as the card says
    p2w embed encoder.safetensors --scans scans.csv --out e.parquet       columns scan, and maybe name, patient
    p2w embed random --width 8 --size 32 64 64 --spacing 2.5 2 2 --window-hu -1000 1000 --scans FOLDER --out random.parquet
    p2w embed runs/paper --scans FOLDER --out e.parquet --shard-of 0/4    one of four jobs; the last one writes e.parquet

Stop and repeat: scans that are done are not computed again, unless their files changed. Scans that cannot be used are named
in one line each, and make the exit code 1. Scans and patients are named by hashes (`--salt` makes them secret); names are
written only with --keep-names, or where the table has a column `name`. Then: p2w probe, p2w neighbours.
"""
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class EmbedOptions:
    """Which encoder, which scans, and where the features are written."""

    encoder: tyro.conf.Positional[str]
    """Run of p2w train (its best checkpoint), RUN@STEP, checkpoint, exported file, fine-tuned run, a file of weights that
    others published, or `random`."""
    scans: str
    """Folder of scans, table.csv with a column `scan`, list.txt with one path a line, or one image file."""
    out: Path
    """The table of scans, .parquet."""
    encoder_input: Annotated[EncoderOptions, tyro.conf.arg(name="")] = EncoderOptions()  # noqa: RUF009 (frozen)
    overlap: float = 0.0
    """Share of a window's edge that neighbouring windows have in common at least, from 0 to 0.9."""
    batch: int = 8
    """Windows at a time, of several scans where one has fewer."""
    precision: Annotated[Amp, tyro.conf.arg(name="precision")] = "fp32"
    """Precision of the network's arithmetic."""
    shard_of: str = "0/1"
    """i/n: the i-th of n shares of the scans (i from 0), as one task of a job array."""
    groups: str = ""
    """Who the scans are of: a file.csv with columns scan, patient, or a regular expression whose first group matches the
    patient in a scan's path. Default: DICOM's PatientID, or the table's column patient."""
    salt: str = ""
    """Secret that is hashed with names and patients, so that nobody can try them out."""
    keep_names: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write the scans' paths too."""
    assume_hu: tyro.conf.FlagCreatePairsOff[bool] = False
    """Take values for HU without a test."""


def main(argv: list[str]) -> int:
    """Parse, compute the share, put the table together when all shares are there."""
    options = tyro.cli(EmbedOptions, args=argv, prog="p2w embed", description=USAGE)
    share = JobShare.parse(options.shard_of)
    if options.out.suffix != ".parquet" or not options.out.parent.is_dir():
        raise UserError(f"--out {options.out}: has to be a file.parquet in a folder that exists")
    if not 0 <= options.overlap <= 0.9 or options.batch < 1:
        raise UserError(f"--overlap {options.overlap} --batch {options.batch}: from 0 to 0.9; at least 1")
    world = World.from_env()
    precision = choose_precision(options.precision, world.device)
    model = load_encoder_input(options.encoder, options.encoder_input, world.device)
    parts = Parts(options.out, model, options, precision.name)
    cohort = list_cohort(
        options.scans, out=str(parts.folder), groups=options.groups, salt=options.salt, modality=model.modality,
        assume_hu=options.assume_hu,
    )  # fmt: skip
    parts.prepare()
    spacing = "the scan's" if model.spacing_mm is None else " x ".join(f"{mm:g}" for mm in model.spacing_mm)
    say(
        f"{len(cohort.scans)} scans; windows of {' x '.join(map(str, model.size))} voxels at {spacing} mm (z, y, x), "
        f"{model.window[0]:g} to {model.window[1]:g}; {model.channels} channels"
    )
    for name, why in cohort.bad:
        say(f"bad: {name}: {why}")
    bad = embed_scans(
        share.of(cohort.scans), model, parts, options.overlap, options.batch, precision.apply().dtype
    )
    sound = parts.merge(cohort)
    return 1 if bad or cohort.bad or not sound else 0


class Parts:
    """The folder with a file for each scan, and the tables that are put together from them."""

    def __init__(self, out: Path, model: EncoderInput, options: EmbedOptions, precision: str) -> None:
        """Nothing is read or written before `prepare`."""
        self.out, self.folder = out, out.with_suffix(".parts")
        self.windows_out = out.with_suffix(".windows.parquet")
        self.salt, self.keep_names = options.salt, options.keep_names
        self.settings = {
            **model.settings(),
            "overlap": options.overlap,
            "precision": precision,
            "assume_hu": options.assume_hu,
            "salt": salt_check(options.salt),
        }
        self.where = model.where
        vector = pa.list_(pa.float32(), model.channels)
        features = [(kind, vector) for kind in KINDS]
        triple = pa.list_(pa.float32(), 3)
        self.window_schema = pa.schema([("scan", pa.string()), ("centre_mm_zyx", triple), *features])
        self.scan_schema = pa.schema(
            [("scan", pa.string()), ("name", pa.string()), ("patient", pa.string()), ("windows", pa.int32()),
             ("left_out", pa.int32()), ("shape_zyx", pa.list_(pa.int32(), 3)), ("spacing_mm_zyx", triple), *features]
        )  # fmt: skip

    def prepare(self) -> None:
        """Make the folder. Raises UserError when it holds features of other settings, or cannot be written."""
        file = self.folder / "settings.json"
        try:
            self.folder.mkdir(exist_ok=True)
            if file.is_file():
                there = json.loads(file.read_bytes())
                other = [key for key, value in self.settings.items() if there.get(key) != value]
                if other:
                    raise UserError(
                        f"{self.folder}: holds features of other settings ({other[0]}: {there.get(other[0])!r}, now "
                        f"{self.settings[other[0]]!r}); name another --out, or remove that folder"
                    )
            write_atomic(file, canonical_json(self.settings, 2))
        except (OSError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.folder}: cannot be used ({error}); name another --out") from error

    def path(self, scan: CohortScan) -> Path:
        """The part of a scan."""
        return self.folder / f"{scan.identifier(self.salt)}.parquet"

    def read(self, scan: CohortScan) -> "tuple[pa.Table, dict[str, Any]] | None":
        """The part of a scan and its record; None where there is none that fits the settings and the scan's files."""
        try:
            table = pq.read_table(self.path(scan))
            record = json.loads(table.schema.metadata[b"p2w"])
            fits = record["settings"] == self.settings and record["state"] == scan.state()
        except (OSError, ValueError, LookupError, TypeError, pa.ArrowException, BadScan):
            return None
        return (table, record) if fits and table.schema.equals(self.window_schema) else None

    def write(self, scan: CohortScan, pending: "Pending") -> None:
        """Write the part of a scan."""
        identifier = scan.identifier(self.salt)
        stack = np.stack([one for one in pending.found if one is not None])
        columns = [pa.array([identifier] * len(stack)), _vectors(np.array(pending.centres, np.float32))]
        columns += [_vectors(stack[:, number]) for number in range(len(KINDS))]
        record = {
            "settings": self.settings, "state": pending.state, "left_out": pending.left_out,
            "shape_zyx": pending.shape, "spacing_mm_zyx": pending.spacing_mm,
        }  # fmt: skip
        table = pa.Table.from_arrays(columns, schema=self.window_schema)
        _write_table(self.path(scan), [table], _with_record(self.window_schema, record))
        self.path(scan).with_suffix(".bad").unlink(missing_ok=True)

    def mark_bad(self, scan: CohortScan) -> None:
        """Leave a note that a scan cannot be used, without its name, so that other shares do not wait for it."""
        self.path(scan).unlink(missing_ok=True)
        write_atomic(self.path(scan).with_suffix(".bad"), "cannot be used\n")

    def merge(self, cohort: Cohort) -> bool:
        """Write both tables when every scan has its part or is bad; else say how many are missing. False where
        some are bad."""
        lock = FileLock(self.folder / ".lock", "two shares may write the tables at once, with the same bytes")
        lock.acquire(wait=True)
        try:
            return self._merge(cohort)
        finally:
            lock.release()

    def _merge(self, cohort: Cohort) -> bool:
        bad = [scan for scan in cohort.scans if self.path(scan).with_suffix(".bad").exists()]
        bad_uids = {scan.uid for scan in bad}
        missing = [s for s in cohort.scans if s.uid not in bad_uids and not self.path(s).exists()]
        if missing:
            say(f"{self.out}: not yet written, {len(missing)} scans of other shares are missing")
            return True
        record = {
            **self.settings, "p2w": __version__, "where": self.where, "secret": bool(self.salt),
            "bad": len(bad) + len(cohort.bad),
        }  # fmt: skip
        rows: list[dict[str, Any]] = []

        def windows() -> Iterator[pa.Table]:
            for scan in cohort.scans:
                if scan.uid not in bad_uids:
                    part = self.read(scan)
                    if part is None:
                        raise UserError(
                            f"{self.path(scan)}: damaged, of other settings, or {scan.name} changed meanwhile; repeat the "
                            "command"
                        )
                    rows.append(self._row(scan, *part))
                    yield part[0]

        _write_table(self.windows_out, windows(), _with_record(self.window_schema, record))
        if not rows:
            self.windows_out.unlink()
            say(f"{self.out}: not written, not one scan could be used")
            return False
        table = pa.Table.from_pylist(rows, self.scan_schema)
        _write_table(self.out, [table], _with_record(self.scan_schema, record))
        patients = len({row["patient"] for row in rows} - {""})
        say(
            f"{self.out}: {len(rows)} scans"
            + (f" of {patients} patients" if patients else ", patients unknown (--groups)")
            + f", {sum(row['windows'] for row in rows):,} windows in {self.windows_out.name}"
            + (f"; {record['bad']} bad ones left out" if record["bad"] else "")
        )
        return not record["bad"]

    def _row(self, scan: CohortScan, table: pa.Table, record: dict[str, Any]) -> dict[str, Any]:
        kinds = [features_of(table, kind) for kind in KINDS]
        mean, largest, deviation = scan_features(*kinds)
        return {
            "scan": scan.identifier(self.salt), "name": scan.given_name or (scan.name if self.keep_names else ""),
            "patient": scan.patient, "windows": len(table), "left_out": record["left_out"],
            "shape_zyx": record["shape_zyx"], "spacing_mm_zyx": record["spacing_mm_zyx"],
            "mean": mean, "max": largest, "std": deviation,
        }  # fmt: skip


def scan_features(mean: Floats, largest: Floats, deviation: Floats) -> tuple[Floats, Floats, Floats]:
    """Features of windows (N, C) -> of their scan (C,): what they would be over all voxels of all windows together."""
    centre = mean.astype(np.float64).mean(0)
    variance = (deviation.astype(np.float64) ** 2).mean(0) + ((mean - centre) ** 2).mean(0)
    return centre.astype(np.float32), largest.max(0), np.sqrt(variance).astype(np.float32)


def _vectors(values: Floats) -> pa.Array:
    flat = np.ascontiguousarray(values, np.float32).ravel()
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), values.shape[1])


def _with_record(schema: pa.Schema, record: dict[str, Any]) -> pa.Schema:
    return schema.with_metadata({b"p2w": canonical_json(record)})


def _write_table(path: Path, tables: "Iterator[pa.Table] | Sequence[pa.Table]", schema: pa.Schema) -> None:
    """Write tables one after the other into one file, under another name first. Raises UserError where it cannot."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for table in tables:
                writer.write_table(table.cast(schema))
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: not written ({error.strerror or error}); name another --out") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@dataclass
class Pending:
    """A scan that is being computed, and the features (3, C) of its windows as they come."""

    scan: CohortScan
    state: str
    shape: list[int]
    spacing_mm: list[float]
    centres: list[list[float]] = field(default_factory=list)
    found: list[Floats | None] = field(default_factory=list)
    left_out: int = 0
    complete: bool = False
    """Whether all its windows were cut and handed over."""


Cut = tuple[Pending, int, NDArray[np.int16]]  # a scan, the number of a window, the window's stored values


@dataclass
class _WindowBatches:
    """Windows of scans, computed in full batches; the part of a scan is written once all its windows are."""

    model: EncoderInput
    parts: Parts
    batch: int
    dtype: torch.dtype | None
    progress: Progress
    waiting: list[Cut] = field(default_factory=list)
    windows: int = 0

    def add(self, cut: Cut) -> None:
        """Take a window; a full batch is computed."""
        self.waiting.append(cut)
        if len(self.waiting) == self.batch:
            self.compute()

    def compute(self) -> None:
        """Compute the windows that wait, in a batch that is filled up with zeros."""
        crops_in = np.zeros((self.batch, 1, *self.model.size), np.int16)
        for at, (_, _, crop) in enumerate(self.waiting):
            crops_in[at, 0] = crop
        device = next(self.model.encoder.parameters()).device
        pooled = self.model.pooled(torch.from_numpy(crops_in).to(device), self.dtype).numpy()
        for values, (pending, number, _) in zip(pooled, self.waiting, strict=False):
            if not np.isfinite(values).all():
                raise UserError(f"{pending.scan.name}: features are not finite; try --precision fp32")
            pending.found[number] = values
        for pending in {id(one[0]): one[0] for one in self.waiting}.values():
            self.finish(pending)
        self.waiting.clear()

    def finish(self, pending: Pending) -> None:
        """Write the part of a scan, if all its windows are computed."""
        if pending.complete and all(one is not None for one in pending.found):
            self.parts.write(pending.scan, pending)
            self.windows += len(pending.found)
            self.progress.step(f"{self.windows:,} windows")
            self.progress.tick()


def embed_scans(
    scans: Sequence[CohortScan],
    model: EncoderInput,
    parts: Parts,
    overlap: float,
    batch: int,
    dtype: torch.dtype | None,
) -> int:
    """Write the part of every scan that has none yet; return how many scans cannot be used.

    Files are read in one thread and windows are cut in another, while the network computes. Batches are full: windows of
    the next scan follow, and the last batch is filled up, so that features do not depend on which scans are done together.
    """
    todo = [scan for scan in scans if parts.read(scan) is None]
    if len(todo) < len(scans):
        say(f"{len(scans) - len(todo)} scans are done already")
    progress, bad = Progress(len(todo), "scans"), 0
    batches = _WindowBatches(model, parts, batch, dtype, progress)
    with (
        progress,
        ReadAhead(_read_scans(todo, model)) as reading,
        ReadAhead(_cut_scans(reading, model, overlap), 2 * batch) as cutting,
    ):
        for item in cutting:
            if isinstance(item, Pending):
                item.complete = True
                batches.finish(item)
            elif isinstance(item[1], str):
                say(f"bad: {item[0].name}: {item[1]}")
                parts.mark_bad(item[0])
                bad += 1
                progress.step("one bad")
            else:
                batches.add(item)
        if batches.waiting:
            batches.compute()
    return bad


# A scan, its voxels, and the state of its files; or None and why it is bad
Read = tuple[CohortScan, Scan | None, str]


def _read_scans(scans: Sequence[CohortScan], model: EncoderInput) -> Iterator[Read]:
    """The scans with their voxels clipped to the window, int16 [z,y,x]."""
    low, high = _stored_window(model)
    for cohort_scan in scans:
        try:
            state, source = cohort_scan.state(), cohort_scan.sources[0]
            scan = read_scan(source) if model.modality == "CT" else read_scaled(source, WINDOW_HU)[0]
            own = scan.voxels if scan.voxels.flags.writeable else None
            yield cohort_scan, replace(scan, voxels=np.clip(scan.voxels, low, high, out=own)), state
        except (BadScan, OSError) as error:
            yield cohort_scan, None, str(error)


def _cut_scans(read: "ReadAhead[Read]", model: EncoderInput, overlap: float) -> Iterator[Any]:
    """The windows of all scans as `Cut`, and after those of a scan its `Pending`; of a bad one (scan, why)."""
    low, _ = _stored_window(model)
    for cohort_scan, scan, said in read:
        if scan is None:
            yield cohort_scan, said
            continue
        spacing = crops.spacing_zyx(scan.grid)
        pending = Pending(cohort_scan, said, list(scan.voxels.shape), [float(mm) for mm in spacing])
        windows = Windows.at_spacing(scan.voxels.shape, spacing, model.size, model.spacing_mm, overlap)
        for start in windows.all_starts():
            box = windows.crop_box(start)
            crop = np.rint(box.cut(scan.voxels, low)).astype(np.int16)
            if crop.min() == crop.max():
                pending.left_out += 1
                continue
            pending.centres.append(_centre(box, scan))
            pending.found.append(None)
            yield pending, len(pending.found) - 1, crop
        if pending.found:
            yield pending
        else:
            yield cohort_scan, f"all of its {pending.left_out} windows have one single value"


def _stored_window(model: EncoderInput) -> tuple[int, int]:
    """The smallest and largest stored value inside the window, rounded outwards."""
    return int(np.floor(model.window[0])), int(np.ceil(model.window[1]))


def _centre(box: CropBox, scan: Scan) -> list[float]:
    """LPS mm z, y, x of the middle of a window."""
    middle = box.first + (np.array(box.size) - 1) / 2 * box.step
    return [float(mm) for mm in crops.to_world(scan.grid, middle)]
