"""A sound machine passes, and what computes wrongly is found and named."""

import pytest
import torch

from p2w.config import PretextConfig
from p2w.kernels import crop_resize_torch
from p2w.model import build_encoder
from p2w.model.conv import Conv3d
from p2w.model.decoder import EncoderDecoder
from p2w.model.unet3d import UNet3dDecoder
from p2w.train.optim import Precision
from p2w.train.selfcheck import wrong_convolution, wrong_crop

CPU, BF16 = torch.device("cpu"), Precision("bf16", torch.bfloat16, "asked for")


def network(width=4):
    encoder = build_encoder("unet3d", width)
    return EncoderDecoder(encoder, UNet3dDecoder(encoder.channels, encoder.strides))


@pytest.mark.parametrize("layout", [torch.channels_last_3d, torch.contiguous_format])
def test_a_sound_machine_passes_and_nothing_is_touched(layout):
    model = network().to(memory_format=layout)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    assert wrong_convolution(model, BF16, (2, 1, 16, 32, 32), CPU) == ""
    assert wrong_convolution(model, Precision("fp32", None, ""), (2, 1, 16, 32, 32), CPU) == ""
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("what", ["output", "weights' gradient"])
def test_a_convolution_that_is_wrong_in_bf16_is_named(monkeypatch, what):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x * 1.05 if what == "output" else x

        @staticmethod
        def backward(context, gradient):
            return gradient * 1.05 if what != "output" else gradient

    def forward(self, x):
        weight = self.weight
        if torch.is_autocast_enabled("cpu") and x.shape[2] == 4:
            weight = Wrong.apply(weight)
        return torch.nn.functional.conv3d(x, weight, self.bias, padding=1)

    monkeypatch.setattr(Conv3d, "forward", forward)
    told = wrong_convolution(network(), BF16, (1, 1, 32, 16, 16), CPU)
    assert told.startswith(f"encoder.down_tr512.ops.0.conv1: {what} in bf16 differs from float32 by 0.0"), (
        told
    )


@pytest.mark.parametrize("antialias", [True, False])
def test_a_sound_crop_passes(antialias):
    assert wrong_crop(PretextConfig(antialias=antialias), CPU) == ""


@pytest.mark.parametrize("fault", ["half a voxel", "nothing written", "window"])
def test_a_crop_that_is_wrong_is_found(monkeypatch, fault):
    run = crop_resize_torch.run

    def wrong(whole, boxes, part, target, *, window_hu, antialias):
        if fault == "half a voxel":
            boxes = boxes.clone()
            boxes[:, 2] += 0.5
        if fault == "window":
            window_hu = (window_hu[0], window_hu[1] + 1)
        run(
            whole,
            boxes,
            part,
            None if fault == "nothing written" else target,
            window_hu=window_hu,
            antialias=antialias,
        )

    monkeypatch.setattr(crop_resize_torch, "run", wrong)
    assert "differs from float64 by" in wrong_crop(PretextConfig(), CPU)


def test_what_a_run_keeps_frozen_is_checked_too():
    model = network(2).requires_grad_(False)
    assert wrong_convolution(model, BF16, (1, 1, 16, 16, 16), CPU) == ""
    assert not any(parameter.requires_grad for parameter in model.parameters())
