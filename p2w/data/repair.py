"""Damaged shards cut again from their scans, and put in place only when they are what the manifest tells of.

The scan is cut by `cut.cut_scan`, as at first, into `DIR/.repair`. All settings come from the manifest. It does not
say whether gaps in DICOM series were allowed, and need not: where none were, there are none.
"""

import os
import shutil
from concurrent.futures import FIRST_COMPLETED, wait
from typing import Any

from p2w.data.cut import cut_scan
from p2w.data.find import Found, Source, find_luna, find_scans
from p2w.data.folder import Folder, Settings, Share
from p2w.data.locks import hold
from p2w.data.manifest import Manifest
from p2w.data.pool import pool
from p2w.data.progress import Progress, say
from p2w.data.run import default_workers, result_of
from p2w.data.subscan import Tiling
from p2w.data.verify import check_shard
from p2w.errors import UserError


def repair(
    manifest: Manifest, shards: list[dict[str, Any]], luna: str | None, scans: tuple[str, ...], workers: int
) -> int:
    """Cut these shards again; how many could not be. Says what became of each.

    Raises UserError when the folders of the scans are not there, or the manifest does not say how to cut.
    """
    settings, sources = _settings(manifest), {source["uid"]: source for source in manifest.meta["sources"]}
    beside = Folder(os.path.join(manifest.root, ".repair"), settings)
    busy = f"{manifest.root}: another process repairs it; wait for it"
    with hold(os.path.join(manifest.root, ".run"), "repair", busy):
        found = _find(manifest, luna, scans)
        known = {source.uid: source for source in found.sources}
        bad = dict(found.bad)
        todo: dict[str, tuple[Source, dict[str, Any]]] = {}
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


def _settings(manifest: Manifest) -> Settings:
    """How the set was cut."""
    meta = manifest.meta
    if "tiling" not in meta or "sources" not in meta or meta.get("format") not in ("tar", "arrow"):
        raise UserError(f"{manifest.root}: its manifest does not say how it was cut: cut the set anew")
    tiling = meta["tiling"]
    tile = (tiling["tile"][0], tiling["tile"][1], tiling["tile"][2])
    return Settings(Tiling(tile, tiling["z_margin"], tiling["min_std_hu"]), meta["format"], allow_gaps=True)


def _find(manifest: Manifest, luna: str | None, scans: tuple[str, ...]) -> Found:
    if luna is None:
        return find_scans(list(scans), manifest.root, allow_gaps=True)
    subsets = {source["subset"] for source in manifest.meta["sources"]}
    if min(subsets, default=-1) < 0:
        raise UserError(f"{manifest.root}: was cut by shard_scans.py: name the folders it got with --scans")
    return find_luna(luna, sorted(subsets))[0]


def _cut(
    manifest: Manifest, todo: dict[str, tuple[Source, dict[str, Any]]], beside: Folder, workers: int
) -> int:
    """Cut and compare; how many shards were put in place."""
    done = 0
    os.makedirs(os.path.join(beside.root, "scans"))
    progress = Progress(len(todo), "scans")
    with progress, pool(workers) as submit:
        waiting = {submit(cut_scan, source, beside, Share()): uid for uid, (source, _) in todo.items()}
        while waiting:
            for task in wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED).done:
                uid = waiting.pop(task)
                source, shard = todo[uid]
                why = _differs(manifest, result_of(task, source, waiting), shard, beside)
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


def _differs(manifest: Manifest, record: dict[str, Any], shard: dict[str, Any], beside: Folder) -> str | None:
    """Why what was cut is not the shard of the manifest; None when it is, as read back from the disk."""
    if "bad" in record:
        return record["bad"]
    told = next(source for source in manifest.meta["sources"] if source["uid"] == record["uid"])
    if record["checksum"] != told["checksum"]:
        return (
            f"has changed since it was cut ({record['checksum']}, the manifest says {told['checksum']}): bring the "
            "old one back, or cut the set anew"
        )
    if record["shard"] is None or check_shard(manifest, shard, beside.root) is not None:
        return f"is the same but gives another shard now; the set was cut by {manifest.meta.get('tool')}: cut it anew"
    return None


def _sync(folder: str) -> None:
    """Make a rename durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
