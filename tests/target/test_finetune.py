"""The loop alone: what a frozen encoder keeps, what continues, what is refused."""

import copy
import math

import numpy as np
import pytest
import torch
from target_sets import write_target_set

from p2w.errors import UserError
from p2w.model import build_encoder
from p2w.target.dataset import open_target
from p2w.target.finetune import FineTuner, Told
from p2w.target.kinds import KINDS
from p2w.target.origin import blank
from p2w.target.recipe import Recipe
from p2w.target.samples import Samples
from p2w.train.optim import Precision
from p2w.world import World

SMALL = Recipe(batch=8, epoch_steps=0, lr=1e-2)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Training and validation samples of the set of bright balls."""
    bright = open_target(write_target_set(tmp_path_factory.mktemp("bright") / "set", "classification"))
    return [Samples(bright, bright.rows(split), torch.device("cpu"), math.inf) for split in ("train", "val")]


def tuner(recipe=SMALL, **more):
    torch.manual_seed(0)
    network = blank("classification", build_encoder("unet3d", 2), True)
    world = World(0, 1, 0, 1, "here", torch.device("cpu"), "test")
    return FineTuner(network, KINDS["classification"], recipe, Precision("fp32", None, ""), world, 0, **more)


def copied(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


@pytest.mark.parametrize("freeze", [False, True])
def test_a_frozen_encoder_stays_as_it_is(sets, freeze):
    one = tuner(Recipe(batch=8, epoch_steps=0, freeze=freeze))
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


def test_it_tells_bright_balls_from_faint_ones(sets):
    one = tuner(Recipe(batch=8, epoch_steps=9, lr=3e-3))
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
    assert KINDS["classification"].loss_of(records) == pytest.approx(min(losses), rel=1e-6)


def test_told_to_stop_it_leaves_in_the_middle_and_a_loss_that_is_no_number_is_named(sets):
    with pytest.raises(Told):
        tuner(told=lambda: True).epoch(*sets)
    with pytest.raises(UserError, match="epoch 1: the loss is not finite"):
        tuner(Recipe(batch=8, lr=1e20, epoch_steps=8)).epoch(*sets)
