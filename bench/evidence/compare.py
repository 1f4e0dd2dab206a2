"""Separability of a run's features after its last step, on the same parts for every run.

    python bench/evidence/compare.py RUN SHARDS            # writes RUN/compared.json; RUN@0 the network it began as

W, P, C = wholes, parts of each, channels. Parts of 1/16 to 1/4 of the wholes set aside for validation, all pairs of them.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shortcuts import CHANGES, PARTS, changed, numbers

from p2w.analysis import similarity
from p2w.analysis.feature_sources import AnalysedRun
from p2w.analysis.features import PartSet, TrainingWholes, extract
from p2w.config import PretextConfig
from p2w.files import write_atomic
from p2w.stream.stream import open_set
from p2w.train.optim import choose_precision
from p2w.world import World

WHOLE = PartSet("whole", 0, 1, ((1.0, 1.0),))


def compare(run: AnalysedRun, where: str, step: int | None) -> dict[str, Any]:
    """AUC against all negatives, against the same tile of other scans, and changed intensities; retrieval; regressions."""
    torch.set_num_threads(1)
    world, shards, began = World.from_env(), open_set(where), time.monotonic()
    ids = shards.ids("val")
    subject = run.feature_source("", step, world, choose_precision("fp32", world.device))
    view = dataclasses.replace(PretextConfig(), size=run.config.pretext.size)
    features = subject.load(TrainingWholes(shards, world))
    seen = {
        name: extract(changed(features, make()), view, PARTS, shards, ids, world).astype(np.float64)
        for name, make in CHANGES.items()
    }
    wholes = extract(features, view, WHOLE, shards, ids, world)[:, 0]
    hits = similarity.retrieval_scores(
        similarity.among_wholes(torch.from_numpy(seen["plain"]), torch.from_numpy(wholes)), len(ids)
    )
    return {
        "step": step, **numbers(seen, shards, ids), "retrieval": hits,
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def main() -> None:
    """Measure the run of the command line, and write the result into its folder."""
    place, where = sys.argv[1:3]
    untrained = place.endswith("@0")
    path = Path(place.removesuffix("@0"))
    run = AnalysedRun.open(path)
    found = compare(run, where, None if untrained else run.checkpoints.steps()[-1])
    write_atomic(path / ("untrained.json" if untrained else "compared.json"), json.dumps(found, indent=1))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
