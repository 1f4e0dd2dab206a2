"""``sbatch --array slurm/shard.sbatch`` on a real Slurm: the same bytes as one process, however the work is shared."""

import hashlib
from pathlib import Path

import pytest
from slurm_cluster import CUT, Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]


def hashes(folder: Path) -> dict[str, str]:
    """Every file of a data set by its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tasks(cluster: Cluster, job: str, count: int) -> list[str]:
    """Exit codes of an array's tasks, once all have ended."""
    return [cluster.ended(f"{job}_{task}")["ExitCode"] for task in range(count)]


def test_an_array_writes_the_bytes_of_one_process(cluster, luna, shards, tmp_path):
    out = tmp_path / "shards"
    job = cluster.sbatch("--array=0-2", "slurm/shard.sbatch", "--luna", luna, f"--out={out}", *CUT)
    assert tasks(cluster, job, 3) == ["0:0"] * 3, "".join(cluster.log(f"{job}_{task}") for task in range(3))
    assert hashes(out) == hashes(shards)


def test_a_folder_of_scans_is_shared_the_same_way(cluster, luna, tmp_path):
    out = tmp_path / "shards"
    job = cluster.sbatch("--array=1-2", "slurm/shard.sbatch", P2W_SCANS=str(luna), P2W_SHARDS=str(out))
    ends = [cluster.ended(f"{job}_{task}")["ExitCode"] for task in (1, 2)]
    assert ends == ["0:0"] * 2, cluster.log(f"{job}_1") + cluster.log(f"{job}_2")
    assert len(list(out.glob("*.tar"))) == 5
    assert (out / "manifest.parquet").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["slurm/shard.sbatch", "--luna", "nowhere"], "no folder nowhere in"),
        (["--array=0,2", "slurm/shard.sbatch", "--luna", "tests"], "number them without gaps"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_final(cluster, options, told):
    job = cluster.sbatch(*options)
    name = f"{job}_0" if options[0].startswith("--array") else job
    end = cluster.ended(name)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "2:0", "0")
    assert cluster.log(name).count("\n") == 1 and told in cluster.log(name)
