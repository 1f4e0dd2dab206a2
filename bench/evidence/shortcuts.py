"""Which cues do features use? Separability of parts without one cue after another, for measure_run.py and compare.py.

W, P, C = wholes, parts of each, channels. All subjects see the same parts, of 1/16 to 1/4, and all pairs are taken.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2w.analysis.features import Features, PartSet
from p2w.analysis.similarity import auc, contrastive_losses
from p2w.stream.local import ShardSet

Array = NDArray[np.float64]
PARTS = PartSet("parts", 1_000, 8, ((1 / 16, 1 / 4),))
FEW = dataclasses.replace(PARTS, each=4)  # of every checkpoint
FIRST_TESTED = 5  # scans from which on the error is one of scans; below, one of wholes


def standardised(parts: Tensor, mean: float = 0.35, deviation: float = 0.25) -> Tensor:
    """Every part (B, 1, d, h, w) with the same mean and standard deviation, clipped to [0, 1]."""
    flat = parts.flatten(1)
    centre, spread = (
        value[:, None, None, None, None] for value in (flat.mean(1), flat.std(1).clamp(min=1e-3))
    )
    return ((parts - centre) / spread * deviation + mean).clamp(0, 1)


class RandomGamma:
    """Every part's intensities to a random power, log-uniform in [1/2, 2], the same for every feature source."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, parts: Tensor) -> Tensor:
        power = 4 ** (torch.rand(len(parts), 1, 1, 1, 1, generator=self.generator) - 0.5)
        return parts**power


CHANGES: dict[str, Callable[[], Features]] = {
    "plain": lambda: lambda parts: parts,
    "standardised": lambda: standardised,
    "gamma": RandomGamma,
}


def changed(features: Features, change: Features) -> Features:
    """The features after a change of the parts."""
    return lambda parts: features(change(parts))


def contrast(features: Array) -> float:
    """The paper's contrastive loss, mean over wholes."""
    return float(contrastive_losses(torch.from_numpy(features)).mean())


def numbers(seen: dict[str, Array], shards: ShardSet, ids: NDArray[np.int64]) -> dict[str, Any]:
    """AUC by change and by kind of negative pair; how well position and size of a part can be predicted."""
    keys = [shards.key(int(one)).split("/") for one in ids]
    scan, tile = (np.unique([key[k] for key in keys], return_inverse=True)[1] for k in (0, 1))
    features = seen["plain"]
    found: dict[str, Any] = {name: separability(values, scan, tile)["all"] for name, values in seen.items()}
    found["centred"] = separability(features - features.mean((0, 1)), scan, tile)["all"]
    found |= {f"against_{name}": value for name, value in separability(features, scan, tile).items()}
    found["error"] = jackknife(features, scan, tile)
    boxes = PARTS.boxes(ids, shards).double().numpy()
    edges = np.array(shards.shape)
    centre = (boxes[..., :3] + boxes[..., 3:]) / 2 / edges
    size = np.log((boxes[..., 3:] - boxes[..., :3]).prod(-1, keepdims=True))
    found["position_r2"], found["size_r2"] = readable(features, centre), readable(features, size)
    return found


def separability(
    features: Array, scan: NDArray[np.int64], tile: NDArray[np.int64]
) -> dict[str, float | None]:
    """AUC of positive pairs against all negative ones, against those of one scan, and those of one tile of two scans."""
    unit = features / np.maximum(np.linalg.norm(features, axis=2, keepdims=True), 1e-12)
    wholes, parts, channels = unit.shape
    cosines = (unit.reshape(-1, channels) @ unit.reshape(-1, channels).T).reshape(
        wholes, parts, wholes, parts
    )
    first, second = np.triu_indices(parts, 1)
    positive = np.concatenate([cosines[w, first, w, second] for w in range(wholes)])
    pairs = {
        "all": list(itertools.combinations(range(wholes), 2)),
        "one_scan": [(v, w) for v, w in itertools.combinations(range(wholes), 2) if scan[v] == scan[w]],
        "one_tile": [(v, w) for v, w in itertools.combinations(range(wholes), 2) if tile[v] == tile[w]],
    }
    return {
        name: auc(positive, np.concatenate([cosines[v, :, w].ravel() for v, w in some])) if some else None
        for name, some in pairs.items()
    }


def jackknife(features: Array, scan: NDArray[np.int64], tile: NDArray[np.int64]) -> float:
    """Standard error of the AUC: one scan left out at a time, or one whole where there are few scans."""
    unit = scan if len(np.unique(scan)) >= FIRST_TESTED else np.arange(len(scan))
    left = [unit != one for one in np.unique(unit)]
    values = np.array(
        [separability(features[kept], scan[kept], tile[kept])["all"] for kept in left], np.float64
    )
    return float(np.sqrt((len(values) - 1) * np.mean((values - values.mean()) ** 2)))


def readable(features: Array, target: Array) -> list[float]:
    """R² with which a ridge regression reads each target (W, P, T) from features of wholes that it was not fitted to."""
    from sklearn.linear_model import RidgeCV  # noqa: PLC0415
    from sklearn.metrics import r2_score  # noqa: PLC0415
    from sklearn.model_selection import GroupKFold, cross_val_predict  # noqa: PLC0415
    from sklearn.pipeline import make_pipeline  # noqa: PLC0415
    from sklearn.preprocessing import StandardScaler  # noqa: PLC0415

    wholes, parts, channels = features.shape
    groups = np.repeat(np.arange(wholes), parts)
    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 4, 13)))
    flat, wanted = features.reshape(-1, channels), target.reshape(wholes * parts, -1)
    guess = cross_val_predict(model, flat, wanted, groups=groups, cv=GroupKFold(5)).reshape(wanted.shape)
    return [float(one) for one in r2_score(wanted, guess, multioutput="raw_values")]
