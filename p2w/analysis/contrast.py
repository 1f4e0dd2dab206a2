"""The contrastive loss that nobody trained (paper, Fig. 2c): does it fall while only reconstruction is trained?

Features are (W, P, C) = wholes, parts of each, channels. A test of a whole takes one of its parts, another of them as the
positive, and K parts of other wholes as negatives; with cosines s and temperature t its loss is

    -log( exp(s+ / t) / (exp(s+ / t) + sum_k exp(s-_k / t)) )

The paper takes K = 5,000, 100 tests of every whole and t = 0.7. Negatives are drawn from the pool of all (W - 1) P parts of
other wholes, uniformly and with replacement, so that K may exceed the pool and the expectation is the same for any pool.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2w.analysis.pairs import TINY, check_enough

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
