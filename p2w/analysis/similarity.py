"""How alike parts are: cosine similarity, separability of positive and negative pairs, nearest neighbours.

A positive pair is two parts of one whole, a negative pair two parts of different wholes. Separability is the area under
the ROC curve (0.5: none, 1: all).

Features are (W, P, C) = wholes, parts of each, channels. A positive pair is two parts of one whole; a negative pair is a
part of it and a part of another. Draws come first, as index arrays from an explicit seed, and are then only looked up.

The contrastive loss that nobody trained (paper, Fig. 2c): does it fall while only reconstruction is trained?

Features are (W, P, C) = wholes, parts of each, channels. A test of a whole takes one of its parts, another of them as the
positive, and K parts of other wholes as negatives; with cosines s and temperature t its loss is

    -log( exp(s+ / t) / (exp(s+ / t) + sum_k exp(s-_k / t)) )

The paper takes K = 5,000, 100 tests of every whole and t = 0.7. Negatives are drawn from the pool of all (W - 1) P parts of
other wholes, uniformly and with replacement, so that K may exceed the pool and the expectation is the same for any pool.

A query is a part; the gallery has one entry a whole: the whole itself (scale 1), or another part of each. The rank of a
query is the place of its own whole by cosine similarity, ties against it: a network that answers the same for all
gets the last place, not a lucky one.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2w.errors import UserError

Array = NDArray[np.float64]


def pair_cosines(features: Array) -> tuple[Array, Array]:
    """Cosines of all pairs of parts of one whole, and of all pairs of parts of two wholes.

    `features` is (wholes, parts, channels); a feature of zeros has cosine 0 with all others.
    """
    unit = features / np.maximum(np.linalg.norm(features, axis=2, keepdims=True), 1e-12)
    wholes, parts, channels = unit.shape
    flat, owner = unit.reshape(wholes * parts, channels), np.repeat(np.arange(wholes), parts)
    first, second = np.triu_indices(wholes * parts, 1)
    cosines = (flat @ flat.T)[first, second]
    same = owner[first] == owner[second]
    return cosines[same], cosines[~same]


def auc(positive: Array, negative: Array) -> float:
    """Area under the ROC curve: probability that a positive pair is more similar than a negative one, ties half."""
    order = np.sort(
        negative
    )  # ranks are counted here: importing scikit-learn for it would take seconds of every start
    below = np.searchsorted(order, positive, "left") + np.searchsorted(order, positive, "right")
    return float(below.sum() / (2 * len(positive) * len(negative)))


def effective_rank(features: Array) -> float:
    """Over how many directions features (n, channels) spread: from 1 to the number of channels; nan where all are one.

    The exponential of the entropy of the singular values' shares (Roy, Vetterli 2007), of the features less their mean.
    Needs no labels, and says what the reconstruction does not: how much of its input an encoder keeps (docs/targets.md).
    """
    values = np.linalg.svd(features - features.mean(0), compute_uv=False)
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else float("nan")


def similarity_file(run: Path, step: int) -> Path:
    """Where the cosines of `step` are kept."""
    folder = run / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"similarity-{step:08d}.npz"


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
        own = l2_normalise_rows(features[whole])
        positive[whole] = (own[alike[:, 0]] * own[alike[:, 1]]).sum(1)
        negative[whole] = (own[apart[:, 0]] * l2_normalise_rows(features[apart[:, 1], apart[:, 2]])).sum(1)
    return positive, negative


def l2_normalise_rows(features: Features) -> Floats:
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


TEMPERATURE, NEGATIVES, TESTS = 0.7, 5000, 100
DRAWN = "uniformly from the parts of all other wholes, with replacement"
BLOCK = 1 << 25  # similarities held at once: 128 MiB in float32


@dataclass(frozen=True)
class Tests:
    """T tests of one whole: `anchor` and `positive` (T,) are parts of it, `negatives` (T, K) rows of the pool (W * P)."""

    anchor: NDArray[np.int64]
    positive: NDArray[np.int64]
    negatives: NDArray[np.int64]


def draw_tests(wholes: int, parts: int, whole: int, tests: int, negatives: int, seed: int) -> Tests:
    """The tests of `whole`: a function of these numbers alone, not of who computes them."""
    rng = np.random.default_rng([seed, whole])
    anchor = rng.integers(0, parts, tests)
    positive = rng.integers(0, parts - 1, tests)
    rows = rng.integers(0, (wholes - 1) * parts, (tests, negatives))
    rows += parts * (rows >= whole * parts)  # the whole's own parts are no negatives
    return Tests(anchor, positive + (positive >= anchor), rows)


@torch.no_grad()
def contrastive_losses(
    features: Tensor, *, tests: int = TESTS, negatives: int = NEGATIVES, temperature: float = TEMPERATURE,
    seed: int = 0, wholes: Iterable[int] | None = None, tick: Callable[[], None] = lambda: None,
) -> Tensor:  # fmt: skip
    """Mean loss over the tests of each of `wholes` (default: all), float64 on the CPU, in that order.

    Computed on the device of `features` in their floating type; sums in float64. Similarities are products of blocks of the
    pool with all of it, of bounded size and at fixed places, and a test's negatives are picked from its anchor's row. So
    a whole's value is the same bits whichever others are asked for, and ranks can share the work in contiguous
    stretches. `tick` is called after each whole.
    Raises UserError for fewer than two wholes, or two parts of each.
    """
    count, parts, channels = features.shape
    check_enough(count, parts)
    pool = torch.nn.functional.normalize(features, dim=2, eps=TINY).reshape(-1, channels)
    rows = max(1, BLOCK // len(pool))
    rows -= rows % parts if rows > parts else 0  # a whole in one block, where there is room
    asked = list(range(count) if wholes is None else wholes)
    totals = dict.fromkeys(asked, torch.zeros((), dtype=torch.float64, device=features.device))
    for start in range(0, len(pool), rows):
        end = min(start + rows, len(pool))
        inside = [whole for whole in asked if whole * parts < end and start < (whole + 1) * parts]
        similar = pool[start:end] @ pool.T / temperature if inside else pool
        for whole in inside:
            drawn = draw_tests(count, parts, whole, tests, negatives, seed)
            first = whole * parts
            for row in range(max(start, first), min(end, first + parts)):
                mine = drawn.anchor == row - first
                totals[whole] = totals[whole] + _losses(
                    similar[row - start], drawn.positive[mine] + first, drawn.negatives[mine]
                )
            if end >= first + parts:
                tick()
    return torch.tensor([float(totals[whole]) / tests for whole in asked], dtype=torch.float64)


def _losses(similar: Tensor, positive: NDArray[np.int64], negatives: NDArray[np.int64]) -> Tensor:
    """Sum () float64 of the losses of tests with one anchor: `similar` (W * P,) are its similarities / temperature."""
    alike = similar[torch.from_numpy(positive).to(similar.device)]
    apart = similar.take(torch.from_numpy(negatives).to(similar.device))
    top = torch.maximum(apart.amax(1), alike)  # below t = 0.011, exp(1 / t) is more than float32 holds
    against = (apart - top[:, None]).exp().sum(1, dtype=torch.float64)
    above = (alike - top).double()
    return ((above.exp() + against).log() - above).sum()


ROUNDING = 1e-12  # of a float64 cosine


@torch.no_grad()
def retrieval_ranks(queries: Tensor, gallery: Tensor) -> Tensor:
    """Rank (N,) int64, from 1, of entry i of `gallery` (N, C) for query i of `queries` (N, C).

    In float64: features of a network that never learned are alike to six digits, and equal ones must tie.
    """
    similar = l2_normalise_features(queries) @ l2_normalise_features(gallery).T
    return (similar >= similar.diagonal()[:, None] - ROUNDING).sum(1)


def l2_normalise_features(features: Tensor) -> Tensor:
    """Features (..., C) at length 1, float64."""
    return torch.nn.functional.normalize(features.double(), dim=-1, eps=TINY)


def among_wholes(parts: Tensor, wholes: Tensor) -> Tensor:
    """Ranks (P, W) of every part, features (W, P, C), in the gallery of wholes (W, C)."""
    return torch.stack([retrieval_ranks(parts[:, part], wholes) for part in range(parts.shape[1])])


def among_parts(parts: Tensor) -> Tensor:
    """Ranks (P, W) of part p of every whole, features (W, P, C), in the gallery of their parts p + 1 (after the last, 0)."""
    check_enough(*parts.shape[:2])
    count = parts.shape[1]
    return torch.stack(
        [retrieval_ranks(parts[:, part], parts[:, (part + 1) % count]) for part in range(count)]
    )


def retrieval_scores(ranks: Tensor, gallery: int) -> dict[str, float]:
    """Share of ranks that are 1 and at most 5, mean of 1 / rank; and what drawing the order by lot would give."""
    found = ranks.double()
    return {
        "top1": float((found <= 1).double().mean()),
        "top5": float((found <= 5).double().mean()),
        "mrr": float((1 / found).mean()),
        "chance_top1": 1 / gallery,
        "chance_top5": min(5, gallery) / gallery,
        "chance_mrr": float((1 / np.arange(1, gallery + 1)).mean()),
        "n_queries": found.numel(),
        "gallery": gallery,
    }
