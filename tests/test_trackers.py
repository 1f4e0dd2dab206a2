"""Trackers beside metrics.jsonl: a toy that misbehaves in every way, and the real ones where they are installed."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from target_sets import write_target_set

from p2w import trackers
from p2w.commands import finetune, train
from p2w.config import Config, flatten
from p2w.errors import UserError
from p2w.files import last_part
from p2w.log import Log, read_metrics
from p2w.trackers import LogConfig, TrackerProcess, without_paths
from p2w.world import World

TOY = """
import json, os, sys, time
from p2w.tracker_process import run_tracker

fault = sys.argv[1]

class Toy:
    def __init__(self, run, name, settings, id):
        print("libraries print")
        if fault == "begin":
            raise ConnectionError("no server\\nand a second line")
        self.file = open(run / "toy.jsonl", "a")
        self.id, self.where = id or "first", "nowhere"
        self.note(name=name, settings=settings, id=self.id)
    def note(self, **said):
        print(json.dumps(said), file=self.file, flush=True)
    def scalars(self, step, time_s, values):
        if fault == "raise" and step == 2:
            raise ValueError("cannot take it")
        if fault == "exit" and step == 2:
            os._exit(7)
        if fault == "hang":
            time.sleep(600)
        self.note(step=step, **values)
    def picture(self, step, name, pixels):
        self.note(step=step, name=name, sum=int(pixels.sum()), shape=pixels.shape)
    def close(self, state):
        self.note(state=state)

