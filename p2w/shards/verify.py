"""Verify that the shards of a data set are the bytes that were written; cut damaged ones again from their scans.

The scan is cut by `workers.cut_scan`, as at first, into `DIR/.repair`. All settings come from the manifest. It does not
say whether gaps in DICOM series were allowed, and need not: where none were, there are none.
"""

import contextlib
import os
import shutil
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import pyarrow.compute as pc
import tyro
from crc32c import crc32c

from p2w.ct.discover import ScanListing, ScanSource, find_luna, find_scans
from p2w.errors import UserError
from p2w.files import hold_lock
from p2w.progress import Progress, say
from p2w.resources import usable_cores
from p2w.shards import manifest_schema
from p2w.shards.build import default_workers, result_of_worker
from p2w.shards.build_folder import BuildFolder, JobShare, ShardingSettings
from p2w.shards.manifest import DamagedManifest, Manifest, open_manifest, repair_command
from p2w.shards.manifest_schema import ANY_SCHEMA
from p2w.shards.tiling import Tiling
from p2w.shards.workers import cut_scan, worker_pool

USAGE = """Whether the shards of a data set are the bytes that were written; and repair from the scans they were cut from.

    p2w verify shards                                    # every byte of every shard, as fast as the disk reads
    p2w verify shards --repair --luna LUNA16             # cut what is damaged again, from LUNA16
    p2w verify shards --repair --scans /data/a /data/b   # or from the folders that preprocess/shard_scans.py got

The manifest carries a checksum of itself, of every shard and of every sub-scan. A shard that differs is looked
into: either sub-scans are damaged, which training would stop at, or only what stands between them. Repair cuts the
scan again by the code that cut it first, beside the damaged shard, and replaces that only by a shard that is,
byte for byte, the one the manifest tells of. Exit code 0: all is sound (again); 1: something is damaged, all of it
named; 2: no data set there.
"""


PIECE = 4 << 20  # bytes read at a time
NAMED = 8  # damaged sub-scans of one shard named in its line; the others are counted


@dataclass(frozen=True)
class VerifyOptions:
    """Whether the shards of a data set are the bytes that were written; and repair from the scans they came from."""

    shards: tyro.conf.Positional[str] = "shards"
    """Folder of the data set."""
    repair: bool = False
    """Cut damaged shards again from their scans, named by --luna or --scans."""
    luna: str | None = None
    """Folder that holds subset0 … subset9, for a set cut by preprocess/shard_luna.py."""
    scans: tuple[str, ...] = ()
    """The folders that preprocess/shard_scans.py got, in the same order."""
    workers: int = 0
    """Shards read, or scans cut, at the same time; 0: one for each core, as far as memory goes."""


@dataclass(frozen=True)
class ShardFault:
    """A shard that is not what was written: what is wrong, and keys of the sub-scans that are damaged."""

    shard: dict[str, Any]
    what: str
    keys: list[str] = field(default_factory=list)

    def line(self, root: str) -> str:
        """For the user."""
        where = os.path.join(root, self.shard["name"])
        if not self.keys:
            return f"damaged: {where}: {self.what}; no sub-scan is: only headers, padding or metadata differ"
        more = f" and {len(self.keys) - NAMED} more" if len(self.keys) > NAMED else ""
        many = f"{len(self.keys)} sub-scans" if len(self.keys) > 1 else "1 sub-scan"
        return f"damaged: {where}: {self.what}; {many}: {', '.join(self.keys[:NAMED])}{more}"


def verify_shard(manifest: Manifest, shard: dict[str, Any], root: str | None = None) -> ShardFault | None:
    """Compare one shard with the manifest; None when every byte is what was written.

    `root` is where the shard lies, if not beside the manifest.
    """
    root = manifest.root if root is None else root
    fault = manifest_schema.shard_fault(root, shard)
    rows = _rows(manifest, shard)
    if fault in (manifest_schema.MISSING, manifest_schema.OUTSIDE):
        return ShardFault(shard, fault, [key for key, *_ in rows])
    try:
        with open(os.path.join(root, shard["name"]), "rb", buffering=0) as file:
            if fault is None:
                crc = _checksum(file)
                if crc == shard["crc32c"]:
                    return None
                fault = f"crc32c {crc:08x}, the manifest says {shard['crc32c']:08x}"
            else:
                fault = f"{fault}, the manifest says {shard['nbytes']:,}"
            return ShardFault(shard, fault, [key for key, *place in rows if not _sound(file, *place)])
    except OSError as error:
        return ShardFault(shard, f"cannot be read ({error.strerror or error})", [key for key, *_ in rows])


