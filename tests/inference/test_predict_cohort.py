"""p2w predict --scans: the files of the single-scan command, restarts, shares, ensembles and flips, and what is refused."""

import csv
import json
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from ct_files import ct, write
from safetensors.torch import save_file

from p2w.errors import UserError
from p2w.finetune.task_types import task_type
from p2w.inference import predict_cohort
from p2w.inference.encoder_input import EncoderOptions, load_encoder_input
from p2w.inference.finetuned_model import EnsembleModel, load_ensemble, load_finetuned
from p2w.model import build_encoder

CPU = torch.device("cpu")
SIZE = [8, 16, 16]


def trial(folder, seed=0, kind="segmentation", **task):
    """A trial as it is left, with random weights."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    state = task_type(kind).network(build_encoder("unet3d", 2)).state_dict()
    card = {
        "kind": kind, "skips": True, "holds": "fine-tuned",
        "encoder": {"name": "unet3d", "width": 2, "in_channels": 1, "feeding": "unit"},
        "task": {"task": "toy", "channels": 1, "channel_names": ["ct"], "size_zyx": SIZE, "window": [-1000, 1000],
                 "settings": {"spacing": None}, "spacing_mm": None} | task,
    }  # fmt: skip
    save_file(
        {k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors", {"p2w": json.dumps(card)}
    )
    (folder / "result.json").write_text(json.dumps({"state": "finished", "best_val_loss": 1.0}))
    return folder


@pytest.fixture
def scans(tmp_path):
    write(tmp_path / "scans" / "a" / "one.nii.gz", ct((9, 20, 18), 0), direction=np.diag([-1, 1, -1]))
    write(tmp_path / "scans" / "two.mha", ct((12, 16, 16), 1))
    write(tmp_path / "scans" / "three.nrrd", ct((8, 17, 20), 2))
    return tmp_path / "scans"


@pytest.fixture
def run(tmp_path):
    trial(tmp_path / "run" / "trial-00")
    return tmp_path / "run"


def predict(run, scans, out, *more):
    return predict_cohort.main([str(run), "--scans", str(scans), "--out", str(out), *more])


def masks(out, kind="masks"):
    return {p.name: sitk.GetArrayFromImage(sitk.ReadImage(str(p))) for p in sorted((out / kind).iterdir())}


def test_each_mask_is_that_of_the_single_scan(run, scans, tmp_path):
    out, single = tmp_path / "out", tmp_path / "single.nii.gz"
    assert predict(run, scans, out, "--probabilities") == 0
    assert sorted(masks(out)) == ["a_one.nii.gz", "three.nii.gz", "two.nii.gz"]
    for name, path in (("a_one", "a/one.nii.gz"), ("two", "two.mha"), ("three", "three.nrrd")):
        assert predict_cohort.main([str(run), "--scan", str(scans / path), "--out", str(single)]) == 0
        assert (out / "masks" / f"{name}.nii.gz").read_bytes() == single.read_bytes()
        probability = masks(out, "probabilities")[f"{name}.nii.gz"]
        assert probability.dtype == np.float32
        assert ((probability > 0.5) == masks(out)[f"{name}.nii.gz"]).all()
        assert (out / "overlays" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    page = (out / "index.html").read_text()
    assert "a/one.nii.gz" in page and page.count("data:image/png;base64,") == 3
    with open(out / "volumes.csv") as file:
        rows = {row["scan"]: row for row in csv.DictReader(file)}
    assert int(rows["two.mha"]["voxels"]) == masks(out)["two.nii.gz"].sum()
    volume = masks(out)["two.nii.gz"].sum() * 0.7 * 0.8 * 2.5 / 1000
    assert float(rows["two.mha"]["ml"]) == pytest.approx(volume, abs=1e-3)


def test_what_is_done_is_not_done_again(run, scans, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert predict(run, scans, out, "--shard-of", "1/2", "--no-overlays") == 0
    assert not (out / "index.html").exists() and len(masks(out)) == 1
    assert predict(run, scans, out, "--shard-of", "0/2", "--no-overlays") == 0
    assert (out / "index.html").exists() and len(masks(out)) == 3
    before = masks(out)
    computed = []
    real = predict_cohort.mask_of
    monkeypatch.setattr(
        predict_cohort, "mask_of", lambda scan, *a, **k: computed.append(scan.name) or real(scan, *a, **k)
    )
    assert predict(run, scans, out, "--no-overlays") == 0 and computed == []
    write(scans / "two.mha", ct((12, 16, 20), 5))
    (out / "masks" / "three.nii.gz").unlink()
    assert predict(run, scans, out, "--no-overlays") == 0
    assert sorted(computed) == ["three.nrrd", "two.mha"]
    after = masks(out)
    assert (after["three.nii.gz"] == before["three.nii.gz"]).all() and after["two.nii.gz"].shape == (
        12,
        16,
        20,
    )
    with pytest.raises(UserError, match=r"other settings \(threshold: 0.5, now 0.4\)"):
        predict(run, scans, out, "--threshold", "0.4")
    with pytest.raises(UserError, match=r"other settings \(assume_hu: None, now True\)"):
        predict(run, scans, out, "--assume-hu")


def test_bad_scans_are_named_and_the_others_go_on(run, scans, tmp_path, capsys):
    (scans / "bad.nii.gz").write_bytes(b"none")
    assert predict(run, scans, tmp_path / "out", "--no-overlays") == 1
    assert "bad: bad.nii.gz: " in capsys.readouterr().out
    assert len(masks(tmp_path / "out")) == 3 and "bad.nii.gz" in (tmp_path / "out" / "index.html").read_text()
    assert predict(run, scans, tmp_path / "out", "--no-overlays") == 1  # it still is
    (scans / "bad.nii.gz").unlink()
    assert predict(run, scans, tmp_path / "out", "--no-overlays") == 0


def test_an_ensemble_is_the_mean_over_networks_and_flips(tmp_path):
    """Beside a plain loop: mirror, predict, mirror back, average."""
    folders = [trial(tmp_path / f"fold{k}", seed=k) for k in range(2)]
    crops = torch.randint(-1000, 400, (2, 1, *SIZE), dtype=torch.int16)
    model = load_ensemble(folders, False, ("x", "z"), CPU)
    assert model.passes == 8
    found = []
    for folder in folders:
        own = load_finetuned(folder, CPU)
        for axes in ([], [4], [2], [2, 4]):
            found.append(own.predictions(crops.flip(axes), None).flip([axis - 1 for axis in axes]).double())
    torch.testing.assert_close(
        model.predictions(crops, None).double(), torch.stack(found).mean(0), atol=1e-6, rtol=0
    )
    alone = load_ensemble(folders[:1], False, (), CPU)
    assert isinstance(alone, EnsembleModel)
    assert torch.equal(
        alone.predictions(crops, None), load_finetuned(folders[0], CPU).predictions(crops, None)
    )


def test_trials_that_cannot_be_averaged(tmp_path, run):
    one = run / "trial-00"
    for other, match in (
        (trial(tmp_path / "size", size_zyx=[16, 16, 16]), r"size \(16, 16, 16\) and \(8, 16, 16\)"),
        (trial(tmp_path / "window", window=[-500, 500]), "window"),
        (trial(tmp_path / "spacing", settings={"spacing": [1, 1, 1]}), "spacing"),
        (one, "names a network twice"),
        (tmp_path / "none", "none"),
    ):
        with pytest.raises(UserError, match=match):
            load_ensemble([one, other], False, (), CPU)
    with pytest.raises(UserError, match="each axis once"):
        load_ensemble([one], False, ("x", "x"), CPU)
    trial(run / "trial-01", seed=1)
    assert load_ensemble([run], True, (), CPU).passes == 2


def test_options_that_cannot_be(run, scans, tmp_path):
    for more, match in (
        (["--batch", "0"], "--batch 0"),
        (["--ending", ".png"], "--ending .png"),
        (["--shard-of", "3/3"], "i from 0"),
    ):
        with pytest.raises(UserError, match=match):
            predict(run, scans, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="below one that exists"):
        predict(run, scans, tmp_path / "no" / "out")
    shutil.rmtree(run)
    trial(run / "trial-00", kind="classification")
    with pytest.raises(UserError, match="--scans is for segmentation"):
        predict(run, scans, tmp_path / "out")


def test_embeddings_of_a_trial_are_fed_as_its_samples_were(run, scans, tmp_path):
    told = load_encoder_input(str(run), EncoderOptions(), CPU)
    assert (told.size, told.spacing_mm, told.window) == ((8, 16, 16), None, (-1000.0, 1000.0))
    network = load_finetuned(run, CPU).network
    assert all(
        torch.equal(a, b)
        for a, b in zip(told.encoder.parameters(), network.encoder.parameters(), strict=True)
    )
    other = load_encoder_input(str(run), EncoderOptions(spacing=(2.0, 1.0, 1.0)), CPU)
    assert other.spacing_mm == (2.0, 1.0, 1.0)
    trial(tmp_path / "mr", window=[0, 32767])
    with pytest.raises(UserError, match="or scaled by percentiles"):
        load_encoder_input(str(tmp_path / "mr"), EncoderOptions(), CPU)
