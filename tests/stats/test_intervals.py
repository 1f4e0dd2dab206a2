"""Intervals against slow references: DeLong's variance pair by pair, the bootstrap by copying cases, coverage by drawing."""

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from p2w import stats


def some(n, seed=0, ties=False):
    rng = np.random.default_rng(seed)
    truth = rng.random(n) < 0.3
    truth[:2] = (True, False)
    score = rng.normal(size=n) + 1.2 * truth
    return (np.round(score) if ties else score), truth


@pytest.mark.parametrize("ties", [False, True])
def test_delong_against_all_pairs(ties):
    score, truth = some(60, ties=ties)
    ours, theirs = score[truth], score[~truth]
    wins = (ours[:, None] > theirs) + 0.5 * (ours[:, None] == theirs)
    naive = np.var(wins.mean(1), ddof=1) / len(ours) + np.var(wins.mean(0), ddof=1) / len(theirs)
    assert stats.delong(score, truth) == pytest.approx((wins.mean(), naive))
    low, high = stats.auc_interval(score, truth)
    middle = math.log(wins.mean() / (1 - wins.mean()))
    for end, sign in ((low, -1), (high, 1)):
        reach = 1.959964 * math.sqrt(naive) / (wins.mean() * (1 - wins.mean()))
        assert math.log(end / (1 - end)) == pytest.approx(middle + sign * reach, abs=1e-6)


def test_the_interval_covers_the_true_value_in_95_percent():
    covered = 0
    true = 0.5 * (1 + math.erf(1.2 / 2))  # P(N(1.2, 1) > N(0, 1))
    for seed in range(300):
        low, high = stats.auc_interval(*some(80, seed))
        covered += low <= true <= high
    assert 0.91 <= covered / 300 <= 0.985


def test_undefined_and_perfect_rankings():
    assert all(map(math.isnan, stats.auc_interval([0.1, 0.2], [1, 1])))
    assert all(map(math.isnan, stats.auc_interval([0.1, 0.3, 0.2], [0, 0, 1])))
    low, high = stats.auc_interval([0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 1, 1])
    assert high == 1 and low**3 == pytest.approx(0.025)
    worst = stats.auc_interval([5, 4, 3, 2], [0, 0, 1, 1])
    assert worst[0] == 0 and worst[1] < 1
    with pytest.raises(ValueError, match="one length"):
        stats.auc_interval([0.1], [0, 1])


def test_resampling_patients_equals_copying_their_cases(monkeypatch):
    monkeypatch.setattr(stats, "RESAMPLES", 200)
    score, truth = some(40, 3, ties=True)
    patients = [f"p{index % 11}" for index in range(40)]
    rng = np.random.default_rng(stats.SEED)
    owners = [np.flatnonzero(np.array(patients) == f"p{number}") for number in range(11)]
    found = []
    for _ in range(stats.RESAMPLES):
        drawn = rng.multinomial(11, np.full(11, 1 / 11))
        rows = np.concatenate([np.tile(owners[at], times) for at, times in enumerate(drawn)])
        if len(set(truth[rows])) == 2:
            found.append(roc_auc_score(truth[rows], score[rows]))
    assert stats.auc_interval(score, truth, patients) == pytest.approx(np.quantile(found, (0.025, 0.975)))


def test_cases_of_one_patient_widen_the_interval():
    """Ten copies of each case tell no more than one of each."""
    rng = np.random.default_rng(1)
    values = np.repeat(rng.random(20), 10)
    as_cases = stats.mean_interval(values)
    as_patients = stats.mean_interval(values, np.repeat(np.arange(20), 10).tolist())
    assert np.ptp(as_patients) > 2.5 * np.ptp(as_cases)
    assert as_patients == pytest.approx(stats.mean_interval(values[::10]))


def test_pooled_iou_is_a_ratio_of_sums():
    above, below = np.array([5.0, 0, 90]), np.array([10.0, 10, 100])
    low, high = stats.ratio_interval(above, below)
    assert 0 <= low < 95 / 120 < high <= 0.9
    assert stats.ratio_interval(above, below) == (low, high)
    assert all(map(math.isnan, stats.ratio_interval([1.0], [2.0])))
    assert all(map(math.isnan, stats.ratio_interval([0.0, 0], [0.0, 0])))
    with pytest.raises(ValueError, match="one length"):
        stats.ratio_interval([1.0, 2], [1.0])
