"""Fine-tuning: epochs of steps, a validation after each, the best weights kept; and the optimizer. How: p2w.finetune.recipe.

A trial continues from whole epochs: its state is (epoch, weights, their average, optimizer, plateau, best weights), and the
order of an epoch's samples and their augmentation are functions of (seed, epoch). So a trial that was interrupted ends, on
the CPU, with the same bits.

The optimizer decides which weights have which share of the learning rate, and which decay. A block is a child module of the
encoder, and of a child that is a list of modules each of these; blocks without weights do not count. With n blocks, block i
(from 0 at the input) has encoder_lr x layer_decay ^ (n - i) of the rate, as in BEiT (Bao et al. 2022) and MAE (He et al.
2022); what is behind the encoder has all of it.
"""

import contextlib
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from p2w.errors import UserError
from p2w.finetune.augment import augment
from p2w.finetune.deep_supervision import DeepSupervision, wants_supervision
from p2w.finetune.recipe import FineTuneRecipe, Plateau, rate_at
from p2w.finetune.samples import Positions, Samples, epoch_batches, fixed_batches, oversampled
from p2w.finetune.task_types import TaskType
from p2w.model import Encoder, Network
from p2w.model.conv import for_optimizer
from p2w.model.encoder import set_memory_format
from p2w.model.norm import recalibrated, synchronise_batch_norm
from p2w.rng import SampleKeys, stratified_ids
from p2w.train.optim import Precision, load_optimizer
from p2w.world import World, average_gradients, gather_rows

State = dict[str, Tensor]
BATCHES, ROWS = 16, 16  # of samples that a frozen encoder's batch norms are recalibrated on
VOTE_EVERY = 8  # batches between the votes of several ranks with GPUs whether to stop
MOMENTUM = 0.99  # of SGD: nnU-Net's


class StopRequested(Exception):
    """A stop request ended the trial early; it continues from its last checkpoint."""


@dataclass
class EpochResult:
    """The result of an epoch; losses are means over the whole split, `lr` is the rate of its last step."""

    number: int
    train_loss: float
    val_loss: float
    lr: float
    best: bool
    idle: int
    samples: int
    seconds: float
    val_metric: float | None = None  # the task's own metric, of a trial that stops on it


