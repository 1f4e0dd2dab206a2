"""Fractions by patient, nested; an epoch's batches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2w.errors import UserError
from p2w.finetune.samples import data_fraction, epoch_batches, fixed_batches

PATIENTS = [f"p{number // 3}" for number in range(120)]  # 40 of them, 3 rows each
ROWS = np.arange(0, 90)  # the first 30 train


def test_a_smaller_fraction_lies_within_a_larger_one_and_patients_stay_whole():
    before = set()
    for fraction in (0.01, 0.1, 0.45, 0.5, 1.0):
        chosen = data_fraction(ROWS, PATIENTS, fraction, 3).tolist()
        assert before <= set(chosen) and chosen == sorted(chosen)
        assert len(chosen) == 3 * np.ceil(round(fraction * 30, 6))
        assert all(
            chosen.count(row) == 1 and {row - row % 3 + i for i in range(3)} <= set(chosen) for row in chosen
        )
        before = set(chosen)
    assert data_fraction(ROWS, PATIENTS, 0.1, 3).tolist() != data_fraction(ROWS, PATIENTS, 0.1, 4).tolist()


def test_a_patients_place_does_not_depend_on_the_others():
    few = data_fraction(np.arange(45), PATIENTS, 0.4, 0)
    every = data_fraction(np.arange(90), PATIENTS, 0.4, 0)
    kept = [row for row in every if row < 45]
    assert set(kept) <= set(few.tolist()) or set(few.tolist()) <= set(kept)


def test_both_classes_are_there():
    labels = np.zeros(120, np.int8)
    labels[31] = 1
    chosen = data_fraction(ROWS, PATIENTS, 0.05, 0, labels)
    assert 31 in chosen and len(set(labels[chosen])) == 2
    wider = data_fraction(ROWS, PATIENTS, 0.9, 0, labels)
    assert set(chosen.tolist()) <= set(wider.tolist())


@pytest.mark.parametrize("fraction", [0, -1, 1.1, float("nan")])
def test_a_fraction_is_one(fraction):
    with pytest.raises(UserError, match="--fraction"):
        data_fraction(ROWS, PATIENTS, fraction, 0)


@given(st.integers(1, 500), st.integers(1, 40))
def test_batches_hold_every_sample_once_and_are_alike(count, batch):
    ends = fixed_batches(count, batch)
    sizes = np.diff([0, *ends])
    assert ends[-1] == count and sizes.max() <= batch and sizes.min() >= 1 and sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize(("count", "least", "times"), [(50, 0, 1), (50, 4, 1), (50, 5, 2), (9, 20, 20)])
def test_an_epoch_goes_through_all_samples_in_orders_of_its_own(count, least, times):
    found = epoch_batches(count, 16, least, 1, 0)
    assert len(found) >= least and np.bincount(np.concatenate(found)).tolist() == [times] * count
    again, other = epoch_batches(count, 16, least, 1, 0), epoch_batches(count, 16, least, 1, 1)
    assert all((a == b).all() for a, b in zip(found, again, strict=True))
    assert any((a != b).any() for a, b in zip(found, other, strict=True))
    if times > 1:
        assert (np.concatenate(found)[:count] != np.concatenate(found)[count : 2 * count]).any()
