"""wandb and MLflow as they are: a run's metrics reach them without a server, and their faults do not reach the run.

A toy in `test_trackers.py` shows what else may go wrong. What is not installed is skipped.
"""

import json
import socket
from pathlib import Path

import pytest
from target_sets import write_target_set

from p2w.commands import finetune, train
from p2w.log import read_metrics
from p2w.world import World

pytestmark = pytest.mark.slow

TINY = """
--data.batch 4 --data.reader-threads 0 --pretext.size 8 16 16 --model.width 2 --train.precision fp32
--train.validate-every 4 --train.checkpoint-every 4 --train.probe-every 4 --train.log-every 2
""".split()  # noqa: SIM905


@pytest.fixture
def run(tiny_set, tmp_path, monkeypatch, capfd):
    """Train a tiny run in tmp_path/jane, `p2w train` without a process; returns its folder and stderr."""
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MLFLOW_TRACKING_URI",
        "WANDB_API_KEY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("P2W_DEVICE", "cpu")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("p2w.report.write_report", lambda run: run)  # drawing takes longer than the run
    monkeypatch.setattr("p2w.pretrain._summary", lambda run, drawn, log: None)

    def start(to: str, steps: int = 8) -> tuple[Path, str]:
        folder = tmp_path / "jane" / "first"
        argv = ["demo", "--shards", str(tiny_set), "--run-dir", str(folder), "--log.to", to, *TINY]
        world = World.start()
        assert train.work(train.build([*argv, "--train.steps", str(steps)], world), world) == 0
        assert json.loads((folder / "status.json").read_text())["state"] == "finished"
        return folder, capfd.readouterr().err

    return start


def numbers(folder: Path) -> dict[tuple[str, int], float]:
    """(name, step) -> value of metrics.jsonl."""
    return {
        (name, record["step"]): value
        for record in read_metrics(folder)
        for name, value in record.items()
        if name not in ("step", "time")
    }


def in_mlflow(folder: Path) -> tuple[object, dict[tuple[str, int], list[float]]]:
    """The one run in RUN/mlruns, and (name, step) -> values."""
    from mlflow import MlflowClient

    client = MlflowClient(f"file:{folder}/mlruns")
    (found,) = client.search_runs([client.get_experiment_by_name("p2w").experiment_id])
    values: dict[tuple[str, int], list[float]] = {}
    for name in found.data.metrics:
        for one in client.get_metric_history(found.info.run_id, name):
            values.setdefault((name, one.step), []).append(one.value)
    return found, values


def test_mlflow_has_what_metrics_has_and_a_resume_continues_its_run(run, monkeypatch):
    pytest.importorskip("mlflow", reason="pip install 'parts2whole[mlflow]'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    folder, err = run("tensorboard,mlflow")
    assert "warning: mlflow" not in err and (folder / "tensorboard").is_dir()
    first, values = in_mlflow(folder)
    assert values == {key: [pytest.approx(value, nan_ok=True)] for key, value in numbers(folder).items()}
    assert first.info.status == "FINISHED" and first.info.user_id == "unknown"
    assert first.data.params["train.steps"] == "8" and first.data.params["model.width"] == "2"
    pictures = list((folder / "mlruns").rglob("images/*.png"))
    assert len(pictures) == 3  # steps 0, 4, 8

    folder, _ = run("tensorboard,mlflow", steps=12)
    again, values = in_mlflow(folder)
    assert again.info.run_id == first.info.run_id and again.data.tags["changed.train.steps"] == "12"
    assert values == {key: [pytest.approx(value, nan_ok=True)] for key, value in numbers(folder).items()}


def test_wandb_writes_files_that_say_no_path_host_or_user(run, tmp_path):
    pytest.importorskip("wandb", reason="pip install 'parts2whole[wandb]'")
    folder, err = run("wandb")
    assert "warning: wandb" not in err and not (folder / "tensorboard").exists()
    (kept,) = (folder / "wandb").glob("offline-run-*")
    assert json.loads((folder / "trackers.json").read_text()) == {"wandb": kept.name.rpartition("-")[2]}
    (sent,) = kept.glob("*.wandb")
    data = sent.read_bytes()
    for name in {name for name, _ in numbers(folder)}:
        assert name.encode() in data, name
    assert data.count(b"similarity/auc") >= 3  # steps 0, 4, 8
    assert len(list(kept.rglob("media/images/*.png"))) == 3
    for private in (str(tmp_path), "jane", socket.gethostname() + "\n", "/work", "/root", "/home"):
        assert private.encode() not in data, private
    assert not list(kept.rglob("requirements.txt")) and not list(kept.rglob("wandb-metadata.json"))

    folder, _ = run("wandb", steps=12)
    kept_twice = [one.name.rpartition("-")[2] for one in (folder / "wandb").glob("offline-run-*")]
    assert len(kept_twice) == 2 and len(set(kept_twice)) == 1


def test_a_tracker_that_cannot_be_reached_costs_one_line(run, monkeypatch):
    """MLflow at a port where nobody listens; wandb without an account, which on a terminal would ask for a password."""
    pytest.importorskip("mlflow", reason="pip install 'parts2whole[mlflow]'")
    pytest.importorskip("wandb", reason="pip install 'parts2whole[wandb]'")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("WANDB_MODE", "online")
    folder, err = run("mlflow,wandb")
    lines = [line for line in err.splitlines() if line.startswith(("warning: mlflow", "warning: wandb"))]
    assert sorted(line.split(":")[1] for line in lines) == [" mlflow", " wandb"], err
    assert {step for _, step in numbers(folder)} == {0, 2, 4, 6, 8}


def test_a_trial_of_a_fine_tuning_is_a_run(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="pip install 'parts2whole[mlflow]'")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("P2W_DEVICE", "cpu")
    argv = [
        "--task",
        str(write_target_set(tmp_path / "set")),
        "--init",
        "random",
        "--run-dir",
        str(tmp_path / "tuned"),
    ]
    argv += ["--width", "2", "--trials", "1", "--recipe.max-epochs", "2", "--log.to", "mlflow", "--quiet"]
    world = World.start()
    assert finetune.work(finetune.build(argv, world), world) == 0
    found, values = in_mlflow(tmp_path / "tuned" / "trial-00")
    for record in read_metrics(tmp_path / "tuned" / "trial-00"):
        assert values["val_loss", record["step"]] == [pytest.approx(record["val_loss"])]
    result = json.loads((tmp_path / "tuned" / "trial-00" / "result.json").read_text())
    for name, value in result["metrics"].items():
        assert values[f"test/{name}", 2] == [pytest.approx(value, nan_ok=True)]
    assert found.info.run_name == "tuned/trial-00" and found.data.params["recipe.max_epochs"] == "2"
    assert not (tmp_path / "tuned" / "trial-00" / "tensorboard").exists()
