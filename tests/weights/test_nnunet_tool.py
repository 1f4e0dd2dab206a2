"""The folder of `p2w export --to nnunet` in nnU-Net's own hands, on a dataset whose slices are thinner than its pixels.

Runs where nnU-Net's git master is installed, which PyPI does not have:

    pip install git+https://github.com/MIC-DKFZ/nnUNet.git && pytest tests/weights/test_nnunet_tool.py

With P2W_REAL_DATA, the volumes are blocks of a real scan.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

import p2w
from p2w.model import build_encoder
from p2w.phantom import make_scan
from p2w.weights import export
from p2w.weights.nnunet import write_nnunet

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SPACING = (0.5, 0.8, 0.8)  # mm z, y, x
SHAPE = (112, 96, 80)  # voxels z, y, x
ID, NAME = 711, "Dataset711_Thin"


@pytest.fixture(scope="module", autouse=True)
def nnunet():
    pytest.importorskip("nnunetv2.experiment_planning.like_nnssl", reason="needs nnU-Net's git master")


def volume(case):
    """A block of HU (z, y, x), of the first real scan where there is one."""
    folder = os.environ.get("P2W_REAL_DATA")
    scans = sorted(Path(folder).rglob("*.nii.gz")) if folder else []
    scans = [scan for scan in scans if "nifti" in scan.parts or "chest" in scan.parts]
    whole = (
        sitk.GetArrayFromImage(sitk.ReadImage(scans[0]))
        if scans
        else make_scan(seed=case, shape=(112, 128, 128)).voxels
    )
    if any(a < b for a, b in zip(whole.shape, SHAPE, strict=True)):
        whole = np.pad(
            whole, [(0, max(b - a, 0)) for a, b in zip(whole.shape, SHAPE, strict=True)], "reflect"
        )
    corner = [(a - b) // (2 + case) for a, b in zip(whole.shape, SHAPE, strict=True)]
    return whole[tuple(slice(c, c + n) for c, n in zip(corner, SHAPE, strict=True))].astype(np.int16)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two cases in nnU-Net's raw layout, and its environment."""
    root = tmp_path_factory.mktemp("nnunet")
    raw = root / "raw" / NAME
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True)
    for case in range(2):
        hu = volume(case)
        for folder, name, array in (
            ("imagesTr", f"c{case}_0000", hu),
            ("labelsTr", f"c{case}", (hu > 0).astype(np.uint8)),
        ):
            image = sitk.GetImageFromArray(array)
            image.SetSpacing(SPACING[::-1])
            sitk.WriteImage(image, raw / folder / f"{name}.nii.gz")
    described = {
        "channel_names": {"0": "CT"}, "labels": {"background": 0, "dense": 1}, "numTraining": 2, "file_ending": ".nii.gz",
    }  # fmt: skip
    (raw / "dataset.json").write_text(json.dumps(described))
    names = {"nnUNet_raw": "raw", "nnUNet_preprocessed": "preprocessed", "nnUNet_results": "results"}
    return {
        **os.environ,
        "nnUNet_compile": "f",
        "nnUNet_def_n_proc": "2",
        **{key: str(root / value) for key, value in names.items()},
    }


def commands(readme, plan):
    """The commands of the README's first or second block, without pip's and the training."""
    blocks = re.findall(r"```\n(.*?)```", readme[readme.index("## In nnU-Net") :], re.DOTALL)
    lines = blocks[plan].strip().splitlines()
    assert lines[-1].startswith("nnUNetv2_train_pretrained ID 3d_fullres 0 -p ptPlans")
    return [line.replace("ID", str(ID)) for line in lines[:-1] if not line.startswith("pip ")], lines[-1]


