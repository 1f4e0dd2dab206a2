"""Build a data set from scans: options of the sharding commands, forecast from headers, worker processes, manifest."""

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import tyro

import p2w
from p2w.ct.discover import ScanListing, ScanSource
from p2w.ct.orientation import CANONICAL, BadScan
from p2w.ct.scan import read_grid
from p2w.errors import UserError
from p2w.files import canonical_json, write_published
from p2w.progress import Progress, duration, say
from p2w.resources import free_disk, free_memory, usable_cores
from p2w.shards.build_folder import BuildFolder, JobShare, ShardingSettings, ShardSource
from p2w.shards.manifest import manifest_bytes
from p2w.shards.manifest_schema import MANIFEST_NAME, MANIFEST_VERSION
from p2w.shards.tiling import WINDOW_HU
from p2w.shards.workers import cut_scan, worker_pool

RULE = "by scan: the first of the scans ordered by sha256(seed:uid) are val, the others train"


def split_scans(uids: list[str], settings: ShardingSettings) -> set[str]:
    """The uids of the validation scans: always the same for the same scans, and at least one where there are two."""
    order = sorted(uids, key=lambda uid: hashlib.sha256(f"{settings.split_seed}:{uid}".encode()).digest())
    wanted = round(settings.val_fraction * len(uids))
    if settings.val_fraction > 0:
        wanted = min(max(wanted, 1), len(uids) - 1)
    return set(order[: max(0, wanted)])


def unfinished_scans(found: ScanListing, folder: BuildFolder) -> list[str]:
    """Names of the scans that have no record in the folder yet, sound or bad."""
    return [source.name for source in found.sources if folder.record(source.uid) is None]


def merge_records(found: ScanListing, folder: BuildFolder) -> dict[str, Any]:
    """Write the files that list all scans, the manifest last. Returns the manifest's metadata.

    The caller holds the merge lock, and every scan has a record (`unfinished_scans` is empty).
    """
    records = [record for source in found.sources if (record := folder.record(source.uid)) is not None]
    good = [record for record in records if "bad" not in record]
    bad = [{"where": where, "why": why} for where, why in found.bad]
    bad += [{"where": record["name"], "why": record["bad"]} for record in records if "bad" in record]
    bad.sort(key=lambda entry: entry["where"])
    form = folder.settings.format
    full = [record["uid"] for record in good if record["rows"]]
    val = split_scans(full, folder.settings)
    rows = [
        row | {"split": "val" if record["uid"] in val else "train", "shard": f"{record['uid']}.{form}"}
        for record in good
        for row in record["rows"]
    ]
    meta = _manifest_meta(good, bad, sorted(set(full) - val), sorted(val), folder.settings)
    report = {
        "bad_scans": bad,
        "left_out": [{"where": where, "why": why} for where, why in found.left_out],
        "files_seen": found.files,
        "files_that_are_no_images": found.not_images,
        "files_passed_over": dict(found.passed_over),
    }
    files = {
        "train.txt": "".join(f"{uid}.{form}\n" for uid in meta["split"]["train_scans"]).encode(),
        "val.txt": "".join(f"{uid}.{form}\n" for uid in meta["split"]["val_scans"]).encode(),
        "report.json": canonical_json(report, indent=1),
        MANIFEST_NAME: manifest_bytes(rows, meta),
    }
    for name, data in files.items():
        write_published(os.path.join(folder.root, name), data, folder.temporary_path(name, "merge"))
    return meta


