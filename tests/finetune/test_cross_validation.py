"""k-fold cross-validation: every patient tested once, folds that depend on the set alone, a summary over all of them."""

import json
import shutil

import numpy as np
import pytest
import torch
from target_sets import write_target_set

from p2w.commands import finetune
from p2w.errors import UserError
from p2w.finetune.cross_validation import SUMMARY, folds_of_run, report_folds, summarise_folds, with_folds
from p2w.finetune.recipe import FineTuneRecipe
from p2w.finetune.results import read_fine_tuning
from p2w.finetune.task_types import segmentation, task_type
from p2w.inference.finetuned_model import load_ensemble
from p2w.tasks.leak import _tested
from p2w.tasks.reader import open_target
from p2w.world import World

WORLD = World(0, 1, 0, 1, "here", torch.device("cpu"), "test")
KIND = task_type("segmentation")
SMALL = "--width 2 --trials 2 --recipe.batch 8 --recipe.max-epochs 1 --recipe.epoch-steps 0".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def balls(tmp_path_factory):
    return write_target_set(tmp_path_factory.mktemp("balls") / "set", counts=(5, 2, 2), each=2)


@pytest.fixture(scope="module")
def run(balls, tmp_path_factory):
    """Two folds of two trials, one fold by a job of its own."""
    folder = tmp_path_factory.mktemp("cv") / "run"
    for more in (["--fold", "1"], []):
        argv = [
            "--task",
            str(balls),
            "--init",
            "random",
            "--run-dir",
            str(folder),
            "--folds",
            "2",
            *SMALL,
            *more,
        ]
        assert finetune.work(finetune.build(argv, WORLD), WORLD) == 0
        assert (folder / SUMMARY).exists() is not bool(more)
    return folder


def test_every_patient_is_tested_once_and_trained_on_otherwise(balls):
    source = open_target(balls)
    one = with_folds(source, 2)
    tested = []
    for fold in range(2):
        parts = {
            split: {one.patient[row] for row in one.rows(split, fold)} for split in ("train", "val", "test")
        }
        assert not parts["train"] & parts["test"] and not parts["val"] & (parts["test"] | parts["train"])
        assert set.union(*parts.values()) == set(source.patient) and all(parts.values())
        tested += parts["test"]
        scans = {one.scan_uid[row] for row in one.rows("test", fold)}
        assert scans == _tested(one, fold)  # what the leak check compares with
    assert sorted(tested) == sorted(set(source.patient))
    assert (with_folds(source, 2).fold == one.fold).all()


def test_folds_that_cannot_be_are_refused(balls, run, tmp_path):
    source = open_target(balls)
    with pytest.raises(UserError, match="--folds 1: from 2 to 100"):
        with_folds(source, 1)
    with pytest.raises(UserError, match=r"--folds 10: .* has 9 patients"):
        with_folds(source, 10)
    own = open_target(write_target_set(tmp_path / "own", counts=(4, 0, 0), folds=4))
    assert with_folds(own, 4) is own
    with pytest.raises(UserError, match="has 4 folds of its own"):
        with_folds(own, 3)
    base = ["--task", str(balls), "--init", "random", *SMALL]
    with pytest.raises(UserError, match="no fold 2; the set has folds 0 to 1"):
        finetune.build([*base, "--run-dir", str(tmp_path / "new"), "--folds", "2", "--fold", "2"], WORLD)
    with pytest.raises(UserError, match="is a cross-validation; repeat its --folds"):
        finetune.build([*base, "--run-dir", str(run)], WORLD)
    with pytest.raises(UserError, match="is a run without --folds"):
        finetune.build([*base, "--run-dir", str(run / "fold-0"), "--folds", "2"], WORLD)
    with pytest.raises(UserError, match=r"task was .*, now"):
        finetune.build([*base, "--run-dir", str(run), "--folds", "3"], WORLD)