run_tracker(Toy)
"""


@pytest.fixture
def toy(tmp_path):
    """Make a log whose one tracker is a toy with a fault."""
    script = tmp_path / "toy.py"
    script.write_text(TOY)

    def make(fault: str = "none", **settings: object) -> Log:
        log = Log(tmp_path, True, 10, LogConfig(to="none"))
        command = [sys.executable, str(script), fault]
        log._trackers = [TrackerProcess("toy", log, "one", settings, command)]
        return log

    return make


def told(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "toy.jsonl").read_text().splitlines()]


def warnings_in(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("warning: ")]


def test_a_tracker_gets_what_metrics_has_with_pictures_and_settings(toy, tmp_path, capsys):
    log = toy(lr=0.5, init="/home/jane/DOE_JOHN/w.pt")
    log.metrics(1, {"train/loss": 0.25})
    log.event(2, {"skipped": "the loss was not finite", "keys": ["DOE_JOHN/0"]})
    log.picture("part; whole", np.full((3, 4), 200, np.uint8), 2)
    log.close("told to stop")
    assert told(tmp_path) == [
        {"name": "one", "settings": {"lr": 0.5, "init": "w.pt"}, "id": "first"},
        {"step": 1, "train/loss": 0.25},
        {"step": 2, "event/skipped": 1.0},
        {"step": 2, "name": "part; whole", "sum": 2400, "shape": [3, 4]},
        {"state": "told to stop"},
    ]
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"toy": "first"}
    assert warnings_in(capsys.readouterr().err) == []

    (tmp_path / "trackers.json").write_text('{"toy": "known", "other": "kept"}')
    (tmp_path / "toy.jsonl").unlink()
    log = toy()
    log.metrics(3, {"train/loss": 0.5})
    log.close()
    assert told(tmp_path)[0]["id"] == "known"
    assert json.loads((tmp_path / "trackers.json").read_text())["other"] == "kept"


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("begin", "ConnectionError: no server"),
        ("raise", "ValueError: cannot take it"),
        ("exit", "its process ended with code 7"),
        ("hang", "has not taken the last records within 0 s"),
        ("behind", "is 3 records behind"),
        ("absent", "FileNotFoundError: "),
    ],
)
def test_a_tracker_that_fails_costs_a_line_and_no_record(toy, tmp_path, capsys, monkeypatch, fault, why):
    log = toy("hang" if fault == "behind" else fault)
    (tracker,) = log._trackers
    if fault == "hang":
        monkeypatch.setattr(trackers, "CLOSE_S", 0.3)
    if fault == "behind":
        monkeypatch.setattr(trackers, "WAITING", 3)
        tracker._records.maxsize = 3
    if fault == "absent":
        tracker.command = [str(tmp_path / "missing")]
    for step in range(1, 5):
        log.metrics(step, {"train/loss": 1 / step})
        if fault == "behind":  # more than a pipe holds
            log.picture("noise", np.zeros((500, 500), np.uint8), step)
    log.close()
    (line,) = warnings_in(capsys.readouterr().err)
    assert line.startswith(f"warning: toy: {why}") and "\n" not in line
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert tracker._process is None or tracker._process.wait() is not None


def test_a_killed_run_ends_its_trackers(toy, tmp_path):
    """Its end of the pipe is closed without a word."""
    log = toy()
    (tracker,) = log._trackers
    log.metrics(1, {"train/loss": 1.0})
    while tracker._process is None or not (tmp_path / "trackers.json").exists():
        time.sleep(0.01)
    while not (tmp_path / "toy.jsonl").exists() or len(told(tmp_path)) < 2:
        time.sleep(0.01)
    tracker._process.stdin.close()
    assert tracker._process.wait() == 1
    assert told(tmp_path)[-1] == {"state": "killed"}


def test_a_run_without_records_or_on_another_rank_starts_no_tracker(tmp_path):
    for speaks in (True, False):
        log = Log(tmp_path, speaks, 10, LogConfig(to="mlflow,wandb"))
        log.describe("one", {})
        if not speaks:
            log.metrics(1, {"train/loss": 1.0})
            log.picture("noise", np.zeros((3, 4), np.uint8), 1)
        log.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["", "wanb", "wandb,", "wandb,wandb", "none,wandb", "wandb mlflow"])
def test_where_metrics_go_is_checked(to):
    with pytest.raises(UserError, match=r"log\.to=.*any of tensorboard, wandb, mlflow, each once"):
        train.parse(["demo", "--log.to", to])


def test_names_of_trackers():
    assert LogConfig().trackers() == ("tensorboard",)
    assert LogConfig(to=" mlflow, tensorboard").trackers() == ("mlflow", "tensorboard")
    assert LogConfig(to="none").trackers() == ()


def test_paths_are_cut():
    given = {
        "a": "/home/jane/scans/", "b": "https://jane:secret@host:80/data/shards?token=1", "c": "s3://bucket",
        "d": ["../x/y", "unet3d"], "e": 3, "f": None, "g": (1, 2), "h": "runs/paper@35000", "i": "bf16",
    }  # fmt: skip
    assert without_paths(given) == {
        "a": "scans", "b": "shards", "c": "", "d": ["y", "unet3d"], "e": 3, "f": None, "g": [1, 2], "h": "paper@35000",
        "i": "bf16",
    }  # fmt: skip
    assert "/" not in json.dumps(without_paths(flatten(Config())))
    assert last_part({"a": [{"b": "/home/jane/scans"}], "c": "http://[::1/x?/y"}) == {
        "a": [{"b": "scans"}],
        "c": "x",
    }


def test_tensorboard_may_fail_in_any_way(tmp_path, capsys):
    """Its folder cannot be made; the records are there."""
    (tmp_path / "tensorboard").write_text("in the way")
    log = Log(tmp_path, True, 10)
    log.metrics(1, {"train/loss": 1.0})
    log.metrics(2, {"train/loss": 0.5})
    log.close()
    assert len(warnings_in(capsys.readouterr().err)) == 1
    assert len(read_metrics(tmp_path)) == 2


def test_no_tracker_leaves_no_file(tmp_path):
    log = Log(tmp_path, True, 10, LogConfig(to="none"))
    log.metrics(1, {"train/loss": 1.0})
    log.picture("noise", np.zeros((3, 4), np.uint8), 1)
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_refused_before_the_start(tiny_set, tmp_path, name):
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    argv = ["demo", "--shards", str(tiny_set), "--run-dir", str(tmp_path / "run"), "--log.to", name]
    with pytest.raises(UserError, match=rf"{name} is not installed; pip install 'parts2whole\[{name}\]'"):
        train.build(argv, World.from_env())
    target = write_target_set(tmp_path / "set")
    argv = ["--task", str(target), "--init", "random", "--run-dir", str(tmp_path / "run"), "--log.to", name]
    with pytest.raises(UserError, match=rf"{name} is not installed"):
        finetune.build(argv, World.from_env())
    assert not (tmp_path / "run").exists()
