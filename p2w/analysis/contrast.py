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
BLOCK = 1 << 24  # similarities held at once: 64 MiB in float32


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
    rows[rows >= whole * parts] += parts  # the whole's own parts are no negatives
    return Tests(anchor, positive + (positive >= anchor), rows)


@torch.no_grad()
def contrastive_losses(
    features: Tensor, *, tests: int = TESTS, negatives: int = NEGATIVES, temperature: float = TEMPERATURE,
    seed: int = 0, wholes: Iterable[int] | None = None, tick: Callable[[], None] = lambda: None,
) -> Tensor:  # fmt: skip
    """Mean loss over the tests of each of `wholes` (default: all), float64 on the CPU, in that order.

    Computed on the device of `features` in their floating type; sums in float64. A whole's similarities to the pool are one
    product of matrices, in blocks of bounded size, and its negatives are picked from there. A whole's value is the
    same whichever others are asked for, so ranks can share the work. `tick` is called after each.
    Raises UserError for fewer than two wholes, or two parts of each.
    """
    count, parts, channels = features.shape
    check_enough(count, parts)
    unit = torch.nn.functional.normalize(features, dim=2, eps=TINY)
    pool = unit.reshape(count * parts, channels)
    step = max(1, BLOCK // len(pool))
    result = []
    for whole in range(count) if wholes is None else wholes:
        drawn = draw_tests(count, parts, whole, tests, negatives, seed)
        total = torch.zeros((), dtype=torch.float64, device=features.device)
        for first in range(0, parts, step):
            mine = (drawn.anchor >= first) & (drawn.anchor < first + step)
            similar = unit[whole, first : first + step] @ pool.T / temperature
            anchor, positive, rows = (
                torch.from_numpy(part).to(features.device)
                for part in (drawn.anchor[mine] - first, drawn.positive[mine], drawn.negatives[mine])
            )
            total += _losses(similar, anchor, positive + whole * parts, rows).sum()
        result.append(total / tests)
        tick()
    return torch.stack(result).cpu() if result else torch.zeros(0, dtype=torch.float64)


def _losses(similar: Tensor, anchor: Tensor, positive: Tensor, negatives: Tensor) -> Tensor:
    """Loss (T,) float64 of tests that look up their similarities / temperature in rows of `similar`."""
    # One flat look-up: gathering rows first would copy the pool's width for every test.
    start = (anchor * similar.shape[1])[:, None]
    against = similar.view(-1).take(start + negatives).exp().sum(1, dtype=torch.float64)
    alike = similar[anchor, positive].double()
    return (alike.exp() + against).log() - alike
