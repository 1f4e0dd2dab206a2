"""The parts of the modern recipe: rates, averaged weights, deep supervision, oversampling, early stop, resume."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from target_sets import write_target_set

from p2w import report
from p2w.commands import finetune
from p2w.errors import UserError
from p2w.finetune.deep_supervision import DeepSupervision, at_size, decoder_levels, wants_supervision
from p2w.finetune.recipe import (
    DEFAULTS,
    FineTuneRecipe,
    check_recipe,
    current_names,
    plain_recipe,
    rate_at,
    recipe_of,
)
from p2w.finetune.samples import Samples, epoch_batches, oversampled
from p2w.finetune.task_types import soft_dice, task_type
from p2w.finetune.trainer import FineTuner, StopRequested, encoder_blocks, rate_shares, set_rate
from p2w.model import ENCODERS, build_encoder
from p2w.tasks.reader import open_target
from p2w.train.optim import Precision
from p2w.world import World

SMALL = dataclasses.replace(
    recipe_of("toy", "modern"), batch=8, epoch_steps=0, max_epochs=6, warmup_epochs=1.0
)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Samples of the set of balls by kind and split."""
    found = {}
    for kind in ("segmentation", "classification"):
        source = open_target(write_target_set(tmp_path_factory.mktemp(kind) / "set", kind))
        for split in ("train", "val"):
            found[kind, split] = Samples(source, source.rows(split), torch.device("cpu"), math.inf)
    return found


def tuner(kind="segmentation", rank=0, ranks=1, **changes):
    torch.manual_seed(0)
    network = task_type(kind).network(build_encoder("unet3d", 2))
    world = World(rank, ranks, rank, ranks, "here", torch.device("cpu"), "test")
    recipe = dataclasses.replace(SMALL, **changes)
    return FineTuner(network, task_type(kind), recipe, Precision("fp32", None, ""), world, 0)


