"""The self-check passes what is sound, finds what is wrong, and leaves no trace."""

import copy

import pytest
import torch

from p2w import geometry
from p2w.config import PretextConfig
from p2w.errors import UserError
from p2w.model import build_encoder
from p2w.pretext import build_pretext
from p2w.train import selfcheck
from p2w.train.optim import Precision
from p2w.world import World

HERE = World(0, 1, 0, 1, "here", torch.device("cpu"), "test")
BF16 = Precision("bf16", torch.bfloat16, "test")
CONFIG = PretextConfig(size=(16, 16, 16))


def network():
    torch.manual_seed(0)
    return build_pretext(CONFIG).build(build_encoder("unet3d", 8))


def test_what_is_sound_passes_and_nothing_is_changed():
    model = network()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    line = selfcheck.check(model, CONFIG, (32, 40, 48), BF16, HERE)
    assert "crop-resize (torch) within" in line and "bf16 within" in line
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("antialias", [True, False])
def test_a_crop_that_is_off_by_half_a_voxel_is_found(monkeypatch, antialias):
    run = geometry.crop_resize_torch.run

    def shifted(whole, boxes, part, target, **options):
        half = torch.tensor([0.5, 0, 0, 0.5, 0, 0])
        run(whole, (boxes - half).clamp(min=0), part, target, **options)

    config = PretextConfig(size=(16, 16, 16), antialias=antialias)
    assert selfcheck.check_crop(config, (32, 40, 48), HERE) <= 1e-5
    monkeypatch.setattr(geometry.crop_resize_torch, "run", shifted)
    with pytest.raises(UserError, match=r"rank 0 on here: self-check: the crop-resize \(torch\) differs"):
        selfcheck.check_crop(config, (32, 40, 48), HERE)


def test_voxels_that_a_kernel_leaves_out_are_found(monkeypatch):
    run = geometry.crop_resize_torch.run

    def partial(whole, boxes, part, target, **options):
        run(whole, boxes, part, target, **options)
        part[1, 0, -1, -1, -1] = torch.nan  # as if never written

    monkeypatch.setattr(geometry.crop_resize_torch, "run", partial)
    with pytest.raises(UserError, match="differs from a float64 reference by inf"):
        selfcheck.check_crop(CONFIG, (32, 40, 48), HERE)


@pytest.mark.parametrize("wrong", ["forward", "backward"])
def test_a_convolution_that_is_wrong_in_bf16_is_found(monkeypatch, wrong):
    forward = torch.nn.Conv3d._conv_forward

    def convolved(self, x, weight, bias):
        if torch.is_autocast_enabled("cpu"):
            if wrong == "forward":
                weight = weight.roll(1, dims=-1)
            else:
                weight = weight.clone()
                weight.register_hook(torch.Tensor.neg)
        return forward(self, x, weight, bias)

    monkeypatch.setattr(torch.nn.Conv3d, "_conv_forward", convolved)
    with pytest.raises(UserError, match=r"in bf16 differs from fp32: output by .* pass --train\.amp fp32"):
        selfcheck.check(network(), CONFIG, (32, 40, 48), BF16, HERE)
