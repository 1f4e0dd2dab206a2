"""Writing a target task's data set: its build folder, one case into one shard, all records into the manifest. No torch."""

import contextlib
import json
import os
import shutil
import struct
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

import p2w
from p2w.ct.orientation import CANONICAL, BadScan
from p2w.ct.scan import source_files
from p2w.errors import UserError
from p2w.files import canonical_json, write_published
from p2w.shards.build_folder import BuildFolder, JobShare
from p2w.shards.manifest import manifest_bytes
from p2w.shards.manifest_schema import MANIFEST_NAME, MANIFEST_VERSION
from p2w.shards.workers import unwritable_folder
from p2w.shards.writer import ShardFile, open_shard
from p2w.tasks import splits
from p2w.tasks.task import (
    SAMPLE_COLUMNS,
    SAMPLE_KINDS,
    SAMPLE_SCHEMA,
    SPLITS,
    TASK_FILE_META,
    Case,
    Cases,
    CutSamples,
    LeftOut,
    Sample,
    Split,
    Task,
)

ROW = {
    "key": str, "label": int, "scan_uid": str, "of": str, "z": int, "y": int, "x": int, "centre_z": float,
    "centre_y": float, "centre_x": float, "spacing_z": float, "spacing_y": float, "spacing_x": float,
    "foreground": float, "patient": str, "offset": int, "nbytes": int, "crc32c": int,
}  # fmt: skip
NAMED = {"uid": str, "name": str}
FINISHED = {
    "nbytes": int,
    "files": [TASK_FILE_META],
    "left_out": [str],
    "rows": [ROW],
    "shard": (None, {"nbytes": int, "crc32c": int}),
}


@dataclass(frozen=True)
class TargetSettings:
    """All that decides what the finished folder holds, besides the images themselves."""

    task: str
    options: dict[str, Any]
    size: tuple[int, int, int]  # z, y, x
    format: str
    tables: dict[str, str]  # tables that name samples, by the checksum of each

    def plain(self) -> dict[str, Any]:
        """The settings as JSON writes them."""
        told = {"schema": MANIFEST_VERSION, "task": self.task, "size_zyx": self.size, "format": self.format}
        options = {f"option {name}": value for name, value in self.options.items()}
        return json.loads(
            canonical_json(told | options | {f"table {name}": crc for name, crc in self.tables.items()})
        )


class TargetFolder(BuildFolder[TargetSettings]):
    """The build folder of a target set: its paths and small files."""

    form = (NAMED | {"bad": str}, NAMED | FINISHED)
    columns = pa.schema([SAMPLE_COLUMNS.field(name) for name in ROW])

    def nbytes(self, source: Case) -> int:
        """The size of all files of a case."""
        images = [path for _, one in source.files for path in source_files(one)]
        return sum(os.path.getsize(path) for path in [*images, *(path for _, path in source.notes)])


