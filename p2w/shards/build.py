"""A whole data set: options of the sharding commands, forecast from headers, workers over scans, the manifest."""

import hashlib
import os
import re
import shutil
import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

import p2w
from p2w.ct.discover import ScanListing, ScanSource
from p2w.ct.orientation import CANONICAL, BadScan
from p2w.ct.scan import read_grid
from p2w.errors import UserError
from p2w.files import canonical_json, write_published
from p2w.progress import Progress, duration, say
from p2w.resources import free_memory, usable_cores
from p2w.shards.build_folder import BuildFolder, JobShare, ShardingSettings, ShardSource
from p2w.shards.manifest import manifest_bytes
from p2w.shards.manifest_schema import MANIFEST_NAME, MANIFEST_VERSION
from p2w.shards.tiling import MIN_STD_HU, WINDOW_HU, Tiling
from p2w.shards.workers import cut_scan, worker_pool

RULE = "by scan: the first of the scans ordered by sha256(seed:uid) are val, the others train"


def split_scans(uids: list[str], settings: ShardingSettings) -> set[str]:
    """The scans of the validation set: the same for the same scans, at least one where there are two."""
    order = sorted(uids, key=lambda uid: hashlib.sha256(f"{settings.split_seed}:{uid}".encode()).digest())
    wanted = round(settings.val_fraction * len(uids))
    if settings.val_fraction > 0:
        wanted = min(max(wanted, 1), len(uids) - 1)
    return set(order[: max(0, wanted)])


def unfinished_scans(found: ScanListing, folder: BuildFolder) -> list[str]:
    """Names of the scans that no process has finished yet."""
    return [source.name for source in found.sources if folder.record(source.uid) is None]