def state(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def equal(one, two):
    return all(torch.equal(value, two[name]) for name, value in one.items())


def test_the_modern_recipe_is_sound_and_the_papers_is_what_it_was():
    for task in ("ncc", "bms", "mine"):
        modern, paper = check_recipe(recipe_of(task, "modern")), recipe_of(task)
        assert modern.augment.on and modern.batch == paper.batch
        assert {
            name: plain_recipe(paper)[name] for name in DEFAULTS if name not in ("batch", "patience")
        } == {name: value for name, value in DEFAULTS.items() if name not in ("batch", "patience")}
    with pytest.raises(UserError, match="--recipe best: must be paper or modern"):
        recipe_of("ncc", "best")


@pytest.mark.parametrize(
    "wrong",
    [
        {"weight_decay": -1.0}, {"encoder_lr": 0.0}, {"layer_decay": 1.5}, {"ema": 1.0}, {"oversample": 2.0},
        {"schedule": "cosine", "warmup_epochs": 5.0, "max_epochs": 5}, {"warmup_epochs": math.nan},
    ],
)  # fmt: skip
def test_senseless_numbers_are_refused(wrong):
    with pytest.raises(UserError, match="--recipe"):
        check_recipe(FineTuneRecipe(**wrong))


def test_a_recipe_from_before_these_settings_means_what_it_meant():
    old = {"batch": 16, "lr": 1e-3, "freeze": False, "channels_last": True}
    named = current_names(old)
    assert named["channels_last"] == "auto" and named["augment.flip"] == 0 and named["ema"] == 0
    assert current_names(old | {"channels_last": False})["channels_last"] == "off"
    assert current_names(plain_recipe(SMALL)) == plain_recipe(SMALL)


def test_warm_up_and_cosine():
    recipe = FineTuneRecipe(schedule="cosine", lr=1.0, min_lr=0.1, warmup_epochs=2, max_epochs=10)
    found = [rate_at(recipe, epochs, 0.5) for epochs in (0.5, 1, 2, 6, 10, 11)]
    assert found == pytest.approx([0.25, 0.5, 1.0, 0.55, 0.1, 0.1])
    plateau = FineTuneRecipe(lr=1.0, warmup_epochs=2)
    assert [rate_at(plateau, epochs, 0.5) for epochs in (1, 2, 3)] == [0.5, 0.5, 0.5]
    assert rate_at(FineTuneRecipe(), 0.01, 1e-3) == 1e-3


def test_rates_fall_block_by_block_towards_the_input():
    network = task_type("segmentation").network(build_encoder("unet3d", 2))
    recipe = FineTuneRecipe(encoder_lr=0.5, layer_decay=0.5)
    shares = rate_shares(network, recipe)
    encoder = network.encoder
    found = [
        {shares[id(weight)] for weight in block.parameters()}
        for block in (encoder.down_tr64, encoder.down_tr128, encoder.down_tr256, encoder.down_tr512)
    ]
    assert found == [{0.5 * 0.5**4}, {0.5 * 0.5**3}, {0.5 * 0.5**2}, {0.5 * 0.5}]
    assert not any(id(weight) in shares for weight in network.decoder.parameters())


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_every_weight_of_an_encoder_is_in_a_block_or_before_all(name):
    with torch.device("meta"):
        encoder = build_encoder(name, 2)
    blocks = encoder_blocks(encoder)
    inside = {id(weight) for block in blocks for weight in block.parameters()}
    outside = [n for n, weight in encoder.named_parameters() if id(weight) not in inside]
    assert len(blocks) >= 4 and all("." not in n for n in outside), outside


def test_steps_are_as_long_as_the_rates_say(sets):
    """With plain SGD and no momentum history, the first step of a weight is rate x share x gradient."""
    one = tuner(
        optimizer="sgd", encoder_lr=0.1, layer_decay=1.0, weight_decay=0.0, ema=0.0, deep_supervision="off"
    )
    before = state(one.network)
    x, target = next(sets["segmentation", "train"].batches([[0, 1, 2]]))
    one._loss(x, target, 3).backward()
    set_rate(one.optimizer, 1e-3)
    one.optimizer.step()
    for name, weight in one.network.named_parameters():
        share = (0.1 if name.startswith("encoder.") else 1.0) * 1e-3 * 1.99  # Nesterov's first step
        if weight.grad is not None:
            torch.testing.assert_close(before[name] - weight, share * weight.grad, rtol=1e-3, atol=1e-7)


def test_norms_and_biases_do_not_decay():
    one = tuner(weight_decay=0.5)
    decays = {weight.ndim: set() for group in one.optimizer.param_groups for weight in group["params"]}
    for group in one.optimizer.param_groups:
        for weight in group["params"]:
            decays[weight.ndim].add(group["weight_decay"])
    assert decays == {1: {0.0}, 5: {0.5}}


def test_averaged_weights_are_what_is_validated_and_kept(sets):
    one = tuner(ema=0.9, warmup_epochs=0.0, lr=1e-2)
    mean = state(one.network)
    seen = []
    real = one.optimizer.step

    def step(*args):
        real(*args)
        seen.append(state(one.network))

    one.optimizer.step = step
    one.epoch(sets["segmentation", "train"], sets["segmentation", "val"])
    for number, weights in enumerate(seen, start=1):
        decay = min(0.9, (1 + number) / (10 + number))
        mean = {
            k: v if not v.is_floating_point() else mean[k] * decay + v * (1 - decay)
            for k, v in weights.items()
        }
    judged = one.judged.state_dict()
    assert all(
        torch.allclose(judged[name].double(), value.double(), atol=1e-6) for name, value in mean.items()
    )
    assert equal(one.best, judged) and not equal(state(one.network), judged)
    losses = one._validate(sets["segmentation", "val"])[0]
    one.take_best()
    assert one._validate(sets["segmentation", "val"])[0] == losses and equal(state(one.network), one.best)


def test_a_level_is_judged_against_the_nearest_voxels_and_weighs_half():
    kind = task_type("segmentation")
    network = kind.network(build_encoder("unet3d", 2))
    one, world = DeepSupervision(network), World(0, 1, 0, 1, "here", torch.device("cpu"), "test")
    x, target = torch.rand(2, 1, 8, 16, 16), torch.randint(0, 2, (2, 1, 8, 16, 16), dtype=torch.uint8)
    with one.watching():
        full = network(x)
        coarser = one.logits()
    assert [tuple(level.shape) for level in coarser] == [(2, 1, 2, 4, 4), (2, 1, 4, 8, 8)]
    losses = []
    for logits, times in ((full, 1), (coarser[1], 2), (coarser[0], 4)):
        p = torch.sigmoid(logits.double())
        mask = target[:, :, times // 2 :: times, times // 2 :: times, times // 2 :: times].double()
        losses.append(1 - (2 * (p * mask).sum() + 1) / (p.sum() + mask.sum() + 1))
    wanted = (losses[0] + losses[1] / 2 + losses[2] / 4) / 1.75
    assert float(one.loss(full, coarser, target, kind, 2, world).detach()) == pytest.approx(
        float(wanted.detach()), rel=1e-5
    )
    network(x)
    assert one._features == []  # no hook is left, and none holds a graph
    assert at_size(target, torch.Size((8, 16, 16))) is target
    assert float(soft_dice(torch.tensor([0.0, 0.0, 0.0]))) == 0


def test_deep_supervision_needs_levels_and_leaves_the_file_of_weights_as_it_is(sets):
    plain = task_type("classification").network(build_encoder("unet3d", 2))
    assert decoder_levels(plain) == [] and not wants_supervision(plain, "auto")
    with pytest.raises(UserError, match="no decoder with levels"):
        wants_supervision(plain, "on")
    one, without = tuner(), tuner(deep_supervision="off")
    assert len(one.trained) > len(without.trained) and one.best.keys() == without.best.keys()
    before = copy.deepcopy(one.supervision.state_dict())
    one.epoch(sets["segmentation", "train"], sets["segmentation", "val"])
    assert not equal(before, one.supervision.state_dict())


def test_foreground_fills_its_share_of_every_batch():
    foreground = np.zeros(40, bool)
    foreground[[3, 17, 31, 38]] = True
    batches = epoch_batches(40, 8, 0, 0, 0)
    found = oversampled(batches, foreground, 0.33, 0, 0)
    for before, after in zip(batches, found, strict=True):
        assert len(after) == 8 and int(foreground[after].sum()) >= 3
        assert len(set(after.tolist())) == 8  # four there are: none is taken twice
        assert set(before[foreground[before]]) <= set(after)
    again = oversampled(batches, foreground, 0.33, 0, 0)
    assert all((one == two).all() for one, two in zip(found, again, strict=True))
    nothing = oversampled(batches, np.zeros(40, bool), 0.33, 0, 0)
    assert all((one == two).all() for one, two in zip(batches, nothing, strict=True))


@pytest.mark.parametrize("kind", ["segmentation", "classification"])
def test_it_goes_on_from_its_state_with_the_same_bits(sets, kind):
    whole = sets[kind, "train"], sets[kind, "val"]
    one = tuner(kind)
    one.epoch(*whole)
    weights, kept = one.state_dict()
    two = tuner(kind)
    two.load_state_dict(1, weights, copy.deepcopy(kept))
    parts = [each.epoch(*whole) for each in (one, two)]
    assert [getattr(parts[0], n) for n in ("train_loss", "val_loss", "val_metric", "lr")] == [
        getattr(parts[1], n) for n in ("train_loss", "val_loss", "val_metric", "lr")
    ]
    assert equal(state(one.network), state(two.network)) and equal(state(one.judged), state(two.judged))
    assert equal(one.best, two.best) and one.best_val_loss == two.best_val_loss


def test_the_best_epoch_is_that_of_the_metric(sets, monkeypatch):
    one = tuner(patience=2, max_epochs=50)
    metrics, epochs = [0.2, 0.5, 0.4, 0.5, 0.1], []
    losses = [0.9, 0.8, 0.1, 0.7, 0.05]
    monkeypatch.setattr(one, "_validate", lambda samples: (losses[len(epochs)], metrics[len(epochs)]))
    monkeypatch.setattr(one, "_train", lambda samples: (0.5, 1, 1e-3))
    while not one.ended:
        epochs.append(one.epoch(None, None))
    assert [epoch.best for epoch in epochs] == [True, True, False, False]
    assert one.best_metric() == {"best_val_iou": 0.5}
    assert one.best_val_loss == 0.7  # of the two epochs with the best metric, the one with the lower loss


def test_ranks_share_out_one_augmented_batch(sets):
    samples, positions = sets["segmentation", "train"], np.arange(7)
    x, target = next(samples.batches([positions]))
    whole = tuner()._augmented(x, target, samples, positions, 12)
    assert not torch.equal(whole[0], x)
    for rank in range(2):
        its = tuner(rank=rank, ranks=2)
        part = its._augmented(x[rank::2], target[rank::2], samples, positions[rank::2], 12)
        torch.testing.assert_close(part[0], whole[0][rank::2], rtol=0, atol=1e-6)
        assert torch.equal(part[1], whole[1][rank::2])


@pytest.mark.slow
def test_an_interrupted_trial_ends_with_the_same_bits(tmp_path, monkeypatch):
    """Through its checkpoint's file: averaged weights, heads of the levels, counts of steps."""
    balls = write_target_set(tmp_path / "set", counts=(4, 2, 2), each=2)
    world = World(0, 1, 0, 1, "here", torch.device("cpu"), "test")
    settings = (
        "--recipe modern --width 2 --trials 1 --recipe.batch 4 --recipe.epoch-steps 0 --recipe.max-epochs 3"
    )
    more = "--recipe.warmup-epochs 1 --recipe.checkpoint-minutes 0 --init random"

    def tune(run, stop_after=9):
        real = FineTuner.epoch

        def epoch(self, train, val):
            if self.number == stop_after:
                raise StopRequested
            return real(self, train, val)

        with monkeypatch.context() as patch:
            patch.setattr(FineTuner, "epoch", epoch)
            patch.setattr(finetune, "draw_test_samples", lambda *_: None)  # nobody looks at pictures here
            patch.setattr(report, "write_report", lambda *_: None)
            argv = ["--task", str(balls), "--run-dir", str(tmp_path / run), *settings.split(), *more.split()]
            return finetune.work(finetune.build(argv, world), world)

    assert tune("whole") == 0
    assert tune("parts", 2) == finetune.STOPPED and list((tmp_path / "parts/trial-00/checkpoints").iterdir())
    assert tune("parts") == 0
    found = [load_file(tmp_path / run / "trial-00" / "model.safetensors") for run in ("whole", "parts")]
    assert equal(*found)
    one, two = (
        json.loads((tmp_path / run / "trial-00" / "result.json").read_text()) for run in ("whole", "parts")
    )
    assert one | {"seconds": 0} == two | {"seconds": 0} and 0 <= one["best_val_iou"] <= 1
