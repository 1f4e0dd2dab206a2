"""Do intensities alone identify a part's whole? Measures this shortcut, with and without transformed parts.

    python bench/evidence/probe.py --shards demo/shards
    python bench/evidence/probe.py --shards demo/shards --run runs/plain \\
        --against histogram,random,plain=runs/plain@600,changed=runs/changed@600 --out probe.json

Wholes that no network was trained on, parts of 1/16 to 1/4 of each. Two probes read one part's features and name its whole
among all N: the nearest of the other parts, and a logistic regression fitted to half of the parts and asked about the rest.
Beside them the AUC of cosine similarity, and chance: 1 / N, and 0.5. Every feature sees each part twice: as it is, and with
its intensities changed as `--intensity.strength` does in training. W, P, C = wholes, parts of each, channels.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2w import geometry
from p2w.analysis.feature_sources import AnalysedRun, baseline, parse_against
from p2w.analysis.features import Features, TrainingWholes
from p2w.analysis.monitors import VALIDATION_SEED, read_sub_scans
from p2w.analysis.similarity import auc, pair_cosines
from p2w.config import PretextConfig
from p2w.errors import exits
from p2w.files import write_atomic
from p2w.pretext.volume_ops import IntensityConfig, intensity_transform
from p2w.rng import SampleKeys
from p2w.stream.local import ShardSet
from p2w.stream.stream import open_set
from p2w.train.optim import choose_precision
from p2w.world import World

Array = NDArray[np.float64]
FIRST = 1_000  # the first part's number, far from those of training and validation
FRACTION = (1 / 16, 1 / 4)


def parts_of(
    shards: ShardSet, split: str, view: PretextConfig, strength: float, count: int
) -> list[tuple[Tensor, Tensor]]:
    """For each part number, the parts (W, 1, d, h, w) of all wholes, unchanged and transformed."""
    ids = shards.ids(split)
    voxels, _ = read_sub_scans(shards, ids)
    keys = SampleKeys(VALIDATION_SEED, 0, torch.from_numpy(ids), shards.real_voxels(ids))
    found = []
    for part in range(FIRST, FIRST + count):
        boxes = geometry.sample_boxes(keys, part, shards.shape, FRACTION, view.max_aspect)
        plain = geometry.crop_resize(
            voxels, boxes, view.size, window_hu=view.window_hu, antialias=view.antialias
        )
        found.append((plain, intensity_transform(plain, keys, part, IntensityConfig(strength=strength))))
    return found


def read_features(features: Features, parts: list[Tensor]) -> Array:
    """Features (W, P, C), computed sixteen parts at a time."""
    rows = [torch.cat([features(some) for some in part.split(16)]) for part in parts]
    return torch.stack(rows, 1).double().numpy()


def probes(features: Array) -> dict[str, float]:
    """Both probes and the AUC; with the standard error over wholes of the first."""
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415
    from sklearn.pipeline import make_pipeline  # noqa: PLC0415
    from sklearn.preprocessing import StandardScaler  # noqa: PLC0415

    wholes, parts, channels = features.shape
    flat, owner = features.reshape(-1, channels), np.repeat(np.arange(wholes), parts)
    apart = np.abs(flat[:, None] - flat).sum(2)
    np.fill_diagonal(apart, np.inf)
    nearest = (owner[apart.argmin(1)] == owner).reshape(wholes, parts).mean(1)
    half = parts // 2
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    model.fit(features[:, :half].reshape(-1, channels), np.repeat(np.arange(wholes), half))
    said = model.predict(features[:, half:].reshape(-1, channels))
    return {
        "nearest": float(nearest.mean()),
        "nearest_error": float(nearest.std(ddof=1) / np.sqrt(wholes)),
        "linear": float((said == np.repeat(np.arange(wholes), parts - half)).mean()),
        "auc": auc(*pair_cosines(features)),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The numbers of every feature source, each printed when it is ready."""
    torch.set_num_threads(1)
    shards, world = open_set(args.shards), World.from_env()
    if args.run:
        run = AnalysedRun.open(args.run)
        view = run.config.pretext
        subjects = parse_against(args.against, run, world, choose_precision("fp32", world.device))
    else:
        view = PretextConfig(size=(16, 32, 32))
        subjects = [baseline("histogram", view)]
    seen = parts_of(shards, args.split, view, args.strength, args.parts)
    wholes = len(shards.ids(args.split))
    found: dict[str, Any] = {"wholes": wholes, "parts": args.parts, "chance": 1 / wholes}
    found |= {"strength": args.strength, "limits": dataclasses.asdict(IntensityConfig())}
    print(f"{wholes} wholes, {args.parts} parts each; chance {1 / wholes:.3f}, AUC 0.5")
    training = TrainingWholes(shards, world)
    for subject in subjects:
        features = subject.load(training)
        for kind, index in (("plain", 0), ("transformed", 1)):
            one = probes(read_features(features, [part[index] for part in seen]))
            found[f"{subject.label} {kind}"] = one
            print(
                f"{subject.label:12}{kind:12} nearest {one['nearest']:.3f} ± {one['nearest_error']:.3f}  "
                f"linear {one['linear']:.3f}  AUC {one['auc']:.3f}",
                flush=True,
            )
    return found


def main() -> int:
    """Parse the command line, measure, write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", required=True, help="folder of shards")
    parser.add_argument("--split", default="val", choices=("train", "val"), help="which wholes")
    parser.add_argument("--run", type=Path, help="see parts as this run does: size, window")
    parser.add_argument(
        "--against", default="histogram", help="with --run: subjects, as launch/analyze.py names them"
    )
    parser.add_argument("--strength", type=float, default=1.0, help="of the transformations, 0 to 1")
    parser.add_argument("--parts", type=int, default=16, help="of every whole")
    parser.add_argument("--out", type=Path, help="write the numbers there as JSON")
    args = parser.parse_args()
    found = measure(args)
    if args.out:
        write_atomic(args.out, json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    exits(main)()
