"""Whether the shards of a data set are the bytes that were written; and repair from the scans they were cut from.

    p2w verify shards                                    # every byte of every shard, as fast as the disk reads
    p2w verify shards --repair --luna LUNA16             # cut what is damaged again, from LUNA16
    p2w verify shards --repair --scans /data/a /data/b   # or from the folders that preprocess/shard_scans.py got

The manifest carries a checksum of itself, of every shard and of every sub-scan. A shard that differs is looked
into: either sub-scans are damaged, which training would stop at, or only what stands between them. Repair cuts the
scan again by the code that cut it first, beside the damaged shard, and replaces that only by a shard that is,
byte for byte, the one the manifest tells of. Exit code 0: all is sound (again); 1: something is damaged, all of it
named; 2: no data set there.
"""

import contextlib
import os
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import pyarrow.compute as pc
import tyro
from crc32c import crc32c

from p2w.data import rules
from p2w.data.manifest import ANY, DamagedManifest, Manifest, open_manifest, repair_command
from p2w.data.progress import Progress, say
from p2w.errors import UserError
from p2w.resources import usable_cores

PIECE = 4 << 20  # bytes read at a time
NAMED = 8  # damaged sub-scans of one shard named in its line; the others are counted


@dataclass(frozen=True)
class Options:
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
class Fault:
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


def check_shard(manifest: Manifest, shard: dict[str, Any], root: str | None = None) -> Fault | None:
    """Compare one shard with the manifest; None when every byte is what was written.

    `root` is where the shard lies, if not beside the manifest.
    """
    root = manifest.root if root is None else root
    fault = rules.shard_fault(root, shard)
    rows = _rows(manifest, shard)
    if fault in (rules.MISSING, rules.OUTSIDE):
        return Fault(shard, fault, [key for key, *_ in rows])
    try:
        with open(os.path.join(root, shard["name"]), "rb", buffering=0) as file:
            if fault is None:
                crc = _checksum(file)
                if crc == shard["crc32c"]:
                    return None
                fault = f"crc32c {crc:08x}, the manifest says {shard['crc32c']:08x}"
            else:
                fault = f"{fault}, the manifest says {shard['nbytes']:,}"
            return Fault(shard, fault, [key for key, *place in rows if not _sound(file, *place)])
    except OSError as error:
        return Fault(shard, f"cannot be read ({error.strerror or error})", [key for key, *_ in rows])


def _open(where: str) -> Manifest:
    """A set of sub-scans, or of a target task's samples: their bytes are checked alike."""
    try:
        return open_manifest(where)
    except DamagedManifest as error:
        with contextlib.suppress(DamagedManifest):
            manifest = open_manifest(where, ANY)
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


def check(manifest: Manifest, workers: int) -> list[Fault]:
    """Every shard of the set, several at a time; the damaged ones, in the manifest's order. Shows progress."""
    shards = manifest.meta["shards"]
    total, done, began = sum(shard["nbytes"] for shard in shards), 0, time.monotonic()
    found: dict[str, Fault] = {}
    progress = Progress(len(shards), "shards")
    with progress, ThreadPoolExecutor(max(1, workers)) as pool:
        tasks = {pool.submit(check_shard, manifest, shard): shard for shard in shards}
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
        Options, args=argv, prog="p2w verify", description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)
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
    faults = check(manifest, options.workers or usable_cores())
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
    from p2w.data.repair import repair  # noqa: PLC0415 - readers of scans, which a check does not need

    left = repair(manifest, [fault.shard for fault in faults], options.luna, options.scans, options.workers)
    say(f"{manifest.root}: {len(faults) - left} of {len(faults)} damaged shards are repaired")
    return 1 if left else 0