def cut_case(case: Case, task: Task, folder: TargetFolder, share: JobShare) -> dict[str, Any]:
    """Read a case, cut its samples, write its shard; its record is in the folder when this returns.

    A bad case is a record too. Raises UserError when the folder cannot be written (a full disk).
    """
    record: dict[str, Any] = {"uid": case.uid, "name": case.name}
    aside = folder.temporary_path(case.uid, share.name)
    try:
        os.makedirs(aside, exist_ok=True)
        try:
            record |= _write(_read(case, task, folder), case, task, folder, aside)
        except BadScan as error:
            record |= {"bad": str(error)}
        if not record.get("shard"):  # an older one, from before the case changed
            with contextlib.suppress(FileNotFoundError):
                os.unlink(folder.shard(case.uid))
        write_published(folder.sidecar(case.uid), canonical_json(record), os.path.join(aside, "record.json"))
    except OSError as error:
        raise UserError(unwritable_folder(folder.root, error)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return record


def _read(case: Case, task: Task, folder: TargetFolder) -> CutSamples:
    """Cut a case; whatever goes wrong in reading a file makes the case a bad one, and the others go on."""
    try:
        return task.cut(case, folder.settings.size)
    except OSError as error:
        raise BadScan(f"cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise BadScan("does not fit into memory: use fewer --workers, or a machine with more") from error
    except (ValueError, OverflowError, IndexError, KeyError, struct.error, RuntimeError) as error:
        if isinstance(error, BadScan):
            raise
        raise BadScan(f"cannot be read: {type(error).__name__}: {str(error).splitlines()[0]}") from error


def _write(cut: CutSamples, case: Case, task: Task, folder: TargetFolder, aside: str) -> dict[str, Any]:
    """The shard of a case, renamed into place, and all the manifest will say of it."""
    path = os.path.join(aside, os.path.basename(folder.shard(case.uid)))
    note = {"task": task.name, "window": list(task.window), "channels": list(task.channel_names)}
    note |= {"axis_order": "czyx", "orientation": "LPS", "spacing": "mm"}
    shard: ShardFile | None = None
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    try:
        for sample in cut.samples:
            if isinstance(sample, LeftOut):
                left_out.append(sample.why)
                continue
            shard = shard or open_shard(path, sample.record.shape, SAMPLE_COLUMNS, note)
            record = np.ascontiguousarray(sample.record, "<i2")
            rows.append(shard.add(_row(len(rows), case, sample, task), record))
        done = shard.close() if shard else None
    except BaseException:
        if shard:
            shard.abandon()
        raise
    if done:
        os.replace(path, folder.shard(case.uid))
    return {
        "nbytes": folder.nbytes(case),
        "files": cut.files,
        "left_out": left_out,
        "rows": rows,
        "shard": {"nbytes": done.nbytes, "crc32c": done.crc32c} if done else None,
    }


def _row(number: int, case: Case, sample: Sample, task: Task) -> dict[str, Any]:
    row: dict[str, Any] = {
        "key": f"{case.uid}/{number:05d}",
        "scan_uid": case.uid,
        "patient": case.patient,
        "of": sample.of,
        "label": sample.label,
        "foreground": _single(sample.record[-1].mean()) if SAMPLE_KINDS[task.kind].masks else 0.0,
    }
    for axis, first, centre, spacing in zip(
        "zyx", sample.first_voxel, sample.centre_mm, sample.spacing_mm, strict=True
    ):
        row |= {axis: round(first), f"centre_{axis}": float(centre), f"spacing_{axis}": _single(spacing)}
    return row


def _single(value: float) -> float:
    """The value as the manifest's float32 holds it, so that shard, record and manifest agree to the bit."""
    return float(np.float32(value))


def merge_cases(task: Task, cases: Cases, split: Split, folder: TargetFolder) -> dict[str, Any]:
    """Write everything that names all cases, the manifest last. Returns the manifest's metadata.

    Asks for the merge lock, and for a record of every case.
    """
    records = [(case, record) for case in cases.cases if (record := folder.record(case.uid)) is not None]
    good = [(case, record) for case, record in records if "bad" not in record]
    bad = [{"where": where, "why": why} for where, why in cases.bad]
    bad += [{"where": record["name"], "why": record["bad"]} for _, record in records if "bad" in record]
    bad.sort(key=lambda entry: entry["where"])
    form = folder.settings.format
    patients = {case.patient for case, record in good if record["rows"]}
    of, fold_of = _split_and_fold(split, patients)
    rows = [
        row
        | {"split": of[case.patient], "fold": fold_of.get(case.patient, -1), "shard": f"{case.uid}.{form}"}
        for case, record in good
        for row in record["rows"]
    ]
    channels = len(task.channel_names)
    shards = [{"name": f"{case.uid}.{form}", **record["shard"]} for case, record in good if record["shard"]]
    sources = [
        {"uid": case.uid, "patient": case.patient, "files": record["files"], "left_out": record["left_out"]}
        | {"samples": len(record["rows"])}
        for case, record in good
    ]
    meta = {
        "schema": MANIFEST_VERSION,
        "tool": f"p2w {p2w.__version__}",
        "task": task.name,
        "kind": task.kind,
        "format": form,
        "dtype": "int16",
        "shape": [channels + SAMPLE_KINDS[task.kind].masks, *folder.settings.size],
        "channels": channels,
        "channel_names": list(task.channel_names),
        "size_zyx": list(folder.settings.size),
        "spacing_mm": _spacing(rows),
        "window": list(task.window),
        "classes": list(task.classes),
        "axis_order": "czyx",
        "orientation": CANONICAL,
        "settings": asdict(task),  # type: ignore[call-overload]
        "tables": cases.tables,
        "split": {
            "rule": split.rule,
            "seed": split.seed,
            "folds": split.folds,
            "val_fraction": split.val_fraction,
            "samples": {name: sum(row["split"] == name for row in rows) for name in SPLITS},
            "scans": _scans(rows, split.folds),
        },
        "sources": sources,
        "shards": shards,
        "bad_scans": bad,
    }
    report = {"bad_cases": bad, "left_out": [{"where": where, "why": why} for where, why in cases.left_out]}
    report["left_out"] += [
        {"where": record["name"], "why": why} for _, record in good for why in record["left_out"]
    ]
    files = {f"{name}.txt": _shard_list(rows, name) for name in SPLITS} if not split.folds else {}
    files |= {
        "report.json": canonical_json(report, indent=1),
        MANIFEST_NAME: manifest_bytes(rows, meta, SAMPLE_SCHEMA),
    }
    for name, data in files.items():
        write_published(os.path.join(folder.root, name), data, folder.temporary_path(name, "merge"))
    return meta


def _split_and_fold(split: Split, patients: set[str]) -> tuple[dict[str, str], dict[str, int]]:
    """Split (of fold 0, where there are folds) and fold of every patient that has samples."""
    if not split.folds:
        return {patient: split.of[patient] for patient in patients}, {}
    fold_of = {patient: split.fold_of[patient] for patient in patients}
    empty = sorted(set(range(split.folds)) - set(fold_of.values()))
    if empty and patients:
        raise UserError(f"fold {empty[0]} of {split.folds} has no patient with samples: ask for fewer folds")
    return splits.split_of_fold(fold_of, 0, split.val_fraction, split.seed), fold_of


def _scans(rows: list[dict[str, Any]], folds: int) -> dict[str, list[str]]:
    """Scans by split, or by the fold they are tested on: what a pretraining set must not hold is here."""
    if folds:
        names = {str(i): {row["scan_uid"] for row in rows if row["fold"] == i} for i in range(folds)}
    else:
        names = {name: {row["scan_uid"] for row in rows if row["split"] == name} for name in SPLITS}
    return {name: sorted(uids) for name, uids in names.items()}


def _spacing(rows: list[dict[str, Any]]) -> list[list[float]] | None:
    """mm z, y, x: [smallest, largest] along each axis; None without samples."""
    if not rows:
        return None
    return [
        [min(row[f"spacing_{axis}"] for row in rows), max(row[f"spacing_{axis}"] for row in rows)]
        for axis in "zyx"
    ]


def _shard_list(rows: list[dict[str, Any]], split: str) -> bytes:
    """The list of a split's shards, for users of stock WebDataset."""
    return "".join(f"{name}\n" for name in sorted({r["shard"] for r in rows if r["split"] == split})).encode()
