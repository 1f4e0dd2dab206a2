"""p2w predict: a network with a known answer over scans in any geometry; files as SimpleITK opens them."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from ct_files import dicom
from safetensors.torch import save_file
from torch import nn

from p2w.ct.orientation import Grid
from p2w.errors import UserError
from p2w.finetune.task_types import task_type
from p2w.inference import mask_files, predict
from p2w.inference.finetuned_model import FineTunedModel, load_finetuned
from p2w.inference.predict import mask_of, read_input
from p2w.model import build_encoder
from p2w.tasks import crops

SIZE = [8, 16, 16]
DIRECTIONS = [
    (1, 0, 0, 0, 1, 0, 0, 0, 1),
    (-1, 0, 0, 0, 1, 0, 0, 0, -1),
    (0, 0, 1, -1, 0, 0, 0, 1, 0),
    (0.98, -0.199, 0, 0.199, 0.98, 0, 0, 0, 1),
]


class Threshold(nn.Module):
    """Voxels above the middle of the window."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1e4))

    def forward(self, x):
        return (x - 0.5) * self.scale


def card(kind="segmentation", **settings):
    task = {"task": "toy", "channels": 1, "channel_names": ["ct"], "size_zyx": SIZE, "window": [-1000, 1000]}
    encoder = {"name": "unet3d", "width": 2, "in_channels": 1, "feeding": "unit"}
    task |= {"settings": settings, "spacing_mm": None}
    return {"kind": kind, "encoder": encoder, "skips": True, "task": task, "holds": "fine-tuned"}


def fitted(**settings):
    return FineTunedModel(None, Threshold(), card(**settings))


def image_of(voxels, spacing=(0.7, 0.8, 2.5), direction=(1, 0, 0, 0, 1, 0, 0, 0, 1), origin=(-12.5, 30, 700)):
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(spacing)
    image.SetDirection(direction)
    image.SetOrigin(origin)
    return image


@pytest.fixture(scope="module")
def voxels():
    """Stored order: air, and a box and a ball of 400 HU."""
    z, y, x = np.ogrid[:20, :36, :30]
    inside = ((z - 8) ** 2 * 6 + (y - 20) ** 2 + (x - 10) ** 2 < 60) | ((z > 13) & (y < 9) & (x > 20))
    return np.where(inside, 400, -900).astype(np.int16)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("ending", [".nii.gz", ".mha"])
def test_a_mask_lies_where_its_scan_does(tmp_path, voxels, direction, ending):
    path, out = tmp_path / f"scan{ending}", tmp_path / f"mask{ending}"
    sitk.WriteImage(image_of(voxels, direction=direction), str(path))
    network = fitted(spacing=None)
    subject = read_input([path], network)
    mask = mask_of(subject, network, 0.5, 0.5, 3, None)
    mask_files.write_mask(out, subject.stored(mask), subject.stored_grid)
    scan, written = sitk.ReadImage(str(path)), sitk.ReadImage(str(out))
    assert written.GetSize() == scan.GetSize() and written.GetPixelID() == sitk.sitkUInt8
    for name in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(written, name)() == pytest.approx(getattr(scan, name)(), abs=1e-5), name
    assert (sitk.GetArrayFromImage(written) == (voxels > 0)).all()


STRAIGHT = (1, 0, 0, 0, 1, 0, 0, 0, 1)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".mha", ".mhd", ".nrrd"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_format_holds_what_a_scan_may_have(tmp_path, ending, direction):
    grid = Grid((30, 36, 20), (0.7, 0.8, 2.5), (-12.5, 30.0, 700.0), tuple(map(float, direction)))
    predict.check_geometry(tmp_path / f"mask{ending}", grid)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("mask.nii.gz", {"direction": (1.0, 0.0, 0.0, 0.0, 1.0, 0.3, 0.0, 0.0, 0.954)}, "cannot hold"),
        ("mask.nii", {"size": (40_000, 3, 3)}, "40,000 voxels along an axis, NIfTI-1 holds 32,767"),
        ("mask.nii.gz", {"origin": (1e12, 0.1, 0.0)}, "cannot hold"),
    ],
)
def test_a_format_that_cannot_hold_the_geometry_is_refused(tmp_path, name, changes, why):
    grid = {
        "size": (30, 36, 20),
        "spacing": (0.7, 0.8, 2.5),
        "origin": (0.0, 0.0, 0.0),
        "direction": STRAIGHT,
    }
    with pytest.raises(UserError, match=why) as error:
        predict.check_geometry(tmp_path / name, Grid(**(grid | changes)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (4.0, 0.5, 1.2)])