def _manifest_meta(
    good: list[dict[str, Any]],
    bad: list[dict[str, str]],
    train: list[str],
    val: list[str],
    settings: ShardingSettings,
) -> dict[str, Any]:
    source_keys = (
        "uid",
        "subset",
        "nbytes",
        "checksum",
        "shape",
        "spacing_mm",
        "origin_xyz_mm",
        "direction_xyz",
    )
    return {
        "schema": MANIFEST_VERSION,
        "tool": f"p2w {p2w.__version__}",
        "format": settings.format,
        "shape": list(settings.tiling.shape),
        "dtype": "int16",
        "window_hu": list(WINDOW_HU),
        "axis_order": "zyx",
        "orientation": CANONICAL,
        "tiling": settings.tiling.to_meta() | {"left_out": sum(record["left_out"] for record in good)},
        "split": {
            "rule": RULE,
            "val_fraction": settings.val_fraction,
            "seed": settings.split_seed,
            "train_scans": train,
            "val_scans": val,
        },
        "sources": [
            {key: record[key] for key in source_keys}
            | ({"resampled": record["resampled"]} if record.get("resampled") else {})
            | {"file": record["name"], "sub_scans": len(record["rows"]), "left_out": record["left_out"]}
            for record in good
        ],
        "shards": [
            {"name": f"{record['uid']}.{settings.format}", **record["shard"]}
            for record in good
            if record["shard"]
        ],
        "bad_scans": bad,
    }


WORKER_BYTES = 2 << 30  # the most memory that a worker takes for a scan of 512 x 512 x 764 voxels
# Voxels per second and worker, for the estimate of a dry run: measured by bench/shard.py on one 2-core machine, with
# LUNA16's compressed scans on a local disk. A network disk may be slower.
VOXELS_PER_SECOND = 40e6


@dataclass(frozen=True)
class ShardingOptions:
    """Options of `preprocess/shard_luna.py` and `shard_scans.py`: what to cut, and how to go about it."""

    settings: Annotated[ShardingSettings, tyro.conf.arg(name="")] = ShardingSettings()  # noqa: RUF009 (frozen)
    workers: int = 0
    """Scans cut at the same time; 0: one for each core, as far as memory goes (2 GiB each)."""
    shard_of: str = "0/1"
    """i/n: cut the i-th of n shares of the scans (i from 0), as one task of a job array."""
    merge: bool = False
    """Cut nothing; write the manifest over what all shares have cut."""
    dry_run: bool = False
    """Read headers, print scans, sub-scans, bytes, free disk and time, and stop."""
    strict: bool = False
    """Stop at the first bad scan, with exit code 2."""

    def __post_init__(self) -> None:
        """Raise UserError for a share that does not exist or a negative number of workers."""
        JobShare.parse(self.shard_of)
        check_workers(self.workers)

    @property
    def share(self) -> JobShare:
        """The share of the scans that this process cuts."""
        return JobShare.parse(self.shard_of)


@dataclass(frozen=True)
class ShardingForecast:
    """Totals over the scans of one share, read from their headers alone."""

    sub_scans: int
    voxels: int
    source_bytes: int
    bad: list[tuple[str, str]]  # name of the scan, what is wrong
    sound: int  # number of scans

    def out_bytes(self, settings: ShardingSettings) -> int:
        """Upper bound of the shards' size in bytes."""
        return self.sub_scans * (2 * int(np.prod(settings.tiling.shape)) + 4096)


def build_shards(found: ScanListing, out: str, options: ShardingOptions) -> int:
    """Cut the scans of a listing into the folder `out`; the last share to end writes the manifest.

    Returns the exit code: 0, or 1 when a scan was bad. Raises UserError when it cannot go on.
    """
    for where, why in found.left_out:
        say(f"left out: {where}: {why}")
    folder, share = BuildFolder(out, options.settings), options.share
    mine = share.of(found.sources)
    if options.dry_run:
        return _dry_run(found, mine, out, options)
    with folder.share_lock(share):
        folder.prepare(share)
        folder.refuse_other_scans(found.sources, found.bad)
        for where, why in found.bad:
            _report_bad(where, why, options.strict)
        bad = len(found.bad)
        if not options.merge:
            bad += _cut(mine, folder, options)
        with folder.merge_lock():
            missing = unfinished_scans(found, folder)
            if not missing:
                meta = merge_records(found, folder)
                folder.remove_run_folder()
    _say_files(found)
    if not missing:
        return _report_result(meta, folder)
    where = f"{len(missing)} of {len(found.sources)} scans are not cut yet (the first: {missing[0]})"
    if options.merge:
        raise UserError(f"{out}: {where}: run the same command without --merge, for every share")
    say(f"{out}: share {share.name} is done; {where}; the last share to end writes the manifest")
    return 1 if bad else 0


