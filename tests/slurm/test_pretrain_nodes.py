"""``sbatch slurm/pretrain.sbatch`` on two real nodes: it trains, survives warnings and deaths, and refuses bad input."""

import contextlib
import json
import os
import re
import signal
from pathlib import Path

import psutil
import pytest
from pretrain_runs import SMALL, STEPS, Start, losses
from slurm_cluster import FIRST_UNFORKED, Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def calm(cluster: Cluster, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The job and folder of the run that nothing disturbs, beside the disturbed ones; named by variables."""
    run = tmp_path_factory.mktemp("slurm") / "calm"
    where = {"P2W_SHARDS": str(shards), "P2W_RUN": str(run)}
    return cluster.sbatch("--nodes=2", "slurm/pretrain.sbatch", *SMALL, **where), run


def test_two_nodes_train_as_one_and_neither_a_warning_nor_a_dead_worker_changes_it(
    cluster: Cluster, pretrain: Start, calm: tuple[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "disturbed"
    job = pretrain(run, **FIRST_UNFORKED)  # the warning goes from Slurm to the ranks themselves
    cluster.wait(job, "first steps", lambda: len(losses(run)) >= 3)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # what Slurm does before the time limit
    cluster.wait(job, "second start", lambda: "continues after" in cluster.log(job))
    stopped = stops(cluster.log(job))[0]
    assert 3 <= stopped < STEPS
    assert f"continues after step {stopped} of {STEPS}" in cluster.log(job)

    cluster.wait(job, "steps after the restart", lambda: len(losses(run)) > stopped)
    worker(cluster, run, node=1).kill()
    end = cluster.ended(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), cluster.log(job)
    assert f"failed with exit code 1; newest checkpoint {stopped:08d}" in cluster.log(job)
    assert cluster.log(job).count(f"continues after step {stopped} of") == 2
    same_as(cluster, calm, run)


def test_a_signal_to_the_steps_a_dead_step_daemon_and_a_requeue_change_nothing(
    cluster: Cluster, pretrain: Start, calm: tuple[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "disturbed"
    job = pretrain(run)
    cluster.wait(job, "first steps", lambda: len(losses(run)) >= 3)
    cluster.run("scancel", "--signal=TERM", job)  # to the ranks of both nodes, not to the batch script
    cluster.wait(job, "go on", lambda: "told to stop, but the job was not" in cluster.log(job))
    (stopped,) = stops(cluster.log(job))

    cluster.wait(job, "steps after the signal", lambda: len(losses(run)) > stopped)
    cluster.run("scontrol", "requeue", job)
    cluster.wait(job, "requeue", lambda: cluster.log(job).count("continues after") == 2)
    told = stops(cluster.log(job))
    assert cluster.job(job)["Restarts"] == "1" and len(told) == 2 and stopped < told[1] < STEPS

    cluster.wait(job, "steps after the requeue", lambda: len(losses(run)) > told[1])
    assert f"continues after step {told[1]} of {STEPS}" in cluster.log(job)  # no step was lost
    os.kill(step_daemon(job, "node2"), signal.SIGKILL)  # its slurmd lives, and srun would wait for ever
    end = cluster.ended(job)
    # Its tasks may have worked on to their end, or died with it: then the job was requeued once more.
    assert end["JobState"] == "COMPLETED" and end["Restarts"] in ("1", "2"), cluster.log(job)
    same_as(cluster, calm, run)


def stops(log: str) -> list[int]:
    """The steps at which a run was told to stop."""
    return [int(step) for step in re.findall(r"told to stop at step (\d+)", log)]


def same_as(cluster: Cluster, calm: tuple[str, Path], run: Path) -> None:
    """Both runs are whole, and every loss is the same."""
    job, quiet = calm
    end = cluster.ended(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "0"), cluster.log(job)
    for node in ("node1: processes 1", "node2: processes 1", "2 process(es) on 2 node(s)"):
        assert node in cluster.log(job)
    starts = json.loads((quiet / "run.json").read_text())["starts"]
    assert [start["world_size"] for start in starts] == [2]
    assert [step for step, _ in losses(quiet)] == list(range(1, STEPS + 1))
    assert losses(run) == losses(quiet)
    for folder in (quiet, run):
        assert json.loads((folder / "status.json").read_text())["state"] == "finished"
        assert (folder / "checkpoints" / f"step-{STEPS:08d}").is_dir()


def step_daemon(job: str, node: str) -> int:
    """The slurmstepd that runs the job's tasks on this node: the parent of one of them."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, StopIteration):
            variables = (entry / "environ").read_bytes().split(b"\0")
            if not {f"SLURM_JOB_ID={job}".encode(), f"SLURMD_NODENAME={node}".encode()} <= set(variables):
                continue
            parent = next(
                x for x in (entry / "status").read_text().splitlines() if x.startswith("PPid:")
            ).split()[1]
            if b"slurmstepd" in Path(f"/proc/{parent}/cmdline").read_bytes():
                return int(parent)
    raise AssertionError(f"job {job} has no step daemon on {node}")


def worker(cluster: Cluster, run: Path, node: int) -> psutil.Process:
    """The rank of the run that torchrun, a fork, has started on a node, counted from 0."""
    for pid, words in list(cluster.gate.living.items()):
        if str(run) in words and f"--node-rank {node}" in " ".join(words):
            return psutil.Process(pid).children()[0]
    raise AssertionError(f"no rank of {run} runs on node {node}")
