"""Verify that the shards of a data set are the bytes that were written; cut damaged ones again from their scans.

A repair cuts the scan into `DIR/.repair` with `build.cut_source`, the code that cut it first, and takes all settings from
the manifest. Gaps in DICOM series are always allowed here, tilted ones resampled, and values taken for HU: if the set was
cut without these options, no series that has a shard needs them.
"""

import contextlib
import itertools
import os
import shutil
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, get_args

import pyarrow as pa
import tyro
from crc32c import crc32c

from p2w import http_client
from p2w.ct.discover import ScanListing, ScanSource, SearchOptions, find_luna, find_scans
from p2w.ct.scan import Modality, straightened
from p2w.errors import UserError
from p2w.files import file_crc32c, hold_lock, sync_to_disk
from p2w.progress import Progress, say
from p2w.resources import usable_cores
from p2w.shards import manifest_schema
from p2w.shards.build import check_workers, cut_in_workers
from p2w.shards.build_folder import JobShare
from p2w.shards.manifest import DamagedManifest, Manifest, open_manifest, repair_command
from p2w.shards.manifest_schema import ANY_SCHEMA
from p2w.shards.privacy import privacy_lines
from p2w.shards.scan_shards import ScanFolder, ShardingSettings
from p2w.shards.tiling import Tiling
from p2w.shards.writer import unpack_voxels

USAGE = """Check that the shards of a data set are the bytes that were written, and repair them from their scans.

    p2w verify shards                                    # every byte of every shard, as fast as the disk reads
    p2w verify https://host/shards                       # the same of a set below a URL, as fast as the network
    p2w verify shards --repair --luna LUNA16             # cut what is damaged again, from LUNA16
    p2w verify shards --repair --scans /data/a /data/b   # or from the folders that p2w shard got
    p2w verify shards --privacy                          # what a set, a run or an export tells about people and machines

The manifest has a checksum of itself, of every shard and of every sub-scan. In a shard that differs, every sub-scan is
checked: either sub-scans are damaged, at which training would stop, or only the bytes between them. Repair cuts the scan
again with the code that cut it first, into a folder of its own, and replaces the damaged shard only if the new one has
exactly the bytes that the manifest describes. Exit code 0: all is sound, or repaired; 1: something is damaged, and every
damaged shard is named; 2: there is no data set.
"""


RETRY_S = 60.0  # how long a web server that fails is asked again
MOST_MANIFEST = 1 << 30  # bytes of a manifest below a URL
MOST_NAMED = 8  # damaged sub-scans of one shard that its line names; the others are counted


@dataclass(frozen=True)
class VerifyOptions:
    """Command line of `p2w verify`."""

    shards: tyro.conf.Positional[str] = "shards"
    """Folder of the data set, or its http(s) URL."""
    repair: bool = False
    """Cut damaged shards again from their scans, named by --luna or --scans."""
    luna: str | None = None
    """Folder that holds subset0 … subset9, for a set cut by p2w shard-luna."""
    scans: tuple[str, ...] = ()
    """The folders that p2w shard got, in the same order."""
    privacy: bool = False
    """List what a set, a run folder or a file of weights would tell about people and machines, instead of its bytes;
    exit code 1 where there is a path, a date, a person's or a machine's name in it."""
    workers: int = 0
    """Shards read, or scans cut, at the same time; 0: one for each core, as far as memory goes."""


@dataclass(frozen=True)
class ShardFault:
    """A damaged shard: its entry in the manifest, what is wrong, and the keys of its damaged sub-scans."""

    shard: dict[str, Any]
    what: str
    keys: list[str] = field(default_factory=list)
    noun: str = "sub-scan"  # what the shard holds

    def line(self, root: str) -> str:
        """One line for the user."""
        where = os.path.join(root, self.shard["name"])
        if not self.keys:
            return (
                f"damaged: {where}: {self.what}; no {self.noun} is: only headers, padding or metadata differ"
            )
        more = f" and {len(self.keys) - MOST_NAMED} more" if len(self.keys) > MOST_NAMED else ""
        many = f"{len(self.keys)} {self.noun}s" if len(self.keys) > 1 else f"1 {self.noun}"
        return f"damaged: {where}: {self.what}; {many}: {', '.join(self.keys[:MOST_NAMED])}{more}"


