"""Fractions by patient, nested; an epoch's batches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2w.errors import UserError
from p2w.target.subset import batches, order, subset

PATIENTS = [f"p{number // 3}" for number in range(120)]  # 40 of them, 3 rows each
ROWS = np.arange(0, 90)  # the first 30 train


def test_a_smaller_fraction_lies_within_a_larger_one_and_patients_stay_whole():
    before = set()
    for fraction in (0.01, 0.1, 0.45, 0.5, 1.0):
        chosen = subset(ROWS, PATIENTS, fraction, 3).tolist()
        assert before <= set(chosen) and chosen == sorted(chosen)
        assert len(chosen) == 3 * np.ceil(round(fraction * 30, 6))
        assert all(
            chosen.count(row) == 1 and {row - row % 3 + i for i in range(3)} <= set(chosen) for row in chosen
        )
        before = set(chosen)
    assert subset(ROWS, PATIENTS, 0.1, 3).tolist() != subset(ROWS, PATIENTS, 0.1, 4).tolist()


def test_a_patients_place_does_not_depend_on_the_others():
    few = subset(np.arange(45), PATIENTS, 0.4, 0)
    every = subset(np.arange(90), PATIENTS, 0.4, 0)
    kept = [row for row in every if row < 45]
    assert set(kept) <= set(few.tolist()) or set(few.tolist()) <= set(kept)


def test_both_classes_are_there():
    labels = np.zeros(120, np.int8)
    labels[31] = 1
    chosen = subset(ROWS, PATIENTS, 0.05, 0, labels)
    assert 31 in chosen and len(set(labels[chosen])) == 2
    wider = subset(ROWS, PATIENTS, 0.9, 0, labels)
    assert set(chosen.tolist()) <= set(wider.tolist())


@pytest.mark.parametrize("fraction", [0, -1, 1.1, float("nan")])
def test_a_fraction_is_one(fraction):
    with pytest.raises(UserError, match="--fraction"):
        subset(ROWS, PATIENTS, fraction, 0)


@given(st.integers(1, 500), st.integers(1, 40))
def test_batches_hold_every_sample_once_and_are_alike(count, batch):
    ends = batches(count, batch)
    sizes = np.diff([0, *ends])
    assert ends[-1] == count and sizes.max() <= batch and sizes.min() >= 1 and sizes.max() - sizes.min() <= 1


def test_orders_are_permutations_of_their_own():
    one, two = order(50, 1, 0), order(50, 1, 1)
    assert (
        sorted(one) == sorted(two) == list(range(50))
        and (one != two).any()
        and (one == order(50, 1, 0)).all()
    )