def _open(where: str) -> Manifest:
    """A set of sub-scans, or of a target task's samples: their bytes are checked alike."""
    try:
        return open_manifest(where)
    except DamagedManifest as error:
        with contextlib.suppress(DamagedManifest):
            manifest = open_manifest(where, ANY_SCHEMA)
            if "task" in manifest.meta:
                return manifest
        raise error


def _rows(manifest: Manifest, shard: dict[str, Any]) -> list[tuple[str, int, int, int]]:
    """Key, offset, nbytes and checksum of the sub-scans in a shard."""
    table = manifest.table
    own = table.filter(pc.equal(table["shard"], shard["name"]))
    return list(zip(*(own[name].to_pylist() for name in ("key", "offset", "nbytes", "crc32c")), strict=True))


def _checksum(file: BinaryIO) -> int:
    """Of the whole file. crc32c and readinto release the GIL, so threads run side by side."""
    crc, buffer = 0, memoryview(bytearray(PIECE))
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        crc = crc32c(buffer[:count], crc)
    return crc


def _sound(file: BinaryIO, offset: int, nbytes: int, checksum: int) -> bool:
    """Whether a sub-scan's voxels are those that were written."""
    try:
        data = os.pread(file.fileno(), nbytes, offset)
    except OSError:  # a bad block of the disk
        return False
    return len(data) == nbytes and crc32c(data) == checksum


