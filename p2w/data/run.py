"""A whole data set: forecast from headers, workers over scans, merge."""

import os
import shutil
import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np

from p2w.data.cut import cut_scan
from p2w.data.find import Found, Source
from p2w.data.folder import Folder, Settings, Share
from p2w.data.grid import BadScan
from p2w.data.merge import merge, unfinished
from p2w.data.pool import pool
from p2w.data.progress import Progress, duration, say
from p2w.data.scan import read_grid
from p2w.data.seams import Scanned
from p2w.errors import UserError
from p2w.resources import free_memory, usable_cores

WORKER_BYTES = 2 << 30  # a worker stays below, for a scan of 512 x 512 x 764 voxels
# Voxels a second and worker, for the estimate of a dry run: what bench/shard.py measured on one 2-core
# machine with LUNA16's compressed scans and a local disk. A network disk may be slower.
VOXELS_PER_SECOND = 40e6


@dataclass(frozen=True)
class Job:
    """What to make of the scans found, and how."""

    out: str
    settings: Settings = Settings()  # noqa: RUF009 (frozen)
    share: Share = Share()  # noqa: RUF009 (frozen)
    workers: int = 0  # 0: one for each core, as far as memory goes
    merge_only: bool = False
    dry_run: bool = False
    strict: bool = False


@dataclass(frozen=True)
class Forecast:
    """What headers say of the scans of one share."""

    sub_scans: int
    voxels: int
    source_bytes: int
    bad: list[tuple[str, str]]
    sound: int

    def out_bytes(self, settings: Settings) -> int:
        """Upper bound of what the shards take."""
        return self.sub_scans * (2 * int(np.prod(settings.tiling.tile)) + 4096)


def run(found: Found, job: Job) -> int:
    """Do the job; the exit code: 0, or 1 when a scan was bad. Raises UserError when it cannot go on."""
    for where, why in found.left_out:
        say(f"left out: {where}: {why}")
    folder = Folder(job.out, job.settings)
    mine = job.share.of(found.sources)
    if job.dry_run:
        return _dry_run(found, mine, job)
    with folder.share_lock(job.share):
        folder.prepare(job.share)
        folder.check_strangers(found.sources, found.bad)
        for where, why in found.bad:
            _bad(where, why, job.strict)
        bad = len(found.bad)
        if not job.merge_only:
            bad += _cut(mine, folder, job)
        with folder.merge_lock():
            missing = unfinished(found, folder)
            if not missing:
                meta = merge(found, folder)
                folder.tidy()
    if not missing:
        return _tell(meta, folder)
    where = f"{len(missing)} of {len(found.sources)} scans are not cut yet (the first: {missing[0]})"
    if job.merge_only:
        raise UserError(f"{job.out}: {where}: run the same command without --merge, for every share")
    say(f"{job.out}: share {job.share.name} is done; {where}; the last share to end writes the manifest")
    return 1 if bad else 0


def _cut(mine: list[Source], folder: Folder, job: Job) -> int:
    """Cut what is not finished; how many scans of this share are bad."""
    todo = [source for source in mine if folder.finished(source) is None]
    if not todo:
        say(f"{job.out}: all {len(mine)} scans are cut already")
        return 0
    records = [folder.record(source.uid) for source in todo]
    if any(record is None or "bad" not in record for record in records):  # not for another try at a bad scan
        folder.withdraw()
    plan = forecast(todo, job.settings)
    say(
        f"{len(todo)} scans to cut ({len(mine) - len(todo)} are finished), {plan.sub_scans:,} tiles, "
        f"{plan.out_bytes(job.settings) / 2**30:.1f} GiB"
    )
    _check_disk(plan, job)
    workers = min(job.workers or default_workers(), len(todo))
    bad = tiles = 0
    progress = Progress(len(todo), "scans")
    with progress, pool(workers) as submit:
        waiting = {submit(cut_scan, source, folder, job.share): source for source in todo}
        while waiting:
            done, _ = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in done:
                source = waiting.pop(future)
                record = result_of(future, source, waiting)
                tiles += len(record.get("rows", ()))
                progress.step(f"{tiles:,} sub-scans")
                if "bad" in record:
                    bad += 1
                    _bad(source.name, record["bad"], job.strict)
            progress.tick()
    return bad