class FineTuner:
    """A trial in progress on every rank: `epoch()` until `ended`; then `best` holds the weights to judge."""

    def __init__(
        self, network: Network, kind: TaskType, recipe: FineTuneRecipe, precision: Precision, world: World, seed: int,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self.kind, self.recipe, self.precision, self.world, self.seed = kind, recipe, precision, world, seed
        self.stop_requested = stop_requested
        self.on_step: Callable[[int, int], None] = lambda done, steps: None
        """Called after each training step with how many of the epoch's are done, and how many it has."""
        if recipe.freeze:
            network.encoder.requires_grad_(False)
        network.to(world.device)
        set_memory_format(network, recipe.channels_last)
        self.network = synchronise_batch_norm(network, world.size)
        self.encoder = network.encoder
        self.averaged = copy.deepcopy(self.network).requires_grad_(False) if recipe.ema else None
        self.supervision: DeepSupervision | None = None
        if wants_supervision(network, recipe.deep_supervision):
            self.supervision = DeepSupervision(network).to(world.device)
        beside = list(self.supervision.parameters()) if self.supervision else []
        self.trained = [weight for weight in self.network.parameters() if weight.requires_grad] + beside
        self.optimizer = build_tuning_optimizer(self.network, beside, recipe, world.device)
        # A GPU's steps take milliseconds, and a vote would hold up the queue of the next ones.
        self.vote_every = VOTE_EVERY if world.device.type == "cuda" and world.size > 1 else 1
        self.plateau = Plateau(recipe)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision.name == "fp16")
        self.number = self.steps = 0
        self.best_val_loss = math.inf
        self.best: State = self._copy(self.judged)

    @property
    def judged(self) -> Network:
        """The network that is validated, tested and saved: the averaged one, where weights are averaged."""
        return self.network if self.averaged is None else self.averaged

    def recalibrate(self, samples: Samples) -> None:
        """Give the encoder the running statistics of at most BATCHES batches of these samples, spread over all of them.

        Called before the first epoch, on all ranks together. A single sample has too few values: then they stay.
        """
        if len(samples) < 2:
            return
        count = max(1, min(BATCHES, len(samples) // ROWS))
        chosen = stratified_ids(np.arange(len(samples)), count * ROWS)
        mine = [chosen[number::count] for number in range(self.world.rank, count, self.world.size)]
        inputs = (x for x, _ in samples.batches(mine))
        with self._autocast():
            found = recalibrated(self.network, inputs, lambda rows: gather_rows(rows, self.world, count))
        self.encoder.load_state_dict(found.encoder.state_dict())
        if self.averaged is not None:
            self.averaged.encoder.load_state_dict(found.encoder.state_dict())
        self.best = self._copy(self.judged)

    @property
    def ended(self) -> bool:
        """Whether the trial has ended: no epoch is left."""
        return self.number >= self.recipe.max_epochs or self.plateau.ended

    def epoch(self, train: Samples, val: Samples) -> EpochResult:
        """One pass over the training samples, then validation.

        Raises StopRequested, or UserError for a loss that is not finite.
        """
        began = time.monotonic()
        train_loss, seen, lr = self._train(train)
        val_loss, metric = self._validate(val)
        if not math.isfinite(train_loss + val_loss + (metric or 0)):
            raise UserError(
                f"epoch {self.number + 1}: the loss is not finite (training {train_loss}, validation {val_loss}) at rate "
                f"{lr:g}; try a smaller --recipe.lr, or --recipe.precision fp32"
            )
        self.number += 1
        best = self.plateau.observe(val_loss if metric is None else -metric)
        # Early in a trial a metric of masks may stand still while the loss falls.
        tied = metric is not None and -metric == self.plateau.best and val_loss < self.best_val_loss
        if best or tied:
            self.best, self.best_val_loss = self._copy(self.judged), val_loss
        seconds = time.monotonic() - began
        return EpochResult(
            self.number, train_loss, val_loss, lr, best, self.plateau.idle, seen, seconds, metric
        )

    def _train(self, samples: Samples) -> tuple[float, int, float]:
        """The steps of an epoch, each rank on its share of every batch: mean loss, number of samples, last rate."""
        self.network.train()
        if self.recipe.freeze:
            self.encoder.eval()
        # Layers that draw (dropout) do it anew each epoch, and the same after an interruption.
        torch.manual_seed((self.seed * 1_000_003 + self.number) * 1_000_003 + self.world.rank)
        whole = self._batches(samples)
        share = [batch[self.world.rank :: self.world.size] for batch in whole]
        summed, first, lr = torch.zeros((), device=self.world.device), 0, 0.0
        watched = contextlib.nullcontext() if self.supervision is None else self.supervision.watching()
        with watched:
            for number, (batch, (x, target)) in enumerate(zip(whole, samples.batches(share), strict=True)):
                self._leave_if_stopped(number)
                lr = rate_at(self.recipe, self.number + (number + 1) / len(whole), self.plateau.lr)
                set_rate(self.optimizer, lr)
                if self.recipe.augment.on:
                    x, target = self._augmented(x, target, samples, share[number], first)  # noqa: PLW2901
                self.optimizer.zero_grad(set_to_none=True)
                loss = self._loss(x, target, len(batch))
                self.scaler.scale(loss).backward()
                average_gradients(self.trained, self.world)
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self._average()
                self.on_step(number + 1, len(whole))
                summed += loss.detach() * len(batch)
                first += len(batch)
        return float(self.world.sum(summed)) / self.world.size / first, first, lr

    def _batches(self, samples: Samples) -> list[Positions]:
        """The batches of the epoch, positions among the samples, the same on every rank."""
        recipe, source = self.recipe, samples.source
        whole = epoch_batches(len(samples), recipe.batch, recipe.epoch_steps, self.seed, self.number)
        if recipe.oversample:
            foreground = ((source.foreground > 0) | (source.label > 0))[samples.rows]
            whole = oversampled(whole, foreground, recipe.oversample, self.seed, self.number)
        return [*whole]

    def _augmented(
        self, x: Tensor, target: Tensor, samples: Samples, positions: Positions, first: int
    ) -> tuple[Tensor, Tensor]:
        """This rank's share of a batch whose first sample is number `first` of the epoch, augmented."""
        rank, size = self.world.rank, self.world.size
        numbers = torch.arange(len(x), device=x.device) * size + (first + rank)
        keys = SampleKeys(self.seed, self.number, numbers)
        rows = samples.rows[np.asarray(positions, np.int64)]
        spacing = samples.pinned(torch.from_numpy(samples.source.spacing_mm[rows]))
        return augment(x, target, self.recipe.augment, keys, spacing.to(x.device, non_blocking=True))

    def _loss(self, x: Tensor, target: Tensor, batch: int) -> Tensor:
        """The loss of this rank's share of a batch of `batch` samples, over all levels of the decoder where asked for."""
        coarser: list[Tensor] = []
        with self._autocast():
            logits = self.network(x)
            if self.supervision is not None:
                coarser = self.supervision.logits()
        if self.supervision is None:
            return self.kind.loss(logits, target, batch, self.world)
        return self.supervision.loss(logits, coarser, target, self.kind, batch, self.world)

    @torch.no_grad()
    def _average(self) -> None:
        """Take the weights and statistics after a step into their average, where there is one."""
        self.steps += 1
        if self.averaged is None:
            return
        decay = min(self.recipe.ema, (1 + self.steps) / (10 + self.steps))
        pairs = [*zip(_values(self.averaged), _values(self.network), strict=True)]
        means, now = ([*side] for side in zip(*(p for p in pairs if p[0].is_floating_point()), strict=True))
        torch._foreach_lerp_(means, now, 1 - decay)
        for mean, value in pairs:
            if not mean.is_floating_point():  # counts of batches
                mean.copy_(value)

    def _validate(self, samples: Samples) -> tuple[float, float | None]:
        """The mean over batches of their loss, weighted by samples, and, of a trial that stops on it, the task's metric.

        Batches are those of the split's order.
        """
        records = self.records(samples)
        ends = fixed_batches(len(samples), self.recipe.batch)
        parts = [records[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        loss = sum(self.kind.loss_of(part) * len(part) for part in parts) / len(samples)
        if self.recipe.stop_on == "loss":
            return loss, None
        patients = [samples.source.patient[row] for row in samples.rows]
        metric = self.kind.measure(records, patients).get(self.kind.compared)
        if metric is None:
            raise UserError(
                f"the validation samples have no {self.kind.compared}, as where one class alone is among them; pass "
                "--recipe.stop-on loss"
            )
        return loss, metric

    @torch.no_grad()
    def records(self, samples: Samples, test: bool = False) -> Tensor:
        """What loss and metrics need of each sample, (N, …) float64 on the CPU, in the split's order, on every rank.

        `test`: with the columns that the test alone needs (`TaskType.test_record`).
        """
        network = self.judged.eval()
        rank, size = self.world.rank, self.world.size
        every = range(len(samples))
        together = self.recipe.batch * size
        share = [every[start:][:together][rank::size] for start in range(0, len(samples), together)]
        batches_of = samples.batches([positions for positions in share if len(positions)])
        found = []
        for number, positions in enumerate(share):
            # Which all ranks ask together, also one that has none of the last samples
            self._leave_if_stopped(number)
            if not len(positions):
                continue
            x, target = next(batches_of)
            with self._autocast():
                logits = network(x)
            if test:
                found.append(self.kind.test_record(logits, target, samples.spacing_mm(positions)))
            else:
                found.append(self.kind.record(logits, target))
        return gather_rows(torch.cat(found), self.world, len(samples)).cpu()

    def _autocast(self) -> torch.autocast:
        dtype = self.precision.dtype
        return torch.autocast(
            self.world.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None
        )

    def _leave_if_stopped(self, number: int) -> None:
        """Raise StopRequested on all ranks when any has a stop request; several GPUs ask one another every few batches."""
        stop_requested = self.stop_requested()
        if number % self.vote_every == 0 and self.world.any(stop_requested):
            raise StopRequested

    def _copy(self, network: Network) -> State:
        """The weights as they are, on the CPU and in memory of their own."""
        return {
            name: value.detach().to("cpu", copy=True).contiguous()
            for name, value in network.state_dict().items()
        }

    def best_metric(self) -> dict[str, float]:
        """The best value of the task's metric on the validation samples, by its name; of a trial that stops on it."""
        if self.recipe.stop_on == "loss":
            return {}
        return {f"best_val_{self.kind.compared}": -self.plateau.best}

    def take_best(self) -> None:
        """Bring the best weights back into the network."""
        self.network.load_state_dict(self.best)
        self.judged.load_state_dict(self.best)

    def state_dict(self) -> tuple[State, dict[str, Any]]:
        """Weights, and all else that the trial continues from: plain types and tensors."""
        state = {
            "optimizer": self.optimizer.state_dict(),
            "plateau": self.plateau.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best": self.best,
            "best_val_loss": self.best_val_loss,
            "steps": self.steps,
        }
        if self.averaged is not None:
            state["averaged"] = self._copy(self.averaged)
        if self.supervision is not None:
            state["supervision"] = {k: v.cpu().clone() for k, v in self.supervision.state_dict().items()}
        return self._copy(self.network), state

    def load_state_dict(self, epoch: int, weights: State, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, after `epoch` epochs."""
        self.network.load_state_dict(weights)
        load_optimizer(self.optimizer, state["optimizer"])
        self.plateau.load_state_dict(state["plateau"])
        self.scaler.load_state_dict(state["scaler"])
        self.best, self.number = state["best"], epoch
        # Earlier versions stopped on the loss, and had nothing else to keep.
        self.best_val_loss, self.steps = state.get("best_val_loss", self.plateau.best), state.get("steps", 0)
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        if self.supervision is not None:
            self.supervision.load_state_dict(state["supervision"])


def _values(network: Network) -> list[Tensor]:
    """Weights, then buffers, in the network's order."""
    return [*network.parameters(), *network.buffers()]


def encoder_blocks(encoder: Encoder) -> list[nn.Module]:
    """The blocks of an encoder, from the input to the coarsest features."""
    found: list[nn.Module] = []
    for child in encoder.children():
        found += list(child.children()) if isinstance(child, nn.Sequential | nn.ModuleList) else [child]
    return [block for block in found if next(block.parameters(), None) is not None]


def rate_shares(network: Network, recipe: FineTuneRecipe) -> dict[int, float]:
    """`id` of a weight of the encoder -> its share of the learning rate."""
    blocks = encoder_blocks(network.encoder)
    shares = {}
    first = recipe.encoder_lr * recipe.layer_decay ** len(blocks)
    for weight in network.encoder.parameters():  # such as position embeddings, which are added to the input
        shares[id(weight)] = first
    for number, block in enumerate(blocks):
        for weight in block.parameters():
            shares[id(weight)] = recipe.encoder_lr * recipe.layer_decay ** (len(blocks) - number)
    return shares


def parameter_groups(
    network: Network, beside: list[nn.Parameter], recipe: FineTuneRecipe
) -> list[dict[str, Any]]:
    """Groups of `params` with `lr_factor` and `weight_decay`, in the order of the network's weights; `beside` come last."""
    shares = rate_shares(network, recipe)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for weight in [*for_optimizer(network), *beside]:
        decay = recipe.weight_decay if weight.ndim > 1 else 0.0
        groups.setdefault((shares.get(id(weight), 1.0), decay), []).append(weight)
    return [
        {"params": weights, "lr_factor": factor, "weight_decay": decay, "lr": recipe.lr * factor}
        for (factor, decay), weights in groups.items()
    ]


def build_tuning_optimizer(
    network: Network, beside: list[nn.Parameter], recipe: FineTuneRecipe, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer for the trainable weights of a network and for those of `beside`, which are not part of it."""
    # On a CPU torch's fused Adam rounds differently, and published results are those of the other.
    fused = True if device.type == "cuda" else None
    weights: list[Any] = [*for_optimizer(network), *beside]
    if recipe.encoder_lr != 1 or recipe.layer_decay != 1 or recipe.weight_decay > 0:
        weights = parameter_groups(network, beside, recipe)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(weights, lr=recipe.lr, momentum=MOMENTUM, nesterov=True, fused=fused)
    if recipe.optimizer == "adamw":
        # torch's own default is 0.01; groups say theirs
        return torch.optim.AdamW(weights, lr=recipe.lr, eps=recipe.adam_eps, weight_decay=0.0, fused=fused)
    return torch.optim.Adam(weights, lr=recipe.lr, eps=recipe.adam_eps, fused=fused)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"] if "lr_factor" in group else rate
