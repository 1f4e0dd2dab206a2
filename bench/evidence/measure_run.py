"""Trains one network of designs.py where it is not there yet, and measures its features on the scans set aside.

    python bench/evidence/measure_run.py FOLDER real-0 parts2whole 0      # data set, method, seed; writes RUN/measured.json

W, P, C = wholes, parts of each, channels. Every network sees the same parts, of 1/16 to 1/4, of at most PER_SCAN wholes of
each scan, evenly spread, so that no scan outweighs the others. Batch norm is recalibrated on training wholes before each
measurement (p2w.analysis.features), an untrained network's too.
"""

import argparse
import dataclasses
import functools
import json
import math
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from designs import (
    CANDIDATES,
    EVERY,
    FOLLOWED,
    LONGER,
    METHODS,
    REFERENCE,
    Pretraining,
    cost,
    steps_of,
    train_command,
)
from jobs import REPO
from numpy.typing import NDArray
from shortcuts import CHANGES, FEW, PARTS, changed, contrast, separability
from torch import Tensor

from p2w.analysis import similarity
from p2w.analysis.feature_sources import AnalysedRun, FeatureSource, baseline
from p2w.analysis.features import Features, PartSet, TrainingWholes, extract
from p2w.analysis.monitors import VALIDATION_SEED, read_sub_scans
from p2w.config import PretextConfig
from p2w.files import write_atomic
from p2w.model import Network
from p2w.rng import SampleKeys
from p2w.stream.local import ShardSet
from p2w.stream.stream import open_set
from p2w.train.optim import Precision, choose_precision
from p2w.world import World

PER_SCAN, PROBED = 12, 64  # wholes: tested of a scan; that a frozen probe is fitted to
WHOLE = PartSet("whole", 0, 1, ((1.0, 1.0),))
Ids = NDArray[np.int64]
Array = NDArray[np.float64]
FROM_PARTS = (
    "parts2whole",
    "parts2whole_contrast",
    *LONGER,
    *CANDIDATES,
)  # draw a whole from a part: their errors compare


def evenly_spaced(ids: Ids, most: int) -> Ids:
    """At most `most` ids, the first and the last among them; in all measurements the same, whatever the product draws."""
    return ids[np.unique(np.linspace(0, len(ids) - 1, min(most, len(ids))).astype(int))]


def tested_wholes(shards: ShardSet, most: int = PER_SCAN) -> Ids:
    """Ids of the wholes that are tested on: of each scan set aside at most `most`, evenly spread."""
    ids = shards.ids("val")
    scans = np.array([shards.key(int(one)).rpartition("/")[0] for one in ids])
    return np.concatenate([evenly_spaced(ids[scans == scan], most) for scan in np.unique(scans)])


def places(shards: ShardSet, ids: Ids) -> tuple[Ids, Ids]:
    """For each whole the number of its scan, and that of its place in the scan."""
    keys = [shards.key(int(one)).rpartition("/") for one in ids]
    scan, tile = (np.unique([key[k] for key in keys], return_inverse=True)[1] for k in (0, 2))
    return scan, tile


@functools.cache
def cut(part_set: PartSet, view: PretextConfig, shards: ShardSet, ids: tuple[int, ...]) -> Tensor:
    """The parts (W, P, 1, d, h, w) that `p2w.analysis.features.extract` computes on; cut once for all that see them."""
    kept: list[Tensor] = []

    def keep(parts: Tensor) -> Tensor:
        kept.append(parts)
        return parts.flatten(1)[:, :1]

    extract(keep, view, part_set, shards, np.array(ids), World.from_env(), batch=part_set.count)
    return torch.stack(kept)


def encode(features: Features, parts: Tensor) -> Array:
    """Features (W, P, C) of parts (W, P, 1, d, h, w), those of one whole at a time."""
    return torch.stack([features(some) for some in parts]).double().numpy()


