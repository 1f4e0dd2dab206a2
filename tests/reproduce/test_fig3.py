"""p2w fig3 on forged folders: points, Pearson's r, refusals, and the files it draws."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from finetune_folders import write_transfer

from p2w.errors import UserError
from p2w.reproduce import commands, fig3

MSE = [0.030, 0.021, 0.017, 0.010, 0.008, 0.0071]
MEANS = [0.61, 0.66, 0.64, 0.70, 0.74, 0.73]


def write_run(folder, task="ncc", share=0.45, run="runs/paper"):
    for at, (mse, mean) in enumerate(zip(MSE, MEANS, strict=True)):
        step = 100 * (at + 1)
        source = f"{run}/checkpoints/step-{step:08d}"
        write_transfer(folder / task / f"step-{step}", task, f"s{step}", [mean - 0.01, mean, mean + 0.01], step=step,
                       val_mse=mse, source=source, fraction=share)  # fmt: skip


def test_points_correlation_and_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs"))
    write_run(Path("runs"), "sarcoma", 0.2)
    write_transfer(Path("runs/ncc/scratch"), label="Scratch", fraction=0.45)
    assert commands.main_fig3(["runs"]) == 0
    found = fig3.load_fig3(Path("runs/tables/fig3.json"))
    ncc, sarcoma = found.panels
    r = float(np.corrcoef([1 - mse for mse in MSE], MEANS)[0, 1])
    reach = 1.959964 / math.sqrt(len(MSE) - 3)
    assert (ncc.r, ncc.low, ncc.high) == pytest.approx(
        (r, *(math.tanh(math.atanh(r) + s * reach) for s in (-1, 1))), abs=1e-5
    )
    assert (ncc.paper_r, sarcoma.paper_r, sarcoma.metric, sarcoma.fraction) == (0.82, None, "iou", 0.2)
    assert [(p.step, p.n) for p in ncc.points] == [(100 * at, 3) for at in range(1, 7)]
    assert ncc.points[0].sd == pytest.approx(1.0) and ncc.points[0].quality == pytest.approx(0.97)
    assert any("Left out: 1 run without step" in note for note in found.notes)
    for name, head in (("fig3.png", b"\x89PNG"), ("fig3.pdf", b"%PDF"), ("fig3.csv", b"task,metric")):
        assert Path("runs/tables", name).read_bytes().startswith(head)
    assert "data:image/png;base64," in Path("runs/tables/tables.html").read_text()
    assert f"Pearson r = {r:.2f}" in capsys.readouterr().out


def test_too_few_checkpoints_have_no_correlation(tmp_path):
    write_transfer(tmp_path / "a", "ncs", auc=[0.5], step=1, val_mse=0.1, fraction=0.1, metric="mean_iou")
    write_transfer(tmp_path / "b", "ncs", auc=[None], step=2, val_mse=0.05, fraction=0.1, metric="mean_iou")
    assert commands.main_fig3([str(tmp_path)]) == 0
    (panel,) = fig3.load_fig3(tmp_path / "tables" / "fig3.json").panels
    assert (
        len(panel.points) == 1
        and panel.r is None
        and "no correlation of 1 checkpoint" in fig3.fig3_sentence(panel)
    )


def test_refusals(tmp_path):
    write_run(tmp_path / "one")
    write_run(tmp_path / "two")
    with pytest.raises(UserError, match="checkpoint 100: two runs"):
        commands.main_fig3([str(tmp_path)])
    write_transfer(tmp_path / "three" / "s", label="Scratch")
    with pytest.raises(UserError, match="no run says the step"):
        commands.main_fig3([str(tmp_path / "three")])


def test_other_runs_are_named_and_a_damaged_file_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(Path("all/one"))
    write_run(Path("all/two"), run="runs/other")
    assert commands.main_fig3(["all"]) == 0
    path = Path("all/tables/fig3.json")
    assert any("of 2 pretrainings: runs/other, runs/paper" in note for note in fig3.load_fig3(path).notes)
    tree = json.loads(path.read_text())
    tree["panels"][0]["points"][0]["step"] = "one"
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match="damaged"):
        fig3.load_fig3(path)
