"""Small data sets for the tests of the stream, written by the package's own writers."""

import os
from pathlib import Path

import numpy as np

from p2w.shards.manifest import manifest_bytes
from p2w.shards.manifest_schema import MANIFEST_NAME, MANIFEST_VERSION
from p2w.shards.writer import open_shard

SHAPE = (2, 4, 8)


def voxels_of(scan: int, tile: int, shape=SHAPE) -> np.ndarray:
    """The voxels that `write_set` gives sub-scan number `tile` of scan number `scan`."""
    return np.random.default_rng([scan, tile]).integers(-1000, 1001, shape).astype("<i2")


def write_set(folder: Path, form="tar", train=(5, 3, 7), val=(4,), shape=SHAPE) -> list[np.ndarray]:
    """Scans with so many sub-scans each; returns the voxels of every id."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, shards, wholes = [], [], []
    for scan, count in enumerate([*train, *val]):
        uid = f"1.2.{scan:04d}"
        shard = open_shard(os.fspath(folder / f"{uid}.{form}"), shape)
        for tile in range(count):
            row = {"key": f"{uid}/z{tile * 64:04d}_y0000_x0000", "scan_uid": uid, "subset": -1}
            row |= {"z": tile * 64, "y": 0, "x": 0, "spacing_z": 1.25, "spacing_y": 0.75, "spacing_x": 0.75}
            row |= {"mean_hu": 0.0, "std_hu": 577.0, "shard": f"{uid}.{form}"}
            row["split"] = "train" if scan < len(train) else "val"
            wholes.append(voxels_of(scan, tile, shape))
            rows.append(shard.add(row, wholes[-1]))
        done = shard.close()
        shards.append({"name": f"{uid}.{form}", "nbytes": done.nbytes, "crc32c": done.crc32c})
    meta = {
        "schema": MANIFEST_VERSION,
        "format": form,
        "shape": list(shape),
        "dtype": "int16",
        "shards": shards,
    }
    (folder / MANIFEST_NAME).write_bytes(manifest_bytes(rows, meta))
    return wholes
