"""Sources of features to analyse: a run's network at a checkpoint or freshly initialised, or features without a network.

On the command line: `random`, `histogram`, `pixels`, or a run folder as RUN, RUN@STEP, LABEL=RUN, LABEL=RUN@STEP.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from p2w import config as settings
from p2w.analysis.features import BASELINES, IDENTITY, Features, TrainingWholes
from p2w.config import Config, PretextConfig
from p2w.errors import UserError
from p2w.model import Network
from p2w.model.encoder import set_memory_format
from p2w.pretext import build_pretext, build_pretext_and_network, pretext_class
from p2w.pretext.protocol import Pretext
from p2w.train.checkpoint import Checkpoints
from p2w.train.optim import Precision
from p2w.world import World


@dataclass(frozen=True)
class FeatureSource:
    """Something that computes features of parts.

    `view` says how a part is cut; `identity` holds, as plain values, everything the features depend on beside the data;
    `load` loads the network on the device, recalibrates its batch norms on training wholes, and returns the function from
    parts to features. It is a collective.
    """

    label: str
    kind: str  # run | random | histogram | pixels
    step: int | None
    view: PretextConfig
    identity: tuple[Any, ...]
    load: Callable[[TrainingWholes], Features]


@dataclass(frozen=True)
class AnalysedRun:
    """A run folder, finished or not; it is only read."""

    path: Path
    config: Config

    @staticmethod
    def open(path: Path) -> "AnalysedRun":
        """Open a run folder. Raises UserError when it is no run, or has no finished checkpoint."""
        if not (path / "config.json").is_file():
            raise UserError(
                f"{path}: no config.json there, so it is no run folder; name one that p2w train has written"
            )
        run = AnalysedRun(path, settings.read_config(path / "config.json"))
        if not run.checkpoints.steps():
            raise UserError(f"{path}: no checkpoint there yet; train it: p2w train --run-dir {path}")
        return run

    @property
    def checkpoints(self) -> Checkpoints:
        """The run's checkpoints."""
        return Checkpoints(self.path / "checkpoints")

    @functools.cached_property
    def pretext(self) -> Pretext:
        """The run's proxy task."""
        return build_pretext(self.config)

    def step(self, asked: int | None = None) -> int:
        """The step of the checkpoint to analyse: `asked`, else the best by validation, else the newest."""
        steps, best = self.checkpoints.steps(), self.checkpoints.best()
        if asked is not None and asked not in steps:
            raise UserError(f"{self.path}: no checkpoint of step {asked}; there are {_few(steps)}")
        return asked if asked is not None else best if best in steps else steps[-1]

    def network(self, step: int | None, world: World) -> Network:
        """The network at `step`, or as initialised before training (None); in evaluation mode, on the device.

        Its running statistics are those of training, with which its validation losses were logged.
        """
        torch.manual_seed(self.config.train.seed)
        _, model = build_pretext_and_network(self.config)
        if step is not None:
            weights = self.checkpoints.load(step).model
            try:
                model.load_state_dict(weights)
            except RuntimeError as error:
                raise UserError(
                    f"{self.checkpoints.path(step)}: contains another network than {self.path / 'config.json'} says; "
                    "copy the run folder again"
                ) from error
        model.to(world.device).eval()
        set_memory_format(model, self.config.train.channels_last)
        return model

    def recalibrated_network(
        self, step: int | None, world: World, precision: Precision, wholes: TrainingWholes
    ) -> Network:
        """The same with batch norms recalibrated on training wholes, which is analysed. A collective over `wholes.world`."""
        with autocast(world.device, precision):
            return wholes.recalibrate(self.network(step, world), self.pretext)

    def feature_source(
        self, label: str, step: int | None, world: World, precision: Precision
    ) -> FeatureSource:
        """The features at `step`, or as initialised before training (None): global average pool of the encoder's coarsest
        level, with batch-norm statistics recalibrated on training wholes."""
        config = self.config

        def load(wholes: TrainingWholes) -> Features:
            encoder = self.recalibrated_network(step, world, precision, wholes).encoder

            def features(parts: Tensor) -> Tensor:
                with torch.no_grad(), autocast(world.device, precision):
                    return encoder.pooled(parts)

            return features

        weights: Any = self._weights(step) if step is not None else [config.train.seed, torch.__version__]
        identity = (
            weights, dataclasses.asdict(config.model), dataclasses.asdict(config.pretext), precision.name,
            IDENTITY, _pretext_settings(config),
        )  # fmt: skip
        return FeatureSource(label, "random" if step is None else "run", step, config.pretext, identity, load)

    def _weights(self, step: int) -> int:
        """Checksum of the weights from the checkpoint's meta.json. Raises UserError when it cannot be read."""
        path = self.checkpoints.path(step) / "meta.json"
        try:
            return int(json.loads(path.read_text())["crc32c"]["model.safetensors"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"{path}: cannot be read ({error}); the checkpoint is damaged, name another --step"
            ) from error


def _pretext_settings(config: Config) -> dict[str, Any]:
    """The settings of the run's pretext: the recalibrated statistics depend on what it shows the network."""
    return {
        group: dataclasses.asdict(getattr(config, group))
        for group in pretext_class(config.pretext.name).groups
    }


def baseline(name: str, view: PretextConfig) -> FeatureSource:
    """Features without a network, of parts cut as for the run's network."""
    return FeatureSource(name, name, None, view, (name, dataclasses.asdict(view)), lambda _: BASELINES[name])


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The autocast context of a precision, as in training."""
    return torch.autocast(device.type, precision.dtype or torch.bfloat16, enabled=precision.dtype is not None)


def parse_against(against: str, run: AnalysedRun, world: World, precision: Precision) -> list[FeatureSource]:
    """The sources named in a comma-separated list. Raises UserError for an unknown one, or for a label used twice."""
    found: list[FeatureSource] = []
    for word in filter(None, (word.strip() for word in against.split(","))):
        if word == "random":
            found.append(run.feature_source("random", None, world, precision))
        elif word in BASELINES:
            found.append(baseline(word, run.config.pretext))
        else:
            label, path, step = _named(word)
            other = AnalysedRun.open(path)
            found.append(other.feature_source(label or name_of(path), other.step(step), world, precision))
    labels = [source.label for source in found]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise UserError(
            f"--against {against}: two are called {twice[0]}; name one of them as LABEL={twice[0]}"
        )
    return found


def _named(word: str) -> tuple[str, Path, int | None]:
    """`LABEL=RUN@STEP` -> label, folder, step; "" and None where left out.

    Folders may contain `=` and `@`: of all ways to read the word, the first whose folder exists is used.
    """
    label, named, rest = word.partition("=")
    readings: list[tuple[str, Path, int | None]] = []
    for name, folder in (("", word), *([(label, rest)] if named else [])):
        path, at, step = folder.rpartition("@")
        readings.append((name, Path(folder), None))
        if at and step.isascii() and step.isdecimal():
            readings.append((name, Path(path), int(step)))
    return next((reading for reading in readings if reading[1].is_dir()), readings[-1])


def name_of(path: Path) -> str:
    """The name of a run: the folder's name, with its parent's if the folder is called `run` or `runs`."""
    whole = path.resolve()
    return f"{whole.parent.name}/{whole.name}" if whole.name in ("run", "runs") else whole.name


def _few(steps: list[int]) -> str:
    return (
        ", ".join(map(str, steps))
        if len(steps) < 9
        else f"{steps[0]}, {steps[1]}, … {steps[-1]} ({len(steps)})"
    )
