"""How a target task is fine-tuned: every setting, and two recipes (docs/finetune_recipes.md).

paper     Models Genesis' protocol, which the paper follows, with what is published for the five tasks (docs/paper.md)
modern    augmentation, AdamW with warm-up and cosine, slower rates towards the input, averaged weights
"""

import dataclasses
import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from p2w.config import Amp
from p2w.errors import UserError
from p2w.finetune.augment import USUAL, Augmentation


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
    """Epochs without a lower validation loss, or a higher metric, before a trial stops [C: by task]."""
    stop_on: Literal["loss", "metric"] = "loss"
    """What makes an epoch the best, and a trial stop: the validation loss [C], or the task's own metric on the validation
    samples. Test samples are judged once, at the end."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Adam [C], AdamW, or SGD with Nesterov momentum 0.99."""
    lr: float = 1e-3
    """Learning rate at the start [C], or after the warm-up."""
    weight_decay: float = 0.0
    """Decoupled for adamw, L2 for the others; norms and biases have none."""
    schedule: Literal["plateau", "cosine"] = "plateau"
    """Halve the rate where the validation loss stands still [C], or lower it along half a cosine, from the end of the
    warm-up to min_lr in the last step of max_epochs."""
    warmup_epochs: float = 0.0
    """Epochs over which the rate rises from 0, step by step."""
    encoder_lr: float = 1.0
    """The encoder's rate as a share of lr."""
    layer_decay: float = 1.0
    """The rate of each block of the encoder as a share of the next block's; the last block has this share of encoder_lr."""
    ema: float = 0.0
    """Decay a step of an exponential moving average of weights and batch-norm statistics, which is what is validated, judged
    and saved; 0: none. In the first steps it is less, (1 + step) / (10 + step)."""
    oversample: float = 0.0
    """At least this share of every batch are samples with foreground, or of a class above 0."""
    deep_supervision: Literal["off", "auto", "on"] = "off"
    """A loss at every level of the decoder but the coarsest, half as heavy from level to level; auto: where the decoder has
    levels."""
    augment: Augmentation = field(default_factory=Augmentation)
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
    """Epochs after which a trial ends in any case [?]; a cosine's length."""
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
    channels_last: Literal["auto", "on", "off"] = "auto"
    """Memory layout with channels innermost; auto: where the encoder is faster with it (`Encoder.channels_last`)."""
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


RecipeName = Literal["paper", "modern"]
MODERN = {
    "lr": 2e-3,  # at its peak: over a cosine the mean is the paper's
    "stop_on": "metric",
    "patience": 50,
    "max_epochs": 100,
    "optimizer": "adamw",
    "weight_decay": 0.01,
    "schedule": "cosine",
    "warmup_epochs": 5.0,
    "layer_decay": 0.9,
    "ema": 0.99,
    "oversample": 0.33,
    "deep_supervision": "auto",
    "augment": USUAL,
}


def recipe_of(task: str, name: str = "paper") -> FineTuneRecipe:
    """The recipe `name` for a task: the published batch and patience of the paper's five, our defaults for a user's own.

    Raises UserError for another name.
    """
    if name not in ("paper", "modern"):
        raise UserError(f"--recipe {name}: must be paper or modern")
    recipe = FineTuneRecipe()
    if task.lower() in PUBLISHED:
        batch, patience = PUBLISHED[task.lower()]
        recipe = replace(recipe, batch=batch, patience=patience)
    return replace(recipe, **MODERN) if name == "modern" else recipe  # type: ignore[arg-type]