def positions(part_set: PartSet, shards: ShardSet, ids: Ids) -> Array:
    """Where each part's centre lies in its scan, (W, P, 3) z, y, x, as a share of the extent of the scan's sub-scans."""

    def corner(number: int) -> tuple[str, list[int]]:
        scan, _, place = shards.key(number).rpartition("/")
        return scan, [int(one) for one in re.findall(r"[zyx](\d+)", place)]

    ends: dict[str, Array] = {}
    for number in (*shards.ids("train"), *shards.ids("val")):
        scan, low = corner(int(number))
        ends[scan] = np.maximum(ends.get(scan, np.zeros(3)), np.add(low, shards.shape))
    boxes = part_set.boxes(ids, shards).double().numpy()
    centres = (boxes[..., :3] + boxes[..., 3:]) / 2
    lows = [corner(int(one)) for one in ids]
    return np.stack([(low + centre) / ends[scan] for (scan, low), centre in zip(lows, centres, strict=True)])


def frozen_probe(seen: Array, seen_at: Array, asked: Array, asked_at: Array) -> float:
    """R² with which a ridge regression fitted to parts of training patients reads where parts of others lie; mean over axes.

    Features (W, P, C) and places (W, P, 3). The penalty is chosen on training wholes left out, an eighth at a time.
    """
    from sklearn.linear_model import RidgeCV  # noqa: PLC0415
    from sklearn.metrics import r2_score  # noqa: PLC0415
    from sklearn.model_selection import GroupKFold  # noqa: PLC0415
    from sklearn.pipeline import make_pipeline  # noqa: PLC0415
    from sklearn.preprocessing import StandardScaler  # noqa: PLC0415

    wholes, parts, channels = seen.shape
    flat, places = seen.reshape(-1, channels), seen_at.reshape(-1, 3)
    groups = [*GroupKFold(8).split(flat, groups=np.repeat(np.arange(wholes), parts))]
    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-1, 5, 7), cv=groups)).fit(flat, places)
    return float(r2_score(asked_at.reshape(-1, 3), model.predict(asked.reshape(-1, channels))))


def numbers(features: Features, view: PretextConfig, shards: ShardSet, ids: Ids) -> dict[str, Any]:
    """Separability, d', contrastive loss, rank, retrieval, frozen probe; AUC without one cue, and against some negatives."""
    scan, tile = places(shards, ids)
    parts, wholes = (cut(some, view, shards, tuple(ids.tolist())) for some in (PARTS, WHOLE))
    seen = {name: encode(changed(features, make()), parts) for name, make in CHANGES.items()}
    plain, whole = seen["plain"], torch.from_numpy(encode(features, wholes)[:, 0])
    hits = similarity.retrieval_scores(similarity.among_wholes(torch.from_numpy(plain), whole), len(ids))
    alike, apart = similarity.pair_cosines(plain)
    training = evenly_spaced(shards.ids("train"), PROBED)
    taught = encode(features, cut(FEW, view, shards, tuple(training.tolist())))
    found = {name: similarity.auc(*similarity.pair_cosines(values)) for name, values in seen.items()}
    kinds = separability(plain, scan, tile)
    return {
        **found,
        "d_prime": similarity.d_prime(alike, apart),
        "contrastive_loss": contrast(plain),
        "rank": similarity.effective_rank(plain),
        "top1": hits["top1"],
        "mrr": hits["mrr"],
        "probe": frozen_probe(taught, positions(FEW, shards, training), plain, positions(PARTS, shards, ids)),
        "against_one_scan": kinds["one_scan"],
        "against_one_tile": kinds["one_tile"],
    }


def shown_and_asked(run: AnalysedRun, shards: ShardSet, ids: Ids) -> tuple[Tensor, Tensor]:
    """What the run's pretext shows of the tested wholes, one part of each, and the volumes it asks for."""
    voxels, _ = read_sub_scans(shards, ids)
    keys = SampleKeys(VALIDATION_SEED, 0, torch.from_numpy(ids), shards.real_voxels(ids))
    views = run.pretext.sample(voxels, keys)
    return views.input, views.target


@torch.no_grad()
def error(network: Network, shown: Tensor, asked: Tensor) -> float:
    """Mean squared error of what a recalibrated network draws; of one part, also where training shows two."""
    drawn: Tensor = network(shown)
    return float((drawn - asked).square().mean())


