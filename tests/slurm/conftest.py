"""The cluster, small scans and their shards, for the tests of ``slurm/``."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import processes
import pytest
import SimpleITK as sitk
from pretrain_runs import SMALL, Start
from slurm_cluster import CUT, DAEMONS, FORKED, PREFIX, ROOT, TORCHRUN, Cluster, start, stop


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes, or a skip that says what is missing."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if missing := [name for name in (*DAEMONS, "sbatch", "srun") if not shutil.which(name, path=path)]:
        pytest.skip(f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge")
    for old in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):  # of a session that was killed
        owner = old.name.removeprefix(PREFIX).split("-")[0]
        if os.access(old, os.W_OK) and not Path(f"/proc/{owner}").exists():
            stop(old)
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
    folder.chmod(0o755)
    try:
        yield start(folder, forked=FORKED | {TORCHRUN})
    finally:
        stop(folder)


@pytest.fixture(scope="session")
def luna(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five small scans in LUNA16's layout, 8 sub-scans: a ball of soft tissue in air, smooth and noisy."""
    folder = tmp_path_factory.mktemp("slurm") / "LUNA16"
    z, y, x = np.ogrid[:64, :128, :128]
    for scan, tiles in enumerate([1, 2, 1, 2, 2]):
        random = np.random.default_rng(scan)
        centre, radius = random.uniform(24, 40), random.uniform(16, 28)
        ball = (z - centre) ** 2 + ((y - 2 * centre) ** 2 + (x - 64) ** 2) / 4 < radius**2
        voxels = np.tile(np.where(ball, 40, -900), (1, tiles, 1)) + random.normal(
            0, 30, (64, 128 * tiles, 128)
        )
        image = sitk.GetImageFromArray(voxels.astype(np.int16))
        image.SetSpacing((0.75, 0.75, 1.25))  # x y z, mm
        (folder / f"subset{scan % 2}").mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(image, str(folder / f"subset{scan % 2}" / f"1.2.3.{scan}.mhd"))
    return folder


@pytest.fixture(scope="session")
def shards(luna: Path) -> Path:
    """The five scans cut by one process, without Slurm."""
    out = luna.parent / "shards"
    command = [sys.executable, "preprocess/shard_luna.py", "--luna", str(luna), "--out", str(out), *CUT]
    processes.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=60)
    return out


@pytest.fixture
def pretrain(cluster: Cluster, shards: Path) -> Start:
    """Submit the small run into a folder."""

    def submit(run: Path, *options: str, more: tuple[str, ...] = (), **variables: str) -> str:
        where = [f"--shards={shards}", "--run", str(run)]
        words = ["--nodes=2", *options, "slurm/pretrain.sbatch", *SMALL, *where, *more]
        return cluster.sbatch(*words, P2W_END_SECONDS="15", **variables)

    return submit