def check_recipe(recipe: FineTuneRecipe) -> FineTuneRecipe:
    """Return `recipe` when its numbers make sense. Raises UserError naming setting, rule and value."""
    at_least = {"batch": 2, "patience": 1, "plateau_patience": 1, "max_epochs": 1, "seed": 0, "min_delta": 0}
    at_least |= {
        "cache_gib": 0, "epoch_steps": 0, "adam_eps": 0, "checkpoint_minutes": 0, "lr": 0, "min_lr": 0,
    }  # fmt: skip
    for name, least in at_least.items():
        value = getattr(recipe, name)
        if not least <= value < float("inf"):  # NaN among them
            raise UserError(f"--recipe.{name.replace('_', '-')} {value}: must be at least {least}")
    if recipe.min_lr > recipe.lr:
        raise UserError(f"--recipe.min-lr {recipe.min_lr}: must not be above --recipe.lr {recipe.lr}")
    ranges = {
        "weight_decay": "0 <= value < 1e6",
        "warmup_epochs": "0 <= value < 1e6",
        "encoder_lr": "0 < value <= 1000",
        "layer_decay": "0 < value <= 1",
        "ema": "0 <= value < 1",
        "oversample": "0 <= value <= 1",
    }
    for name, rule in ranges.items():
        low, sign, _, also, high = rule.split()
        value = getattr(recipe, name)
        above = value >= float(low) if sign == "<=" else value > float(low)
        if not (above and (value <= float(high) if also == "<=" else value < float(high))):
            raise UserError(f"--recipe.{name.replace('_', '-')} {value}: the rule is {rule}")
    if recipe.schedule == "cosine" and recipe.warmup_epochs >= recipe.max_epochs:
        raise UserError(
            f"--recipe.warmup-epochs {recipe.warmup_epochs:g}: must be below --recipe.max-epochs {recipe.max_epochs}"
        )
    recipe.augment.check()
    return recipe


# Settings that may change when a run folder is continued: they do not change the results.
MAY_CHANGE = frozenset({"cache_gib", "checkpoint_minutes", "keep_weights"})


# Settings under the names that older runs wrote into their transfer.json.
RENAMED = {"amp": "precision", "held_gib": "cache_gib"}


def current_names(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe as a file holds it, with the names that its settings have now, and those that it was written without.

    A file that lacks a setting is older than the setting, and its run was trained as the default says; see `recalibrate`.
    """
    named = {RENAMED.get(name, name): value for name, value in recipe.items()}
    if isinstance(named.get("channels_last"), bool):  # every encoder of that time was faster with it
        named["channels_last"] = "auto" if named["channels_last"] else "off"
    missing = {name: value for name, value in DEFAULTS.items() if name not in named}
    added = {name: value for name, value in missing.items() if name in SINCE or name.startswith("augment.")}
    return named | added | {"recalibrate": named.get("recalibrate", not named.get("freeze", False))}


def plain_recipe(recipe: FineTuneRecipe) -> dict[str, Any]:
    """The settings by dotted name, as JSON writes them."""
    plain = dataclasses.asdict(recipe)
    augment = plain.pop("augment")
    return plain | {f"augment.{name}": value for name, value in augment.items()}


DEFAULTS = plain_recipe(FineTuneRecipe())
SINCE = frozenset(  # settings that files of the first version lack
    {"stop_on", "optimizer", "weight_decay", "schedule", "warmup_epochs", "encoder_lr", "layer_decay", "ema", "oversample"}
    | {"deep_supervision"}
)  # fmt: skip


def rate_at(recipe: FineTuneRecipe, epochs: float, plateau_lr: float) -> float:
    """The learning rate of the step that ends `epochs` epochs (a fraction) after the start of the trial.

    `plateau_lr` is the rate that `Plateau` has come to; a cosine schedule ignores it.
    """
    if epochs < recipe.warmup_epochs:
        return recipe.lr * epochs / recipe.warmup_epochs
    if recipe.schedule == "plateau":
        return plateau_lr
    done = (epochs - recipe.warmup_epochs) / (recipe.max_epochs - recipe.warmup_epochs)
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Plateau:
    """Halves the learning rate while the validation loss stands still, and says when to stop. Pure numbers, no optimizer.

    Where a trial stops on a metric, it is given the metric's negative in place of the loss.

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
