"""What is analysed: a run's network at a checkpoint, the same freshly initialised, or features without a network.

On the command line: `random`, `histogram`, `pixels`, or a run folder as RUN, RUN@STEP, LABEL=RUN, LABEL=RUN@STEP.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from p2w import config as settings
from p2w.analysis.features import BASELINES, Features
from p2w.config import Config, PretextConfig
from p2w.errors import UserError
from p2w.model import Network
from p2w.pretext import build_pretext_and_network
from p2w.train.checkpoint import Checkpoints
from p2w.train.optim import Precision
from p2w.world import World


@dataclass(frozen=True)
class FeatureSource:
    """Something with features. `identity` is what they follow from, as plain values; `load` makes it on the device."""

    label: str
    kind: str  # run | random | histogram | pixels
    step: int | None
    view: PretextConfig
    identity: tuple[Any, ...]
    load: Callable[[], Features]


@dataclass(frozen=True)
class AnalysedRun:
    """A finished or unfinished run folder, read only."""

    path: Path
    config: Config

    @staticmethod
    def open(path: Path) -> "AnalysedRun":
        """Raises UserError where there is no run, or no whole checkpoint in it."""
        if not (path / "config.json").is_file():
            raise UserError(
                f"{path}: no config.json there, so it is no run folder; name one that launch/train.py has written"
            )
        run = AnalysedRun(path, settings.read_config(path / "config.json"))
        if not run.checkpoints.steps():
            raise UserError(f"{path}: no checkpoint there yet; train it: launch/train.py --run-dir {path}")
        return run

    @property
    def checkpoints(self) -> Checkpoints:
        """Its checkpoints."""
        return Checkpoints(self.path / "checkpoints")

    def step(self, asked: int | None = None) -> int:
        """The checkpoint to look at: the one asked for, else the best by validation, else the newest."""
        steps, best = self.checkpoints.steps(), self.checkpoints.best()
        if asked is not None and asked not in steps:
            raise UserError(f"{self.path}: no checkpoint of step {asked}; there are {_few(steps)}")
        return asked if asked is not None else best if best in steps else steps[-1]

    def network(self, step: int | None, world: World) -> Network:
        """The network at `step`, or freshly initialised as its training began; in evaluation mode, on the device."""
        torch.manual_seed(self.config.train.seed)
        _, model = build_pretext_and_network(self.config)
        if step is not None:
            weights = self.checkpoints.load(step).model
            try:
                model.load_state_dict(weights)
            except RuntimeError as error:
                raise UserError(
                    f"{self.checkpoints.path(step)}: holds another network than {self.path / 'config.json'} says; "
                    "copy the run folder again"
                ) from error
        model.to(world.device).eval()
        if self.config.train.channels_last:
            model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # torch's stub knows 2D only
        return model

    def subject(self, label: str, step: int | None, world: World, precision: Precision) -> FeatureSource:
        """Its features: global average pool of the encoder's coarsest level, with the stored batch-norm statistics.

        Freshly initialised (step None) these are mean 0 and variance 1, as nothing was seen yet: nothing is
        recalibrated, so it is the network that training starts from, in the mode in which all are looked at.
        """
        config = self.config

        def load() -> Features:
            encoder = self.network(step, world).encoder

            def features(parts: Tensor) -> Tensor:
                with torch.no_grad(), autocast(world.device, precision):
                    return encoder.pooled(parts)

            return features

        weights: Any = self._weights(step) if step is not None else [config.train.seed, torch.__version__]
        identity = (
            weights,
            dataclasses.asdict(config.model),
            dataclasses.asdict(config.pretext),
            precision.name,
        )
        return FeatureSource(label, "random" if step is None else "run", step, config.pretext, identity, load)

    def _weights(self, step: int) -> int:
        """Checksum of the weights as the checkpoint notes it. Raises UserError for a note that is broken."""
        path = self.checkpoints.path(step) / "meta.json"
        try:
            return int(json.loads(path.read_text())["crc32c"]["model.safetensors"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"{path}: cannot be read ({error}); the checkpoint is damaged, name another --step"
            ) from error


def baseline(name: str, view: PretextConfig) -> FeatureSource:
    """Features without a network, of parts as the run's network sees them."""
    return FeatureSource(name, name, None, view, (name, dataclasses.asdict(view)), lambda: BASELINES[name])


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The arithmetic asked for, as in training."""
    return torch.autocast(device.type, precision.dtype or torch.bfloat16, enabled=precision.dtype is not None)


def parse_against(against: str, run: AnalysedRun, world: World, precision: Precision) -> list[FeatureSource]:
    """The subjects named in a comma-separated list. Raises UserError for what is none, or a label met twice."""
    found: list[FeatureSource] = []
    for word in filter(None, (word.strip() for word in against.split(","))):
        if word == "random":
            found.append(run.subject("random", None, world, precision))
        elif word in BASELINES:
            found.append(baseline(word, run.config.pretext))
        else:
            label, path, step = _named(word)
            other = AnalysedRun.open(path)
            found.append(other.subject(label or name_of(path), other.step(step), world, precision))
    labels = [subject.label for subject in found]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise UserError(
            f"--against {against}: two are called {twice[0]}; name one of them as LABEL={twice[0]}"
        )
    return found


def _named(word: str) -> tuple[str, Path, int | None]:
    """`LABEL=RUN@STEP` -> label, folder, step; "" and None where left out. The first reading whose folder is there holds."""
    label, named, rest = word.partition("=")
    readings: list[tuple[str, Path, int | None]] = []
    for said, place in (("", word), *([(label, rest)] if named else [])):
        path, at, step = place.rpartition("@")
        readings.append((said, Path(place), None))
        if at and step.isascii() and step.isdecimal():
            readings.append((said, Path(path), int(step)))
    return next((reading for reading in readings if reading[1].is_dir()), readings[-1])


def name_of(path: Path) -> str:
    """What a person calls a run: the folder's name, and its parent's where that alone says little."""
    whole = path.resolve()
    return f"{whole.parent.name}/{whole.name}" if whole.name in ("run", "runs") else whole.name


def _few(steps: list[int]) -> str:
    return (
        ", ".join(map(str, steps))
        if len(steps) < 9
        else f"{steps[0]}, {steps[1]}, … {steps[-1]} ({len(steps)})"
    )
