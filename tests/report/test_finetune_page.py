"""The page of a fine-tuning against the files that it shows: numbers, curves, commands, cross-validation, damage."""

import json
import re
import shlex

import numpy as np
import pytest
import torch
from finetune_folders import write_transfer
from target_sets import write_target_set
from test_report import EVIL, Page

from p2w import report
from p2w.commands import finetune
from p2w.finetune.task_types import task_type
from p2w.inference import drawing
from p2w.report import finetune_page, run_reader
from p2w.report.markup import DASH
from p2w.world import World

COMMAND = (
    "-m p2w finetune --task 'my set' --init runs/ours --label=Ours --run-dir runs/tuned --width 8 --trials 3"
)
PNG = b"\x89PNG\r\n\x1a\n"


def write_run(run, planned=3, **more):
    """Two finished trials of three, a classification, and one that has begun."""
    started = {
        "command": COMMAND,
        "cwd": "/work",
        "world_size": 1,
        "nodes": 1,
        "host": "node7",
        "torch": "2.13.0",
    }
    write_transfer(
        run, auc=(0.8, 0.9), planned=planned, source="runs/ours/checkpoints/step-0000200", step=200, val_mse=0.0234,
        started=started, recipe={"lr": 0.001, "batch": 16, "augment.flip": 0.5}, width=8, leak="none is among them",
        samples={"train": 56, "val": 8, "test": 4}, **more,
    )  # fmt: skip
    for index, interval in enumerate(((0.7, 0.86), (0.8, 0.96))):
        path = run / f"trial-{index:02d}" / "result.json"
        told = json.loads(path.read_text()) | {"ci95": {"auc": interval}, "epochs": 4, "seconds": 61.0}
        told |= {"best_val_loss": 0.3 - 0.1 * index, "n_train": 56, "test_patients": 4}
        path.write_text(json.dumps(told))
    for index in range(3):
        folder = run / f"trial-{index:02d}"
        folder.mkdir(exist_ok=True)
        records = [
            {"step": 1 + at, "time": 0, "train_loss": 1 / (1 + at), "val_loss": (0.5, 0.2, 0.3)[at], "lr": 1e-3}
            for at in range(3)
        ]  # fmt: skip
        (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return run


@pytest.fixture
def no_charts(monkeypatch):
    monkeypatch.setattr(finetune_page, "_charts", lambda found: [])


def said_of(run):
    return Page(report.write_report(run).read_text()).said.replace("\u00a0", " ")


def test_the_page_says_what_the_files_say(tmp_path):
    run = write_run(tmp_path / "tuned")
    (run / "figures").mkdir()
    (run / "figures" / "predictions.png").write_bytes(PNG + bytes(50))
    text = report.write_report(run).read_text()
    page = Page(text)
    said = page.said.replace("\u00a0", " ")
    for expected in (
        "tuned 2 of 3 trials finished the same command continues it",
        "fine-tuned on ncc (classification) · unet3d · width 8",
        "AUC, test samples 0.850 ± 0.071 95 % interval by patient: 0.750 to 0.910", "Time, all trials 0:02:02",
        "56 / 8 / 4 to train, validate, test; 4 patients tested", "AUC 0.850 0.071 0.750 to 0.910 0.800 0.900",
        "trial 0 0 finished 4 0.3000 0:01:01 0.800 0.700 to 0.860 56", f"trial 2 {DASH} unfinished 3 {DASH} {DASH} {DASH}",
        "runs/ours/checkpoints/step-0000200", "validation MSE of the pretraining 0.0234", "none is among them", "node7",
        "python " + COMMAND, "1 trial not finished",
    ):  # fmt: skip
        assert expected in said, expected
    assert (
        page.outside == []
        and f"<title>{tmp_path.name}/tuned: ncc, 2 of 3 trials finished · p2w</title>" in text
    )
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert [label.split()[0] for label in labels] == [
        "Loss",
        "Learning",
        "The",
    ]  # no metric ends a trial, no predictions
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img") and "<img" in text


def test_the_comparison_is_the_same_command_from_random_weights(tmp_path, no_charts):
    said = said_of(write_run(tmp_path / "tuned"))
    words = finetune_page.other_start(COMMAND, {"network": "unet3d", "width": 8}, "random", "other")
    assert words[:3] == ["-m", "p2w", "finetune"] and shlex.join(words) in said.replace(
        f"{tmp_path}/tuned-random", "other"
    )
    options = dict(zip(words[3::2], words[4::2], strict=True))
    expected = {
        "--task": "my set",
        "--trials": "3",
        "--init": "random",
        "--run-dir": "other",
        "--network": "unet3d",
    }
    assert options == expected | {"--width": "8"}
    assert f"p2w table1 {tmp_path}/tuned {tmp_path}/tuned-random --ours Parts2Whole --against Scratch" in said
    assert finetune_page.other_start("a 'b", {}, "random", "other") == []
    own = finetune_page.other_start(
        "f.py --init random --allow-leak --width 8 --trials 1", {"width": 8}, "RUN", "other"
    )
    assert own == ["f.py", "--trials", "1", "--init", "RUN", "--run-dir", "other"]


def test_roc_curves_are_those_of_the_predictions(tmp_path):
    run = write_run(tmp_path / "tuned", planned=2)
    score, label = np.array([0.9, 0.8, 0.8, 0.1]), np.array([1, 1, 0, 0], np.int8)
    np.savez(run / "trial-00" / "predictions.npz", probability=score, label=label)
    (run / "trial-01" / "predictions.npz").write_text("no arrays")
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    assert finetune_page._roc(axes, run_reader.read_trials(run))
    (line, _) = axes.lines  # and the diagonal
    assert line.get_xydata().tolist() == [[0, 0], [0, 0.5], [0.5, 1], [1, 1]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["segmentation", "classification"])
def test_a_run_leaves_its_page_with_pictures_of_test_samples(tmp_path, kind):
    target = write_target_set(tmp_path / "set", kind, counts=(3, 2, 2), each=2)
    world = World(0, 1, 0, 1, "here", torch.device("cpu"), "test")
    argv = ["--task", str(target), "--init", "random", "--run-dir", str(tmp_path / "run"), "--width", "2", "--trials", "1",
            "--recipe.batch", "4", "--recipe.max-epochs", "1", "--recipe.epoch-steps", "0"]  # fmt: skip
    job = finetune.build(argv, world)
    assert finetune.work(job, world) == 0
    said = Page((tmp_path / "run" / "report.html").read_text()).said
    assert "run finished" in said and "Four test samples, from the" in said and "Not on this page" not in said
    result = json.loads((tmp_path / "run" / "trial-00" / "result.json").read_text())
    compared = task_type(kind).compared
    assert next(iter(result["metrics"])) == compared and f"{result['metrics'][compared]:.3f}" in said
    assert (tmp_path / "run" / drawing.SAMPLES).read_bytes().startswith(PNG)
    (tmp_path / "run" / "trial-00" / "model.safetensors").unlink()
    assert drawing.draw_test_samples(job.first.fine_tuning, world.device) is None


def test_the_samples_that_are_drawn_go_from_the_worst_to_the_best():
    hits = np.array([4, 0, 3, 1, 2, 0])
    counts = np.stack([hits, np.full(6, 4), np.array([4, 4, 4, 4, 4, 0])], 1)  # the last has no foreground
    expected = ["Dice 0.00", "Dice 0.25", "Dice 0.75", "Dice 1.00"], [1, 3, 2, 0]
    of_classes = {"counts": counts[:, None]}
    of_thresholds = {
        "counts": np.concatenate([counts, counts[:, :1]], 1)[:, None],
        "thresholds": np.array([0.5]),
    }
    for kept in (of_classes, of_thresholds):
        chosen, titles = drawing._choose_samples(kept)
        assert (titles, chosen.tolist()) == expected
    kept = {"probability": np.array([0.2, 0.9]), "label": np.array([1, 0], np.int8)}
    chosen, titles = drawing._choose_samples(kept)
    assert chosen.tolist() == [0, 1] and titles == ["probability 0.20, label 1", "probability 0.90, label 0"]
    assert len(drawing._choose_samples({"counts": np.zeros((3, 1, 3), int)})[0]) == 0


def test_a_cross_validation_has_one_page(tmp_path, no_charts):
    run = tmp_path / "cv"
    for fold in (0, 1, 10):
        write_run(run / f"fold-{fold}", planned=2, fold=fold)
        tree = json.loads((run / f"fold-{fold}" / "transfer.json").read_text())
        tree["task"]["folds"] = 3
        (run / f"fold-{fold}" / "transfer.json").write_text(json.dumps(tree))
    said = said_of(run)
    assert (
        "cv finished" in said
        and "AUC, test samples 0.850" in said
        and said.index("fold 1,") < said.index("fold 10,")
    )
    row = {"all": 0.777, "ci95": [0.6, 0.9], "mean_of_folds": 0.85, "sd_of_folds": 0.05}
    (run / "cross_validation.json").write_text(json.dumps({"patients": 12, "metrics": {"auc": row}}))
    said = said_of(run)
    assert "AUC, test samples 0.777 ± 0.050 95 % interval by patient: 0.600 to 0.900" in said
    assert "12 patients tested" in said and "fold 10, trial 1 1 finished" in said
    (run / "fold-1" / "trial-01" / "result.json").unlink()
    assert "cv 5 of 6 trials finished" in said_of(run)
    assert "fold-0 finished" in said_of(run / "fold-0")


def test_damaged_and_hostile_files_cost_only_what_they_hold(tmp_path):
    run = write_run(tmp_path / "tuned", planned=2)
    tree = json.loads((run / "transfer.json").read_text())
    tree["task"] |= {"name": EVIL, "kind": EVIL, "where": EVIL, "folds": EVIL}
    tree |= {
        "recipe": {EVIL: EVIL},
        "trials": 1e400,
        "samples": EVIL,
        "width": EVIL,
        "fraction": EVIL,
        "leak": EVIL,
    }
    tree["started"] |= {"command": f"{EVIL} 'open", "cwd": EVIL, "world_size": EVIL}
    (run / "transfer.json").write_text(json.dumps(tree))
    told = json.loads((run / "trial-00" / "result.json").read_text())
    told |= {
        "metrics": {EVIL: 0.5, "auc": EVIL},
        "ci95": {EVIL: EVIL},
        "seconds": EVIL,
        "epochs": [EVIL],
        "seed": EVIL,
    }
    (run / "trial-00" / "result.json").write_text(json.dumps(told))
    (run / "trial-01" / "result.json").write_text("{")
    (run / "trial-02" / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "val_loss": EVIL, "lr": 1e-3}) + "\n{"
    )
    page = Page(report.write_report(run).read_text())
    assert "trial-01/result.json: not read" in page.said and page.outside == []
    assert not page.scripts and not [attrs for tag, attrs in page.tags if tag == "img" or "onerror" in attrs]
    (run / "transfer.json").write_text("[]")
    said = said_of(run)
    assert "transfer.json: not read (a list, not an object)" in said and re.search(
        r"trial 0 .*finished", said
    )
