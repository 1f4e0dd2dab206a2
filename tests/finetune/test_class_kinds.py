"""Every kind of several classes through a fine-tuning: it learns the set of balls, and its card is enough to predict."""

import json

import numpy as np
import pytest
import torch
from target_sets import CLASSES, write_target_set

from p2w.commands import finetune
from p2w.errors import UserError
from p2w.finetune.results import read_fine_tuning
from p2w.finetune.task_types import task_type
from p2w.inference.finetuned_model import load_finetuned
from p2w.tasks.reader import open_target
from p2w.world import World

LEARNED = {  # a metric and what it has to be better than
    "multi-class segmentation": ("dice:ball", 0.4),
    "multi-label segmentation": ("dice:ball", 0.4),
    "multi-class classification": ("auc", 0.8),
    "multi-label classification": ("auc:bright", 0.8),
    "regression": ("r2", 0.2),
}
SMALL = ["--init", "random", "--width", "2", "--trials", "1", "--recipe.lr", "1e-2", "--recipe.batch", "8"]


def build(folder, run, *more):
    world = World.from_env()
    return finetune.build(["--task", str(folder), "--run-dir", str(run), *SMALL, *more], world), world


@pytest.mark.slow
@pytest.mark.parametrize("kind", LEARNED)
def test_it_learns_and_predicts_what_it_was_judged_by(tmp_path, kind):
    folder = write_target_set(tmp_path / "set", kind, counts=(8, 2, 4))
    epochs = "8" if kind.endswith("segmentation") else "12"
    job, world = build(folder, tmp_path / "run", "--recipe.max-epochs", epochs, "--recipe.epoch-steps", "6")
    assert finetune.work(job, world) == 0
    result = json.loads((tmp_path / "run" / "trial-00" / "result.json").read_text())
    name, least = LEARNED[kind]
    assert result["metrics"][name] > least, result["metrics"]
    assert result["metrics"].keys() == result["ci95"].keys()
    assert next(iter(result["metrics"])) == task_type(kind).compared  # which the page of the run puts first
    assert (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / "figures" / "predictions.png").exists() == kind.endswith("segmentation")
    found = read_fine_tuning(tmp_path / "run")
    assert not found.problems and found.trials[0].metrics[name] == result["metrics"][name]
    assert (tmp_path / "run" / "trial-00" / "test.png").read_bytes()[:4] == b"\x89PNG"
    model = load_finetuned(tmp_path / "run", torch.device("cpu"))
    target = open_target(folder)
    rows = target.rows("test")
    voxels, truth = target.read(rows)
    predicted = model.predictions(voxels, None).numpy()
    kept = np.load(tmp_path / "run" / "trial-00" / "predictions.npz")
    if kind.endswith("segmentation"):
        masks = [model.kind.to_mask(own[:, z], 0.5) for own in predicted for z in range(own.shape[1])]
        count = np.array([[own.sum() for own in model.kind.mask_classes(mask).values()] for mask in masks])
        assert (count.reshape(len(rows), -1, count.shape[1]).sum(1) == kept["counts"][:, :, 1]).all()
        assert kept["hd95_mm"].shape == kept["surface_dice"].shape == (len(rows), 2)
        assert truth.dtype == (torch.uint8 if kind.startswith("multi-class") else torch.int16)
    else:
        own = kept["value" if kind == "regression" else "probability"]
        np.testing.assert_allclose(predicted, own, rtol=1e-4, atol=1e-5)
    assert kept["classes"].tolist() == [*CLASSES[kind]][kind == "multi-class segmentation" :]


def test_folds_that_lack_a_class_are_refused_before_training(tmp_path):
    folder = write_target_set(tmp_path / "set", "multi-class classification", counts=(1, 1, 1), each=1)
    with pytest.raises(UserError, match="the samples to train are all of class faint; two are needed"):
        build(folder, tmp_path / "run")
    folder = write_target_set(tmp_path / "numbers", "regression", counts=(1, 1, 1), each=1)
    with pytest.raises(UserError, match="100 alone in column brightness"):
        build(folder, tmp_path / "run")
