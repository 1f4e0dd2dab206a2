"""A fine-tuned network read back from a trial, and what its input must be; the mean of several, also of mirrored windows."""

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from p2w.errors import UserError
from p2w.files import type_mismatch
from p2w.finetune.cross_validation import folds_of_run
from p2w.finetune.task_types import TaskType, task_type
from p2w.finetune.trial import MODEL, RESULT
from p2w.model import Network, build_encoder
from p2w.model.encoder import InputNorm
from p2w.weights.foreign import check_tensors
from p2w.weights.load import read_card

CARD = {
    "kind": str,
    "encoder": {"name": str, "width": int, "in_channels": int, "feeding": str},
    "skips": bool,
    "task": {"task": str, "channels": int, "size_zyx": [int], "window": [float], "settings": {}},
}


@dataclass(frozen=True)
class FineTunedModel:
    """A network in evaluation mode, and its card."""

    file: Path
    network: Network
    card: dict[str, Any]

    @property
    def kind(self) -> TaskType:
        """The kind of the task that it was fine-tuned on, which knows the task's classes."""
        return task_type(self.card["kind"]).for_set(self.card["task"])

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the task's classes; () where the card has none."""
        return tuple(self.card["task"].get("classes") or ())

    @property
    def channels(self) -> int:
        """The number of channels of its input."""
        return int(self.card["task"]["channels"])

    @property
    def size(self) -> tuple[int, int, int]:
        """Voxels z, y, x of a crop that it takes."""
        z, y, x = self.card["task"]["size_zyx"]
        return z, y, x

    @property
    def window(self) -> tuple[float, float]:
        """Stored values that become 0 and 1."""
        low, high = self.card["task"]["window"]
        return float(low), float(high)

    @property
    def in_hu(self) -> bool:
        """Whether it was trained on CT; else each image is scaled by values of its own."""
        return self.window[0] < 0

    @property
    def by_percentiles(self) -> bool:
        """Whether images that are not CT are scaled by their percentiles; else by their smallest and largest value."""
        return bool(self.card["task"]["settings"].get("values") == "percentiles")

    @property
    def assumes_hu(self) -> bool:
        """Whether the task's images were taken for HU without a test."""
        return bool((self.card["task"].get("settings") or {}).get("assume_hu"))

    @property
    def of_whole_scans(self) -> bool:
        """Whether a sample was a whole scan, so that a prediction is about a whole scan too."""
        return not self.kind.per_voxel and (self.card["task"].get("target") or {}).get("sample") == "scan"

    def check_threshold(self, threshold: float, default: float) -> None:
        """Raise UserError for a threshold of a network that takes the most probable class instead."""
        if threshold != default and not self.kind.by_threshold:
            raise UserError(
                f"--threshold {threshold:g}: {self.file} gives each voxel its most probable class; leave it out, or write "
                "--probabilities"
            )

    @property
    def spacing_mm(self) -> tuple[float, float, float] | None:
        """mm z, y, x of a crop's voxels; None: those of the scan, whatever they are.

        As the task's settings say; of a task that has no such setting, the spacing of its samples where they all have one.
        """
        task = self.card["task"]
        if "spacing" in task["settings"]:
            spacing = task["settings"]["spacing"]
            return None if spacing is None else (float(spacing[0]), float(spacing[1]), float(spacing[2]))
        ranges = task.get("spacing_mm")
        if not ranges or any(not math.isclose(low, high, rel_tol=1e-3) for low, high in ranges):
            return None
        return float(ranges[0][0]), float(ranges[1][0]), float(ranges[2][0])

    def scale(self, values: Tensor) -> Tensor:
        """Turn stored values, float32 of any shape, into the network's input in [0, 1], in place."""
        low, high = self.window
        return values.sub_(low).div_(high - low).clamp_(0, 1)

    def predictions(self, crops: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Stored values int16 (B, C, D, H, W) on the network's device -> what `TaskType.predict` makes of its logits."""
        return self.predictions_of_scaled(self.scale(crops.float()), dtype)

    @torch.no_grad()
    def predictions_of_scaled(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        """`predictions` of crops that were scaled before."""
        with torch.autocast(x.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            logits: Tensor = self.network(x)
        return self.kind.predict(logits)


def load_finetuned(where: Path, device: torch.device) -> FineTunedModel:
    """Load a trial, its model.safetensors, or of a run of p2w finetune the trial with the lowest validation loss.

    Raises UserError where there is none, or it is damaged.
    """
    file = where / MODEL if where.is_dir() else where
    if where.is_dir() and not file.is_file():
        file = _best(where) / MODEL
    card = read_card(file)
    if problem := type_mismatch(card, CARD, "its card"):
        raise UserError(
            f"{file}: no fine-tuned weights ({problem}); name a run of p2w finetune, or a trial of it"
        )
    spec = card["encoder"]
    encoder = build_encoder(spec["name"], spec["width"], spec["in_channels"])
    if spec["feeding"] not in get_args(InputNorm):
        raise UserError(
            f"{file}: its card has the input normalisation {spec['feeding']!r}; known are "
            f"{', '.join(get_args(InputNorm))}; use the version of p2w that wrote it"
        )
    encoder.input_norm = spec["feeding"]
    classes = card["task"].get("classes") or ()
    try:
        task_type(card["kind"]).for_set(card["task"]).mask_legend()
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise UserError(f"{file}: its card does not fit its classes ({error}); copy it again") from error
    network = task_type(card["kind"]).network(encoder, classes, card["skips"] or encoder.only_skips)
    try:
        state = load_file(file)
        check_tensors(state, str(file))
        network.load_state_dict(state)
    except UserError:
        raise
    except (SafetensorError, OSError, RuntimeError) as error:
        said = str(error).strip().splitlines()[0]
        raise UserError(f"{file}: damaged, or of another version ({said}); copy it again") from error
    return FineTunedModel(file, network.to(device).eval(), card)


def _best(run: Path) -> Path:
    """The trial with the lowest validation loss."""
    found: list[tuple[float, Path]] = []
    for path in sorted(run.glob(f"trial-*/{RESULT}")):
        try:
            loss = float(json.loads(path.read_text())["best_val_loss"])
        except (OSError, ValueError, LookupError, TypeError):
            continue
        if (path.parent / MODEL).is_file():
            found.append((loss, path.parent))
    if not found:
        raise UserError(
            f"{run}: no finished trial with weights there; name a run of p2w finetune (with --recipe.keep-weights)"
        )
    return min(found)[1]


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
    def predictions_of_scaled(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        """The mean over networks and flips; of one network without flips, its own bits. All networks have one window."""
        if self.passes == 1:
            return super().predictions_of_scaled(x, dtype)
        subsets = [
            [AXES[axis] for axis in chosen]
            for count in range(len(self.flips) + 1)
            for chosen in itertools.combinations(self.flips, count)
        ]
        own = FineTunedModel(self.file, self.network, self.card)
        total: Tensor | None = None
        for model, axes in itertools.product((own, *self.others), subsets):
            found = model.predictions_of_scaled(x.flip(axes), dtype).float()
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
                _comparable(first), _comparable(other), strict=True,
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


def _comparable(model: FineTunedModel) -> tuple[object, ...]:
    """What networks must have in common to be averaged, in the order that `load_ensemble` names it."""
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
