"""``sbatch --array slurm/finetune.sbatch`` on a real Slurm: trials and lines of commands, requeued and continued."""

import json
import shlex

import pytest
from slurm_cluster import Cluster
from target_sets import write_target_set

from p2w.finetune import results

EPOCHS = "10"  # of a trial that is disturbed, each of which sleeps a while
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]
SMALL = [
    "--width",
    "2",
    "--recipe.max-epochs",
    "3",
    "--recipe.batch",
    "8",
    "--recipe.epoch-steps",
    "0",
    "--init",
    "random",
]


@pytest.fixture(scope="module")
def balls(tmp_path_factory):
    return write_target_set(tmp_path_factory.mktemp("balls") / "set")


def test_a_task_a_trial_and_a_task_a_line(cluster: Cluster, balls, tmp_path):
    run, other = tmp_path / "run", tmp_path / "a b"
    argv = ["--task", balls, "--run-dir", run, "--trials", "2", *SMALL]
    job = cluster.sbatch("--array=0-1", "slurm/finetune.sbatch", *argv)
    line = ["python", "launch/finetune.py", "--task", balls, "--run-dir", other, "--trials", "1", *SMALL]
    (tmp_path / "jobs.txt").write_text("python -c pass\n" + shlex.join(map(str, line)) + "\n")
    lines = cluster.sbatch("--array=1-3", "slurm/finetune.sbatch", tmp_path / "jobs.txt")
    ends = [cluster.ended(f"{job}_{task}")["ExitCode"] for task in (0, 1)]
    assert ends == ["0:0"] * 2, cluster.log(f"{job}_0") + cluster.log(f"{job}_1")
    ends = [cluster.ended(f"{lines}_{task}")["ExitCode"] for task in (1, 2, 3)]
    assert ends == ["0:0", "0:0", "2:0"], cluster.log(f"{lines}_2") + cluster.log(f"{lines}_3")
    assert "line 3 of" in cluster.log(f"{lines}_3")
    assert results.read_fine_tuning(run).finished and results.read_fine_tuning(other).finished


def test_a_warning_requeues_and_the_trial_goes_on(cluster: Cluster, balls, tmp_path):
    run = tmp_path / "run"
    argv = ["--task", balls, "--run-dir", run, "--trials", "1", *SMALL]
    argv += ["--recipe.max-epochs", EPOCHS, "--recipe.patience", EPOCHS, "--recipe.checkpoint-minutes", "0"]
    job = cluster.sbatch("slurm/finetune.sbatch", *argv)
    epochs = run / "trial-00" / "metrics.jsonl"
    cluster.wait(job, "third epoch", lambda: epochs.exists() and epochs.read_text().count("\n") > 2)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    end = cluster.ended(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), cluster.log(job)
    assert "continues after epoch" in cluster.log(job) and results.read_fine_tuning(run).finished
    done = [json.loads(line)["step"] for line in epochs.read_text().splitlines()]
    assert done == list(range(1, int(EPOCHS) + 1))


def test_what_cannot_be_done_is_one_line(cluster: Cluster):
    job = cluster.sbatch("slurm/finetune.sbatch", "nowhere.txt")
    assert cluster.ended(job)["ExitCode"] == "2:0"
    assert cluster.log(job).count("\n") == 1 and "no file nowhere.txt" in cluster.log(job)


def test_a_warning_to_the_last_task_of_an_array_requeues_that_task_alone(cluster: Cluster, balls, tmp_path):
    """The last task carries the array's own number, which means all of its tasks."""
    run = tmp_path / "run"
    argv = ["--task", balls, "--run-dir", run, "--trials", "2", *SMALL]
    argv += ["--recipe.max-epochs", EPOCHS, "--recipe.patience", EPOCHS, "--recipe.checkpoint-minutes", "0"]
    array = cluster.sbatch("--array=0-1", "slurm/finetune.sbatch", *argv)
    epochs = [run / f"trial-0{trial}" / "metrics.jsonl" for trial in (0, 1)]
    cluster.wait(
        f"{array}_1",
        "epochs of both",
        lambda: all(path.exists() and path.read_text().count("\n") > 2 for path in epochs),
    )
    cluster.run("scancel", "--batch", "--signal=USR1", f"{array}_1")
    ends = [cluster.ended(f"{array}_{task}") for task in (0, 1)]
    logs = [cluster.log(f"{array}_{task}") for task in (0, 1)]
    assert [(end["JobState"], end["Restarts"]) for end in ends] == [("COMPLETED", "0"), ("COMPLETED", "1")], (
        logs
    )
