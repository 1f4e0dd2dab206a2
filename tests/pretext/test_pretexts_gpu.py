"""Every proxy task on the CPU and on a GPU: the same views, the same loss, a gradient for everything that trains."""

import functools
from dataclasses import replace

import pytest
import torch
from ct_sets import structured_hu
from devices import CPU_AND_GPU, settle

from p2w.config import Config, ModelConfig, PretextConfig
from p2w.pretext import PRETEXTS, build_pretext_and_network
from p2w.pretext.voco import VocoConfig
from p2w.rng import SampleKeys

CPU = torch.device("cpu")
WHOLE = (16, 32, 32)


def wholes(count=4):
    return torch.stack([torch.from_numpy(structured_hu(scan, 0, WHOLE)) for scan in range(count)])


def built(name, device):
    """Pretext and network of width 2, its weights drawn on the CPU."""
    model = ModelConfig("vit3d:depth=1" if name == "mae" else "unet3d", 2)
    config = Config(
        pretext=PretextConfig(name=name, size=(16, 16, 16)), model=model, voco=VocoConfig((1, 2, 2))
    )
    config = replace(config, data=replace(config.data, batch=4))
    torch.manual_seed(0)
    pretext, model = build_pretext_and_network(config)
    model.to(device).to(memory_format=torch.channels_last_3d)
    return pretext, model


def passed(name, device, dtype=None):
    """Of the second of two passes over four wholes, the first having filled what a task remembers: views, loss, further
    scalars, and the gradient of each weight that trains."""
    pretext, model = built(name, device)
    voxels, ids = wholes().to(device), torch.arange(4, device=device)
    for epoch in (0, 1):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(epoch)
        views = pretext.sample(voxels, SampleKeys(0, epoch, ids))
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            output = model(views.input, *views.extra_inputs)
        loss, extras = pretext.loss(output, views)
        loss.backward()
    settle(device)
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    return views, loss.detach(), extras, gradients


@functools.cache
def reference(name):
    """What `passed` gives on the CPU in float32; not to be changed."""
    return passed(name, CPU)


@pytest.mark.parametrize("name", sorted(PRETEXTS))
@CPU_AND_GPU
def test_views_loss_and_gradients_are_on_the_device(name, device):
    views, loss, extras, gradients = passed(name, device)
    tensors = (views.input, views.target, *views.extra_inputs, loss, *extras.values())
    assert {tensor.device.type for tensor in tensors} == {device.type}
    assert torch.isfinite(loss) and loss.ndim == 0
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())
    other = reference(name)
    torch.testing.assert_close(views.input.cpu(), other[0].input, rtol=0, atol=1e-4)
    if device.type == "cpu":  # the same keys draw the same views, and the loss follows
        assert torch.equal(loss, other[1])
    else:
        torch.testing.assert_close(loss.cpu(), other[1], rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("name", sorted(PRETEXTS))
@CPU_AND_GPU
def test_a_loss_in_bf16_is_near_that_in_float32(name, device):
    plain = float((reference(name) if device.type == "cpu" else passed(name, device))[1])
    half = float(passed(name, device, torch.bfloat16)[1])
    assert half == pytest.approx(plain, rel=0.1, abs=0.02)
