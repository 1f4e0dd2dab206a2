"""Similarity of parts: separability of positive and negative pairs, contrastive loss, retrieval.

Features are (W, P, C) = wholes, parts of each, channels. A positive pair is two parts of one whole, a negative pair two
parts of different wholes. Separability is the area under the ROC curve of their cosines (0.5: none, 1: complete). Pairs
and tests are drawn first, as index arrays from an explicit seed.

Contrastive loss (paper, Fig. 2c): it is measured while only reconstruction is trained. A test of a whole takes one of its
parts as anchor, another as positive, and K parts of other wholes as negatives; with cosines s and temperature t, its loss is

    -log( exp(s+ / t) / (exp(s+ / t) + sum_k exp(s-_k / t)) )

The paper uses K = 5,000, 100 tests of every whole and t = 0.7. Negatives are drawn from the pool of all (W - 1) P parts of
other wholes, uniformly and with replacement, so that K may exceed the pool and the expectation is the same for any pool.

Retrieval: the query is a part, and the gallery has one entry for each whole, the whole itself (scale 1) or another part of
it. The rank of a query is the rank of its own whole by cosine similarity. Ties count against it, so that a network with the
same features for all inputs gets the last rank.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2w.errors import UserError

Features = NDArray[np.floating]  # float32 or float64
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
TINY = 1e-12  # smallest norm to divide by: a feature vector of zeros has cosine 0 with everything


def pair_cosines(features: Floats) -> tuple[Floats, Floats]:
    """Cosines of all positive and of all negative pairs, two 1D arrays, from features (W, P, C).

    A feature vector of zeros has cosine 0 with all others.
    """
    unit = features / np.maximum(np.linalg.norm(features, axis=2, keepdims=True), 1e-12)
    wholes, parts, channels = unit.shape
    flat, owner = unit.reshape(wholes * parts, channels), np.repeat(np.arange(wholes), parts)
    first, second = np.triu_indices(wholes * parts, 1)
    cosines = (flat @ flat.T)[first, second]
    same = owner[first] == owner[second]
    return cosines[same], cosines[~same]


def auc(positive: Floats, negative: Floats) -> float:
    """Area under the ROC curve: probability that a positive pair is more similar than a negative one, ties half."""
    # Computed here, because importing scikit-learn would add seconds to every start
    order = np.sort(negative)
    below = np.searchsorted(order, positive, "left") + np.searchsorted(order, positive, "right")
    return float(below.sum() / (2 * len(positive) * len(negative)))


def effective_rank(features: Floats) -> float:
    """Over how many directions features spread: from 1 to C; NaN when all are equal, or for fewer than four samples.

    It is the participation ratio (tr S)² / tr S² of the covariance S of the features' distribution, the number of directions
    if all vary alike, estimated without the bias of small samples: numerator and denominator are the unbiased estimators of
    Himeno and Yamada (2014, Journal of Multivariate Analysis 130), for any distribution. So 32 samples of white noise in 512
    channels give 512 within 10 %, where the plain ratio, or the entropy of singular values (Roy and Vetterli 2007),
    cannot exceed 31, and numbers from different numbers of parts and wholes compare.

    `features` (N, C): independent samples. Or (W, P, C): parts of wholes, which are no independent samples; then both terms
    are means over p of those of the W parts number p. It needs no labels, and shows how much of its input an encoder
    represents, which the loss does not (docs/targets.md).
    """
    each = features[:, None] if features.ndim == 2 else features
    terms = [_participation_terms(each[:, part]) for part in range(each.shape[1])]
    over, under = np.mean(terms, 0)
    if len(each) < 4 or not under > 0:
        return float("nan")
    return float(np.clip(over / under, 1.0, features.shape[-1]))


def _participation_terms(features: Floats) -> tuple[float, float]:
    """Estimators of (tr S)² and of tr S² from features (N, C), both times N (N - 2)(N - 3) / (N - 1)."""
    count = len(features)
    wide = features.astype(np.float64)
    wide = wide - wide.mean(0)
    lengths = (wide**2).sum(1)
    if lengths.max() <= TINY * (features.astype(np.float64) ** 2).sum(1).max():  # rounding of the mean
        return 0.0, 0.0
    gram = wide @ wide.T if count < wide.shape[1] else wide.T @ wide
    squares, trace = float((gram**2).sum()) / (count - 1) ** 2, float(lengths.sum()) / (count - 1)
    fourth = count * float((lengths**2).sum()) / (count - 1)
    return (
        2 * squares + (count**2 - 3 * count + 1) * trace**2 - fourth,
        (count - 1) * (count - 2) * squares + trace**2 - fourth,
    )


def similarity_file(run: Path, step: int) -> Path:
    """The file in RUN/figures with the cosines at `step`; creates the folder."""
    folder = run / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"similarity-{step:08d}.npz"


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
    """Raise UserError for fewer than two wholes or two parts of each."""
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
    """Features (..., C) divided by their L2 norm, float64."""
    wide = features.astype(np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), TINY)


def d_prime(positive: Floats, negative: Floats) -> float:
    """Distance of the two means in units of the root mean variance; NaN where neither set varies."""
    spread = np.sqrt((positive.var() + negative.var()) / 2)
    return float((positive.mean() - negative.mean()) / spread) if spread > 0 else float("nan")


def separability(positive: Floats, negative: Floats) -> dict[str, float]:
    """AUC, d' and mean cosines, from cosines of positive and negative pairs of any shape."""
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
BLOCK = 1 << 25  # similarities in memory at a time: 128 MiB in float32


