"""The loop alone: what a frozen encoder keeps, what continues, what is refused, what waits for a GPU."""

import copy
import math

import numpy as np
import pytest
import torch
from target_sets import write_target_set

from p2w.errors import UserError
from p2w.finetune.recipe import FineTuneRecipe, current_names, plain_recipe
from p2w.finetune.samples import Samples
from p2w.finetune.task_types import TASK_TYPES, task_type
from p2w.finetune.trainer import FineTuner, StopRequested
from p2w.model import build_encoder
from p2w.model.conv import for_optimizer
from p2w.rng import stratified_ids
from p2w.tasks.reader import open_target
from p2w.train.optim import Precision
from p2w.world import World

SMALL = FineTuneRecipe(batch=8, epoch_steps=0, lr=1e-2)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Training and validation samples of the set of bright balls."""
    bright = open_target(write_target_set(tmp_path_factory.mktemp("bright") / "set", "classification"))
    return [Samples(bright, bright.rows(split), torch.device("cpu"), math.inf) for split in ("train", "val")]


def tuner(recipe=SMALL, **more):
    torch.manual_seed(0)
    network = task_type("classification").network(build_encoder("unet3d", 2))
    world = World(0, 1, 0, 1, "here", torch.device("cpu"), "test")
    return FineTuner(
        network, TASK_TYPES["classification"], recipe, Precision("fp32", None, ""), world, 0, **more
    )


def copied(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


@pytest.mark.parametrize("freeze", [False, True])
def test_a_frozen_encoder_stays_as_it_is(sets, freeze):
    one = tuner(FineTuneRecipe(batch=8, epoch_steps=0, freeze=freeze))
    before = copied(one.network)
    one.epoch(*sets)
    after = one.network.state_dict()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert any(name.startswith("head.") for name in moved)
    assert any(name.startswith("encoder.") for name in moved) is not freeze


def test_it_goes_on_from_its_state_with_the_same_bits(sets):
    one = tuner()
    one.epoch(*sets)
    weights, state = one.state_dict()
    two = tuner()
    two.load_state_dict(1, weights, copy.deepcopy(state))  # as a file would hold it
    first, second = one.epoch(*sets), two.epoch(*sets)
    assert (first.train_loss, first.val_loss, first.number) == (second.train_loss, second.val_loss, 2)
    assert all(
        torch.equal(value, two.network.state_dict()[name]) for name, value in one.network.state_dict().items()
    )


@pytest.mark.slow
def test_it_tells_bright_balls_from_faint_ones(sets):
    one = tuner(FineTuneRecipe(batch=8, epoch_steps=9, lr=3e-3))
    for _ in range(8):
        one.epoch(*sets)
    one.take_best()
    metrics, _ = one.kind.judge(one.records(sets[1]), [str(number) for number in range(12)])
    assert metrics["auc"] > 0.9 and one.plateau.best < 0.4


def test_the_best_weights_come_back(sets):
    one = tuner()
    losses, best = [], None
    for _ in range(6):
        losses.append(one.epoch(*sets).val_loss)
        best = copied(one.network) if losses[-1] == min(losses) else best
    assert int(np.argmin(losses)) < 5  # else nothing is tested
    one.take_best()
    assert all(torch.equal(value, best[name]) for name, value in one.network.state_dict().items())
    records = one.records(sets[1])
    assert TASK_TYPES["classification"].loss_of(records) == pytest.approx(min(losses), rel=1e-6)


def test_told_to_stop_it_leaves_in_the_middle_and_a_loss_that_is_no_number_is_named(sets):
    with pytest.raises(StopRequested):
        tuner(stop_requested=lambda: True).epoch(*sets)
    with pytest.raises(UserError, match="epoch 1: the loss is not finite"):
        tuner(FineTuneRecipe(batch=8, lr=1e20, epoch_steps=8)).epoch(*sets)


def test_a_checkpoint_of_a_fused_adam_goes_on_without_and_one_without_goes_on(sets):
    """As after a move between a GPU, whose Adam is fused, and a CPU."""
    one, two = tuner(), tuner()
    one.optimizer = torch.optim.Adam(
        for_optimizer(one.network), lr=one.recipe.lr, eps=one.recipe.adam_eps, fused=True
    )
    one.epoch(*sets)
    weights, state = one.state_dict()
    two.load_state_dict(1, weights, copy.deepcopy(state))
    assert one.optimizer.param_groups[0]["fused"] and not two.optimizer.param_groups[0]["fused"]
    moments = [kept["exp_avg"] for kept in two.optimizer.state.values()]
    assert len(moments) == len(two.trained) and any(moment.abs().max() > 0 for moment in moments)
    two.epoch(*sets)
    weights, state = two.state_dict()
    one.load_state_dict(2, weights, copy.deepcopy(state))
    assert one.optimizer.param_groups[0]["fused"]
    one.epoch(*sets)


@pytest.mark.parametrize(("every", "votes"), [(1, [0, 1, 2]), (2, [0, 2])])
def test_ranks_are_asked_at_every_batch_and_vote_at_every_few(sets, monkeypatch, every, votes):
    asked, voted = [], []
    monkeypatch.setattr(World, "any", lambda self, flag: voted.append(len(asked) - 1) or flag)
    one = tuner(FineTuneRecipe(batch=4), stop_requested=lambda: bool(asked.append(1)) or len(asked) > 2)
    one.vote_every = every
    with pytest.raises(StopRequested):
        one.epoch(*sets)
    assert voted == votes and len(asked) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("held", [0, math.inf])
def test_a_gpu_gets_the_same_samples_and_a_fused_adam(tmp_path, held):
    bright = open_target(write_target_set(tmp_path / "set", "classification"))
    device = torch.device("cuda")
    there, here = (Samples(bright, bright.rows("train"), at, held) for at in (device, torch.device("cpu")))
    places = [[3, 0, 5], [1], [2, 4]]
    for (x, target), (right, label) in zip(there.batches(places), here.batches(places), strict=True):
        assert x.is_cuda and torch.equal(x.cpu(), right) and torch.equal(target.cpu(), label)
    network = task_type("classification").network(build_encoder("unet3d", 2))
    world = World(0, 1, 0, 1, "here", device, "test")
    one = FineTuner(network, TASK_TYPES["classification"], SMALL, Precision("fp32", None, ""), world, 0)
    assert one.optimizer.param_groups[0]["fused"]
    torch.cuda.set_sync_debug_mode("error")  # no step may wait for the device
    try:
        samples = there.batches([[0, 1, 2, 3]] * 3)
        for x, target in samples:
            one.optimizer.zero_grad(set_to_none=True)
            one.kind.loss(one.network(x), target, 4, world).backward()
            one.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_frozen_encoder_is_recalibrated_on_the_training_samples(sets):
    """Statistics of fixed batches of the samples; weights and all behind the encoder stay."""
    one = tuner(FineTuneRecipe(batch=8, epoch_steps=0, freeze=True))
    before = copied(one.network)
    one.recalibrate(sets[0])
    after = one.network.state_dict()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    norms = {name for name in after if name.startswith("encoder.") and name.endswith(("_mean", "_var"))}
    assert moved == norms and norms
    assert all(torch.equal(one.best[name], after[name]) for name in after)
    first = min(norms, key=lambda name: list(after).index(name)).removesuffix("running_mean")
    count = max(1, len(sets[0]) // 16)
    rows = stratified_ids(np.arange(len(sets[0])), 16 * count)
    conv = one.network.get_submodule(first.rsplit(".", 2)[0]).conv1
    each = []
    for x, _ in sets[0].batches([rows[number::count] for number in range(count)]):
        values = conv(x).double()
        each.append(torch.stack((values.mean((0, 2, 3, 4)), values.var((0, 2, 3, 4)))))
    mean, variance = torch.stack(each).mean(0)
    torch.testing.assert_close(after[f"{first}running_mean"].double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after[f"{first}running_var"].double(), variance, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("freeze", "meant"), [(True, False), (False, True)])
def test_a_run_from_before_recalibration_means_what_it_meant(freeze, meant):
    old = {
        name: value
        for name, value in plain_recipe(FineTuneRecipe(freeze=freeze)).items()
        if name != "recalibrate"
    }
    assert current_names(old)["recalibrate"] is meant
    assert current_names(old | {"recalibrate": True})["recalibrate"] is True
