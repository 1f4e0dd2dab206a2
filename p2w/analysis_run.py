"""One analysis of a run, as the paper's Fig. 2: all ranks measure, rank 0 draws and writes the results.

RUN/analysis/
    summary.json           every number, with settings, data and machine
    reconstructions.npz    parts of growing scale and what was reconstructed from them
    cache/                 features, with which an interrupted analysis continues; may be deleted
RUN/report.html            written again with these results
RUN/figures/               tsne, similarity_networks, separability_by_scale, contrastive, reconstruction_scales, retrieval
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from p2w import report
from p2w.analysis import plots, qualitative, similarity
from p2w.analysis.feature_sources import AnalysedRun, FeatureSource, autocast
from p2w.analysis.features import is_early
from p2w.analysis.measure import PART_SETS, AnalysisSettings, Cache, Key, Measure
from p2w.analysis.monitors import Validation
from p2w.errors import UserError
from p2w.files import write_atomic, write_remedy
from p2w.log import Log, read_metrics
from p2w.pretext import build_pretext
from p2w.shards.manifest import data_fingerprint
from p2w.stats import Correlation, pearson
from p2w.stream.local import ShardSet
from p2w.stream.stream import Stream
from p2w.train.optim import Precision
from p2w.world import World


@dataclasses.dataclass(frozen=True)
class Analysis:
    """The run and checkpoint to analyse, the networks to compare it with, the data and the settings."""

    run: AnalysedRun
    step: int
    label: str
    against: list[FeatureSource]
    checkpoints: bool
    settings: AnalysisSettings
    shards: ShardSet
    split: str
    world: World
    precision: Precision
    log: Log


def analyze(a: Analysis) -> dict[str, Any]:
    """Measure, draw, write; returns the summary on rank 0, nothing on the others. Every rank calls it.

    Raises UserError for data or networks that cannot be analysed.
    """
    began, world, data = time.monotonic(), a.world, data_fingerprint(a.shards.meta)
    ids = a.settings.wholes(a.shards.ids(a.split))
    measure = Measure(
        a.settings, a.settings.part_sets(a.run.config.pretext), a.shards, data, ids, world,
        Cache(a.run.path, world),
    )  # fmt: skip
    own = a.run.feature_source(a.label, a.step, world, a.precision)
    subjects = [*a.against, own]
    steps = a.run.checkpoints.steps() if a.checkpoints else []
    course = [a.run.feature_source(f"step {step}", step, world, a.precision) for step in steps]
    a.log.line(
        f"{a.run.path}: step {a.step} on {len(ids)} wholes of {a.shards.where} ({a.split}); {world.describe()}"
    )
    measure.fill(
        [(subject, name) for subject in subjects for name in PART_SETS] + [(one, "parts") for one in course]
    )
    subjects = _finite(measure, subjects, PART_SETS, a.log)
    course = _finite(measure, course, ("parts",), a.log)
    if not subjects:
        raise UserError(
            f"{a.run.path}: no network has finite features, so there is nothing to compare; see the warnings"
        )
    measure.contrast([*subjects, *course])
    mse = [_validation_mse(a, measure, one) for one in course]
    summary: dict[str, Any] = {}
    if world.is_main:
        summary = {
            "run": str(a.run.path), "step": a.step, "shards": a.shards.where, "split": a.split, "wholes": len(ids),
            "world_size": world.size, "device": str(world.machine()["device"]), "data": data,
            "precision": a.precision.name, "settings": _settings(a, measure),
        }  # fmt: skip
        try:
            summary |= _write(a, measure, subjects, course, mse)
        except OSError as error:
            raise UserError(
                f"{a.run.path}: figures not written ({error.strerror or error}); {write_remedy(error)}, then repeat the "
                "command"
            ) from error
        summary["seconds"] = round(time.monotonic() - began, 1)
        _save(a.run.path / "analysis" / "summary.json", summary)
        with a.log.tolerate("report.html"):
            report.write_report(a.run.path)
    world.barrier()
    return summary


def _settings(a: Analysis, measure: Measure) -> dict[str, Any]:
    """The settings as used, with those taken from the run, and how negatives are drawn, in words."""
    used = {
        "volume_fraction": a.settings.fraction(a.run.config.pretext),
        "max_aspect": measure.sets["parts"].max_aspect,
        "negatives_drawn": similarity.DRAWN,
    }
    return dataclasses.asdict(a.settings) | used


def _finite(
    measure: Measure, subjects: Sequence[FeatureSource], names: Sequence[str], log: Log
) -> list[FeatureSource]:
    """The networks whose features are finite; a warning names the others."""
    kept = []
    for subject in subjects:
        if all(np.isfinite(measure.features(subject, name)).all() for name in names):
            kept.append(subject)
        else:
            log.warn(f"{subject.label}: its features are not finite; left out")
    return kept


def _validation_mse(a: Analysis, measure: Measure, subject: FeatureSource) -> float:
    """Validation MSE of a checkpoint: logged in training, or measured now on the whole split. All ranks call it."""
    assert subject.step is not None
    if a.split == "val":
        for record in read_metrics(a.run.path):
            if record["step"] == subject.step and "val/loss" in record:
                return float(record.get("val/mse", record["val/loss"]))
    key: Key = ("mse", (subject.identity, measure.data, a.split))
    if not measure.cache.has(key):
        world, batch = a.world, a.world.size * max(1, a.settings.batch // a.world.size)
        stream = functools.partial(
            Stream.validation, a.shards, batch, rank=world.rank, world_size=world.size, device=world.device,
            split=a.split,
        )  # fmt: skip
        model = a.run.network(subject.step, world)
        with torch.no_grad(), autocast(world.device, a.precision):
            validation = Validation(build_pretext(a.run.config), model, stream, world)
            found = dict(validation(max(1, subject.step)))  # at step 0 it would also compute the mean image
        measure.cache.write(key, np.array(found.get("val/mse", found["val/loss"])))
    return float(measure.cache.read(key))


def _write(
    a: Analysis,
    measure: Measure,
    subjects: list[FeatureSource],
    course: list[FeatureSource],
    mse: list[float],
) -> dict[str, Any]:
    """On rank 0, compute the numbers of every network and over the checkpoints, and draw all figures."""
    networks, pairs, points = {}, {}, {}
    for subject in subjects:
        a.log.line(f"{subject.label}: pairs, retrieval, t-SNE")
        numbers, pairs[subject.label] = measure.numbers(subject)
        networks[subject.label] = {"kind": subject.kind, "step": subject.step, **numbers}
        points[subject.label] = measure.tsne_points(subject)
    kinds, scale = measure.scatter()
    drawn = {
        "tsne": plots.tsne_figure(points, kinds, scale),
        "similarity_networks": plots.similarity_figure(
            pairs, {k: v["similarity"] for k, v in networks.items()}
        ),
        "separability_by_scale": plots.scale_figure(
            {k: v["by_scale"] for k, v in networks.items()}, a.run.config.pretext.volume_fraction, a.label
        ),
    }
    over: dict[str, Any] = {}
    if course:
        steps, loss = [one.step or 0 for one in course], [measure.contrastive_loss(one) for one in course]
        found = pearson(loss, mse)
        early = [step for step in steps if is_early(step, a.run.config.optim.accumulate)]
        over = {
            "steps": steps,
            "contrastive_loss": loss,
            "val_mse": mse,
            "early": early,
            **_correlation(found),
        }
        drawn["contrastive"] = plots.contrastive_figure(steps, loss, mse, found, early)
    if subjects[-1].step == a.step and subjects[-1].label == a.label:
        drawn["retrieval"] = plots.neighbours_figure(qualitative.nearest(measure, subjects[-1]), a.label)
        if build_pretext(a.run.config).reconstructs:
            grown = qualitative.reconstructions(a.run, a.step, a.shards, a.split, a.world, a.precision)
            qualitative.save_arrays(grown, a.run.path / "analysis" / "reconstructions.npz")
            drawn["reconstruction_scales"] = plots.reconstruction_figure(
                grown["whole"], grown["part"], grown["output"], grown["scale"]
            )
    for name, figure in drawn.items():
        plots.save_figure(figure, a.run.path, name)
    return {"networks": networks, "over_checkpoints": over or None, "figures": sorted(drawn)}


def _correlation(found: Correlation) -> dict[str, Any]:
    """The correlation as entries of the summary."""
    return {"pearson_r": found.r, "ci95": [found.low, found.high], "p_value": found.p_value, "n": found.n}


def _save(path: Path, summary: dict[str, Any]) -> None:
    """Write strict JSON, with null for NaN and infinity. Raises UserError when it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(_plain(summary), indent=2, allow_nan=False))
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; {write_remedy(error)}, then repeat the command"
        ) from error


def _plain(value: Any) -> Any:
    """The same value with null for NaN and infinity, and lists for tuples."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