def merge_records(found: ScanListing, folder: BuildFolder) -> dict[str, Any]:
    """Write everything that names all scans, the manifest last. Returns the manifest's metadata.

    Asks for the merge lock, and for a record of every scan (`unfinished`).
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
    meta = _meta(good, bad, sorted(set(full) - val), sorted(val), folder.settings)
    report = {
        "bad_scans": bad,
        "left_out": [{"where": where, "why": why} for where, why in found.left_out],
        "files_that_are_no_images": found.not_images,
    }
    files = {
        "train.txt": "".join(f"{uid}.{form}\n" for uid in meta["split"]["train_scans"]).encode(),
        "val.txt": "".join(f"{uid}.{form}\n" for uid in meta["split"]["val_scans"]).encode(),
        "report.json": canonical_json(report, indent=1),
        MANIFEST_NAME: manifest_bytes(rows, meta),
    }
    for name, data in files.items():
        write_published(os.path.join(folder.root, name), data, folder.aside(name, "merge"))
    return meta


def _meta(
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
        "shape": list(settings.tiling.tile),
        "dtype": "int16",
        "window_hu": list(WINDOW_HU),
        "axis_order": "zyx",
        "orientation": CANONICAL,
        "tiling": {
            "tile": list(settings.tiling.tile),
            "z_margin": settings.tiling.z_margin,
            "min_std_hu": settings.tiling.min_std_hu,
            "left_out": sum(record["left_out"] for record in good),
        },
        "split": {
            "rule": RULE,
            "val_fraction": settings.val_fraction,
            "seed": settings.split_seed,
            "train_scans": train,
            "val_scans": val,
        },
        "sources": [
            {key: record[key] for key in source_keys}
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


WORKER_BYTES = 2 << 30  # a worker stays below, for a scan of 512 x 512 x 764 voxels
# Voxels a second and worker, for the estimate of a dry run: what bench/shard.py measured on one 2-core
# machine with LUNA16's compressed scans and a local disk. A network disk may be slower.
VOXELS_PER_SECOND = 40e6


@dataclass(frozen=True)
class ShardingJob:
    """What to make of the scans found, and how."""

    out: str
    settings: ShardingSettings = ShardingSettings()  # noqa: RUF009 (frozen)
    share: JobShare = JobShare()  # noqa: RUF009 (frozen)
    workers: int = 0  # 0: one for each core, as far as memory goes
    merge_only: bool = False
    dry_run: bool = False
    strict: bool = False


@dataclass(frozen=True)
class ShardingForecast:
    """What headers say of the scans of one share."""

    sub_scans: int
    voxels: int
    source_bytes: int
    bad: list[tuple[str, str]]
    sound: int

    def out_bytes(self, settings: ShardingSettings) -> int:
        """Upper bound of what the shards take."""
        return self.sub_scans * (2 * int(np.prod(settings.tiling.tile)) + 4096)


def build_shards(found: ScanListing, job: ShardingJob) -> int:
    """Do the job; the exit code: 0, or 1 when a scan was bad. Raises UserError when it cannot go on."""
    for where, why in found.left_out:
        say(f"left out: {where}: {why}")
    folder = BuildFolder(job.out, job.settings)
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
            missing = unfinished_scans(found, folder)
            if not missing:
                meta = merge_records(found, folder)
                folder.tidy()
    if not missing:
        return _tell(meta, folder)
    where = f"{len(missing)} of {len(found.sources)} scans are not cut yet (the first: {missing[0]})"
    if job.merge_only:
        raise UserError(f"{job.out}: {where}: run the same command without --merge, for every share")
    say(f"{job.out}: share {job.share.name} is done; {where}; the last share to end writes the manifest")
    return 1 if bad else 0


def _cut(mine: list[ScanSource], folder: BuildFolder, job: ShardingJob) -> int:
    """Cut what is not finished; how many scans of this share are bad."""
    todo = [source for source in mine if folder.finished(source) is None]
    if not todo:
        say(f"{job.out}: all {len(mine)} scans are cut already")
        return 0
    records = [folder.record(source.uid) for source in todo]
    if any(record is None or "bad" not in record for record in records):  # not for another try at a bad scan
        folder.withdraw()
    plan = forecast_shards(todo, job.settings)
    say(
        f"{len(todo)} scans to cut ({len(mine) - len(todo)} are finished), {plan.sub_scans:,} tiles, "
        f"{plan.out_bytes(job.settings) / 2**30:.1f} GiB"
    )
    _check_disk(plan, job)
    workers = min(job.workers or default_workers(), len(todo))
    bad = tiles = 0
    progress = Progress(len(todo), "scans")
    with progress, worker_pool(workers) as submit:
        waiting = {submit(cut_scan, source, folder, job.share): source for source in todo}
        while waiting:
            done, _ = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in done:
                source = waiting.pop(future)
                record = result_of_worker(future, source, waiting)
                tiles += len(record.get("rows", ()))
                progress.step(f"{tiles:,} sub-scans")
                if "bad" in record:
                    bad += 1
                    _bad(source.name, record["bad"], job.strict)
            progress.tick()
    return bad


def result_of_worker(
    future: "Future[dict[str, Any]]", source: ShardSource, waiting: dict[Any, Any]
) -> dict[str, Any]:
    """What became of a scan. Raises UserError when a worker process was killed."""
    try:
        return future.result()
    except BrokenProcessPool as error:
        time.sleep(0.2)  # where a signal went to all of us, let ours arrive first: it tells the user more
        raise UserError(
            f"a worker was killed while it cut {source.name} or one of the next {len(waiting)} scans (most "
            "often: out of memory); finished scans are kept: give the same command again with fewer --workers"
        ) from error


def forecast_shards(sources: list[ScanSource], settings: ShardingSettings) -> ShardingForecast:
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
    return ShardingForecast(sub_scans, voxels, nbytes, bad, sound)


def _dry_run(found: ScanListing, mine: list[ScanSource], job: ShardingJob) -> int:
    plan = forecast_shards(mine, job.settings)
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


def _check_disk(plan: ShardingForecast, job: ShardingJob) -> None:
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


def _tell(meta: dict[str, Any], folder: BuildFolder) -> int:
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


@dataclass(frozen=True)
class ShardingOptions:
    """How to cut, and how to go about it."""

    format: Literal["tar", "arrow"] = "tar"
    """tar opens with webdataset, arrow with pyarrow; training reads both alike."""
    z_margin: int = 0
    """Slices to leave out at each end of a scan; 25 gives the paper's number of sub-scans."""
    min_std: float = MIN_STD_HU
    """Leave out sub-scans whose standard deviation (HU) is below: nearly constant air. 0 keeps all."""
    val_fraction: float = 0.1
    """Share of the scans set aside for validation, at least one of two. Never parts of a scan."""
    split_seed: int = 0
    """Another seed sets other scans aside."""
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

    def job(self, out: str, allow_gaps: bool = False) -> ShardingJob:
        """The checked job. Raises UserError where a value makes no sense."""
        match = re.fullmatch(r"(\d+)/(\d+)", self.shard_of)
        if not match or not int(match[1]) < int(match[2]):
            raise UserError(
                f"--shard-of {self.shard_of!r}: write i/n with i from 0 to n - 1, such as 0/4 … 3/4"
            )
        if self.workers < 0:
            raise UserError(f"--workers {self.workers}: 1 or more, or 0 for one a core")
        tiling = Tiling(z_margin=self.z_margin, min_std_hu=self.min_std)
        settings = ShardingSettings(tiling, self.format, self.val_fraction, self.split_seed, allow_gaps)
        share = JobShare(int(match[1]), int(match[2]))
        return ShardingJob(out, settings, share, self.workers, self.merge, self.dry_run, self.strict)
