"""Worker processes that cut one scan into one shard each; they end with the process that started them."""

import contextlib
import errno
import multiprocessing
import os
import shutil
import signal
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait
from types import FrameType
from typing import Any

import numpy as np

from p2w.ct.discover import ScanSource
from p2w.ct.orientation import BadScan
from p2w.ct.scan import Scan, quiet_itk, read_scan
from p2w.errors import UserError
from p2w.files import canonical_json, write_published
from p2w.resources import usable_cores
from p2w.shards.build_folder import BuildFolder, JobShare, ShardingSettings
from p2w.shards.tiling import SubScan, cut_sub_scans
from p2w.shards.writer import ShardFile, open_shard


@contextmanager
def worker_pool(workers: int) -> Iterator[Callable[..., Any]]:
    """Start worker processes and give `submit(function, *arguments)`, which returns a future.

    The workers end at once when the block is left or this process ends, whatever the reason.
    """
    threads = max(1, usable_cores() // workers)
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, context, _start_worker, (threads,))

    def submit(*task: Any) -> Any:
        # A worker that starts here inherits that Ctrl-C is ignored, so that none prints a traceback while it imports.
        # The price: a Ctrl-C within these milliseconds is lost.
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return executor.submit(*task)
        finally:
            signal.signal(signal.SIGINT, interrupt)

    before = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        yield submit
        executor.shutdown()
    finally:
        signal.signal(signal.SIGTERM, before)
        executor.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()
        for child in multiprocessing.active_children():
            child.join(5)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    print("stopped: SIGTERM; finished scans are kept, the same command goes on", file=sys.stderr, flush=True)
    sys.exit(128 + number)


def _start_worker(threads: int) -> None:
    """Prepare a worker: it ignores Ctrl-C, which the parent handles, and ends when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quiet_itk(threads)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_with_parent, args=(parent.sentinel,), daemon=True).start()


def _exit_with_parent(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def cut_scan(source: ScanSource, folder: BuildFolder[ShardingSettings], share: JobShare) -> dict[str, Any]:
    """Read a scan, write its shard and its record into the folder, and return the record.

    A bad scan gets a record that says why. Raises UserError when the folder cannot be written (a full disk).
    """
    record: dict[str, Any] = {"uid": source.uid, "name": source.name, "subset": source.subset}
    if source.resampled:
        record["resampled"] = source.resampled
    temporary = folder.temporary_path(source.uid, share.name)
    try:
        os.makedirs(temporary, exist_ok=True)
        try:
            record |= _write(_read(source), source, folder, temporary)
        except BadScan as error:
            record |= {"bad": str(error)}
        if not record.get("shard"):  # a shard of an earlier version of this scan may exist
            with contextlib.suppress(FileNotFoundError):
                os.unlink(folder.shard(source.uid))
        write_published(
            folder.sidecar(source.uid), canonical_json(record), os.path.join(temporary, "record.json")
        )
    except OSError as error:
        raise UserError(unwritable_folder(folder.root, error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return record


def _read(source: ScanSource) -> Scan:
    """Read a scan. Raises BadScan for any error of a reader: a damaged file must not stop the others."""
    try:
        return read_scan(source)
    except OSError as error:
        raise BadScan(f"cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise BadScan("does not fit into memory: use fewer --workers, or a machine with more") from error
    except (ValueError, OverflowError, IndexError, KeyError, struct.error, RuntimeError) as error:
        if isinstance(error, BadScan):
            raise
        raise BadScan(f"cannot be read: {type(error).__name__}: {str(error).splitlines()[0]}") from error


def _write(
    scan: Scan, source: ScanSource, folder: BuildFolder[ShardingSettings], temporary: str
) -> dict[str, Any]:
    """Write the shard of a scan, rename it into place, and return the rest of the scan's record."""
    tiling, grid = folder.settings.tiling, scan.grid
    path = os.path.join(temporary, os.path.basename(folder.shard(scan.uid)))
    spacing = dict(zip(("spacing_x", "spacing_y", "spacing_z"), map(_single, grid.spacing), strict=True))
    shard: ShardFile | None = None
    rows, left_out = [], 0
    try:
        for sub in cut_sub_scans(scan, tiling):
            if sub.std_hu < tiling.min_std_hu:
                left_out += 1
                continue
            shard = shard or open_shard(path, tiling.shape)
            rows.append(shard.add(_row(scan.uid, source.subset, sub) | spacing, sub.voxels))
        done = shard.close() if shard else None
    except BaseException:
        if shard:
            shard.abandon()
        raise
    if done:
        os.replace(path, folder.shard(scan.uid))
    return {
        "nbytes": scan.nbytes,
        "checksum": f"crc32c:{scan.checksum:08x}",
        "shape": list(scan.voxels.shape),
        "spacing_mm": list(grid.spacing[::-1]),
        "origin_xyz_mm": list(grid.origin),
        "direction_xyz": list(grid.direction),
        "left_out": left_out,
        "rows": rows,
        "shard": {"nbytes": done.nbytes, "crc32c": done.crc32c} if done else None,
    }


def _row(uid: str, subset: int, sub: SubScan) -> dict[str, Any]:
    return {
        "key": f"{uid}/z{sub.z:04d}_y{sub.y:04d}_x{sub.x:04d}",
        "scan_uid": uid,
        "subset": subset,
        "z": sub.z,
        "y": sub.y,
        "x": sub.x,
        "mean_hu": _single(sub.mean_hu),
        "std_hu": _single(sub.std_hu),
    }


def _single(value: float) -> float:
    """Round to float32, as the manifest does, so that shard, record and manifest agree to the bit."""
    return float(np.float32(value))


def unwritable_folder(root: str, error: OSError) -> str:
    """One line for the user: the data set at `root` cannot be written, why, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = 0
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(root).free
        return (
            f"{root}: the disk is full ({free / 2**30:.1f} GiB free); finished scans are kept: make "
            "room and give the same command again"
        )
    return (
        f"{root}: cannot be written ({error.strerror or error}); finished scans are kept: give the "
        "same command again"
    )