def verify_shard(manifest: Manifest, shard: dict[str, Any], root: str | None = None) -> ShardFault | None:
    """Compare one shard with the manifest; None when every byte is what was written.

    `root` is the folder of the shard, by default that of the manifest.
    """
    root = manifest.root if root is None else root
    fault = manifest_schema.shard_fault(root, shard)
    rows = _rows(manifest, shard)
    if fault in (manifest_schema.MISSING, manifest_schema.OUTSIDE):
        return ShardFault(shard, fault, [key for key, *_ in rows])
    try:
        with open(os.path.join(root, shard["name"]), "rb", buffering=0) as file:
            if fault is None:
                crc = file_crc32c(file)
                if crc == shard["crc32c"]:
                    return None
                fault = f"crc32c {crc:08x}, the manifest says {shard['crc32c']:08x}"
            else:
                fault = f"{fault}, the manifest says {shard['nbytes']:,}"
            unpacked = manifest_schema.unpacked_bytes(manifest.meta)
            return ShardFault(
                shard,
                fault,
                [
                    key
                    for key, offset, nbytes, checksum in rows
                    if not _is_sound(file, offset, nbytes, checksum, unpacked)
                ],
            )
    except OSError as error:
        return ShardFault(shard, f"cannot be read ({error.strerror or error})", [key for key, *_ in rows])


def verify_remote_shard(manifest: Manifest, shard: dict[str, Any]) -> ShardFault | None:
    """As `verify_shard`, for a set below the http(s) URL `manifest.root`: fetches the shard once, and stores nothing."""
    url, rows = f"{manifest.root}/{shard['name']}", sorted(_rows(manifest, shard), key=lambda row: row[1])
    try:
        done, whole, found = http_client.retried(
            lambda: _fetch_checksums(url, shard["nbytes"], rows), url, RETRY_S
        )
    except http_client.RequestFailed as error:
        return ShardFault(shard, f"cannot be fetched {error}", [key for key, *_ in rows])
    if done == shard["nbytes"] and whole == shard["crc32c"]:
        return None
    fault = f"crc32c {whole:08x}, the manifest says {shard['crc32c']:08x}"
    if done != shard["nbytes"]:
        fault = f"has {'more' if done > shard['nbytes'] else f'{done:,}'} bytes, the manifest says {shard['nbytes']:,}"
    # Checksums are of voxels, and packed ones pass by here as they are: each may be the damaged one.
    packed = manifest_schema.compressed(manifest.meta)
    bad = [
        key
        for (key, offset, nbytes, checksum), crc in zip(rows, found, strict=True)
        if packed or crc != checksum or offset + nbytes > done
    ]
    return ShardFault(shard, fault, bad)


def _fetch_checksums(
    url: str, nbytes: int, rows: list[tuple[str, int, int, int]]
) -> tuple[int, int, list[int]]:
    """Bytes that arrived, at most one piece more than `nbytes`, their CRC-32C, and that of each of the rows."""
    done, whole, found = 0, 0, [0] * len(rows)
    first = 0  # of the rows that have not ended yet
    with contextlib.closing(http_client.read_pieces(url)) as pieces:
        for piece in pieces:
            whole, data = crc32c(piece, whole), memoryview(piece)
            for number in range(first, len(rows)):
                _, offset, length, _ = rows[number]
                if offset >= done + len(piece):
                    break
                part = data[max(0, offset - done) : max(0, offset + length - done)]
                found[number] = crc32c(part, found[number])
                if number == first and offset + length <= done + len(piece):
                    first += 1
            done += len(piece)
            if done > nbytes:
                break
    return done, whole, found


def _open_manifest(where: str) -> Manifest:
    """Open the manifest of a set of sub-scans or of a target task's samples; both are checked in the same way."""
    source: str | bytes = where
    if "://" in where:
        source = http_client.fetch(f"{where}/{manifest_schema.MANIFEST_NAME}", MOST_MANIFEST, RETRY_S)
    try:
        manifest = open_manifest(source)
    except DamagedManifest as error:
        manifest = _open_samples(source, error)
    return replace(manifest, root=where) if "://" in where else manifest


def _open_samples(source: str | bytes, error: DamagedManifest) -> Manifest:
    """The manifest of a target task's samples; raises `error` where it is none."""
    with contextlib.suppress(DamagedManifest):
        manifest = open_manifest(source, ANY_SCHEMA)
        if "task" in manifest.meta:
            return manifest
    raise error


def _noun(manifest: Manifest) -> str:
    """What the shards of a set hold, in a word."""
    return "chunk" if manifest_schema.stores_scans(manifest.meta) else "sub-scan"


def _rows(manifest: Manifest, shard: dict[str, Any]) -> list[tuple[str, int, int, int]]:
    """Key, offset, nbytes and checksum of the sub-scans in a shard."""
    rows = manifest.rows_of(shard["name"])
    own = manifest.table.select(["offset", "nbytes", "crc32c"]).take(pa.array(rows))
    columns = (own[name].to_pylist() for name in own.column_names)
    return list(zip(manifest.keys.take(rows).to_pylist(), *columns, strict=True))


