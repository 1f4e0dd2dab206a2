"""Pictures with voxels in them: reconstructions of parts of growing scale, and a part's nearest wholes. Rank 0 alone."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from p2w import geometry
from p2w.analysis import retrieval
from p2w.analysis.features import PartSet, cut
from p2w.analysis.measure import Measure
from p2w.analysis.pictures import grey, telling_wholes
from p2w.analysis.protocol import GROWING
from p2w.analysis.subjects import Run, Subject, autocast
from p2w.analysis.validation import VALIDATION_SEED
from p2w.data.stream import ShardSet
from p2w.geometry import Keys
from p2w.log import write_atomic
from p2w.train.optim import Precision
from p2w.world import World

QUERIES, HITS = 4, 4
Grey = NDArray[np.uint8]


@torch.no_grad()
def reconstructions(
    run: Run, step: int, shards: ShardSet, split: str, world: World, precision: Precision
) -> dict[str, Any]:
    """Arrays `whole` (W, d, h, w), `part` and `output` (W, S, d, h, w) uint8, 0..255 for 0..1; `scale` (S,), `keys` (W,);
    `extent_mm` (W, 3), edges z y x of the whole.

    A part grows round its place: the draws that put and shape it are the same at all scales.
    """
    view, model = run.config.pretext, run.network(step, world)
    voxels, ids = telling_wholes(shards, split)
    keys = Keys(VALIDATION_SEED, 0, ids)
    boxes = torch.stack(
        [
            geometry.sample_boxes(keys, 0, shards.shape, (scale, scale), view.aspect_range)
            for scale in GROWING
        ],
        1,
    ).to(world.device)
    parts, outputs = [], []
    for whole, around in zip(voxels.to(world.device), boxes, strict=True):
        part = cut(whole, around, view)
        with autocast(world.device, precision):
            output = model(part)
        parts.append(grey(part))
        outputs.append(grey(output))
    shown, made = np.stack(parts), np.stack(outputs)
    return {
        "whole": shown[:, -1], "part": shown, "output": made, "scale": np.array(GROWING),
        "keys": np.array([shards.key(int(row)) for row in ids]),
        "extent_mm": shards.spacing_mm[ids.numpy()] * shards.shape,
    }  # fmt: skip


def keep(arrays: dict[str, Any], path: Path) -> None:
    """Write them as a compressed npz, whole or not at all."""
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    write_atomic(path, packed.getvalue())


def nearest(measure: Measure, subject: Subject) -> list[dict[str, Any]]:
    """For `panels.neighbours`: parts of a few wholes, and the wholes most like them by the subject's features."""
    parts, wholes = (torch.from_numpy(measure.features(subject, name)) for name in ("parts", "whole"))
    gallery = retrieval.unit(wholes[:, 0])
    asked = np.searchsorted(measure.ids, measure.wholes("scatter")[:QUERIES])
    rows = []
    for own in asked:
        similar = gallery @ retrieval.unit(parts[own, 0])
        first = similar.argsort(descending=True, stable=True)[:HITS].tolist()
        rows.append(
            {
                "query": _picture(measure, subject, "parts", own),
                "own": _picture(measure, subject, "whole", own),
                "rank": int(retrieval.ranks(parts[:, 0], wholes[:, 0])[own]),
                "hits": [
                    (_picture(measure, subject, "whole", i), float(similar[i]), i == own) for i in first
                ],
            }
        )
    return rows


def _picture(measure: Measure, subject: Subject, name: str, index: int) -> Grey:
    """The first part (d, h, w) of a set, of the whole at this place."""
    voxels = torch.empty(measure.shards.shape, dtype=torch.int16)
    measure.shards.read_into(int(measure.ids[index]), voxels)
    part_set: PartSet = measure.sets[name]
    return grey(
        cut(voxels, part_set.boxes(measure.ids[index : index + 1], measure.shards.shape)[0, :1], subject.view)
    )[0]
