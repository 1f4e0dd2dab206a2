"""The recipes of docs/add_a_task.md: the toy of tests/grades.py goes from scans to a table of predictions."""

import csv
import json
import runpy

import numpy as np
import pytest
import SimpleITK as sitk
from grades import BallTask, Grades
from processes import REPO
from target_sets import write_target_set

from p2w.commands import finetune
from p2w.errors import UserError
from p2w.finetune.results import read_fine_tuning
from p2w.finetune.task_types import TASK_TYPES
from p2w.inference import predict
from p2w.reproduce.table_builder import metric_of
from p2w.tasks import TASKS
from p2w.tasks.reader import open_target
from p2w.world import World


@pytest.fixture
def ball(monkeypatch):
    """The two lines of the recipes."""
    monkeypatch.setitem(TASKS, BallTask.name, BallTask)
    monkeypatch.setitem(TASK_TYPES, Grades.name, Grades())


def write_scans(folder):
    folder.mkdir()
    z, y, x = np.ogrid[:12, :20, :20]
    inside = (z - 4) ** 2 * 4 + (y - 8) ** 2 + (x - 8) ** 2 < 30
    for number in range(12):
        noise = np.random.default_rng(number).normal(-800, 30, inside.shape)
        noise[:, 16:] += 850  # some tissue, as a scan has
        voxels = np.where(inside, noise + 500 * (number % 3), noise).astype(np.int16)
        sitk.WriteImage(sitk.GetImageFromArray(voxels), str(folder / f"p{number:02d}_g{number % 3}.nii.gz"))


@pytest.mark.slow
def test_from_scans_to_predictions(ball, tmp_path, monkeypatch, capsys):
    scans, folder, run, out = (tmp_path / name for name in ("scans", "set", "run", "graded.csv"))
    write_scans(scans)
    argv = ["prepare_target", "ball", "--source", str(scans), "--out", str(folder), "--workers", "1"]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPO / "preprocess" / "prepare_target.py"), run_name="__main__")
    assert end.value.code == 0, capsys.readouterr().err
    target = open_target(folder)
    assert target.kind == "grades" and sorted(target.label[target.rows("test")]) == [0, 1, 2]

    argv = ["--task", str(folder), "--init", "random", "--width", "2", "--run-dir", str(run), "--trials", "1"]
    recipe = ["--recipe.max-epochs", "3", "--recipe.epoch-steps", "4", "--recipe.batch", "6"]
    world = World.from_env()
    assert finetune.work(finetune.build([*argv, *recipe], world), world) == 0
    result = json.loads((run / "trial-00" / "result.json").read_text())
    assert result["metrics"].keys() == {"accuracy"} and result["epochs"] == 3
    assert np.load(run / "trial-00" / "predictions.npz")["probability"].shape == (3, 3)
    assert metric_of("ball", [read_fine_tuning(run)], {}) == "accuracy"

    table = tmp_path / "candidates.csv"
    table.write_text("x,y,z\n8,8,4\n3,3,3\n")
    scan = str(scans / "p09_g0.nii.gz")
    argv = [str(run), "--scan", scan, "--out", str(out), "--candidates", str(table)]
    assert predict.main(argv) == 0
    with open(out) as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and rows[0].keys() == {"x", "y", "z", "faint", "grey", "bright"}
    for row in rows:
        assert sum(float(row[name]) for name in BallTask.classes) == pytest.approx(1, abs=1e-5)
    kept = np.load(run / "trial-00" / "predictions.npz")
    tested = kept["probability"][kept["patient"].tolist().index("p09")]
    assert [float(rows[0][name]) for name in BallTask.classes] == pytest.approx(tested.tolist(), abs=1e-5)


def test_what_the_kind_refuses_is_refused_before_training(ball, tmp_path):
    folder = write_target_set(tmp_path / "set", "grades", task="ball")  # of two grades
    argv = ["--task", str(folder), "--init", "random", "--width", "2", "--run-dir", str(tmp_path / "run")]
    world = World.from_env()
    with pytest.raises(UserError, match="has no decoder"):
        finetune.build([*argv, "--decoder", "pretrained"], world)
    monotone = write_target_set(tmp_path / "one", "grades", counts=(2, 2, 1), each=1, task="ball")
    with pytest.raises(UserError, match="the samples to test hold one grade alone"):
        finetune.build(["--task", str(monotone), *argv[2:]], world)
