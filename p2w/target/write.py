"""One case into one shard: what a worker process does. No torch."""

import contextlib
import os
import shutil
import struct
from typing import Any

import numpy as np

from p2w.data.cut import unwritable
from p2w.data.folder import Share
from p2w.data.grid import BadScan
from p2w.data.manifest import dump, publish
from p2w.data.shard import ShardFile, open_shard
from p2w.errors import UserError
from p2w.target.folder import TargetFolder
from p2w.target.record import SCHEMA, SEGMENTATION
from p2w.target.tasks.protocol import Case, Cut, LeftOut, Sample, Task


def cut_case(case: Case, task: Task, folder: TargetFolder, share: Share) -> dict[str, Any]:
    """Read, cut, write; the record of it stands in the folder when this returns.

    A bad case is a record too. Raises UserError when the folder cannot be written (a full disk).
    """
    record: dict[str, Any] = {"uid": case.uid, "name": case.name}
    aside = folder.aside(case.uid, share.name)
    try:
        os.makedirs(aside, exist_ok=True)
        try:
            record |= _write(_read(case, task, folder), case, task, folder, aside)
        except BadScan as error:
            record |= {"bad": str(error)}
        if not record.get("shard"):  # of a time when the case was another
            with contextlib.suppress(FileNotFoundError):
                os.unlink(folder.shard(case.uid))
        publish(folder.sidecar(case.uid), dump(record), os.path.join(aside, "record.json"))
    except OSError as error:
        raise UserError(unwritable(folder.root, error)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return record


def _read(case: Case, task: Task, folder: TargetFolder) -> Cut:
    """Whatever a reader stumbles over in a file is a property of that file."""
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


def _write(cut: Cut, case: Case, task: Task, folder: TargetFolder, aside: str) -> dict[str, Any]:
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
            shard = shard or open_shard(path, sample.record.shape, SCHEMA, note)
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
        "foreground": _single(sample.record[-1].mean()) if task.kind == SEGMENTATION else 0.0,
    }
    for axis, first, centre, spacing in zip(
        "zyx", sample.first_voxel, sample.centre_mm, sample.spacing_mm, strict=True
    ):
        row |= {axis: round(first), f"centre_{axis}": float(centre), f"spacing_{axis}": _single(spacing)}
    return row


def _single(value: float) -> float:
    """As the manifest's float32 will hold it, so that shard, record and manifest agree to the bit."""
    return float(np.float32(value))