@dataclass(frozen=True)
class Tests:
    """T tests of one whole: `anchor` and `positive` (T,) are its parts, `negatives` (T, K) are rows of the pool (W * P)."""

    anchor: NDArray[np.int64]
    positive: NDArray[np.int64]
    negatives: NDArray[np.int64]


def draw_tests(wholes: int, parts: int, whole: int, tests: int, negatives: int, seed: int) -> Tests:
    """The tests of `whole`; they depend on these numbers alone, not on the rank that computes them."""
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

    Computed on the device of `features` (W, P, C) in their dtype; sums in float64. Similarities are computed in fixed blocks
    of bounded size, and a test's negatives are picked from its anchor's row. So a whole's value has the same bits whichever
    other wholes are asked for, and ranks can divide the work into contiguous ranges. `tick` is called after each whole.
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
    """Sum () float64 of the losses of tests with one anchor; `similar` (W * P,) are its similarities / temperature."""
    of_positive = similar[torch.from_numpy(positive).to(similar.device)]
    of_negatives = similar.take(torch.from_numpy(negatives).to(similar.device))
    top = torch.maximum(of_negatives.amax(1), of_positive)  # below t = 0.011, exp(1 / t) overflows float32
    sum_negatives = (of_negatives - top[:, None]).exp().sum(1, dtype=torch.float64)
    shifted = (of_positive - top).double()
    return ((shifted.exp() + sum_negatives).log() - shifted).sum()


ROUNDING = 1e-12  # error of a float64 cosine


@torch.no_grad()
def retrieval_ranks(queries: Tensor, gallery: Tensor) -> Tensor:
    """Rank (N,) int64, from 1, of entry i of `gallery` (N, C) for query i of `queries` (N, C).

    In float64, because an untrained network's features agree to six digits, and equal ones must tie.
    """
    similar = l2_normalise_features(queries) @ l2_normalise_features(gallery).T
    return (similar >= similar.diagonal()[:, None] - ROUNDING).sum(1)


def l2_normalise_features(features: Tensor) -> Tensor:
    """Features (..., C) divided by their L2 norm, float64."""
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
    """Top-1 and top-5 accuracy and mean reciprocal rank, and their values by chance, from ranks of any shape."""
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
