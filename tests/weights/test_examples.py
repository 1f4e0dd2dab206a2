"""The examples run unchanged."""

import functools
import importlib.util
import json
import re
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
from processes import REPO

import p2w
from p2w.phantom import make_scan


@pytest.fixture(autouse=True)
def one_scan(monkeypatch):
    """The examples make the same phantom scan, which takes as long as some of their steps: it is made once."""
    monkeypatch.setattr(p2w.phantom, "make_scan", cached_scan)


@functools.cache
def cached_scan(seed, shape):
    return make_scan(seed=seed, shape=shape)


def of_coarser_scans(run, folder, times):
    """A copy of a run whose scans had so much larger voxels: MONAI resamples a phantom to them."""
    copy = shutil.copytree(run, folder)
    told = json.loads((copy / "run.json").read_text())
    data_set = told["starts"][-1]["data_set"]
    data_set["spacing_mm"] = [[times * mm for mm in scan] for scan in data_set["spacing_mm"]]
    (copy / "run.json").write_text(json.dumps(told))
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetune_torch", "monai_unet_decoder"])
def test_an_example_takes_its_ten_steps(name, trained_run, monkeypatch, capsys):
    if name.startswith("monai") and importlib.util.find_spec("monai") is None:
        pytest.skip("needs monai: pip install 'parts2whole[examples]'")
    monkeypatch.setattr(sys, "argv", [name, str(trained_run)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPO / "examples" / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 0
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", capsys.readouterr().out)]
    assert len(losses) == 10 and all(0 < loss < 3 for loss in losses)
    assert "torchvision" not in sys.modules


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "network"), [("unet3d", "SegResNet"), ("unet3d", "SwinUNETR"), ("resencl", "SegResNet")]
)
def test_monais_networks_train_with_an_encoder_in_them(
    network, encoder, trained_run, resencl_run, tmp_path, monkeypatch, capsys
):
    for module in ("monai", "nibabel"):  # MONAI turns images with nibabel
        pytest.importorskip(module, reason="pip install 'parts2whole[examples]'")
    # To a million voxels of 5 x 2.8 x 2.8 mm; at the spacing of these runs they would be 8 and 60 millions.
    run, times = (trained_run, 2) if encoder == "unet3d" else (resencl_run, 4)
    run = of_coarser_scans(run, tmp_path / "run", times)
    assert p2w.card(run)["input"]["spacing_mm_zyx"]["network"] == pytest.approx([5, 2.8, 2.8])
    monkeypatch.setattr(sys, "argv", ["monai_networks", str(run), network])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPO / "examples" / "monai_networks.py"), run_name="__main__")
    assert ended.value.code == 0
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", capsys.readouterr().out)]
    assert len(losses) == 4 and all(0 < loss < 3 for loss in losses)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["SegResNet", "SwinUNETR"])
def test_the_encoder_in_monais_network_is_the_pretrained_one_and_all_of_it_is_trained(network, resencl_run):
    """The decoder is given the encoder's own features, and no parameter is left without a gradient."""
    pytest.importorskip("monai", reason="pip install 'parts2whole[examples]'")
    module = runpy.run_path(str(REPO / "examples" / "monai_networks.py"), run_name="example")
    encoder, seen = p2w.load(resencl_run), []
    model = module["network_of"](network, encoder, 3)
    encoder.register_forward_hook(lambda _module, _input, features: seen.append(features))
    x = torch.rand(1, 1, 32, 32, 64)
    logits = model(x)
    assert logits.shape == (1, 3, 32, 32, 64) and len(seen) == 1
    assert all(torch.equal(a, b) for a, b in zip(seen[0], p2w.load(resencl_run)(x), strict=True))
    logits.square().mean().backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []


def test_monais_transforms_give_the_input_of_the_card(trained_run):
    """An image with its axes in MONAI's order, R, A, S, becomes the volume that our own pipeline would show."""
    pytest.importorskip("nibabel", reason="pip install 'parts2whole[examples]'")
    monai_data = pytest.importorskip("monai.data", reason="pip install 'parts2whole[examples]'")
    module = runpy.run_path(str(REPO / "examples" / "monai_networks.py"), run_name="example")
    card = p2w.card(trained_run)
    spacing = card["input"]["spacing_mm_zyx"]["network"]
    hu = np.random.default_rng(0).integers(-1500, 1500, (40, 70, 66)).astype(np.float32)  # z, y, x in LPS
    ras = hu[:, ::-1, ::-1].transpose(2, 1, 0).copy()
    affine = np.diag([spacing[2], spacing[1], spacing[0], 1.0])
    image = monai_data.MetaTensor(torch.from_numpy(ras)[None], affine=affine)
    made = module["transforms"](card)({"image": image, "label": image.clone()})["image"]
    np.testing.assert_allclose(made[0], (hu.clip(-1000, 1000) + 1000) / 2000, atol=1e-5)


@pytest.mark.parametrize("name", ["finetune_torch", "monai_unet_decoder", "monai_networks"])
def test_an_example_is_short_and_says_how_it_is_run(name):
    text = (REPO / "examples" / f"{name}.py").read_text()
    assert f"python examples/{name}.py" in text and text.count("\n") < (
        125 if name == "monai_networks" else 90
    )
