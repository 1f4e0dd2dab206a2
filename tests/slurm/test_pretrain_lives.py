"""``sbatch slurm/pretrain.sbatch``: cancelled, planned, refused, submitted twice, and preempted again and again."""

import json
from pathlib import Path

import pytest
from pretrain_runs import Start, losses
from processes import EXEMPT
from slurm_cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

LIVES = 28  # steps of a run that is preempted three times on its way


def test_scancel_saves_and_is_final(cluster, pretrain, tmp_path):
    """Of the `python` on the path: Slurm's own signal reaches torchrun and its rank."""
    run = tmp_path / "run"
    job = pretrain(run, "--nodes=1", P2W_PYTHON="")
    cluster.wait(job, "first steps", lambda: len(losses(run)) >= 3)
    cluster.run("scancel", job)
    assert cluster.ended(job)["JobState"] == "CANCELLED"
    cluster.wait(job, "last word", lambda: "ended by Slurm" in cluster.log(job))
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "told to stop"
    assert (run / "checkpoints" / f"step-{status['step']:08d}").is_dir()


def test_dry_run_plans_one_process_a_gpu_and_starts_nothing(cluster, pretrain, tmp_path):
    run = tmp_path / "run"
    job = pretrain(run, "--gpus-per-node=2", more=("--dry-run",))
    end = cluster.ended(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "0")
    assert "4 process(es) on 2 node(s)" in cluster.log(job)
    assert not run.exists()


@pytest.mark.parametrize(
    ("recipe", "shards", "told"),
    [("paper", "nowhere", "no folder nowhere in"), ("papier", "tests", "tests has no manifest.parquet")],
)
def test_what_is_missing_is_one_line_and_final(cluster, recipe, shards, told):
    job = cluster.sbatch("slurm/pretrain.sbatch", recipe, P2W_SHARDS=shards)
    end = cluster.ended(job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "2:0", "0")
    assert cluster.log(job).count("\n") == 1
    assert told in cluster.log(job) and "sbatch --array=0-15 slurm/shard.sbatch" in cluster.log(job)


def test_a_refused_setting_is_one_line_and_final(cluster, pretrain, shards, tmp_path):
    job = cluster.sbatch("slurm/pretrain.sbatch", "papier", P2W_SHARDS=str(shards), P2W_RUN=str(tmp_path))
    end = cluster.ended(job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "2:0", "0")
    assert cluster.log(job).count("\n") == 1 and "papier" in cluster.log(job)


def test_the_same_job_twice_ends_the_second_one(cluster: Cluster, pretrain: Start, tmp_path: Path) -> None:
    """It took the checkpoints of the first one for its own progress, and began anew every 8 s for ever."""
    run = tmp_path / "run"
    first = pretrain(run, "--nodes=1", more=("--train.steps=100000",))
    cluster.wait(first, "first steps", lambda: len(losses(run)) >= 3)
    second = pretrain(run, "--nodes=1", more=("--train.steps=100000",))
    end = cluster.ended(second)
    log = cluster.log(second)
    assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("FAILED", "0", "2:0"), log
    assert log.count("another job trains in") == 1, log
    assert cluster.job(first)["JobState"] == "RUNNING", cluster.log(first)
    cluster.run("scancel", first)
    cluster.ended(first)
    steps = [step for step, _ in losses(run)]
    assert steps == list(range(1, len(steps) + 1))


def test_a_preemption_before_the_first_checkpoint_of_a_late_life_does_not_end_the_job(
    cluster: Cluster, pretrain: Start, tmp_path: Path
) -> None:
    """Two lives got further; the third is warned before it trains. All restarts were counted, not those in vain."""
    run = tmp_path / "run"
    limits = {"P2W_MAX_REQUEUES": "1", "P2W_GIVE_UP_MINUTES": "0", EXEMPT: "-2-0"}  # the third is no fork
    job = pretrain(run, "--nodes=1", more=(f"--train.steps={LIVES}",), **limits)
    for life in range(3):
        cluster.wait(job, f"life {life}", lambda life=life: cluster.job(job).get("Restarts") == str(life))
        # Slurm calls a job running before its shell has begun, and a shell without a trap dies of the warning. Here it has
        # begun; torchrun has not even been imported.
        cluster.wait(job, "start", lambda life=life: cluster.log(job).count(": processes 1, threads") > life)
        if life < 2:
            before = len(losses(run))
            cluster.wait(job, "steps", lambda before=before: len(losses(run)) > before + 1)
        cluster.run("scancel", "--batch", "--signal=USR1", job)
        cluster.wait(job, "requeue", lambda life=life: cluster.log(job).count(": requeued") == life + 1)
    end = cluster.ended(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "3"), cluster.log(job)
    assert [step for step, _ in losses(run)] == list(range(1, LIVES + 1))
