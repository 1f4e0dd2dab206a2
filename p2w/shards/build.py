"""Build a data set: options of the commands, worker processes, one shard and record for each source, the manifest.

The same code builds sub-scans from scans (`scan_shards.ScanFolder`) and samples of a target task from its cases
(`p2w.tasks.prepare.TargetFolder`); a `BuildFolder` says what is cut, and how.
"""

import contextlib
import itertools
import multiprocessing
import os
import shutil
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for_futures
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import p2w
from p2w.ct.orientation import CANONICAL, BadScan
from p2w.ct.scan import quiet_itk
from p2w.errors import UserError, first_line
from p2w.files import canonical_json, write_published
from p2w.progress import Progress, say
from p2w.resources import free_disk, free_memory, usable_cores
from p2w.shards.build_folder import (
    BuildFolder,
    BuildForecast,
    CutSource,
    JobShare,
    Source,
    SourceListing,
    StoredRows,
)
from p2w.shards.manifest import LARGE_SHARDS, manifest_bytes
from p2w.shards.manifest_schema import MANIFEST_NAME, MANIFEST_VERSION
from p2w.shards.writer import ShardFile, dataset_card, may_write_card, open_shard

RECORDS_A_CHUNK = 1024  # records whose rows become one table
WORKER_BYTES = 2 << 30  # the most memory that a worker takes for a scan of 512 x 512 x 764 voxels


@dataclass(frozen=True)
class BuildOptions:
    """Options of all commands that build a data set. They change how it is built, and not what it holds."""

    workers: int = 0
    """Shards cut at the same time; 0: one for each core, as far as memory goes (2 GiB each)."""
    shard_of: str = "0/1"
    """i/n: cut the i-th of n shares of the scans or cases (i from 0), as one task of a job array."""
    merge: bool = False
    """Cut nothing; write the manifest over what all shares have cut."""
    dry_run: bool = False
    """Print what is there, what cutting it gives, its bytes and the free disk, and stop."""
    strict: bool = False
    """Stop at the first bad scan or case, with exit code 2."""

    def __post_init__(self) -> None:
        """Raise UserError for a share that does not exist or a negative number of workers."""
        JobShare.parse(self.shard_of)
        check_workers(self.workers)

    @property
    def share(self) -> JobShare:
        """The share of the sources that this process cuts."""
        return JobShare.parse(self.shard_of)


def check_workers(workers: int) -> None:
    """Raise UserError for a value of --workers below 0."""
    if workers < 0:
        raise UserError(f"--workers {workers}: 1 or more, or 0 for one per core")