def test_windows_of_another_spacing_find_the_same_place(tmp_path, voxels, spacing):
    path = tmp_path / "scan.nii.gz"
    sitk.WriteImage(image_of(voxels, direction=(-1, 0, 0, 0, -1, 0, 0, 0, 1)), str(path))
    network = fitted(spacing=spacing)
    subject = read_input([path], network)
    found, truth = subject.stored(mask_of(subject, network, 0.5, 0.5, 3, None)) > 0, voxels > 0
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.85


def saved(folder, kind, seed=0):
    """A trial as it is left, with random weights."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    network = task_type(kind).network(build_encoder("unet3d", 2))
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(state, folder / "model.safetensors", {"p2w": json.dumps(card(kind))})
    (folder / "result.json").write_text(json.dumps({"state": "finished", "best_val_loss": 1.0 - seed}))
    return network.eval()


def test_from_a_run_to_a_file_and_a_picture(tmp_path, voxels, capsys):
    path = tmp_path / "scan.mha"
    sitk.WriteImage(image_of(voxels), str(path))
    saved(tmp_path / "run" / "trial-00", "segmentation")
    saved(tmp_path / "run" / "trial-01", "segmentation", seed=1)
    assert load_finetuned(tmp_path / "run", torch.device("cpu")).file.parent.name == "trial-01"
    out, png = tmp_path / "mask.nii.gz", tmp_path / "mask.png"
    argv = [str(tmp_path / "run"), "--scan", str(path), "--out", str(out), "--preview", str(png)]
    assert predict.main(argv) == 0
    assert "trial-01" in capsys.readouterr().out
    assert sitk.ReadImage(str(out)).GetSize() == (30, 36, 20)
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mask.nii.gz", "mask.png", "run", "scan.mha"]


@pytest.mark.parametrize("skips", [True, False])
def test_a_network_whose_decoder_is_made_of_skips_is_read_back(tmp_path, skips):
    """Cards written before said that dense V-Net's decoder has none."""
    network = task_type("segmentation").network(build_encoder("dense_vnet", 2))
    told = card() | {"skips": skips}
    told["encoder"]["name"] = "dense_vnet"
    save_file(network.state_dict(), tmp_path / "model.safetensors", {"p2w": json.dumps(told)})
    read = load_finetuned(tmp_path, torch.device("cpu"))
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in read.network.state_dict().items())


def test_candidates_get_the_probability_of_their_crop(tmp_path, voxels):
    path, table, out = tmp_path / "scan.mha", tmp_path / "candidates.csv", tmp_path / "scored.csv"
    image = image_of(voxels, direction=(-1, 0, 0, 0, 1, 0, 0, 0, 1))
    sitk.WriteImage(image, str(path))
    network = saved(tmp_path / "trial", "classification")
    places = [(10, 20, 8), (25, 4, 16), (0, 0, 0)]  # stored voxels x, y, z
    worlds = [image.TransformIndexToPhysicalPoint(place) for place in places]
    rows = [f"scan,{x},{y},{z},0" for x, y, z in worlds] + ["another,0,0,0,0"]
    table.write_text("\n".join(["seriesuid,coordX,coordY,coordZ,class", *rows]))
    argv = [
        str(tmp_path / "trial"),
        "--scan",
        str(path),
        "--out",
        str(out),
        "--candidates",
        str(table),
        "--batch",
        "2",
    ]
    assert predict.main(argv) == 0
    with open(out) as file:
        scored = list(csv.DictReader(file))
    assert [[float(row[axis]) for axis in "xyz"] for row in scored] == [
        pytest.approx(world) for world in worlds
    ]
    canonical = voxels[:, :, ::-1]  # LPS: x was stored backwards
    for (x, y, z), row in zip(places, scored, strict=True):
        padded = np.pad(canonical, 20, constant_values=-1000)
        at = (slice(z + 16, z + 24), slice(y + 12, y + 28), slice(29 - x + 12, 29 - x + 28))
        crop = torch.from_numpy(padded[at].astype(np.float32))[None, None]
        expected = torch.sigmoid(network((crop + 1000) / 2000))
        assert float(row["probability"]) == pytest.approx(expected.item(), abs=1e-5)


