"""Which cues do features use? Separability of parts without one cue after another, for measure_run.py.

W, P, C = wholes, parts of each, channels. All subjects see the same parts, of 1/16 to 1/4, and all pairs are taken.
"""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2w.analysis.features import Features, PartSet
from p2w.analysis.similarity import auc, contrastive_losses

Array = NDArray[np.float64]
PARTS = PartSet("parts", 1_000, 8, ((1 / 16, 1 / 4),))
FEW = dataclasses.replace(PARTS, each=4)  # of every checkpoint


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
