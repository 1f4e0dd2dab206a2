"""Preflight checks on a GPU: a correct GPU passes, and a wrong result is found and named."""

import pytest
import torch
from devices import CPU_AND_GPU, NEEDS_GPU, settle

from p2w.config import PretextConfig
from p2w.kernels import crop_resize_torch
from p2w.model import build_encoder
from p2w.model.conv import Conv3d
from p2w.model.decoder import EncoderDecoder
from p2w.model.unet3d import UNet3dDecoder
from p2w.train.optim import Precision
from p2w.train.preflight import convolution_error, crop_resize_error

CUDA = torch.device("cuda")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def network(device, layout=torch.channels_last_3d):
    torch.manual_seed(0)
    encoder = build_encoder("unet3d", 8)
    model = EncoderDecoder(encoder, UNet3dDecoder(encoder.channels, encoder.strides))
    return model.to(device).to(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.channels_last_3d, torch.contiguous_format])
@pytest.mark.parametrize("name", list(DTYPES))
@NEEDS_GPU
def test_a_sound_card_passes_and_nothing_is_touched(name, layout):
    model = network(CUDA, layout)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.cuda.get_rng_state()
    assert convolution_error(model, Precision(name, DTYPES[name], ""), (4, 1, 16, 32, 32), CUDA) == ""
    settle(CUDA)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.cuda.get_rng_state(), random)


@pytest.mark.parametrize("name", list(DTYPES))
@NEEDS_GPU
def test_a_convolution_that_is_wrong_is_named(monkeypatch, name):
    whole = Conv3d.forward

    def forward(self, x, *more):
        right = whole(self, x, *more)
        return right * 1.1 if torch.is_autocast_enabled("cuda") and x.shape[2] == 4 else right

    monkeypatch.setattr(Conv3d, "forward", forward)
    said = convolution_error(network(CUDA), Precision(name, DTYPES[name], ""), (4, 1, 16, 32, 32), CUDA)
    assert "down_tr256" in said and name in said and "cuda" in said


@pytest.mark.parametrize("antialias", [True, False])
@CPU_AND_GPU
def test_crop_resize_is_sound(device, antialias):
    assert crop_resize_error(PretextConfig(antialias=antialias), device) == ""
    settle(device)


@CPU_AND_GPU
def test_a_wrong_crop_is_named(monkeypatch, device):
    """By whichever backend the device has."""
    module = crop_resize_torch
    if device.type == "cuda":
        from p2w.kernels import crop_resize_triton as module  # a GPU machine with triton
    whole = module.run

    def run(voxels, boxes, part, target, **options):
        whole(voxels, boxes, part, target, **options)
        part += 0.01

    monkeypatch.setattr(module, "run", run)
    assert "differs from float64 by 0.01" in crop_resize_error(PretextConfig(), device)
