"""How a target task is fine-tuned: every setting, and what is published for the five tasks (see docs/paper.md)."""

import dataclasses
from dataclasses import dataclass, replace
from typing import Any, Literal

from p2w.config import Amp
from p2w.errors import UserError


@dataclass(frozen=True)
class FineTuneRecipe:
    """Settings of a trial.

    [C] marks Models Genesis' protocol, which the paper follows, and [?] our choice of what is not published.
    """

    batch: int = 16
    """Samples a step, over all ranks together [C: by task]. An epoch is cut into batches of equal size, to within one."""
    epoch_steps: int = 20
    """An epoch has at least this many steps; a small training set is repeated as often as that takes [?]. Sets of the
    paper's size have more; with a step or two an epoch, a trial would end before batch norm knows the set."""
    patience: int = 30
    """Epochs without a lower validation loss before a trial stops [C: by task]."""
    lr: float = 1e-3
    """Adam's learning rate at the start [C]."""
    adam_eps: float = 1e-7
    """Adam's epsilon [?]. Smaller ones turn rounding noise into steps where the true gradient is zero, as it is for every
    bias before a batch norm: trials would then differ from one machine, or number of ranks, to the next."""
    plateau_patience: int = 6
    """Epochs without improvement before the rate is halved [C]."""
    min_delta: float = 1e-4
    """By how much a validation loss must be lower to count as improvement for the rate [C]."""
    min_lr: float = 1e-6
    """The learning rate falls no lower than this [C]."""
    max_epochs: int = 1000
    """Epochs after which a trial ends in any case [?]."""
    precision: Amp = "fp32"
    """Precision of the network's arithmetic; auto takes bf16 where the device computes in it [?]."""
    freeze: bool = False
    """Leave the encoder as it is and train what is behind it alone; its batch statistics stay too."""
    recalibrate: bool = True
    """With freeze: before the first epoch, compute the encoder's running batch-norm statistics anew on the training samples,
    for every starting point alike [?]; else they are those of its pretraining, and mean 0, variance 1 for a random one."""
    subset: Literal["by-trial", "fixed"] = "by-trial"
    """Which patients a fraction of the training data keeps [?]: drawn anew for each trial, or the same for all of them.
    Either way the same for every starting point, and a smaller fraction lies within a larger one."""
    seed: int = 0
    """Trial k has seed `seed + k`: of the initial weights, the order of samples and, by trial, the subset."""
    channels_last: bool = True
    """Memory layout with channels innermost (faster with batch norm)."""
    cache_gib: float = 8.0
    """Samples are decoded once and stay on the device when they take no more than this; else they are read every epoch."""
    checkpoint_minutes: float = 1.0
    """Time between checkpoints of an unfinished trial: what an interruption costs at most, and an epoch."""
    keep_weights: bool = True
    """Keep the fine-tuned weights of finished trials, for `p2w predict`."""


PUBLISHED = {  # task: batch, patience [C]
    "ncc": (24, 10),
    "ncs": (16, 50),
    "lcs": (16, 20),
    "ecc": (24, 38),
    "bms": (16, 30),
}


def recipe_of(task: str) -> FineTuneRecipe:
    """The published recipe of a task, our defaults for a task of the user's own."""
    if task.lower() not in PUBLISHED:
        return FineTuneRecipe()
    batch, patience = PUBLISHED[task.lower()]
    return replace(FineTuneRecipe(), batch=batch, patience=patience)


def check_recipe(recipe: FineTuneRecipe) -> FineTuneRecipe:
    """Return `recipe` when its numbers make sense. Raises UserError naming setting, rule and value."""
    at_least = {"batch": 2, "patience": 1, "plateau_patience": 1, "max_epochs": 1, "seed": 0, "min_delta": 0}
    at_least |= {
        "cache_gib": 0,
        "epoch_steps": 0,
        "adam_eps": 0,
        "checkpoint_minutes": 0,
        "lr": 0,
        "min_lr": 0,
    }
    for name, least in at_least.items():
        value = getattr(recipe, name)
        if not least <= value < float("inf"):  # NaN among them
            raise UserError(f"--recipe.{name.replace('_', '-')} {value}: must be at least {least}")
    if recipe.min_lr > recipe.lr:
        raise UserError(f"--recipe.min-lr {recipe.min_lr}: must not be above --recipe.lr {recipe.lr}")
    return recipe


# Settings that may change when a run folder is continued: they do not touch what comes out.
MAY_CHANGE = frozenset({"cache_gib", "checkpoint_minutes", "keep_weights"})


# Settings under the names that older runs wrote into their transfer.json.
RENAMED = {"amp": "precision", "held_gib": "cache_gib"}


def current_names(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe as a file holds it, with the names that its settings have now, and those that it was written without."""
    named = {RENAMED.get(name, name): value for name, value in recipe.items()}
    return named | {"recalibrate": named.get("recalibrate", not named.get("freeze", False))}


def plain_recipe(recipe: FineTuneRecipe) -> dict[str, object]:
    """The settings by name, as JSON writes them."""
    return dataclasses.asdict(recipe)


class Plateau:
    """Halves the learning rate while the validation loss stands still, and says when to stop. Pure numbers, no optimizer.

    Two counts, as in Models Genesis' protocol (Keras' two callbacks): an improvement by `min_delta` resets the one for the
    rate, any improvement the one for the end; the latter is also what makes a checkpoint the best.
    """

    def __init__(self, recipe: FineTuneRecipe) -> None:
        self.recipe = recipe
        self.lr = recipe.lr
        self.best = self.reference = float("inf")
        self.waited = self.idle = 0

    def observe(self, loss: float) -> bool:
        """Take an epoch's validation loss into account; True when it is the lowest so far."""
        if loss < self.reference - self.recipe.min_delta:
            self.reference, self.waited = loss, 0
        else:
            self.waited += 1
            if self.waited >= self.recipe.plateau_patience:
                self.lr, self.waited = max(self.lr * 0.5, self.recipe.min_lr), 0
        if loss < self.best:
            self.best, self.idle = loss, 0
            return True
        self.idle += 1
        return False

    @property
    def ended(self) -> bool:
        """Whether `patience` epochs in a row brought no lower validation loss."""
        return self.idle >= self.recipe.patience

    def state_dict(self) -> dict[str, float]:
        """The state for `load_state_dict`, as plain numbers."""
        return {name: value for name, value in vars(self).items() if name != "recipe"}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what `state_dict` returned."""
        vars(self).update(state)