def course(
    run: AnalysedRun, shards: ShardSet, ids: Ids, world: World, wholes: TrainingWholes, precision: Precision
) -> dict[str, list[float]]:
    """At every checkpoint: the error of the task's own reconstruction, contrastive loss, and AUC, of 4 parts a whole."""
    found: dict[str, list[float]] = {name: [] for name in ("step", "mse", "contrast", "auc")}
    shown, asked = shown_and_asked(run, shards, ids)
    parts = cut(FEW, run.config.pretext, shards, tuple(ids.tolist()))
    # Not those of a run that was stopped
    for step in (one for one in run.checkpoints.steps() if one % EVERY == 0):
        network = run.recalibrated_network(step, world, precision, wholes)
        with torch.no_grad():
            features = encode(network.encoder.pooled, parts)
        auc = similarity.auc(*similarity.pair_cosines(features))
        for name, value in zip(
            found, (step, error(network, shown, asked), contrast(features), auc), strict=True
        ):
            found[name].append(value)
    return found


def subjects(run: AnalysedRun, one: Pretraining, world: World, precision: Precision) -> list[FeatureSource]:
    """The network as trained; with the reference method also as it began, and features that are no network."""
    view = dataclasses.replace(PretextConfig(), size=run.config.pretext.size)
    found = [run.feature_source(one.method, run.checkpoints.steps()[-1], world, precision)]
    if one.method == REFERENCE:
        found.append(run.feature_source("random", None, world, precision))
        found += [baseline(name, view) for name in ("histogram", "pixels")]
    return [dataclasses.replace(source, view=view) for source in found]


def measure(folder: Path, one: Pretraining) -> dict[str, Any]:
    """The numbers of a run that is finished."""
    torch.set_num_threads(1)
    began, path = time.process_time(), folder / "runs" / one.name
    world, shards, run = World.from_env(), open_set(str(folder / one.data)), AnalysedRun.open(path)
    ids, wholes, precision = (
        tested_wholes(shards),
        TrainingWholes(shards, world),
        choose_precision("fp32", world.device),
    )
    found: dict[str, Any] = {
        **dataclasses.asdict(one),
        "steps": steps_of(one.method),
        "cost": round(cost(one.method), 3),
        "wholes": len(ids),
        "scans": len(np.unique(places(shards, ids)[0])),
        "features": {
            source.label: numbers(source.load(wholes), source.view, shards, ids)
            for source in subjects(run, one, world, precision)
        },
    }
    if one.method in FROM_PARTS:
        shown, asked = shown_and_asked(run, shards, ids)
        last = run.recalibrated_network(run.checkpoints.steps()[-1], world, precision, wholes)
        found["mse"] = error(last, shown, asked)
        found["mse_of_mean"] = float((asked - asked.mean(0)).square().mean())
    if one.method in FOLLOWED:
        found["course"] = course(run, shards, ids, world, wholes, precision)
    found["measuring_s"] = round(time.process_time() - began, 1)
    return found


def train(folder: Path, one: Pretraining) -> float:
    """Train it where it is not finished; the processor time in seconds, NaN where some of it was spent before."""
    state = folder / "runs" / one.name / "status.json"
    begun = state.exists()
    if state.exists() and json.loads(state.read_text())["state"] == "finished":
        return math.nan
    before = _children_s()
    subprocess.run(train_command(folder, one), cwd=REPO, check=True)
    return math.nan if begun else _children_s() - before


def _children_s() -> float:
    import resource  # noqa: PLC0415  (not on Windows)

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Train and measure the run of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="data sets and runs, as run.py makes them")
    parser.add_argument("data", help="real-0, real-1, …, phantom or varied")
    parser.add_argument("method", choices=(*METHODS, *LONGER, *CANDIDATES))
    parser.add_argument("seed", type=int)
    args = parser.parse_args()
    one, folder = Pretraining(args.method, args.data, args.seed), args.folder.resolve()
    spent, path = train(folder, one), folder / "runs" / one.name / "measured.json"
    if math.isnan(spent) and path.exists():  # measured anew: it was trained before
        spent = json.loads(path.read_text())["training_s"] or math.nan
    found = measure(folder, one) | {"training_s": None if math.isnan(spent) else round(spent, 1)}
    write_atomic(path, json.dumps(found, indent=1))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