def _is_sound(file: BinaryIO, offset: int, nbytes: int, checksum: int, unpacked: int | None) -> bool:
    """Whether a sub-scan's voxels are those that were written; packed ones have `unpacked` bytes."""
    try:
        data = os.pread(file.fileno(), nbytes, offset)
        if unpacked is not None:
            return crc32c(unpack_voxels(data, unpacked).data) == checksum
    except (OSError, ValueError):  # a bad block of the disk; bytes that do not unpack
        return False
    return len(data) == nbytes and crc32c(data) == checksum


def verify_shards(manifest: Manifest, workers: int) -> list[ShardFault]:
    """Check all shards, `workers` at a time, and return the damaged ones in the manifest's order. Shows progress."""
    shards = manifest.meta["shards"]
    total, done, began = sum(shard["nbytes"] for shard in shards), 0, time.monotonic()
    found: dict[str, ShardFault] = {}
    if shards:
        manifest.rows_of(shards[0]["name"])  # sorts the rows by shard once, before threads ask
    progress = Progress(len(shards), "shards")
    verify_one = verify_remote_shard if "://" in manifest.root else verify_shard
    with progress, ThreadPoolExecutor(max(1, workers)) as pool:
        waiting, tasks = iter(shards), dict[Future[ShardFault | None], dict[str, Any]]()
        try:
            while True:
                # A few at a time: waiting for one of all would take time in proportion to their number, for every shard.
                for shard in itertools.islice(waiting, max(0, 4 * workers + 4 - len(tasks))):
                    tasks[pool.submit(verify_one, manifest, shard)] = shard
                if not tasks:
                    break
                for task in wait(tasks, timeout=1.0, return_when=FIRST_COMPLETED).done:
                    shard = tasks.pop(task)
                    if fault := task.result():
                        fault = replace(fault, noun=_noun(manifest))
                        found[shard["name"]] = fault
                        say(fault.line(manifest.root))
                    done += shard["nbytes"]
                    rate = done / max(1e-9, time.monotonic() - began)
                    progress.step(f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB, {rate / 1e6:,.0f} MB/s")
                progress.tick()
        except BaseException:  # such as Ctrl-C: start no further shard
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [found[shard["name"]] for shard in shards if shard["name"] in found]


def _privacy(where: str, repair: bool) -> int:
    """Print what a folder or file tells; returns the exit code, 1 where there is something to look at."""
    if repair or "://" in where:
        raise UserError(f"{where}: --privacy goes with a folder or file, and without --repair")
    is_set = os.path.isfile(os.path.join(where, manifest_schema.MANIFEST_NAME))
    lines, clean = privacy_lines(Path(where), _open_manifest(where).meta if is_set else None)
    for line in lines:
        say(line)
    return 0 if clean else 1


def main(argv: list[str]) -> int:
    """Run `p2w verify` with these arguments; the exit code."""
    options = tyro.cli(
        VerifyOptions, args=argv, prog="p2w verify", description=USAGE, config=(tyro.conf.FlagCreatePairsOff,)
    )
    if options.repair != bool(options.luna or options.scans) or (options.luna and options.scans):
        raise UserError(
            "--repair goes with --luna FOLDER or with --scans FOLDER ..., whichever the set was cut from"
        )
    check_workers(options.workers)
    where = options.shards
    if options.privacy:
        return _privacy(where, options.repair)
    if "://" in where:
        if not where.startswith(("http://", "https://")):
            raise UserError(
                f"{where}: only a folder or an http(s) URL can be verified; training checks what it streams"
            )
        if options.repair:
            raise UserError(
                f"{where}: only a folder can be repaired; repair the one that it was uploaded from"
            )
        where = where.rstrip("/")
    try:
        manifest = _open_manifest(where)
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
        parts = f"{manifest.table.num_rows:,} {_noun(manifest)}s"
        say(f"{manifest.root}: sound: manifest, {count} shards, {parts}, {size / 1e6:,.0f} MB")
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
    """Cut these shards again, print a line on each, and return how many could not be repaired.

    Raises UserError when the folders of the scans are not there, or the manifest does not say how to cut.
    """
    settings, sources = (
        _sharding_settings(manifest),
        {source["uid"]: source for source in manifest.meta["sources"]},
    )
    repair_folder = ScanFolder(os.path.join(manifest.root, ".repair"), settings)
    busy = f"{manifest.root}: another process repairs it; wait for it"
    with hold_lock(os.path.join(manifest.root, ".run"), "repair", busy):
        found = _find_scans(manifest, luna, scans)
        known = {source.uid: source for source in found.sources}
        bad = dict(found.bad)
        todo: dict[str, tuple[ScanSource, dict[str, Any], dict[str, Any]]] = {}
        for shard in shards:
            uid = os.path.splitext(shard["name"])[0]
            recorded, source = sources.get(uid), known.get(uid)
            if recorded is None or source is None or source.name != recorded["file"]:
                name = recorded["file"] if recorded else uid
                why = bad.get(
                    name, f"is not below {luna or ' '.join(scans)}: name the folder the set was cut from"
                )
                say(f"not repaired: {shard['name']}: its scan {name} {why}")
            else:
                todo[uid] = (source, recorded, shard)
        shutil.rmtree(repair_folder.root, ignore_errors=True)
        try:
            done = _cut(manifest, todo, repair_folder, workers) if todo else 0
        finally:
            shutil.rmtree(repair_folder.root, ignore_errors=True)
    return len(shards) - done


def _sharding_settings(manifest: Manifest) -> ShardingSettings:
    """The settings with which the set was cut. Raises UserError when the manifest lacks them."""
    meta = manifest.meta
    if "tiling" not in meta or "sources" not in meta or meta.get("format") not in ("tar", "arrow"):
        raise UserError(f"{manifest.root}: its manifest does not say how it was cut: cut the set anew")
    return ShardingSettings(
        Tiling.from_meta(meta["tiling"]), meta["format"],
        store="scans" if manifest_schema.stores_scans(meta) else "subscans",
        compress="zstd" if manifest_schema.compressed(meta) else "none", allow_gaps=True,
        modality=_modality(manifest), sample_version=meta.get("sample_version", 1),
    )  # fmt: skip


def _modality(manifest: Manifest) -> Modality:
    """The modality of the scans. Raises UserError for an unknown one."""
    said = manifest.meta.get("modality", "ct")
    if said not in get_args(Modality):
        raise UserError(f"{manifest.root}: its manifest names the modality {said!r}: cut the set anew")
    modality: Modality = said
    return modality


def _find_scans(manifest: Manifest, luna: str | None, scans: tuple[str, ...]) -> ScanListing:
    if luna is None:
        search = SearchOptions(
            allow_gaps=True, resample=True, assume_hu=True, modality=_modality(manifest).upper()
        )
        found = find_scans(list(scans), manifest.root, options=search)
        found.sources = [straightened(source) for source in found.sources]
        return found
    subsets = {source["subset"] for source in manifest.meta["sources"]}
    if min(subsets, default=-1) < 0:
        raise UserError(f"{manifest.root}: was cut by p2w shard: name the folders it got with --scans")
    return find_luna(luna, sorted(subsets))[0]


def _cut(
    manifest: Manifest,
    todo: dict[str, tuple[ScanSource, dict[str, Any], dict[str, Any]]],
    repair_folder: ScanFolder,
    workers: int,
) -> int:
    """Cut scans and replace those of their shards that come out as the manifest says; the number of replaced ones."""
    done = 0
    os.makedirs(os.path.join(repair_folder.root, "scans"))

    def finish(source: ScanSource, record: dict[str, Any]) -> str:
        nonlocal done
        _, recorded, shard = todo[source.uid]
        why = _difference(manifest, record, recorded, shard, repair_folder)
        if why is None:
            os.replace(repair_folder.shard(source.uid), os.path.join(manifest.root, shard["name"]))
            sync_to_disk(manifest.root)
            done += 1
            say(
                f"repaired: {shard['name']}, from {source.name}: crc32c {shard['crc32c']:08x} as in the manifest"
            )
        else:
            say(f"not repaired: {shard['name']}: its scan {source.name} {why}")
        return f"{done} repaired"

    cut_in_workers([source for source, *_ in todo.values()], repair_folder, JobShare(), workers, finish)
    return done


def _difference(
    manifest: Manifest,
    record: dict[str, Any],
    recorded: dict[str, Any],
    shard: dict[str, Any],
    folder: ScanFolder,
) -> str | None:
    """Why the new shard in `folder` is not the one of the manifest; None when, read back from the disk, it is.

    `recorded` is what the manifest says of its source.
    """
    if "bad" in record:
        return record["bad"]
    if record["checksum"] != recorded["checksum"]:
        return (
            f"has changed since it was cut ({record['checksum']}, the manifest says {recorded['checksum']}): bring the "
            "old one back, or cut the set anew"
        )
    if record["shard"] is None or verify_shard(manifest, shard, folder.root) is not None:
        return f"is the same but gives another shard now; the set was cut by {manifest.meta.get('tool')}: cut it anew"
    return None