def test_leaning_slices_are_straightened_for_candidates_and_refused_for_masks(tmp_path, voxels):
    """A candidate is a point in mm, wherever slices lie; no format of masks holds slices that lean."""
    path, table, out = tmp_path / "scan.mha", tmp_path / "candidates.csv", tmp_path / "scored.csv"
    lean = (1, 0, 0, 0, 1, np.sin(0.2), 0, 0, np.cos(0.2))
    image = image_of(voxels, direction=lean)
    sitk.WriteImage(image, str(path))
    x, y, z = image.TransformIndexToPhysicalPoint((10, 20, 8))
    table.write_text(f"x,y,z\n{x},{y},{z}\n")
    saved(tmp_path / "points", "classification")
    argv = [str(tmp_path / "points"), "--scan", str(path), "--out", str(out), "--candidates", str(table)]
    with pytest.raises(UserError, match=r"sheared axes: y and z are 11\.5 degrees"):
        predict.main(argv)
    assert predict.main([*argv, "--resample-tilt"]) == 0
    (row,) = csv.DictReader(out.open())
    assert [float(row[axis]) for axis in "xyz"] == pytest.approx([x, y, z])
    centre = read_input([path], load_finetuned(tmp_path / "points", torch.device("cpu")), resample_tilt=True)
    assert centre.voxels[tuple(np.rint(crops.to_voxel(centre.grid, np.array([z, y, x]))).astype(int))] > 350
    saved(tmp_path / "masks", "segmentation")
    argv = [
        str(tmp_path / "masks"),
        "--scan",
        str(path),
        "--out",
        str(tmp_path / "m.nii.gz"),
        "--resample-tilt",
    ]
    with pytest.raises(UserError, match=r"sheared axes.* no format of masks holds such slices"):
        predict.main(argv)
    assert not (tmp_path / "m.nii.gz").exists()


def test_several_images_scaled_by_their_own_range(tmp_path):
    """MR: any values, one image a channel; 1 where both channels are in the upper half of their range."""
    rng = np.random.default_rng(0)
    values = [rng.random((10, 20, 18)) * 700 + 5, rng.random((10, 20, 18)) * 3]
    paths = [tmp_path / f"P_{name}.nii.gz" for name in ("flair", "t1")]
    for path, own in zip(paths, values, strict=True):
        sitk.WriteImage(image_of(own.astype(np.float32), direction=(-1, 0, 0, 0, -1, 0, 0, 0, 1)), str(path))
    asks = card(spacing=None)
    asks["task"] |= {"channels": 2, "window": [0, 32767]}

    class Both(Threshold):
        def forward(self, x):
            assert x.shape[1] == 2
            return super().forward(x.amin(1, keepdim=True))

    network = FineTunedModel(None, Both(), asks)
    subject = read_input(paths, network)
    found = subject.stored(mask_of(subject, network, 0.5, 0.5, 3, None)) > 0
    upper = [(own - own.min()) / np.ptp(own) > 0.5 for own in values]
    assert (found == (upper[0] & upper[1])).mean() > 0.999  # int16 rounds
    sitk.WriteImage(image_of(values[1][1:].astype(np.float32)), str(paths[1]))
    with pytest.raises(UserError, match=r"P_t1\.nii\.gz: "):
        read_input(paths, network)


def test_a_dicom_folder_is_looked_at_where_one_stands(tmp_path, voxels, monkeypatch):
    """The mask of a series lies where the series does."""
    folder = tmp_path / "series"
    dicom(folder, voxels, "1.2.3")
    monkeypatch.chdir(folder)
    network = fitted(spacing=None)
    subject = read_input([Path()], network)
    mask = mask_of(subject, network, 0.5, 0.5, 3, None)
    mask_files.write_mask(tmp_path / "mask.nii.gz", subject.stored(mask), subject.stored_grid)
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    series, mask = sitk.ReadImage(names), sitk.ReadImage(str(tmp_path / "mask.nii.gz"))
    assert (sitk.GetArrayFromImage(mask) == (sitk.GetArrayFromImage(series) > 0)).all()
    assert mask.GetOrigin() == pytest.approx(series.GetOrigin(), abs=1e-4)
    assert mask.GetSpacing() == pytest.approx(series.GetSpacing(), abs=1e-4)