def result_of(future: "Future[dict[str, Any]]", source: Scanned, waiting: dict[Any, Any]) -> dict[str, Any]:
    """What became of a scan. Raises UserError when a worker process was killed."""
    try:
        return future.result()
    except BrokenProcessPool as error:
        time.sleep(0.2)  # where a signal went to all of us, let ours arrive first: it tells the user more
        raise UserError(
            f"a worker was killed while it cut {source.name} or one of the next {len(waiting)} scans (most "
            "often: out of memory); finished scans are kept: give the same command again with fewer --workers"
        ) from error


def forecast(sources: list[Source], settings: Settings) -> Forecast:
    """Read headers, and nothing else."""
    sub_scans = voxels = nbytes = sound = 0
    bad = []
    for source in sources:
        try:
            grid, size = read_grid(source)
            settings.tiling.check(grid.size[::-1])
        except (BadScan, OSError, ValueError) as error:
            bad.append((source.name, str(error)))
            continue
        sub_scans += settings.tiling.count(grid.size[::-1])
        voxels += int(np.prod(grid.size))
        nbytes += size
        sound += 1
    return Forecast(sub_scans, voxels, nbytes, bad, sound)


def _dry_run(found: Found, mine: list[Source], job: Job) -> int:
    plan = forecast(mine, job.settings)
    bad = sorted(found.bad + plan.bad)
    for where, why in bad:
        say(f"bad scan: {where}: {why}")
    free = _free(job.out)
    workers = min(job.workers or default_workers(), max(1, len(mine)))
    tiling = job.settings.tiling
    say(
        f"scans          {plan.sound:,}, besides {len(bad)} bad ones; {plan.source_bytes / 2**30:.2f} GiB to read"
    )
    say(f"sub-scans      {plan.sub_scans:,} tiles of {tiling.tile} (z, y, x), z margin {tiling.z_margin}")
    if tiling.min_std_hu:
        say(
            f"               before leaving out those of a standard deviation below {tiling.min_std_hu:g} HU "
            "(chest CT: 1 in 5)"
        )
    say(f"to write       at most {plan.out_bytes(job.settings) / 2**30:.2f} GiB into {job.out}")
    say(f"free there     {free / 2**30:.2f} GiB")
    seconds = plan.voxels / VOXELS_PER_SECOND / workers
    say(
        f"time           about {duration(seconds)} with {workers} workers, at {VOXELS_PER_SECOND / 1e6:.0f} "
        "million voxels a second each (measured on another machine with a local disk; yours may differ by a "
        "factor of 3)"
    )
    _check_disk(plan, job)
    return 1 if bad else 0


def _check_disk(plan: Forecast, job: Job) -> None:
    """Refuse what cannot fit: of a chest CT a fifth of the tiles is left out, hardly ever two fifths."""
    need = plan.out_bytes(job.settings) * (0.6 if job.settings.tiling.min_std_hu else 1.0)
    free = _free(job.out)
    if free < need:
        raise UserError(
            f"{job.out}: {free / 2**30:.2f} GiB free, the shards take at least {need / 2**30:.2f} GiB: make "
            "room, name another --out, or cut fewer scans"
        )


def _free(path: str) -> int:
    path = os.path.abspath(path)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free


def default_workers() -> int:
    """One for each core this process may use, as far as free memory goes."""
    return max(1, min(usable_cores(), free_memory() // WORKER_BYTES))


def _bad(where: str, why: str, strict: bool) -> None:
    if strict:
        raise UserError(f"bad scan: {where}: {why} (--strict stops at the first)")
    say(f"bad scan: {where}: {why}")


def _tell(meta: dict[str, Any], folder: Folder) -> int:
    kept = sum(source["sub_scans"] for source in meta["sources"])
    tiling, parts = meta["tiling"], meta["split"]
    say(
        f"{kept + tiling['left_out']:,} tiles, {tiling['left_out']:,} left out (standard deviation < "
        f"{tiling['min_std_hu']:g} HU), {kept:,} sub-scans kept"
    )
    if kept == 0:
        folder.withdraw()
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
