"""One optimizer step: accumulation equals one pass, clipping uses the norm of all weights, skips leave no trace."""

import copy

import pytest
import torch
from torch import nn

from p2w.config import Config, OptimConfig, PretextConfig
from p2w.errors import UserError
from p2w.pretext.protocol import Views
from p2w.train.optim import Precision, Schedule, build_optimizer
from p2w.train.step import Stepper, select_all

FP32 = Precision("fp32", None, "test")


class Squares:
    """A pretext whose loss is the mean squared error; only `loss` is used by a step."""

    def loss(self, output, views):
        error = (output - views.target).square()
        return (error if views.mask is None else error * views.mask).mean(), {"largest": error.max().detach()}


def network(norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Conv3d(1, 4, 3, padding=1),
        *([nn.BatchNorm3d(4)] if norm else []),
        nn.Tanh(),
        nn.Conv3d(4, 1, 1),
    ]
    return nn.Sequential(*layers)


def stepper(model, **optim):
    config = Config(optim=OptimConfig(**{"schedule": "constant", **optim}), pretext=PretextConfig())
    optimizer, _ = build_optimizer(config.optim, model)
    return Stepper(config, Squares(), model, optimizer, Schedule(config.optim, 10), FP32, torch.device("cpu"))


def views(count=8, seed=1, mask=False):
    generator = torch.Generator().manual_seed(seed)
    one, two, three = (torch.rand(count, 1, 4, 4, 4, generator=generator) for _ in range(3))
    return Views(one, two, (three > 0.5).float() if mask else None)


def weights(model):
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("passes", [2, 4, 8])
def test_accumulation_is_one_pass(passes, mask):
    whole, split = network(), network()
    one = stepper(whole, name="sgd", lr=0.05)
    many = stepper(split, name="sgd", lr=0.05, accumulate=passes)
    for step in range(3):
        a, b = one.step(views(seed=step, mask=mask), step), many.step(views(seed=step, mask=mask), step)
        assert float(a.loss) == pytest.approx(float(b.loss), rel=1e-6)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)
    assert (weights(whole) - weights(split)).abs().max() < 1e-6
    assert (weights(whole) - weights(network())).abs().max() > 1e-2


def test_accumulation_must_divide():
    with pytest.raises(UserError, match=r"optim\.accumulate=3: does not divide a rank's 8 samples"):
        stepper(network(), accumulate=3).step(views(), 0)


def test_a_step_against_gradients_by_hand_clipped_and_not():
    """SGD from scratch: w - lr * g, with g scaled to the limit when its norm is above."""
    for limit in (0.0, 1e-3, 1e3):
        model, twin = network(), network()
        data = views()
        (twin(data.input) - data.target).square().mean().backward()
        norm = torch.stack([p.grad.double().square().sum() for p in twin.parameters()]).sum().sqrt()
        scale = min(1.0, limit / float(norm)) if limit else 1.0
        result = stepper(model, name="sgd", lr=0.5, sgd_momentum=0.0, clip_norm=limit).step(data, 0)
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-5) and result.applied
        for new, old in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.allclose(new, old - 0.5 * scale * old.grad, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["input", "target"])
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_a_gradient_that_is_not_finite_leaves_no_trace(bad, where, name):
    """Weights, optimizer and batch-norm statistics stay as they were, bit for bit, and the next step is a good one."""
    model = network(norm=True)
    one = stepper(model, name=name)
    one.step(views(seed=1), 0)
    before, optimizer = copy.deepcopy(model.state_dict()), copy.deepcopy(one.optimizer.state_dict())
    data = views(seed=2)
    getattr(data, where)[3, 0, 1, 2, 3] = bad
    result = one.step(data, 1)
    assert not result.applied
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    after = one.optimizer.state_dict()
    assert after["param_groups"] == optimizer["param_groups"]
    for index, state in after["state"].items():
        assert all(
            torch.equal(value, optimizer["state"][index][key]) for key, value in state.items() if key != "lr"
        )
    assert one.step(views(seed=3), 2).applied