def test_refusals(tmp_path, voxels):
    path = tmp_path / "scan.mha"
    sitk.WriteImage(image_of(voxels), str(path))
    trial = tmp_path / "trial"
    saved(trial, "segmentation")
    (tmp_path / "cut.mha").write_bytes(path.read_bytes()[:-500])
    (tmp_path / "empty").mkdir()
    for argv, said in (
        ([tmp_path / "gone", "--scan", path, "--out", "m.nii"], "gone"),
        ([tmp_path / "empty", "--scan", path, "--out", "m.nii"], "no finished trial"),
        ([trial, "--scan", tmp_path / "gone.mha", "--out", "m.nii"], "no such file"),
        ([trial, "--scan", tmp_path / "cut.mha", "--out", "m.nii"], "cut.mha"),
        ([trial, "--scan", path, path, "--out", "m.nii"], "names 2 image"),
        ([trial, "--scan", path, "--out", "m.jpg"], "segments"),
        ([trial, "--scan", path, "--out", tmp_path / "no" / "m.nii"], "no folder"),
        ([trial, "--scan", path, "--out", "m.nii", "--overlap", "1"], "--overlap"),
        ([trial, "--scan", tmp_path / "empty", "--out", "m.nii"], "no MetaImage.* with --scan DIR"),
        (
            [trial, "--scan", path, "--out", "m.nii", "--preview", tmp_path / "no" / "m.png"],
            "--preview .*no folder",
        ),
    ):
        with pytest.raises(UserError, match=said):
            predict.main([str(word) for word in argv])


def test_a_folder_of_mr_is_read_for_a_network_that_was_not_trained_on_ct(tmp_path):
    values = np.random.default_rng(0).gamma(2.0, 300.0, (8, 16, 16)).astype(np.int16)
    tags = {"0008|0060": "MR", "0028|1052": "0", "0028|1053": "1"}
    dicom(tmp_path / "mr", values, "1.2.3", tags=tags)
    assert predict._source(tmp_path / "mr", in_hu=False).uid == "1.2.3"
    with pytest.raises(UserError, match="0 scans in it, one is needed"):
        predict._source(tmp_path / "mr", in_hu=True)
    task = {"window": [0, 32767], "settings": {"values": "percentiles"}}
    model = FineTunedModel(Path(), nn.Identity(), {"task": task})
    voxels, _, cut = predict._channel(predict._source(tmp_path / "mr", in_hu=False), model)
    low, high = np.percentile(values, (0.5, 99.5))
    crop = cut(predict.CropBox(np.zeros(3), np.ones(3), values.shape))
    np.testing.assert_allclose(crop / 32767, np.clip((values - low) / (high - low), 0, 1), atol=1e-4)
    assert voxels.shape == values.shape


def test_nothing_that_is_read_or_written_is_overwritten(tmp_path, voxels):
    """An out file that is the scan, the table, a slice of the series, or that another option names too."""
    scan, series, table = tmp_path / "scan.nii.gz", tmp_path / "series", tmp_path / "c.csv"
    sitk.WriteImage(image_of(voxels), str(scan))
    dicom(series, voxels, "1.2.3")
    (slice_0, *_) = sorted(series.iterdir())
    (tmp_path / "link.nii.gz").symlink_to(scan)
    table.write_text("x,y,z\n0,0,0\n")
    saved(tmp_path / "masks", "segmentation")
    saved(tmp_path / "points", "classification")
    masks, points = tmp_path / "masks", tmp_path / "points"
    mask = tmp_path / "m.nii.gz"
    before = {path: path.read_bytes() for path in (scan, slice_0, table)}
    for argv, other in (
        ([masks, "--scan", scan, "--out", scan], "--scan"),
        ([masks, "--scan", scan, "--out", tmp_path / "link.nii.gz"], "--scan"),
        ([masks, "--scan", scan, "--out", mask, "--probabilities", mask], "--out"),
        ([masks, "--scan", scan, "--out", mask, "--preview", scan], "--scan"),
        ([masks, "--scan", series, "--out", slice_0, "--format", "dicom-seg"], "--scan"),
        ([points, "--scan", scan, "--out", table, "--candidates", table], "--candidates"),
    ):
        with pytest.raises(UserError, match=f"would overwrite what {other} names; name another file"):
            predict.main([str(word) for word in argv])
    assert all(path.read_bytes() == data for path, data in before.items()) and not mask.exists()
