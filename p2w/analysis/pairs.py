"""Positive and negative pairs of parts, how alike they are, and how well that tells them apart (paper, Fig. 2b).

Features are (W, P, C) = wholes, parts of each, channels. A positive pair is two parts of one whole; a negative pair is a
part of it and a part of another. Draws come first, as index arrays from an explicit seed, and are then only looked up.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2w.analysis.similarity import auc
from p2w.errors import UserError

Features = NDArray[np.floating]  # as they come, float32 or float64
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
TINY = 1e-12  # a feature of zeros has cosine 0 with everything


@dataclass(frozen=True)
class Pairs:
    """N pairs of each whole: `positive` (W, N, 2) are two parts of it; `negative` (W, N, 3) its part, other whole, part."""

    positive: Ints
    negative: Ints


def draw_pairs(wholes: int, parts: int, count: int, seed: int) -> Pairs:
    """`count` positive and as many negative pairs for every whole.

    Positive pairs are distinct where there are as many as that (parts (parts - 1) / 2), else drawn with replacement.
    Negative pairs: part, other whole and its part are uniform and independent.
    Raises UserError for fewer than two wholes or two parts of each.
    """
    check_enough(wholes, parts)
    first, second = np.triu_indices(parts, 1)
    positive = np.empty((wholes, count, 2), np.int64)
    negative = np.empty((wholes, count, 3), np.int64)
    for whole in range(wholes):
        rng = np.random.default_rng([seed, whole])
        chosen = rng.choice(len(first), count, replace=count > len(first))
        positive[whole] = np.stack((first[chosen], second[chosen]), 1)
        other = rng.integers(0, wholes - 1, count)
        other += other >= whole
        negative[whole] = np.stack((rng.integers(0, parts, count), other, rng.integers(0, parts, count)), 1)
    return Pairs(positive, negative)


def check_enough(wholes: int, parts: int) -> None:
    """Raise UserError where there is nothing to compare."""
    if wholes < 2:
        raise UserError(f"{wholes} whole(s): parts of different wholes are compared, which takes at least 2")
    if parts < 2:
        raise UserError(
            f"{parts} part(s) of each whole: parts of one whole are compared, which takes at least 2"
        )


def cosines(features: Features, pairs: Pairs) -> tuple[Floats, Floats]:
    """Cosine similarity of the positive and of the negative pairs, both (W, N) float64."""
    positive = np.empty(pairs.positive.shape[:2])
    negative = np.empty(pairs.negative.shape[:2])
    for whole, (alike, apart) in enumerate(zip(pairs.positive, pairs.negative, strict=True)):
        own = unit(features[whole])
        positive[whole] = (own[alike[:, 0]] * own[alike[:, 1]]).sum(1)
        negative[whole] = (own[apart[:, 0]] * unit(features[apart[:, 1], apart[:, 2]])).sum(1)
    return positive, negative


def unit(features: Features) -> Floats:
    """Features (..., C) at length 1, float64."""
    wide = features.astype(np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), TINY)


def d_prime(positive: Floats, negative: Floats) -> float:
    """Distance of the two means in units of the root mean variance; NaN where neither set varies."""
    spread = np.sqrt((positive.var() + negative.var()) / 2)
    return float((positive.mean() - negative.mean()) / spread) if spread > 0 else float("nan")


def separability(positive: Floats, negative: Floats) -> dict[str, float]:
    """AUC, d' and the two mean cosines of a set of pairs of each kind, any shape."""
    alike, apart = positive.ravel(), negative.ravel()
    return {
        "auc": auc(alike, apart),
        "d_prime": d_prime(alike, apart),
        "positive_mean": float(alike.mean()),
        "negative_mean": float(apart.mean()),
        "n_pairs": int(alike.size),
    }
