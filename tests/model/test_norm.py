"""Batch norm with ReLU in its forms, and the convolution's bias that it cancels."""

import copy

import pytest
import torch
from torch import nn

from p2w.errors import UserError
from p2w.model import build_encoder, norm
from p2w.model.conv import cancelled_biases, for_optimizer, let_train
from p2w.model.decoder import EncoderDecoder, build_decoder
from p2w.model.norm import BatchNorm3d, synchronise_batch_norm
from p2w.weights.foreign import from_genesis, to_genesis

LAYOUTS = [torch.channels_last_3d, torch.contiguous_format]


def network(name="unet3d", dtype=torch.float64):
    torch.manual_seed(0)
    encoder = build_encoder(name, 2)
    one = EncoderDecoder(encoder, build_decoder(encoder, skips=name != "unet3d")).to(dtype)
    for bias in cancelled_biases(one):
        nn.init.normal_(bias)  # as an older run's, which rounding had moved
    return one


def outcome(module, x, training, passes=2):
    """Output, gradients and running statistics after some passes, the last of which is in the mode asked for."""
    module = copy.deepcopy(module)
    for last in range(passes):
        module.train(training or last < passes - 1)
        out = module(x)
    out.square().sum().backward()
    return out.detach(), {n: p.grad for n, p in module.named_parameters()}, dict(module.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_plain_is_torchs_and_flat_is_the_same_bit_by_bit(relu, training, layout, dtype):
    torch.manual_seed(0)
    ours, torchs = BatchNorm3d(5, 1e-3, 0.2, relu=relu), nn.BatchNorm3d(5, 1e-3, 0.2)
    for weights in zip(ours.parameters(), torchs.parameters(), strict=True):
        values = torch.randn(5)
        for weight in weights:
            weight.data.copy_(values)
    x = torch.randn(3, 5, 4, 3, 6).to(dtype).to(memory_format=layout)
    expected = outcome(nn.Sequential(torchs, nn.ReLU()) if relu else nn.Sequential(torchs), x, training)
    for form in ours.forms(x.device, None, 3):
        ours.form = form
        found = outcome(nn.Sequential(ours), x, training)
        assert found[0].is_contiguous(memory_format=layout)
        assert torch.equal(found[0], expected[0])
        for values, right in zip(found[1:], expected[1:], strict=True):
            assert list(values) == list(right) and all(torch.equal(values[n], right[n]) for n in right)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_every_form_on_a_gpu_is_within_rounding_of_float64(training, dtype):
    torch.manual_seed(0)
    one = BatchNorm3d(32, relu=True).to("cuda")
    x = torch.randn(3, 32, 4, 6, 10, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last_3d)
    expected = outcome(nn.Sequential(BatchNorm3d(32, relu=True).to("cuda").double()), x.double(), training)
    forms = one.forms(x.device, None if dtype == torch.float32 else dtype, 3)
    assert forms[:2] == ("plain", "flat")
    for form in forms:
        one.form = form
        found = outcome(nn.Sequential(one), x, training)
        assert found[0].dtype == dtype and found[0].is_contiguous(memory_format=torch.channels_last_3d)
        share = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(
            found[0].double(), expected[0], atol=share * float(expected[0].max()), rtol=0
        )
        for values, right in zip(found[1:], expected[1:], strict=True):
            for label, value in right.items():
                atol = share * float(value.abs().max())
                torch.testing.assert_close(values[label].double(), value.double(), atol=atol, rtol=0)


def test_which_forms_run_where(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    one, bare = BatchNorm3d(2, relu=True), BatchNorm3d(2)
    monkeypatch.setattr(norm, "fused_kernel", lambda: None)  # triton is not installed
    assert one.forms(cpu, None, 1) == one.forms(cuda, None, 1) == ("plain", "flat")
    monkeypatch.setattr(norm, "fused_kernel", lambda: torch.relu)
    assert one.forms(cuda, torch.bfloat16, 1) == ("plain", "flat", "fused")
    assert one.forms(cpu, None, 1) == bare.forms(cuda, None, 1) == ("plain", "flat")
    synchronise_batch_norm(one, 2)
    assert one.forms(cuda, None, 1) == ("plain", "fused") and one.forms(cpu, None, 1) == ("plain",)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["unet3d", "vit3d"])
def test_without_the_cancelled_bias_all_is_as_with_it(name, training):
    """Outputs, gradients, running statistics; in eval mode after training."""
    without = network(name)
    biases = cancelled_biases(without)
    assert len(biases) == {"unet3d": 14, "vit3d": 10}[name]
    assert not any(bias.requires_grad for bias in biases)
    with_bias = copy.deepcopy(without).requires_grad_()  # biases that are trained are computed with
    x = torch.rand(2, 1, 16, 8, 8, dtype=torch.float64)
    found, expected = outcome(without, x, training), outcome(with_bias, x, training)
    torch.testing.assert_close(found[0], expected[0], atol=1e-12, rtol=0)
    for label, value in expected[2].items():
        torch.testing.assert_close(found[2][label], value, atol=1e-12, rtol=1e-12)
    left_out = {n for n, p in without.named_parameters() if not p.requires_grad}
    assert len(left_out) == len(biases)
    for label, gradient in expected[1].items():
        if label not in left_out:
            torch.testing.assert_close(found[1][label], gradient, atol=1e-11, rtol=1e-10)
        elif training:
            assert gradient.abs().max() < 1e-11 and found[1][label] is None


def test_two_forward_passes_may_come_before_a_backward_pass():
    """Contrastive pretexts do so; torch saves the running mean, which the second pass changes."""
    one = network(dtype=torch.float32)
    x = torch.rand(2, 1, 8, 8, 8)
    (one(x).square().mean() + one(x.flip(2)).square().mean()).backward()
    assert all(p.grad is not None for p in one.parameters() if p.requires_grad)


def test_a_steps_update_leaves_the_biases_and_models_genesis_values_travel_untouched():
    one = network(dtype=torch.float32)
    given = {name: value.clone() for name, value in to_genesis(one.state_dict()).items()}
    other = network(dtype=torch.float32)
    other.load_state_dict(from_genesis(given))
    assert all(torch.equal(value, given[name]) for name, value in to_genesis(other.state_dict()).items())
    optimizer = torch.optim.AdamW(for_optimizer(other), lr=0.1, weight_decay=0.1)
    other(torch.rand(2, 1, 8, 8, 8)).square().mean().backward()
    optimizer.step()
    moved = {
        name
        for name, weight in to_genesis(dict(other.named_parameters())).items()
        if not weight.equal(given[name])
    }
    assert moved == {name for name, _ in given.items() if name.endswith(("weight", "bias"))} - {
        name for name in given if name.endswith("conv1.bias")
    }


def test_optimizer_states_of_earlier_versions_load():
    """They have averages of every bias."""
    old = network(dtype=torch.float32).requires_grad_()
    before = torch.optim.Adam(old.parameters())
    old(torch.rand(2, 1, 8, 8, 8)).square().mean().backward()
    before.step()
    new = network(dtype=torch.float32)
    for parameters in (list(new.parameters()), for_optimizer(new)):
        optimizer = torch.optim.Adam(parameters)
        optimizer.load_state_dict(before.state_dict())
        new(torch.rand(2, 1, 8, 8, 8)).square().mean().backward()
        optimizer.step()
        assert len(optimizer.state_dict()["state"]) == len(list(new.parameters()))


def test_frozen_parts_are_not_given_to_the_optimizer_and_training_again_leaves_the_biases_frozen():
    one = network()
    one.encoder.requires_grad_(False)
    assert {id(p) for p in for_optimizer(one)} == {id(p) for p in one.decoder.parameters()}
    let_train(one, but=("decoder.out_tr",))
    frozen = {name for name, p in one.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in one.named_parameters() if n.endswith("conv1.bias") or "out_tr" in n}


def test_a_foreign_batch_norm_over_ranks_is_refused_by_name():
    class Own(nn.BatchNorm3d):
        """Whose forward pass may be anything."""

    with pytest.raises(UserError, match=r"1: batch norm of the kind Own cannot be computed over 2 ranks"):
        synchronise_batch_norm(nn.Sequential(nn.ReLU(), Own(3)), 2)
    alone = nn.Sequential(Own(3), BatchNorm3d(3))
    assert synchronise_batch_norm(alone, 1) is alone and not alone[1].over_ranks