def test_the_rate_is_the_schedules():
    model = network()
    one = stepper(model, name="sgd", lr=1.0, warmup_steps=4)
    one.step(views(), 1)
    assert one.optimizer.param_groups[0]["lr"] == 0.5


def test_frozen_parameters_stay():
    model = network()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model[0].state_dict())
    assert stepper(model).step(views(), 0).applied
    assert all(torch.equal(before[name], value) for name, value in model[0].state_dict().items())


def test_the_throw_away_pass_leaves_no_trace_and_takes_no_more_memory_than_a_step():
    model = network(norm=True)
    one = stepper(model, accumulate=4)
    before, seen = copy.deepcopy(model.state_dict()), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    one.warm_up_ddp(views(count=8))
    assert seen == [2]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_scaled_loss_makes_the_same_step_and_a_bad_one_halves_the_scale():
    """Loss scaling alone, in float32: a power of two changes no bit."""
    plain, scaled = network(norm=True), network(norm=True)
    one, two = stepper(plain, clip_norm=0.01), stepper(scaled, clip_norm=0.01)
    two.scaler = torch.amp.GradScaler("cpu")
    for step in range(3):
        a, b = one.step(views(seed=step), step), two.step(views(seed=step), step)
        assert a.grad_norm == b.grad_norm and torch.equal(weights(plain), weights(scaled))
    data = views(seed=3)
    data.target[0, 0, 0, 0, 0] = float("inf")
    assert not two.step(data, 3).applied and two.scaler.get_scale() == 2.0**15
    assert torch.equal(weights(plain), weights(scaled))


def test_a_first_step_that_is_skipped_leaves_momentum_of_nothing():
    """Torch's fused SGD alone would go on from memory that it never wrote."""
    plain, skipped = network(), network()
    one, two = stepper(plain, name="sgd", lr=0.1), stepper(skipped, name="sgd", lr=0.1)
    bad = views(seed=2)
    bad.target[0, 0, 0, 0, 0] = float("nan")
    assert not two.step(bad, 0).applied
    for step in range(2):
        one.step(views(seed=step), step)
        two.step(views(seed=step), step)
    assert torch.equal(weights(plain), weights(skipped))


def test_without_a_fused_optimizer_the_host_decides():
    model = network(norm=True)
    one = stepper(model, fused="none")
    assert not one.skips_on_device
    before = copy.deepcopy(model.state_dict())
    bad = views(seed=2)
    bad.target[0, 0, 0, 0, 0] = float("nan")
    assert not one.step(bad, 0).applied
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert one.step(views(), 1).applied


@pytest.mark.parametrize("bad", [True, False])
def test_tensors_are_chosen_on_the_device_of_any_layout_and_also_from_nan(bad):
    kept = [torch.arange(24.0).view(1, 2, 3, 2, 2), torch.tensor(7), torch.tensor([1.0, 2.0])]
    kept[0] = kept[0].contiguous(memory_format=torch.channels_last_3d)
    now = [torch.full_like(kept[0], float("nan")), torch.tensor(8), torch.tensor([3.0, float("inf")])]
    expected = [tensor.clone() for tensor in (kept if bad else now)]
    select_all(torch.tensor(bad), kept, now)
    for found, right in zip(now, expected, strict=True):
        assert torch.equal(found.nan_to_num(-1), right.nan_to_num(-1)) and found.stride() == right.stride()


def test_wholes_are_shared_out_with_all_that_belongs_to_them():
    ids = torch.arange(8)
    both = Views(ids * 1.0, ids * 2, ids > 3, extra_inputs=(ids * 10, ids))
    shares = both.split(4)
    assert [share.input.tolist() for share in shares] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert shares[2].extra_inputs[0].tolist() == [40, 50] and shares[2].mask.tolist() == [True, True]
    assert len(both.rows(slice(3, 4))) == 1
