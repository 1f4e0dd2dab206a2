"""The decoder over any encoder: sizes, skips, and that every level is used."""

import pytest
import torch

from p2w.model import build_encoder
from p2w.model.decoder import GeneralDecoder, build_decoder
from p2w.model.unet3d import UNet3dDecoder

LEVELS = [
    ((4, 6, 8), (1, 2, 4)),
    ((4, 6, 8, 10), (2, 4, 8, 8)),  # a dilated residual network's
    ((3, 5), (4, 8)),
    ((7,), (2,)),
]


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize(("channels", "strides"), LEVELS)
def test_logits_have_the_inputs_size_and_every_feature_asked_for_is_used(channels, strides, skips):
    decoder = GeneralDecoder(channels, strides, skips, out_channels=2)
    features = [
        torch.randn(2, c, 8 // s, 16 // s, 24 // s, requires_grad=True)
        for c, s in zip(channels, strides, strict=True)
    ]
    output = decoder(features)
    assert output.shape == (2, 2, 8, 16, 24)
    output.square().sum().backward()
    used = [feature.grad is not None and bool(feature.grad.abs().sum() > 0) for feature in features]
    assert used == [skips] * (len(features) - 1) + [True]
    assert all((p.grad is not None) is p.requires_grad for p in decoder.parameters())


def test_the_papers_encoder_gets_the_papers_decoder():
    assert type(build_decoder(build_encoder("unet3d", 2), skips=True)) is UNet3dDecoder


def test_more_input_channels():
    features = build_encoder("unet3d", 2, in_channels=4)(torch.zeros(2, 4, 8, 8, 8))
    assert [f.shape[1] for f in features] == [4, 8, 16, 32]