def _cut(mine: list[ScanSource], folder: BuildFolder[ShardingSettings], options: ShardingOptions) -> int:
    """Cut the scans of this share that are not finished; the number of bad ones among them."""
    todo = [source for source in mine if folder.finished(source) is None]
    if not todo:
        say(f"{folder.root}: all {len(mine)} scans are cut already")
        return 0
    records = [folder.record(source.uid) for source in todo]
    if any(
        record is None or "bad" not in record for record in records
    ):  # a bad scan tried again changes no shard
        folder.remove_manifest()
    forecast = forecast_shards(todo, folder.settings)
    say(
        f"{len(todo)} scans to cut ({len(mine) - len(todo)} are finished), {forecast.sub_scans:,} sub-scans, "
        f"{forecast.out_bytes(folder.settings) / 2**30:.1f} GiB"
    )
    _check_disk(forecast, folder.root, folder.settings)
    bad = sub_scans = 0

    def finish(source: ScanSource, record: dict[str, Any]) -> str:
        nonlocal bad, sub_scans
        sub_scans += len(record.get("rows", ()))
        if "bad" in record:
            bad += 1
            _report_bad(source.name, record["bad"], options.strict)
        return f"{sub_scans:,} sub-scans"

    cut_in_workers(
        cut_scan, [(source, folder, options.share) for source in todo], "scans", options.workers, finish
    )
    return bad


def cut_in_workers(
    cut: Callable[..., dict[str, Any]],
    jobs: Sequence[tuple[Any, ...]],
    unit: str,
    workers: int,
    finish: Callable[[Any, dict[str, Any]], str],
) -> None:
    """Call `cut(*job)` for every job in worker processes, and show progress.

    A job starts with its source, which has a `name`. `finish(source, record)` runs in this process as soon as a record is
    there, and returns the text that the progress shows. `unit` names what is counted, such as "scans"; `workers` 0 means
    `default_workers`. Raises UserError when a worker process was killed.
    """
    progress = Progress(len(jobs), unit)
    with progress, worker_pool(min(workers or default_workers(), len(jobs))) as submit:
        waiting = {submit(cut, *job): job[0] for job in jobs}
        while waiting:
            done, _ = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in done:
                source = waiting.pop(future)
                record = result_of_worker(future, source, waiting)
                progress.step(finish(source, record))
            progress.tick()


def result_of_worker(
    future: "Future[dict[str, Any]]", source: ShardSource, waiting: dict[Any, Any]
) -> dict[str, Any]:
    """The record of one source. Raises UserError when a worker process was killed."""
    try:
        return future.result()
    except BrokenProcessPool as error:
        time.sleep(0.2)  # where all processes got a signal, ours may still arrive: its message says more
        raise UserError(
            f"a worker was killed while it cut {source.name} or one of the next {len(waiting)} scans (most "
            "often: out of memory); finished scans are kept: give the same command again with fewer --workers"
        ) from error


def forecast_shards(sources: list[ScanSource], settings: ShardingSettings) -> ShardingForecast:
    """Totals over these scans; only their headers are read."""
    sub_scans = voxels = nbytes = sound = 0
    bad = []
    for source in sources:
        try:
            grid, size = read_grid(source)
            settings.tiling.check_size(grid.size[::-1])
        except (BadScan, OSError, ValueError) as error:
            bad.append((source.name, str(error)))
            continue
        sub_scans += settings.tiling.count(grid.size[::-1])
        voxels += int(np.prod(grid.size))
        nbytes += size
        sound += 1
    return ShardingForecast(sub_scans, voxels, nbytes, bad, sound)