def default_workers() -> int:
    """Number of workers: one for each core that this process may use, as far as free memory goes (2 GiB each)."""
    return max(1, min(usable_cores(), free_memory() // WORKER_BYTES))


def build_data_set(
    folder: BuildFolder[Any, Source],
    listing: SourceListing[Source],
    options: BuildOptions,
    report: dict[str, Any] | None = None,
) -> int:
    """Cut the sources of a listing into the folder; the last share to end writes the manifest.

    `report` has further entries of report.json. Returns the exit code: 0, or 1 when a source was bad. Raises UserError
    when it cannot go on.
    """
    for where, why in listing.left_out:
        say(f"left out: {where}: {why}")
    share = options.share
    if options.dry_run:
        return _dry_run(folder, listing, options)
    with folder.share_lock(share):
        folder.prepare(share)
        folder.refuse_other_sources(listing.sources, listing.bad)
        for where, why in listing.bad:
            _report_bad(folder, where, why, options.strict)
        bad = len(listing.bad)
        if not options.merge:
            bad += _cut(folder, listing, options)
        with folder.merge_lock():
            missing = unfinished_sources(listing, folder)
            if not missing:
                meta = merge_records(listing, folder, report)
                folder.remove_run_folder()
    if not missing:
        return _report_result(meta, folder)
    many = f"{len(missing)} of {len(listing.sources)} {folder.source_noun}s"
    where = f"{many} are not cut yet (the first: {missing[0]})"
    if options.merge:
        raise UserError(f"{folder.root}: {where}: run the same command without --merge, for every share")
    say(f"{folder.root}: share {share.name} is done; {where}; the last share to end writes the manifest")
    return 1 if bad else 0


def _cut(folder: BuildFolder[Any, Source], listing: SourceListing[Source], options: BuildOptions) -> int:
    """Cut the sources of this share that are not finished; the number of bad ones among them."""
    nouns = f"{folder.source_noun}s"
    mine = options.share.of(listing.sources)
    todo = [source for source in mine if folder.finished(source) is None]
    if not todo:
        say(f"{folder.root}: all {len(mine)} {nouns} are cut already")
        return 0
    records = [folder.record(source.uid) for source in todo]
    if any(record is None or "bad" not in record for record in records):
        folder.remove_manifest()  # to try a bad one again changes no shard
    forecast = folder.forecast(listing, todo, options.workers or default_workers())
    say(f"{len(todo)} {nouns} to cut ({len(mine) - len(todo)} are finished), {forecast.text}")
    _check_disk(forecast, folder)
    bad = parts = 0

    def finish(source: Source, record: dict[str, Any]) -> str:
        nonlocal bad, parts
        parts += len(record.get("rows", ()))
        if record.get("ends_build"):
            raise UserError(f"{source.name}: {record['bad']}")
        if "bad" in record:
            bad += 1
            _report_bad(folder, source.name, record["bad"], options.strict)
        elif remark := folder.remark(record):
            say(remark)
        return f"{parts:,} {folder.part_noun}s"

    cut_in_workers(todo, folder, options.share, options.workers, finish)
    return bad


def _dry_run(folder: BuildFolder[Any, Source], listing: SourceListing[Source], options: BuildOptions) -> int:
    mine = options.share.of(listing.sources)
    workers = min(options.workers or default_workers(), max(1, len(mine)))
    forecast = folder.forecast(listing, mine, workers)
    bad = sorted(listing.bad + forecast.bad)
    for where, why in bad:
        _report_bad(folder, where, why, strict=False)
    for line in forecast.lines:
        say(line)
    say(f"free there     {free_disk(folder.root) / 2**30:.2f} GiB")
    _check_disk(forecast, folder)
    return 1 if bad else 0


def _check_disk(forecast: BuildForecast, folder: BuildFolder[Any, Any]) -> None:
    """Raise UserError when the shards cannot fit on the folder's disk."""
    need, free = forecast.least_bytes, free_disk(folder.root)
    if free < need:
        raise UserError(
            f"{folder.root}: {free / 2**30:.2f} GiB free, the shards take at least {need / 2**30:.2f} GiB: make "
            f"room, name another --out, or cut fewer {folder.source_noun}s"
        )


def _report_bad(folder: BuildFolder[Any, Any], where: str, why: str, strict: bool) -> None:
    line = f"bad {folder.source_noun}: {where}: {why}"
    if strict:
        raise UserError(f"{line} (--strict stops at the first)")
    say(line)


def _report_result(meta: dict[str, Any], folder: BuildFolder[Any, Any]) -> int:
    """Print what the finished set holds; the exit code. Raises UserError for an empty set."""
    nouns, report = f"{folder.source_noun}s", os.path.join(folder.root, "report.json")
    if not meta["shards"]:
        folder.remove_manifest()
        raise UserError(
            f"{folder.root}: not one {folder.part_noun}: the {nouns} are all bad, or nothing in them is kept, see {report}"
        )
    for line in folder.summary(meta):
        say(line)
    if meta["bad_scans"]:
        say(f"{len(meta['bad_scans'])} bad {nouns}, see {report}")
    return 1 if meta["bad_scans"] else 0


def unfinished_sources(listing: SourceListing[Source], folder: BuildFolder[Any, Source]) -> list[str]:
    """Names of the sources that have no record in the folder yet, sound or bad.

    Each share of an array asks this when it ends. So no record is read as long as one is missing in the folder's listing.
    """
    there = folder.recorded_uids()
    if missing := [source.name for source in listing.sources if source.uid not in there]:
        return missing
    return [source.name for source in listing.sources if folder.record(source.uid) is None]


def merge_records(
    listing: SourceListing[Source], folder: BuildFolder[Any, Source], report: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write the files that list all sources, the manifest last. Returns the manifest's metadata.

    The caller holds the merge lock, and every source has a record (`unfinished_sources` is empty).
    """
    records = read_records(listing, folder)
    good = [record for record in records if "bad" not in record]
    bad = [{"where": where, "why": why} for where, why in listing.bad]
    bad += [{"where": record["name"], "why": record["bad"]} for record in records if "bad" in record]
    bad.sort(key=lambda entry: entry["where"])
    content, form = folder.content(listing, good), folder.settings.format
    meta = content.meta | {
        "schema": MANIFEST_VERSION,
        "tool": f"p2w {p2w.__version__}",
        "format": form,
        "dtype": "int16",
        "orientation": CANONICAL,
        "shards": [{"name": f"{one['uid']}.{form}", **one["shard"]} for one in good if one["shard"]],
        "bad_scans": bad,
    }
    rows: list[dict[str, Any]] | pa.Table
    if isinstance(content.rows, pa.Table):
        shard = pc.binary_join_element_wise(content.rows["scan_uid"], f".{form}", "")
        rows = content.rows.append_column("shard", shard)
    else:
        rows = [row | {"shard": f"{row['scan_uid']}.{form}"} for row in content.rows]
    left_out = [{"where": where, "why": why} for where, why in (*listing.left_out, *content.left_out)]
    entries = {f"bad_{folder.source_noun}s": bad, "left_out": left_out} | (report or {})
    files = {name: "".join(f"{one}\n" for one in shards).encode() for name, shards in content.lists.items()}
    if may_write_card(os.path.join(folder.root, "README.md")):
        files["README.md"] = dataset_card(meta, content.lists)
    files |= {
        "report.json": canonical_json(entries, indent=1),
        MANIFEST_NAME: manifest_bytes(rows, meta, folder.schema),
    }
    for name, data in files.items():
        write_published(os.path.join(folder.root, name), data, folder.temporary_path(name, "merge"))
    return meta


def read_records(listing: SourceListing[Source], folder: BuildFolder[Any, Source]) -> list[dict[str, Any]]:
    """The records of all sources that have one. In a large set their rows are `StoredRows`: objects would take 1 kB each."""
    records: list[dict[str, Any]] = []
    pending: list[dict[str, Any]] = []
    large = len(listing.sources) >= LARGE_SHARDS

    assert folder.schema.schema is not None  # ANY_SCHEMA is for reading only
    columns = pa.schema([one for one in folder.schema.schema if one.name not in ("split", "fold", "shard")])

    def store() -> None:
        rows = [row for record in pending for row in record["rows"]]
        chunk, start = pa.Table.from_pylist(rows, schema=columns), 0
        for record in pending:
            count = len(record["rows"])
            record["rows"], start = StoredRows(chunk, start, count), start + count
        pending.clear()

    for source in listing.sources:
        if (record := folder.record(source.uid)) is None:
            continue
        records.append(record)
        if large and "rows" in record:
            pending.append(record)
            if len(pending) == RECORDS_A_CHUNK:
                store()
    store()
    return records


def cut_source(source: Source, folder: BuildFolder[Any, Source], share: JobShare) -> dict[str, Any]:
    """Read a source, write its shard and its record into the folder, and return the record.

    A bad source gets a record that says why. Raises UserError when the folder cannot be written (a full disk).
    """
    record = folder.head(source)
    temporary = folder.temporary_path(source.uid, share.name)
    try:
        os.makedirs(temporary, exist_ok=True)
        try:
            with errors_of_readers():
                cut = folder.cut(source)
            record |= _write_shard(cut, source.uid, folder, temporary)
        except BadScan as error:
            record |= {"bad": str(error)} | ({"ends_build": True} if error.ends_build else {})
        if not record.get("shard"):  # a shard of an earlier version of this source may exist
            with contextlib.suppress(FileNotFoundError):
                os.unlink(folder.shard(source.uid))
        write_published(
            folder.sidecar(source.uid), canonical_json(record), os.path.join(temporary, "record.json")
        )
    except OSError as error:
        raise folder.unwritable_shard(error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return record


@contextlib.contextmanager
def errors_of_readers() -> Iterator[None]:
    """Raise BadScan for any error of a reader: a damaged file must not stop the others."""
    try:
        yield
    except BadScan:
        raise
    except OSError as error:
        raise BadScan(f"cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise BadScan("does not fit into memory: use fewer --workers, or a machine with more") from error
    except (ValueError, OverflowError, IndexError, KeyError, struct.error, RuntimeError) as error:
        said = first_line(error)
        raise BadScan(f"cannot be read: {type(error).__name__}: {said}") from error


def _write_shard(cut: CutSource, uid: str, folder: BuildFolder[Any, Any], temporary: str) -> dict[str, Any]:
    """Write the shard of a source, rename it into place, and return the rest of the source's record."""
    assert folder.schema.schema is not None  # ANY_SCHEMA is for reading only
    path = os.path.join(temporary, os.path.basename(folder.shard(uid)))
    shard: ShardFile | None = None
    rows: list[dict[str, Any]] = []
    try:
        for row, voxels in cut.parts:
            shard = shard or open_shard(
                path, voxels.shape, folder.schema.schema, folder.note, folder.sample_note, folder.compress
            )
            rows.append(shard.add(row, voxels))
        done = shard.close() if shard else None
    except BaseException:
        if shard:
            shard.abandon()
        raise
    if done:
        os.replace(path, folder.shard(uid))
    return cut.record | {
        "rows": rows,
        "shard": {"nbytes": done.nbytes, "crc32c": done.crc32c} if done else None,
    }


def single(value: float) -> float:
    """Round to float32, as the manifest does, so that shard, record and manifest agree to the bit."""
    return float(np.float32(value))


def cut_in_workers(
    sources: Sequence[Source],
    folder: BuildFolder[Any, Source],
    share: JobShare,
    workers: int,
    finish: Callable[[Source, dict[str, Any]], str],
) -> None:
    """Call `cut_source` for every source in worker processes, and show progress.

    `finish(source, record)` runs in this process as soon as a record is there, and returns the text that the progress
    shows. `workers` 0 means `default_workers`. Raises UserError when a worker process was killed.
    """
    nouns, many = f"{folder.source_noun}s", min(workers or default_workers(), len(sources))
    with Progress(len(sources), nouns) as progress, _worker_pool(many) as submit:
        left, waiting = iter(sources), dict[Future[dict[str, Any]], Source]()
        while True:
            # A few at a time: waiting for one of all would take time in proportion to their number, for every scan.
            for source in itertools.islice(left, max(0, 4 * many - len(waiting))):
                waiting[submit(cut_source, source, folder, share)] = source
            if not waiting:
                break
            done, _ = wait_for_futures(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in done:
                source = waiting.pop(future)
                try:
                    record = future.result()
                except BrokenProcessPool as error:
                    # Where all processes got a signal, ours may still arrive: its message says more.
                    time.sleep(0.2)
                    raise UserError(
                        f"a worker was killed while it cut {source.name} or one of the next {len(waiting)} {nouns} (most "
                        f"often: out of memory); finished {nouns} are kept: give the same command again with fewer --workers"
                    ) from error
                progress.step(finish(source, record))
            progress.tick()


@contextlib.contextmanager
def _worker_pool(workers: int) -> Iterator[Callable[..., "Future[dict[str, Any]]"]]:
    """Start worker processes and give `submit(function, *arguments)`, which returns a future.

    The workers end at once when the block is left or this process ends, whatever the reason.
    """
    threads = max(1, usable_cores() // workers)
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, context, _start_worker, (threads,))

    def submit(*task: Any) -> "Future[dict[str, Any]]":
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
    print("stopped: SIGTERM; finished shards are kept, the same command goes on", file=sys.stderr, flush=True)
    sys.exit(128 + number)


def _start_worker(threads: int) -> None:
    """Prepare a worker: it ignores Ctrl-C, which the parent handles, and ends when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quiet_itk(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None  # this runs in workers only

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
