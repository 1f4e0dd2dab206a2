"""A small data set with visible structure, written by the package's own writers."""

import functools
import os
from pathlib import Path

import numpy as np

from p2w.files import write_published
from p2w.shards.manifest import manifest_bytes
from p2w.shards.manifest_schema import MANIFEST_NAME, MANIFEST_VERSION
from p2w.shards.writer import open_shard

SHAPE = (16, 32, 32)


def structured_hu(scan: int, tile: int, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """int16 HU (D, H, W) in [-1000, 1000]: a smooth ramp of the scan's own direction, and a ball of the sub-scan's own."""
    return _structured_hu(scan, tile, shape).copy()


@functools.cache
def _structured_hu(scan: int, tile: int, shape: tuple[int, int, int]) -> np.ndarray:
    rng = np.random.default_rng([7, scan, tile])
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    direction, centre = rng.normal(size=3), rng.uniform(-0.6, 0.6, 3)
    ramp = np.tensordot(direction / np.linalg.norm(direction), grid, 1)
    ball = np.linalg.norm(grid - centre[:, None, None, None], axis=0) < rng.uniform(0.3, 0.6)
    return np.clip(600 * ramp + 800 * ball - 300, -1000, 1000).astype("<i2")


def write_structured_set(
    folder: Path, form: str = "tar", train: int = 6, val: int = 2, per: int = 4, compress: str = "none"
) -> Path:
    """A data set of `train` + `val` scans with `per` sub-scans each."""
    folder.mkdir(parents=True)
    rows, shards = [], []
    for scan in range(train + val):
        uid = f"1.2.826.{scan:04d}"
        shard = open_shard(os.fspath(folder / f"{uid}.{form}"), SHAPE, compress=compress)
        for tile in range(per):
            voxels = structured_hu(scan, tile)
            row = {"key": f"{uid}/z{tile * SHAPE[0]:04d}_y0000_x0000", "scan_uid": uid, "subset": -1}
            row |= {
                "z": tile * SHAPE[0],
                "y": 0,
                "x": 0,
                "spacing_z": 2.5,
                "spacing_y": 0.7,
                "spacing_x": 0.7,
            }
            row |= {"mean_hu": float(voxels.mean()), "std_hu": float(voxels.std()), "shard": f"{uid}.{form}"}
            rows.append(shard.add({**row, "split": "train" if scan < train else "val"}, voxels))
        done = shard.close()
        shards.append({"name": f"{uid}.{form}", "nbytes": done.nbytes, "crc32c": done.crc32c})
    meta = {
        "schema": MANIFEST_VERSION,
        "format": form,
        "shape": list(SHAPE),
        "dtype": "int16",
        "shards": shards,
    }
    meta |= {"window_hu": [-1000, 1000], "axis_order": "zyx", "split": {"rule": "scan", "val_scans": val}}
    if compress != "none":
        meta["compression"] = compress
    write_published(
        os.fspath(folder / MANIFEST_NAME), manifest_bytes(rows, meta), os.fspath(folder / "unfinished")
    )
    return folder
