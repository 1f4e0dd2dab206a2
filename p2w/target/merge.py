"""The records of all cases into one manifest: the step that makes a folder of shards a data set. No torch."""

import os
from dataclasses import asdict
from typing import Any

import p2w
from p2w.data.grid import CANONICAL
from p2w.data.manifest import NAME, VERSION, dump, manifest_bytes, publish
from p2w.errors import UserError
from p2w.target import splits
from p2w.target.folder import TargetFolder
from p2w.target.record import FORM, SEGMENTATION, SPLITS
from p2w.target.tasks.protocol import Cases, Split, Task


def merge(task: Task, cases: Cases, split: Split, folder: TargetFolder) -> dict[str, Any]:
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
    of, fold_of = _places(split, patients)
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
        "schema": VERSION,
        "tool": f"p2w {p2w.__version__}",
        "task": task.name,
        "kind": task.kind,
        "format": form,
        "dtype": "int16",
        "shape": [channels + (task.kind == SEGMENTATION), *folder.settings.size],
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
    files |= {"report.json": dump(report, indent=1), NAME: manifest_bytes(rows, meta, FORM)}
    for name, data in files.items():
        publish(os.path.join(folder.root, name), data, folder.aside(name, "merge"))
    return meta


def _places(split: Split, patients: set[str]) -> tuple[dict[str, str], dict[str, int]]:
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
    """For stock WebDataset users."""
    return "".join(f"{name}\n" for name in sorted({r["shard"] for r in rows if r["split"] == split})).encode()
