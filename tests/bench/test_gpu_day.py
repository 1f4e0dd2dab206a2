"""A rehearsal of the GPU day: every stage of both calls runs at toy size on the CPU, and the results make a table."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import processes
import pytest
from processes import REPO

sys.path.append(str(REPO / "bench"))


def module(name):
    """A script of bench/gpu, which is no package."""
    spec = importlib.util.spec_from_file_location(f"gpu_day_{name}", REPO / "bench" / "gpu" / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


day, table = module("day"), module("table")


@pytest.mark.timeout(1500)
def test_every_stage_runs_and_leaves_its_rows(tmp_path):
    # The interpreter that day.sh would become notes its command; the command is then run, and its stages with it, as forks.
    # Their runs draw neither curves nor report.html, which took half of their time: tests/launch has runs that do.
    python, words, variables = (tmp_path / name for name in ("python", "words", "variables"))
    python.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" > {words}\nenv -0 > {variables}\n")
    python.chmod(0o755)
    env = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "out"), "DAY": str(tmp_path / "day")}
    subprocess.run(["bash", "bench/gpu/day.sh", "--rehearse"], cwd=REPO, env=env, check=True)
    command = words.read_text().split("\0")[:-1]
    env = dict(pair.split("=", 1) for pair in variables.read_text().split("\0")[:-1])
    done = processes.run(
        [sys.executable, *command], cwd=REPO, env=env, capture_output=True, text=True, timeout=1400,
        spies=(("draw_nothing",), ("recalibrate_on_few",)),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    rows = []
    for call in ("1", "2", "3"):
        files = list((tmp_path / "out" / call).iterdir())
        assert len(files) <= day.MOST_FILES and all(path.is_file() for path in files)
        rows += [json.loads(line) for path in files if path.name.startswith("rows-") for line in path.open()]
    assert [row["what"] for row in rows if "error" in row] == []
    planned = [stage.name for call in (1, 2, 3) for stage in day.stages(call, tmp_path, tmp_path, True)]
    ended = {row["stage"]: row for row in rows if row["what"] == "stage"}
    assert {name: ended[name]["state"] for name in planned} == dict.fromkeys(planned, "done")
    measured = {row["what"] for row in rows if "skipped" not in row}
    assert {
        *("machine", "tests marked gpu", "convolutions in bf16", "crop-resize", "losses in bf16", "resume"),
        *("set on the device", "step", "profile", "start", "copy", "matrix product", "norm", "upsampling"),
        *("convolution", "pretraining continued", "fine-tuning", "transfer", "transfer against scratch"),
    } <= measured  # fmt: skip
    assert not [row for row in rows if row["what"] == "resume" and not row["holds"]]
    tuned = {row["start"]: row["trials"] for row in rows if row["what"] == "fine-tuning"}
    assert tuned == {"Scratch": 2, "Parts2Whole": 2}
    moved = {(row["task"], row["start"]): row["trials"] for row in rows if row["what"] == "transfer"}
    assert moved == {("organs", start): 2 for start in ("Scratch", "encoder", "encoder and up-path")}
    stopped = next(row for row in rows if row["what"] == "pretraining told to stop")
    continued = next(row for row in rows if row["what"] == "pretraining continued")
    assert (stopped["state"], continued["state"]) == ("told to stop", "finished")
    result = json.loads((tmp_path / "out" / "gpu_day.json").read_text())
    assert [goal["text"] for goal in result["goals"] if not goal["met"]] == []
    assert any("needs a card" in line for line in result["skipped"])


def test_time_is_kept_for_later_stages_of_the_same_worth():
    one, two = day.Stage("one", (), 100, 10, 1), day.Stage("two", (), 100, 30, 1)
    less = day.Stage("less", (), 100, 50, 2)
    assert day.allowed_s(one, [two, less], 200) == 100
    assert day.allowed_s(one, [two, less], 60) == 30
    assert day.allowed_s(less, [two], 80) == 50
    assert day.allowed_s(two, [less], 25) == 0  # it is skipped
    assert day.allowed_s(one, [two, less], 25) == 25  # nothing is kept for what cannot run anyway
    assert day.allowed_s(less, [two], 70) == 0


def test_a_stage_that_is_too_slow_is_ended_and_the_next_one_runs(tmp_path, monkeypatch):
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import subprocess, time\nsubprocess.Popen(['sleep', '60'])\nprint('begun', flush=True)\ntime.sleep(60)\n"
    )
    (tmp_path / "fine.py").write_text("print('fine')\n")
    (tmp_path / "fails.py").write_text("raise SystemExit(3)\n")
    stages = [
        day.Stage("slow", (str(slow),), 2, 1),
        day.Stage("fails", (str(tmp_path / "fails.py"),), 10, 1),
        day.Stage("fine", (str(tmp_path / "fine.py"),), 10, 1),
        day.Stage("long", (str(slow),), 1000, 500),
    ]
    monkeypatch.setattr(day, "stages", lambda *_: stages)
    monkeypatch.setattr(day.Call, "background", lambda self: None)
    call = day.Call(1, tmp_path / "out", tmp_path / "day", False, day.time.time() + 100)
    assert call.run() == {"slow": "too slow", "fails": "failed", "fine": "done", "long": "skipped"}
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows-1.jsonl").open()]
    assert [row["state"] for row in rows] == ["too slow", "failed", "done", "skipped"]
    assert "begun" in (tmp_path / "out" / "log-1.txt").read_text()
    assert json.loads((tmp_path / "day" / "missed.json").read_text()) == ["long"]


def test_no_more_files_than_travel(tmp_path):
    for number in range(12):
        (tmp_path / f"file-{number}").write_text("x" * number)
    (tmp_path / "rows-1.jsonl").write_text("{}")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inside").write_text("y")
    day.pack(tmp_path)
    names = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert len(names) <= day.MOST_FILES and {"rows-1.jsonl", "more.tgz", "file-11"} <= names


CARD = [
    {"stage": "machine", "what": "machine", "card": "NVIDIA H200",
     "machine": {"cores": 16, "cpu": "x", "load_average": [1]}},
    {"stage": "step", "what": "step", "form": "plain loop, fp16", "batch": 16, "ms": 50.0, "samples_s": 320.0,
     "spread_samples_s": [310, 330], "floor": True},
    {"stage": "step", "what": "step", "form": "as a run chooses", "batch": 16, "ms": 20.0, "samples_s": 800.0,
     "spread_samples_s": [790, 810]},
    {"stage": "start", "what": "start", "name": "second start", "seconds_to_first_step": 12.0},
    {"stage": "training", "what": "losses in bf16", "amp": "bf16", "steps": 20, "worst_differs": 0.2},
    {"stage": "training", "what": "losses in fp16", "error": "RuntimeError: no | such"},
    {"stage": "layers", "what": "norm", "skipped": "3 s left, 5 s needed"},
    {"stage": "layers", "what": "stage", "state": "too slow", "exit_code": -15, "seconds": 60},
]  # fmt: skip


def test_a_table_of_a_card_has_its_goals(tmp_path):
    (tmp_path / "rows-1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*CARD, CARD[2]]))
    script = str(REPO / "bench" / "gpu" / "table.py")
    out = tmp_path / "gpu_day.json"
    subprocess.run(
        [sys.executable, script, str(tmp_path), "--out", str(out)], check=True, capture_output=True
    )
    result = json.loads(out.read_text())
    met = {goal["text"]: goal["met"] for goal in result["goals"]}
    assert met["samples/s end to end (730 is asked of an H200)"]
    assert met["end to end, times a plain fp16-autocast loop"]
    assert met["seconds to the first step, second start"]
    assert not met["losses of 20 steps in bf16 differ from fp32's by, at most"]
    assert not met["losses in fp16: RuntimeError: no / such"]
    assert not met["stage layers: too slow, exit code -15"]
    assert result["skipped"] == ["norm: 3 s left, 5 s needed"]
    assert [row["name"] for row in result["rows"]] == ["plain loop, fp16", "as a run chooses"]
    assert result["machine"]["card"] == "NVIDIA H200"


def test_a_start_of_the_transfer_stands_beside_scratch():
    moved = {"stage": "transfer", "what": "transfer", "task": "organs", "metric": "dice", "trials": 4}
    found = [
        moved | {"start": "Scratch", "mean": 0.5}, moved | {"start": "encoder", "mean": 0.53},
        moved | {"start": "nothing", "mean": None},
        {"what": "transfer against scratch", "task": "organs", "start": "encoder", "difference": 0.03, "p": 0.0421},
    ]  # fmt: skip
    rows, _ = table.science(found, "H100")
    assert [(row.name, row.value, row.kind) for row in rows] == [
        ("Scratch", 0.5, "peer"),
        ("encoder", 0.53, "ours"),
    ]
    assert rows[1].note == "4 trials, +3.0 points against scratch, p = 0.042"


def test_a_table_of_nothing_is_refused(tmp_path):
    script = str(REPO / "bench" / "gpu" / "table.py")
    done = subprocess.run(
        [sys.executable, script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and "no rows-*.jsonl" in done.stderr


def test_the_wheels_have_their_versions_in_the_constraints():
    text = (REPO / "bench" / "gpu" / "wheels.sh").read_text()
    names = text.partition("packages=(")[2].partition(")")[0].split()
    pinned = [line.partition("==")[0].lower() for line in (REPO / "constraints.txt").read_text().splitlines()]
    assert names and all(name in pinned for name in names)
    assert Path(REPO / ".gitignore").read_text().splitlines().count("/.whl/") == 1