@pytest.mark.parametrize("plan", [0, 1], ids=["pretrained", "dataset"])
def test_the_readmes_commands_give_the_same_features(resencl_run, dataset, tmp_path, monkeypatch, plan):
    """From another folder, to the letter; then nnU-Net's own trainer builds the network and loads the weights."""
    out = tmp_path / "weights"
    assert export.main([str(resencl_run), "--to", "nnunet", "--out", str(out)]) == 0
    if plan == 1:
        published_width(out)
    readme = (out / "README.md").read_text()
    steps, train = commands(readme, plan)
    if plan == 1:
        steps = commands(readme, 0)[0][:1] + steps
    for step in steps:
        first, *rest = shlex.split(step.replace("$nnUNet_preprocessed", dataset["nnUNet_preprocessed"]))
        program = sys.executable if first == "python" else str(Path(sys.executable).with_name(first))
        done = subprocess.run(
            [program, *rest], env=dataset, cwd=tmp_path, check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{step}\n{done.stdout}\n{done.stderr}"
    compare(dataset, monkeypatch, re.findall(r"-p (\S+) -tr (\S+)", train)[0], p2w.load(out), plan == 0)


def published_width(out):
    """The same folder with the network that nnU-Net plans itself, ResEncL at width 32."""
    card = json.loads((out / "card.json").read_text())
    encoder = build_encoder("resencl", 32)
    card["encoder"] |= {"width": 32, "channels": list(encoder.channels)}
    (out / "card.json").write_text(json.dumps(card))
    write_nnunet(out, {f"encoder.{name}": value for name, value in encoder.state_dict().items()}, card)


def compare(dataset, monkeypatch, names, ours, pretrained):
    """nnU-Net's preprocessed volume and its features, beside ours on the same volume in z, y, x."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_compile"):
        monkeypatch.setenv(name, dataset[name])
    from nnunetv2.run.run_training_from_pretrained import get_trainer_from_args
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    plans, trainer_name = names
    trainer = get_trainer_from_args(str(ID), "3d_fullres", 0, trainer_name, plans, torch.device("cpu"))
    trainer.initialize()
    assert trainer.plans_manager.transpose_forward == [
        1,
        0,
        2,
    ]  # the axis with the largest voxels, y, is first
    data = nnUNetDatasetBlosc2(trainer.preprocessed_dataset_folder).load_case("c0")[0][0]
    theirs = np.asarray(data[:], np.float32)
    spacing = trainer.configuration_manager.spacing
    if pretrained:  # the network saw 1.25, 0.7, 0.7 mm (z, y, x)
        assert spacing == [0.7, 1.25, 0.7] and trainer.configuration_manager.patch_size == [64, 32, 64]
    zyx = theirs.transpose(1, 0, 2)
    expected = [
        round(n * a / b) for n, a, b in zip(SHAPE, SPACING, (spacing[1], spacing[0], spacing[2]), strict=True)
    ]
    assert list(zyx.shape) == expected
    low, high = volume(0).min(), volume(0).max()
    ends = np.clip([low, high], -1000, 1000) / 2000 + 0.5
    assert ends[0] - 0.2 <= zyx.min() and zyx.max() <= ends[1] + 0.2  # a cubic spline overshoots
    if spacing == [0.8, 0.5, 0.8]:  # not resampled: our input, voxel for voxel
        np.testing.assert_allclose(zyx, (volume(0).clip(-1000, 1000) + 1000) / 2000, atol=1e-6)
    size = [n // 32 * 32 for n in zyx.shape]
    block = np.pad(zyx, [(0, max(32 - n, 0)) for n in zyx.shape])
    block = block[: max(size[0], 32), : max(size[1], 32), : max(size[2], 32)]
    network = trainer.network.eval()
    with torch.no_grad():
        mine = ours.eval()(torch.from_numpy(block.copy())[None, None])
        others = network.encoder(torch.from_numpy(block.transpose(1, 0, 2).copy())[None, None])
    if pretrained:
        for a, b in zip(mine, others, strict=True):
            torch.testing.assert_close(b.transpose(2, 3), a, rtol=1e-4, atol=1e-5)
    kernels = {name: value for name, value in network.encoder.named_parameters() if "all_modules" not in name}
    assert len(kernels) > 100  # nnU-Net may plan fewer stages than the weights have
    for name, value in ours.named_parameters():
        if name in kernels:
            mine = value.transpose(2, 3) if value.ndim == 5 else value
            assert torch.equal(kernels.pop(name), mine), name
    assert not kernels