def verify_shards(manifest: Manifest, workers: int) -> list[ShardFault]:
    """Every shard of the set, several at a time; the damaged ones, in the manifest's order. Shows progress."""
    shards = manifest.meta["shards"]
    total, done, began = sum(shard["nbytes"] for shard in shards), 0, time.monotonic()
    found: dict[str, ShardFault] = {}
    progress = Progress(len(shards), "shards")
    with progress, ThreadPoolExecutor(max(1, workers)) as pool:
        tasks = {pool.submit(verify_shard, manifest, shard): shard for shard in shards}
        try:
            while tasks:
                for task in wait(tasks, timeout=1.0, return_when=FIRST_COMPLETED).done:
                    shard = tasks.pop(task)
                    if fault := task.result():
                        found[shard["name"]] = fault
                        say(fault.line(manifest.root))
                    done += shard["nbytes"]
                    rate = done / max(1e-9, time.monotonic() - began)
                    progress.step(f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB, {rate / 1e6:,.0f} MB/s")
                progress.tick()
        except BaseException:  # Ctrl-C: no shard is begun any more
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [found[shard["name"]] for shard in shards if shard["name"] in found]


def main(argv: list[str]) -> int:
    """Check, and repair where asked to."""
    options = tyro.cli(
        VerifyOptions, args=argv, prog="p2w verify", description=USAGE, config=(tyro.conf.FlagCreatePairsOff,)
    )
    if options.repair != bool(options.luna or options.scans) or (options.luna and options.scans):
        raise UserError(
            "--repair goes with --luna FOLDER or with --scans FOLDER ..., whichever the set was cut from"
        )
    if options.workers < 0:
        raise UserError(f"--workers {options.workers}: 1 or more, or 0 for one a core")
    if "://" in options.shards:
        raise UserError(
            f"{options.shards}: only a folder can be verified; training checks what it streams, copy the set to check it"
        )
    try:
        manifest = _open(options.shards)
    except DamagedManifest as error:
        again = "repeat the preprocess command that cut the set, it writes the manifest again and no finished shard"
        say(f"damaged: {error}, or {again}")
        return 1
    if options.repair and "task" in manifest.meta:
        raise UserError(
            f"{manifest.root}: {repair_command(manifest.root, manifest.meta)}; --repair is for scans"
        )
    faults = verify_shards(manifest, options.workers or usable_cores())
    if not faults:
        count, size = len(manifest.meta["shards"]), sum(s["nbytes"] for s in manifest.meta["shards"])
        say(
            f"{manifest.root}: sound: manifest, {count} shards, {manifest.table.num_rows:,} sub-scans, {size / 1e6:,.0f} MB"
        )
        return 0
    if not options.repair:
        many = "1 shard is" if len(faults) == 1 else f"{len(faults)} shards are"
        say(f"{manifest.root}: {many} damaged; to repair: {repair_command(manifest.root, manifest.meta)}")
        return 1

    left = repair_shards(
        manifest, [fault.shard for fault in faults], options.luna, options.scans, options.workers
    )
    say(f"{manifest.root}: {len(faults) - left} of {len(faults)} damaged shards are repaired")
    return 1 if left else 0


def repair_shards(
    manifest: Manifest, shards: list[dict[str, Any]], luna: str | None, scans: tuple[str, ...], workers: int
) -> int:
    """Cut these shards again; how many could not be. Says what became of each.

    Raises UserError when the folders of the scans are not there, or the manifest does not say how to cut.
    """
    settings, sources = _settings(manifest), {source["uid"]: source for source in manifest.meta["sources"]}
    beside = BuildFolder(os.path.join(manifest.root, ".repair"), settings)
    busy = f"{manifest.root}: another process repairs it; wait for it"
    with hold_lock(os.path.join(manifest.root, ".run"), "repair", busy):
        found = _find(manifest, luna, scans)
        known = {source.uid: source for source in found.sources}
        bad = dict(found.bad)
        todo: dict[str, tuple[ScanSource, dict[str, Any]]] = {}
        for shard in shards:
            uid = os.path.splitext(shard["name"])[0]
            told, source = sources.get(uid), known.get(uid)
            if told is None or source is None or source.name != told["file"]:
                name = told["file"] if told else uid
                why = bad.get(
                    name, f"is not below {luna or ' '.join(scans)}: name the folder the set was cut from"
                )
                say(f"not repaired: {shard['name']}: its scan {name} {why}")
            else:
                todo[uid] = (source, shard)
        shutil.rmtree(beside.root, ignore_errors=True)
        try:
            done = _cut(manifest, todo, beside, min(workers or default_workers(), len(todo))) if todo else 0
        finally:
            shutil.rmtree(beside.root, ignore_errors=True)
    return len(shards) - done


def _settings(manifest: Manifest) -> ShardingSettings:
    """How the set was cut."""
    meta = manifest.meta
    if "tiling" not in meta or "sources" not in meta or meta.get("format") not in ("tar", "arrow"):
        raise UserError(f"{manifest.root}: its manifest does not say how it was cut: cut the set anew")
    tiling = meta["tiling"]
    tile = (tiling["tile"][0], tiling["tile"][1], tiling["tile"][2])
    return ShardingSettings(
        Tiling(tile, tiling["z_margin"], tiling["min_std_hu"]), meta["format"], allow_gaps=True
    )


def _find(manifest: Manifest, luna: str | None, scans: tuple[str, ...]) -> ScanListing:
    if luna is None:
        return find_scans(list(scans), manifest.root, allow_gaps=True)
    subsets = {source["subset"] for source in manifest.meta["sources"]}
    if min(subsets, default=-1) < 0:
        raise UserError(f"{manifest.root}: was cut by shard_scans.py: name the folders it got with --scans")
    return find_luna(luna, sorted(subsets))[0]


def _cut(
    manifest: Manifest, todo: dict[str, tuple[ScanSource, dict[str, Any]]], beside: BuildFolder, workers: int
) -> int:
    """Cut and compare; how many shards were put in place."""
    done = 0
    os.makedirs(os.path.join(beside.root, "scans"))
    progress = Progress(len(todo), "scans")
    with progress, worker_pool(workers) as submit:
        waiting = {submit(cut_scan, source, beside, JobShare()): uid for uid, (source, _) in todo.items()}
        while waiting:
            for task in wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED).done:
                uid = waiting.pop(task)
                source, shard = todo[uid]
                why = _differs(manifest, result_of_worker(task, source, waiting), shard, beside)
                if why is None:
                    os.replace(beside.shard(uid), os.path.join(manifest.root, shard["name"]))
                    _sync(manifest.root)
                    done += 1
                    say(
                        f"repaired: {shard['name']}, from {source.name}: crc32c {shard['crc32c']:08x} as in the manifest"
                    )
                else:
                    say(f"not repaired: {shard['name']}: its scan {source.name} {why}")
                progress.step(f"{done} repaired")
            progress.tick()
    return done


def _differs(
    manifest: Manifest, record: dict[str, Any], shard: dict[str, Any], beside: BuildFolder
) -> str | None:
    """Why what was cut is not the shard of the manifest; None when it is, as read back from the disk."""
    if "bad" in record:
        return record["bad"]
    told = next(source for source in manifest.meta["sources"] if source["uid"] == record["uid"])
    if record["checksum"] != told["checksum"]:
        return (
            f"has changed since it was cut ({record['checksum']}, the manifest says {told['checksum']}): bring the "
            "old one back, or cut the set anew"
        )
    if record["shard"] is None or verify_shard(manifest, shard, beside.root) is not None:
        return f"is the same but gives another shard now; the set was cut by {manifest.meta.get('tool')}: cut it anew"
    return None


def _sync(folder: str) -> None:
    """Make a rename durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
