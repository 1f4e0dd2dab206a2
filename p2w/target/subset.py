"""A fraction of the training patients, and batches of samples: functions of seed and names alone. No torch."""

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

from p2w.errors import UserError

Rows = NDArray[np.int64]


def subset(
    rows: Rows, patients: list[str], fraction: float, seed: int, labels: NDArray[np.int8] | None = None
) -> Rows:
    """The rows of a fraction of the patients, ascending; `patients` and `labels` are columns of the whole set.

    Patients come in an order that a hash of seed and name draws, and the first ceil(fraction * n) stay: the patients of
    10 % are among those of 45 %, whatever else there is in the set. With `labels` (classification) as many more follow as
    it takes for both classes to be there.

    Raises:
        UserError: fraction not in (0, 1], or no training patient.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"--fraction {fraction}: must be above 0 and at most 1")
    if fraction == 1:
        return rows
    names = sorted({patients[row] for row in rows})
    names.sort(key=lambda name: hashlib.sha256(f"{seed}:subset:{name}".encode()).digest())
    rank = {name: place for place, name in enumerate(names)}
    places = np.array([rank[patients[row]] for row in rows])
    count = math.ceil(round(fraction * len(names), 9))
    if labels is not None:
        first = [places[labels[rows] == which].min(initial=len(names) - 1) for which in (0, 1)]
        count = max(count, *(int(place) + 1 for place in first))
    return rows[places < count]


def batches(count: int, batch: int) -> list[int]:
    """Where an epoch of `count` samples is cut: ends of ceil(count / batch) batches whose sizes differ by one at most.

    Every sample is seen once an epoch, and none in a small last batch, whose statistics batch norm would take for the set's.
    """
    number = math.ceil(count / batch)
    return [count * (i + 1) // number for i in range(number)]


def epoch_of(count: int, batch: int, least: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """The batches of an epoch: all samples in an order of its own, again and again until there are `least` steps."""
    ends = batches(count, batch)
    found = []
    for time in range(max(1, math.ceil(least / len(ends)))):
        places = np.random.default_rng((seed, epoch, time)).permutation(count)
        found += [places[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return found
