"""p2w predict of several classes: label maps in the values of the masks, files of labels that overlap, scans."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from ct_files import write
from safetensors.torch import save_file
from torch import nn

from p2w.errors import UserError
from p2w.finetune.task_types import task_type
from p2w.inference import predict, predict_cohort
from p2w.inference.finetuned_model import FineTunedModel, load_ensemble
from p2w.inference.mask_files import write_classes
from p2w.inference.predict import mask_of, probabilities_for, read_input
from p2w.model import build_encoder

SIZE = [8, 16, 16]
FLIPPED = np.diag([-1, 1, -1])


def card(kind, classes, target, **settings):
    task = {"task": "toy", "channels": 1, "channel_names": ["ct"], "size_zyx": SIZE, "window": [-1000, 1000]}
    task |= {
        "settings": {"spacing": None} | settings,
        "spacing_mm": None,
        "classes": classes,
        "target": target,
    }
    encoder = {"name": "unet3d", "width": 2, "in_channels": 1, "feeding": "unit"}
    return {"kind": kind, "encoder": encoder, "skips": True, "task": task, "holds": "fine-tuned"}


class Levels(nn.Module):
    """Logits that say: above -500 HU, and above 200 HU; of exclusive classes with background first."""

    def __init__(self, exclusive):
        super().__init__()
        self.scale, self.exclusive = nn.Parameter(torch.tensor(50.0)), exclusive

    def forward(self, x):
        hu = x * 2000 - 1000
        low, high = (hu + 500) * self.scale / 100, (hu - 200) * self.scale / 100
        if not self.exclusive:
            return torch.cat((low, high), 1)
        return torch.cat((torch.zeros_like(low), torch.minimum(low, -high), torch.minimum(low, high)), 1)


@pytest.fixture
def scan(tmp_path):
    z, y, x = np.ogrid[:20, :36, :30]
    voxels = np.full((20, 36, 30), -900, np.int16)
    voxels[4:16, 5:30, 4:25] = 50
    voxels[((z - 9) ** 2 * 4 + (y - 15) ** 2 + (x - 9) ** 2) < 30] = 400
    write(tmp_path / "scan.nii.gz", voxels, direction=FLIPPED)
    return tmp_path / "scan.nii.gz", voxels


def read(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_a_label_map_has_the_values_of_the_training_masks(scan, tmp_path):
    path, voxels = scan
    told = card("multi-class segmentation", ["background", "body", "bone"], {"values": [[1], [300]]})
    model = FineTunedModel(Path(), Levels(True), told)
    subject = read_input([path], model)
    found = probabilities_for(subject, model)
    mask = mask_of(subject, model, 0.5, 0.5, 3, None, found)
    write_classes(tmp_path / "out.nii.gz", mask, subject, model.kind)
    expected = np.where(voxels > 200, 300, np.where(voxels > -500, 1, 0))
    assert (read(tmp_path / "out.nii.gz") == expected).all()
    assert json.loads((tmp_path / "out.labels.json").read_text()) == {
        "labels": {"background": 0, "body": 1, "bone": 300}
    }
    assert found.shape == (3, 20, 36, 30) and np.allclose(found.sum(0), 1, atol=1e-5)
    assert (np.array([0, 1, 300])[found.argmax(0)] == mask).all()


def test_regions_are_written_as_nnunet_writes_them_and_labels_that_overlap_as_files(scan, tmp_path):
    path, voxels = scan
    told = card("multi-label segmentation", ["whole", "core"], {"values": [[1, 2], [2]], "order": [1, 2]})
    model = FineTunedModel(Path(), Levels(False), told)
    subject = read_input([path], model)
    mask = mask_of(subject, model, 0.5, 0.5, 3, None)
    write_classes(tmp_path / "out.nii.gz", mask, subject, model.kind)
    written = read(tmp_path / "out.nii.gz")
    assert (
        written == np.where(voxels > 200, 2, np.where(voxels > -500, 1, 0))
    ).all() and written.dtype == np.uint8
    legend = {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions_class_order": [1, 2]}
    assert json.loads((tmp_path / "out.labels.json").read_text()) == legend
    inside = model.kind.mask_classes(mask)
    assert (subject.stored(inside["whole"]) == (voxels > -500)).all()

    told["task"]["target"] = {"values": [[1], [2]]}
    model = FineTunedModel(Path(), Levels(False), told)
    mask = mask_of(subject, model, 0.5, 0.5, 3, None)
    write_classes(tmp_path / "masks", mask, subject, model.kind, ".nii.gz")
    assert (read(tmp_path / "masks" / "whole.nii.gz") == (voxels > -500)).all()
    assert (read(tmp_path / "masks" / "core.nii.gz") == (voxels > 200)).all()
    assert json.loads((tmp_path / "masks" / "labels.json").read_text()) == {"structures": ["whole", "core"]}


def saved(folder, kind, classes, target, **settings):
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    network = task_type(kind).network(build_encoder("unet3d", 2), classes)
    told = {"p2w": json.dumps(card(kind, classes, target, **settings))}
    save_file(
        {k: v.contiguous() for k, v in network.state_dict().items()}, folder / "model.safetensors", told
    )
    (folder / "result.json").write_text(json.dumps({"state": "finished", "best_val_loss": 1.0}))
    return network.eval()


def test_whole_scans_get_one_answer_each_alone_and_in_a_cohort(scan, tmp_path, capsys):
    path, _ = scan
    network = saved(
        tmp_path / "run",
        "regression",
        ["age"],
        {"sample": "scan", "mean": [50], "sd": [10]},
        spacing=[5, 2, 2],
    )
    run, out = str(tmp_path / "run"), tmp_path / "age.csv"
    assert predict.main([run, "--scan", str(path), "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.open()))
    model = FineTunedModel(Path(), network, card("regression", ["age"], {}, spacing=[5, 2, 2]))
    subject = read_input([path], model)
    box = predict.CropBox.of_whole((8, 16, 16), subject.grid, (5, 2, 2))
    expected = 50 + 10 * network((torch.from_numpy(subject.crop(box)[None]).float() + 1000) / 2000).item()
    assert rows[0]["scan"] == "scan.nii.gz" and float(rows[0]["age"]) == pytest.approx(expected, abs=1e-4)
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "a.nii.gz").write_bytes(path.read_bytes())
    argv = [run, "--scans", str(tmp_path / "scans"), "--out", str(tmp_path / "cohort")]
    assert predict_cohort.main(argv) == 0
    rows = list(csv.DictReader((tmp_path / "cohort" / "answers.csv").open()))
    assert [row["scan"] for row in rows] == ["a.nii.gz"] and float(rows[0]["age"]) == pytest.approx(
        expected, abs=1e-4
    )
    assert predict_cohort.main(argv) == 0 and "1 scans are done already" in capsys.readouterr().out


def test_a_cohort_of_labels_that_overlap(scan, tmp_path):
    saved(tmp_path / "run", "multi-label segmentation", ["a", "b"], {})
    argv = [
        str(tmp_path / "run"),
        "--scans",
        str(scan[0]),
        "--out",
        str(tmp_path / "out"),
        "--probabilities",
        "--flips",
        "z",
    ]
    assert predict_cohort.main(argv) == 0
    for kind in ("masks", "probabilities"):
        assert sorted(p.name for p in (tmp_path / "out" / kind / "scan").iterdir()) == [
            "a.nii.gz",
            "b.nii.gz",
        ]
    assert (
        (read(tmp_path / "out/probabilities/scan/a.nii.gz") > 0.5)
        == read(tmp_path / "out/masks/scan/a.nii.gz")
    ).all()
    head = (tmp_path / "out" / "volumes.csv").read_text().splitlines()[0]
    assert head == "scan,mask,voxels,ml,ml:a,ml:b"
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == {"structures": ["a", "b"]}


def test_trials_whose_masks_have_other_values_are_not_averaged(tmp_path):
    runs = [tmp_path / name for name in "ab"]
    for run, value in zip(runs, (1, 2), strict=True):
        saved(run, "multi-class segmentation", ["background", "a"], {"values": [[value]]})
    with pytest.raises(UserError, match=r"labels .*'a': 2.* and .*'a': 1"):
        load_ensemble(runs, False, (), torch.device("cpu"))


def test_options_that_do_not_go_with_the_kind(scan, tmp_path):
    path = str(scan[0])
    saved(tmp_path / "map", "multi-class segmentation", ["background", "a"], {"values": [[1]]})
    saved(tmp_path / "over", "multi-label segmentation", ["a", "b"], {})
    saved(tmp_path / "whole", "multi-class classification", ["a", "b"], {"sample": "scan"}, spacing=[5, 2, 2])
    saved(tmp_path / "wrong", "multi-class segmentation", ["background", "a"], {"values": [[1], [2]]})
    for run, more, why in (
        ("map", ["--out", "x.csv"], "segments"),
        ("map", ["--out", "x.nii.gz", "--probabilities", "p.nii.gz"], "name a folder"),
        ("over", ["--out", "x.nii.gz"], "its labels may overlap"), ("whole", ["--out", "x.nii.gz"], "is of whole scans"),
        ("whole", ["--out", "x.csv", "--preview", "x.png"], "makes no mask"),
        ("map", ["--out", "x.nii.gz", "--threshold", "0.4"], "gives each voxel its most probable class"),
        ("wrong", ["--out", "x.nii.gz"], "its card does not fit its classes"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=why):
            predict.main([str(tmp_path / run), "--scan", path, *more])
