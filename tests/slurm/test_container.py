"""P2W_CONTAINER: every command of p2w runs in the image, Slurm's own outside, on two real nodes.

The image's program is a stand-in that records its arguments and runs the command: what an image changes is not tested here.
"""

import json
import os
import sys
from pathlib import Path

import pytest
from pretrain_runs import SMALL
from slurm_cluster import CUT, Cluster
from test_shard_array import hashes

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

APPTAINER = """#!/bin/bash
echo "$SLURMD_NODENAME $*" >> "{said}"
[[ $1 == exec && $2 == --nv && $3 == --bind && $5 == --pwd && $7 == image.sif ]] || exit 9
cd "$6" && shift 7 && IN_IMAGE=1 exec "$@"
"""


@pytest.fixture
def image(tmp_path: Path) -> dict[str, str]:
    """Variables of a job that runs in the image, with the stand-in on its path; it writes tmp_path/said."""
    program = tmp_path / "bin" / "apptainer"
    program.parent.mkdir()
    program.write_text(APPTAINER.format(said=tmp_path / "said"))
    program.chmod(0o755)
    return {
        "P2W_CONTAINER": "image.sif",
        "PATH": f"{program.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


def test_an_array_cuts_in_the_image(
    cluster: Cluster, luna: Path, shards: Path, image, tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    job = cluster.sbatch("slurm/shard.sbatch", "--luna", luna, f"--out={out}", *CUT, **image)
    assert cluster.ended(job)["ExitCode"] == "0:0", cluster.log(job)
    assert hashes(out) == hashes(shards)
    said = (tmp_path / "said").read_text().splitlines()
    assert len(said) == 2 and said[1].count("python -m p2w shard-luna --luna") == 1


def test_two_nodes_train_in_the_image(cluster: Cluster, shards: Path, image, tmp_path: Path) -> None:
    run = tmp_path / "run"
    small = [*SMALL, "--train.steps=3"]
    where = [f"--shards={shards}", "--run", str(run)]
    job = cluster.sbatch("--nodes=2", "slurm/pretrain.sbatch", *small, *where, P2W_END_SECONDS="15", **image)
    assert cluster.ended(job)["ExitCode"] == "0:0", cluster.log(job)
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    said = (tmp_path / "said").read_text().splitlines()
    trained = [line.split()[0] for line in said if "-m torch.distributed.run" in line]
    assert sorted(trained) == ["node1", "node2"]
    assert not any("scontrol" in line or "srun" in line for line in said)


def test_an_environment_without_p2w_is_one_line(cluster: Cluster, tmp_path: Path) -> None:
    """The line comes after what the shell itself says."""
    job = cluster.sbatch("slurm/shard.sbatch", P2W_PYTHON="/nowhere/python")
    end = cluster.ended(job)
    assert (end["JobState"], end["ExitCode"]) == ("FAILED", "2:0")
    assert "cannot run p2w: submit from the checkout or activate the environment" in cluster.log(job)