def test_the_summary_is_that_of_all_patients_together(run):
    told = json.loads((run / SUMMARY).read_text())
    assert (told["folds"], told["trials"], told["patients"], told["task"]) == (2, 2, 9, "toy")
    folders = folds_of_run(run)
    assert [folder.name for folder in folders] == ["fold-0", "fold-1"]
    found, ends, folds = [], [], []
    for trial in range(2):
        arrays = [dict(np.load(folder / f"trial-{trial:02d}" / "predictions.npz")) for folder in folders]
        counts = np.concatenate([one["counts"] for one in arrays])
        patients = [str(name) for one in arrays for name in one["patient"]]
        metrics, intervals = segmentation(counts, patients)
        found.append(metrics["dice_patient"])
        ends.append(intervals["dice_patient"])
        folds.append([read_fine_tuning(folder).trials[trial].metrics["dice_patient"] for folder in folders])
    page = (run / "report.html").read_text()
    assert "2 folds of a cross-validation" in page.replace("\u00a0", " ") and page.count("<img alt=") == 2
    assert f"{told['metrics']['iou']['all']:.3f}" in page
    row = told["metrics"]["dice_patient"]
    assert row["all"] == pytest.approx(np.mean(found))
    assert row["ci95"] == pytest.approx(np.mean(ends, axis=0).tolist())
    assert row["mean_of_folds"] == pytest.approx(np.mean(folds))
    assert row["sd_of_folds"] == pytest.approx(np.mean(np.std(folds, axis=1, ddof=1)))


@pytest.mark.slow  # its fixture
def test_folds_of_other_settings_or_missing_make_no_summary(run, tmp_path, capsys):
    copied = shutil.copytree(run, tmp_path / "run")
    transfer = copied / "fold-1" / "transfer.json"
    told = json.loads(transfer.read_text())
    transfer.write_text(json.dumps(told | {"recipe": told["recipe"] | {"lr": 0.5}}))
    with pytest.raises(UserError, match="fold-1: its recipe is not that of"):
        summarise_folds(copied, 2, KIND)
    (copied / "fold-1" / "trial-01" / "result.json").unlink()
    assert summarise_folds(copied, 2, KIND) is None
    report_folds(copied, 2, KIND)
    assert "folds 1 are not finished" in capsys.readouterr().out


def test_the_recipe_is_named_beside_its_settings(balls, tmp_path):
    base = ["--task", str(balls), "--init", "random", "--run-dir", str(tmp_path / "run")]
    args, _ = finetune.parse(
        [*base, "--recipe", "modern", "--recipe.ema", "0.5", "--recipe.augment.noise", "0"]
    )
    assert args.recipe.schedule == "cosine" and args.recipe.ema == 0.5 and args.recipe.augment.noise == 0
    assert args.recipe.augment.gamma == 0.3 and args.recipe.augment.flip == 0  # bodies have one orientation
    assert finetune.parse(base)[0].recipe == FineTuneRecipe()
    with pytest.raises(UserError, match="--recipe best: must be paper or modern"):
        finetune.parse([*base, "--recipe=best"])
    with pytest.raises(UserError, match=r"no-channels-last: is named --recipe\.channels-last off now"):
        finetune.parse([*base, "--recipe.no-channels-last"])


def test_predict_averages_the_folds(run, tmp_path):
    device = torch.device("cpu")
    together = load_ensemble([run], False, (), device)
    alone = [load_ensemble([folder], False, (), device) for folder in folds_of_run(run)]
    assert together.passes == 2 and together.weights() == [one.weights()[0] for one in alone]
    crops = torch.randint(-1000, 1000, (2, 1, 8, 16, 16), dtype=torch.int16)
    wanted = torch.stack([one.predictions(crops, None) for one in alone]).mean(0)
    torch.testing.assert_close(together.predictions(crops, None), wanted)


@pytest.mark.slow
def test_numbers_of_all_folds_are_judged_in_their_own_unit(tmp_path):
    """Each fold's network gives standard deviations of its own training samples."""
    folder = write_target_set(tmp_path / "set", "regression", counts=(3, 1, 2), each=2)
    run, base = tmp_path / "run", ["--init", "random", "--folds", "2", *SMALL, "--trials", "1"]
    argv = ["--task", str(folder), "--run-dir", str(run), *base]
    assert finetune.work(finetune.build(argv, WORLD), WORLD) == 0
    told = json.loads((run / SUMMARY).read_text())["metrics"]["mae"]
    arrays = [dict(np.load(fold / "trial-00" / "predictions.npz")) for fold in folds_of_run(run)]
    error = np.concatenate([np.abs(one["value"] - one["target"]) for one in arrays])
    assert told["all"] == pytest.approx(error.mean(), rel=1e-6)
    assert told["ci95"][0] <= told["all"] <= told["ci95"][1]
