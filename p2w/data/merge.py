"""The records of all scans into one manifest: the step that makes a folder of shards a data set."""

import hashlib
import os
from typing import Any

import p2w
from p2w.data.find import Found
from p2w.data.folder import Folder, Settings
from p2w.data.grid import CANONICAL
from p2w.data.manifest import NAME, VERSION, dump, manifest_bytes, publish
from p2w.data.subscan import WINDOW_HU

RULE = "by scan: the first of the scans ordered by sha256(seed:uid) are val, the others train"


def split(uids: list[str], settings: Settings) -> set[str]:
    """The scans of the validation set: the same for the same scans, at least one where there are two."""
    order = sorted(uids, key=lambda uid: hashlib.sha256(f"{settings.split_seed}:{uid}".encode()).digest())
    wanted = round(settings.val_fraction * len(uids))
    if settings.val_fraction > 0:
        wanted = min(max(wanted, 1), len(uids) - 1)
    return set(order[: max(0, wanted)])


def unfinished(found: Found, folder: Folder) -> list[str]:
    """Names of the scans that no process has finished yet."""
    return [source.name for source in found.sources if folder.record(source.uid) is None]


def merge(found: Found, folder: Folder) -> dict[str, Any]:
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
    val = split(full, folder.settings)
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
        "report.json": dump(report, indent=1),
        NAME: manifest_bytes(rows, meta),
    }
    for name, data in files.items():
        publish(os.path.join(folder.root, name), data, folder.aside(name, "merge"))
    return meta


def _meta(
    good: list[dict[str, Any]],
    bad: list[dict[str, str]],
    train: list[str],
    val: list[str],
    settings: Settings,
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
        "schema": VERSION,
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
