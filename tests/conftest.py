"""What the tests share: a small data set written by the package's own writers, and real processes to train on it."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from processes import REPO, kill_group

from p2w.data.manifest import NAME, VERSION, manifest_bytes, publish
from p2w.data.shard import open_shard

SHAPE = (16, 32, 32)


def structured_hu(scan: int, tile: int, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """int16 HU (D, H, W) in [-1000, 1000]: a smooth ramp of the scan's own direction, and a ball of the tile's own."""
    rng = np.random.default_rng([7, scan, tile])
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    direction, centre = rng.normal(size=3), rng.uniform(-0.6, 0.6, 3)
    ramp = np.tensordot(direction / np.linalg.norm(direction), grid, 1)
    ball = np.linalg.norm(grid - centre[:, None, None, None], axis=0) < rng.uniform(0.3, 0.6)
    return np.clip(600 * ramp + 800 * ball - 300, -1000, 1000).astype("<i2")


def write_structured_set(folder: Path, form: str = "tar", train: int = 6, val: int = 2, per: int = 4) -> Path:
    """A data set of `train` + `val` scans with `per` sub-scans each."""
    folder.mkdir(parents=True)
    rows, shards = [], []
    for scan in range(train + val):
        uid = f"1.2.826.{scan:04d}"
        shard = open_shard(os.fspath(folder / f"{uid}.{form}"), SHAPE)
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
    meta = {"schema": VERSION, "format": form, "shape": list(SHAPE), "dtype": "int16", "shards": shards}
    meta |= {"window_hu": [-1000, 1000], "axis_order": "zyx", "split": {"rule": "scan", "val_scans": val}}
    publish(os.fspath(folder / NAME), manifest_bytes(rows, meta), "test")
    return folder


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory) -> Path:
    """24 + 8 sub-scans of (16, 32, 32) in tar shards; not to be changed."""
    return write_structured_set(tmp_path_factory.mktemp("tar") / "set")


@pytest.fixture(scope="session")
def tiny_arrow_set(tmp_path_factory) -> Path:
    """The same in Arrow shards."""
    return write_structured_set(tmp_path_factory.mktemp("arrow") / "set", "arrow")


@pytest.fixture
def start():
    """Start a command in a process group of its own, output to files; whatever is left of it is killed after the test."""
    running = []

    def begin(command: list[str], folder: Path, **environment: str) -> subprocess.Popen:
        folder.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment}
        with open(folder / "out.txt", "ab") as out, open(folder / "err.txt", "ab") as err:
            process = subprocess.Popen(
                ["timeout", "-k", "5", "150", *command],
                stdout=out, stderr=err, env=env, cwd=REPO, start_new_session=True,
            )  # fmt: skip
        running.append(process)
        return process

    yield begin
    for process in running:
        kill_group(process)
