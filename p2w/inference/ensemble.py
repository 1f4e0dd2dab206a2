"""Several fine-tuned networks, and mirrored windows, as one network: the mean of their predictions."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from p2w.errors import UserError
from p2w.finetune.cross_validation import folds_of_run
from p2w.finetune.trial import MODEL, RESULT
from p2w.inference.finetuned_model import FineTunedModel, load_finetuned

AXES = {"z": -3, "y": -2, "x": -1}  # of crops (B, C, D, H, W) and of predictions (B, D, H, W)


@dataclass(frozen=True)
class EnsembleModel(FineTunedModel):
    """The first network and `others`, each on the windows as they are and mirrored along all subsets of the axes `flips`."""

    others: tuple[FineTunedModel, ...] = ()
    flips: tuple[str, ...] = ()

    @property
    def passes(self) -> int:
        """How often each window is computed."""
        return int((1 + len(self.others)) * 2 ** len(self.flips))

    @torch.no_grad()
    def predictions(self, crops: Tensor, dtype: torch.dtype | None) -> Tensor:
        """As `FineTunedModel.predictions`, the mean over networks and flips; of one network without flips, its own bits."""
        if self.passes == 1:
            return super().predictions(crops, dtype)
        subsets = [
            [AXES[axis] for axis in chosen]
            for count in range(len(self.flips) + 1)
            for chosen in itertools.combinations(self.flips, count)
        ]
        own = FineTunedModel(self.file, self.network, self.card)
        total: Tensor | None = None
        for model, axes in itertools.product((own, *self.others), subsets):
            found = model.predictions(crops.flip(axes), dtype).float()
            if self.kind.per_voxel:
                found = found.flip(axes)
            total = found if total is None else total + found
        assert total is not None
        return total / self.passes

    def weights(self) -> list[str]:
        """The first 16 digits of a SHA-256 of each network's file."""
        return [hashlib.sha256(model.file.read_bytes()).hexdigest()[:16] for model in (self, *self.others)]


def load_ensemble(
    runs: Sequence[Path], all_trials: bool, flips: Sequence[str], device: torch.device
) -> EnsembleModel:
    """The networks of `runs` as one; `all_trials`: of each run every finished trial, not the best alone.

    Of a cross-validation, all folds that there are.

    Raises UserError where one cannot be loaded, or was trained on samples of another kind, size, spacing or window.
    """
    if len(set(flips)) < len(flips):
        raise UserError(f"--flips {' '.join(flips)}: each axis once, such as --flips y x")
    runs = [fold for run in runs for fold in (folds_of_run(run) or [run])]
    files = [file for run in runs for file in (_trials(run) if all_trials else [run])]
    models = [load_finetuned(file, device) for file in files]
    first, *others = models
    for other in others:
        wrong = [
            f"{what} {theirs} and {ours}" for what, ours, theirs in zip(
                ("kind", "classes", "labels", "channels", "size", "window", "spacing", "values"),
                _fed(first), _fed(other), strict=True,
            ) if ours != theirs
        ]  # fmt: skip
        if wrong:
            raise UserError(
                f"{other.file}: cannot be averaged with {first.file}: {wrong[0]}; name trials of one task"
            )
    twice = {model.file.resolve() for model in models}
    if len(twice) < len(models):
        raise UserError("--ensemble: names a network twice; name each once")
    return EnsembleModel(first.file, first.network, first.card, tuple(others), tuple(flips))


def _fed(model: FineTunedModel) -> tuple[object, ...]:
    values = "percentiles" if model.by_percentiles else "own range"
    size, window = model.size, model.window
    legend = model.kind.mask_legend()
    return model.kind.name, model.classes, legend, model.channels, size, window, model.spacing_mm, values


def _trials(run: Path) -> list[Path]:
    """The finished trials of a run."""
    found = []
    for result in sorted(run.glob(f"trial-*/{RESULT}")):
        try:
            finished = json.loads(result.read_text()).get("state", "finished") == "finished"
        except (OSError, ValueError, AttributeError):
            continue
        if finished and (result.parent / MODEL).is_file():
            found.append(result.parent)
    if not found:
        raise UserError(
            f"{run}: --all-trials takes runs of p2w finetune; it has no finished trial with weights"
        )
    return found
