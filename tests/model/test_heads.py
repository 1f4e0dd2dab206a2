"""Heads over every network: shapes, grey volumes, gradients."""

import pytest
import torch

from p2w.model import build_encoder
from p2w.model.decoder import HIDDEN, Classifier, Segmenter, build_decoder


@pytest.mark.parametrize("name", ["unet3d", "resnet10", "i3d", "dense_vnet"])
def test_one_logit_a_sample_and_one_a_voxel(name):
    torch.manual_seed(0)
    encoder = build_encoder(name, 4)
    x = torch.rand(2, 1, 16, 32, 32)
    classifier = Classifier(encoder)
    logits = classifier(x)
    assert logits.shape == (2,) and logits.dtype == torch.float32
    logits.sum().backward()
    assert classifier.head[0].weight.shape == (HIDDEN, encoder.channels[-1])
    assert all(weight.grad is not None for weight in classifier.head.parameters())
    assert Segmenter(encoder, build_decoder(encoder, True))(x).shape == (2, 1, 16, 32, 32)


@pytest.mark.parametrize(("name", "frozen"), [("dense_vnet", ".skip."), ("unet3d", ".conv1.bias")])
def test_a_classifier_trains_nothing_that_no_gradient_reaches(name, frozen):
    network = Classifier(build_encoder(name, 2))
    network(torch.rand(2, 1, 8, 8, 8)).sum().backward()
    wanted = {name for name, weight in network.named_parameters() if weight.requires_grad}
    reached = {name for name, weight in network.named_parameters() if weight.grad is not None}
    assert wanted == reached
    assert any(frozen in name for name, _ in network.named_parameters()) and not any(
        frozen in n for n in wanted
    )