def _dry_run(found: ScanListing, mine: list[ScanSource], out: str, options: ShardingOptions) -> int:
    forecast = forecast_shards(mine, options.settings)
    bad = sorted(found.bad + forecast.bad)
    for where, why in bad:
        say(f"bad scan: {where}: {why}")
    workers = min(options.workers or default_workers(), max(1, len(mine)))
    tiling = options.settings.tiling
    say(
        f"scans          {forecast.sound:,}, besides {len(bad)} bad ones; {forecast.source_bytes / 2**30:.2f} GiB to read"
    )
    say(
        f"sub-scans      {forecast.sub_scans:,} of {' x '.join(map(str, tiling.shape))} voxels (z, y, x), "
        f"z margin {tiling.z_margin}"
    )
    if tiling.min_std_hu:
        say(
            f"               before leaving out those of a standard deviation below {tiling.min_std_hu:g} HU "
            "(chest CT: 1 in 5)"
        )
    say(f"to write       at most {forecast.out_bytes(options.settings) / 2**30:.2f} GiB into {out}")
    say(f"free there     {free_disk(out) / 2**30:.2f} GiB")
    seconds = forecast.voxels / VOXELS_PER_SECOND / workers
    say(
        f"time           about {duration(seconds)} with {workers} workers, at {VOXELS_PER_SECOND / 1e6:.0f} "
        "million voxels a second each (measured on another machine with a local disk; yours may differ by a "
        "factor of 3)"
    )
    _check_disk(forecast, out, options.settings)
    _say_files(found)
    return 1 if bad else 0


def _say_files(found: ScanListing) -> None:
    """Account for every file that was seen; LUNA16's folders are not searched, so nothing is said of them."""
    if found.files:
        for line in found.table():
            say(line)


def _check_disk(forecast: ShardingForecast, out: str, settings: ShardingSettings) -> None:
    """Raise UserError when the shards cannot fit on the disk of `out`.

    Of a chest CT a fifth of the sub-scans is nearly constant and left out, hardly ever two fifths: 0.6 is the least.
    """
    need = forecast.out_bytes(settings) * (0.6 if settings.tiling.min_std_hu else 1.0)
    free = free_disk(out)
    if free < need:
        raise UserError(
            f"{out}: {free / 2**30:.2f} GiB free, the shards take at least {need / 2**30:.2f} GiB: make "
            "room, name another --out, or cut fewer scans"
        )


def check_workers(workers: int) -> None:
    """Raise UserError for a value of --workers below 0."""
    if workers < 0:
        raise UserError(f"--workers {workers}: 1 or more, or 0 for one per core")


def default_workers() -> int:
    """Number of workers: one for each core that this process may use, as far as free memory goes (2 GiB each)."""
    return max(1, min(usable_cores(), free_memory() // WORKER_BYTES))


def _report_bad(where: str, why: str, strict: bool) -> None:
    if strict:
        raise UserError(f"bad scan: {where}: {why} (--strict stops at the first)")
    say(f"bad scan: {where}: {why}")


def _report_result(meta: dict[str, Any], folder: BuildFolder[ShardingSettings]) -> int:
    """Print what the finished set holds; the exit code."""
    kept = sum(source["sub_scans"] for source in meta["sources"])
    tiling, parts = meta["tiling"], meta["split"]
    say(
        f"{kept + tiling['left_out']:,} sub-scans, {tiling['left_out']:,} left out (standard deviation < "
        f"{tiling['min_std_hu']:g} HU), {kept:,} sub-scans kept"
    )
    if kept == 0:
        folder.remove_manifest()
        why = "the scans are all bad or nearly constant, see report.json there"
        raise UserError(f"{folder.root}: not one sub-scan: {why}")
    if not parts["val_scans"]:
        say(
            "no validation scans: "
            + ("there is only one scan" if len(parts["train_scans"]) == 1 else "--val-fraction 0")
        )
    size = sum(shard["nbytes"] for shard in meta["shards"]) / 2**30
    train, val = len(parts["train_scans"]), len(parts["val_scans"])
    say(f"{folder.root}: {size:.2f} GiB; scans for training {train}, for validation {val}")
    if meta["bad_scans"]:
        say(f"{len(meta['bad_scans'])} bad scans, see {os.path.join(folder.root, 'report.json')}")
    return 1 if meta["bad_scans"] else 0
