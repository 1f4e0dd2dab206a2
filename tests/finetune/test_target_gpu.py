"""Fine-tuning and prediction on the CPU and on a GPU: the same weights to train, losses and masks that agree."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from devices import CPU_AND_GPU, on_gpu, settle
from target_sets import write_target_set

from p2w.finetune.recipe import FineTuneRecipe
from p2w.finetune.samples import Samples
from p2w.finetune.task_types import TASK_TYPES, task_type
from p2w.finetune.trainer import FineTuner
from p2w.inference.finetuned_model import FineTunedModel
from p2w.inference.predict import mask_of, read_input
from p2w.model import build_encoder
from p2w.tasks.reader import open_target
from p2w.train.optim import choose_precision, set_float32
from p2w.world import World

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = FineTuneRecipe(batch=8, epoch_steps=0, lr=1e-2)


@pytest.fixture(autouse=True)
def ieee():
    """float32 is float32 on both devices; torch's switches as they were, after a test."""
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    set_float32("ieee")
    yield
    torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    """A set of each kind, by its kind."""
    folder = tmp_path_factory.mktemp("targets")
    return {
        kind: open_target(write_target_set(folder / kind, kind))
        for kind in ("classification", "segmentation")
    }


def samples(target, split, device, held=math.inf):
    return Samples(target, target.rows(split), device, held)


def tuner(kind, device, amp="fp32", recipe=SMALL):
    torch.manual_seed(0)
    network = task_type(kind).network(build_encoder("unet3d", 2))
    world = World(0, 1, 0, 1, "here", device, "test")
    return FineTuner(network, TASK_TYPES[kind], recipe, choose_precision(amp, device), world, 0)


def epochs(target, kind, device, count=2, held=math.inf, **more):
    one = tuner(kind, device, **more)
    train, val = (samples(target, split, device, held) for split in ("train", "val"))
    found = [one.epoch(train, val) for _ in range(count)]
    settle(device)
    return one, [(epoch.train_loss, epoch.val_loss) for epoch in found]


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
@CPU_AND_GPU
def test_epochs_on_a_device_are_those_on_the_cpu(targets, kind, device):
    one, found = epochs(targets[kind], kind, device)
    assert {weight.device.type for weight in one.network.parameters()} == {device.type}
    assert all(value.device.type == "cpu" for value in one.best.values())
    _, right = epochs(targets[kind], kind, CPU)
    np.testing.assert_allclose(found, right, rtol=0 if device.type == "cpu" else 0.05)


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
@CPU_AND_GPU
def test_samples_that_are_read_anew_each_epoch_train_the_same(targets, kind, device):
    """Without room for them on the device they come from the shards, one batch ahead."""
    _, held = epochs(targets[kind], kind, device)
    _, read = epochs(targets[kind], kind, device, held=0)
    np.testing.assert_allclose(read, held, rtol=0 if device.type == "cpu" else 0.05)


@pytest.mark.parametrize(("device", "amp"), [on_gpu(CUDA, amp) for amp in ("tf32", "bf16", "fp16")])
def test_other_precisions_of_a_gpu_are_near_float32(targets, device, amp):
    _, right = epochs(targets["classification"], "classification", device)
    _, found = epochs(targets["classification"], "classification", device, amp=amp)
    np.testing.assert_allclose(found, right, rtol=0.25)
    assert found != right


@CPU_AND_GPU
def test_a_trial_goes_on_from_what_it_saved(targets, device):
    train, val = (samples(targets["segmentation"], split, device) for split in ("train", "val"))
    one = tuner("segmentation", device)
    one.epoch(train, val)
    weights, state = one.state_dict()
    two = tuner("segmentation", device)
    two.load_state_dict(1, weights, copy.deepcopy(state))  # as a file would hold it
    first, second = one.epoch(train, val), two.epoch(train, val)
    settle(device)
    within = 0 if device.type == "cpu" else 0.05
    assert second.train_loss == pytest.approx(first.train_loss, rel=within, abs=0 if not within else 1e-4)
    assert second.number == 2


@pytest.fixture(scope="module")
def trained(targets):
    """Weights that find the bright ball, after some epochs on the CPU."""
    one, _ = epochs(targets["segmentation"], "segmentation", CPU, count=6)
    one.take_best()
    return one.state_dict()[0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@CPU_AND_GPU
def test_a_mask_predicted_on_a_device_is_that_of_the_cpu(trained, tmp_path, device, dtype):
    z, y, x = np.ogrid[:20, :36, :30]
    voxels = np.random.default_rng(0).normal(-800, 40, (20, 36, 30))
    voxels[(z - 8) ** 2 * 4 + (y - 20) ** 2 + (x - 10) ** 2 < 30] += 900
    image = sitk.GetImageFromArray(voxels.astype(np.int16))
    sitk.WriteImage(image, str(tmp_path / "scan.nii.gz"))
    card = {
        "kind": "segmentation", "skips": True, "holds": "fine-tuned",
        "encoder": {"name": "unet3d", "width": 2, "in_channels": 1, "feeding": "unit"},
        "task": {"task": "toy", "channels": 1, "channel_names": ["ct"], "size_zyx": [8, 16, 16], "window": [-1000, 1000],
                 "settings": {"spacing": None}, "spacing_mm": None},
    }  # fmt: skip
    masks = []
    for where, precision in ((CPU, None), (device, dtype)):
        network = task_type("segmentation").network(build_encoder("unet3d", 2)).eval()
        network.load_state_dict(trained)
        fitted = FineTunedModel(None, network.to(where), card)
        subject = read_input([tmp_path / "scan.nii.gz"], fitted)
        masks.append(mask_of(subject, fitted, 0.5, 0.5, 3, precision))
    settle(device)
    assert 0.001 < masks[0].mean() < 0.5
    same = (masks[0] == masks[1]).mean()
    assert same == 1 if (device.type, dtype) == ("cpu", None) else same > (0.999 if dtype is None else 0.98)


@CPU_AND_GPU
def test_a_frozen_encoder_stays_as_it_is(targets, device):
    recipe = replace(SMALL, freeze=True)
    one = tuner("classification", device, recipe=recipe)
    before = {name: value.detach().clone() for name, value in one.network.state_dict().items()}
    one.epoch(*(samples(targets["classification"], split, device) for split in ("train", "val")))
    after = one.network.state_dict()
    moved = {name.partition(".")[0] for name in after if not torch.equal(before[name], after[name])}
    assert moved == {"head"}
