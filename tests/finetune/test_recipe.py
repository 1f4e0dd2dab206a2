"""The rate, the end and the best epoch against the protocol's rules, spelled out naively; the published table."""

import numpy as np
import pytest

from p2w.errors import UserError
from p2w.finetune.recipe import FineTuneRecipe, Plateau, check_recipe, recipe_of


def naive(losses, recipe):
    """Rate of each epoch, epochs done, and the best, by looking at the whole history each time."""
    rate, rates, last_change = recipe.lr, [], 0
    for done in range(len(losses)):
        rates.append(rate)
        window = losses[last_change : done + 1]
        reference, since = np.inf, 0
        for loss in losses[: done + 1]:
            reference, since = (loss, 0) if loss < reference - recipe.min_delta else (reference, since + 1)
        if min(since, len(window)) >= recipe.plateau_patience:
            rate, last_change = max(rate / 2, recipe.min_lr), done + 1
        if done - int(np.argmin(losses[: done + 1])) >= recipe.patience:
            return rates, done + 1
    return rates, len(losses)


@pytest.mark.parametrize("seed", range(20))
def test_plateau_follows_the_protocol(seed):
    rng = np.random.default_rng(seed)
    losses = (np.exp(-np.arange(60) / 8) + rng.normal(0, 0.02, 60)).round(4).tolist()
    recipe = FineTuneRecipe(patience=15, plateau_patience=3, min_lr=1e-4)
    plateau, rates, best = Plateau(recipe), [], -1
    for epoch, loss in enumerate(losses):
        rates.append(plateau.lr)
        if plateau.observe(loss):
            best = epoch
        again = Plateau(recipe)
        again.load_state_dict(plateau.state_dict())
        plateau = again
        if plateau.ended:
            break
    assert (rates, len(rates)) == naive(losses, recipe)
    assert best == int(np.argmin(losses[: len(rates)]))


def test_published_batches_and_patience():
    assert [(recipe_of(t).batch, recipe_of(t).patience) for t in ("NCC", "ncs", "lcs", "ecc", "bms")] == [
        (24, 10), (16, 50), (16, 20), (24, 38), (16, 30),
    ]  # fmt: skip
    assert recipe_of("ncs").lr == 1e-3 and recipe_of("mine") == FineTuneRecipe()


@pytest.mark.parametrize(
    "wrong",
    [{"batch": 1}, {"lr": float("nan")}, {"patience": 0}, {"min_lr": 1.0}, {"max_epochs": 0}, {"seed": -1}],
)
def test_senseless_numbers_are_refused(wrong):
    with pytest.raises(UserError, match="--recipe"):
        check_recipe(FineTuneRecipe(**wrong))
