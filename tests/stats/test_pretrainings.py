"""Methods of pretraining are compared with the pretraining as the replicate: known answers, and how often chance wins."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from p2w.stats import compare, compare_pretrainings, paired


def trials(values):
    return {index: (100 + index, float(value)) for index, value in enumerate(values)}


def made(table):
    return {seed: trials(row) for seed, row in enumerate(table)}


def test_one_pretraining_has_no_test_however_many_trials_there_are():
    found = compare_pretrainings({0: trials([0.9, 0.91, 0.92])}, {None: trials([0.1, 0.12, 0.11])})
    assert found.difference == pytest.approx(0.8) and math.isnan(found.p) and math.isnan(found.low)
    assert "no replicate" in found.why


def test_without_pretraining_on_both_sides_trials_are_the_replicates():
    one, two = trials([0.5, 0.6, 0.8]), trials([0.4, 0.6, 0.6])
    assert compare_pretrainings({None: one}, {None: two}) == compare(one, two)


def test_two_crossed_effects_against_the_formulas():
    table, bare = np.random.default_rng(0).normal(size=(3, 5)), np.random.default_rng(1).normal(size=5)
    found = compare_pretrainings(made(table), {None: trials(bare)})
    apart, (s, t) = table - bare, (3, 5)
    m = apart.mean()
    ms_s = t * sum((apart[i].mean() - m) ** 2 for i in range(s)) / (s - 1)
    ms_t = s * sum((apart[:, j].mean() - m) ** 2 for j in range(t)) / (t - 1)
    ms_e = sum(
        (apart[i, j] - apart[i].mean() - apart[:, j].mean() + m) ** 2 for i in range(s) for j in range(t)
    ) / ((s - 1) * (t - 1))
    variance = max(ms_s + ms_t - ms_e, ms_s, ms_t)
    df = variance**2 / (ms_s**2 / (s - 1) + ms_t**2 / (t - 1) + ms_e**2 / ((s - 1) * (t - 1)))
    error = math.sqrt(variance / (s * t))
    assert (found.difference, found.t) == pytest.approx((m, m / error))
    assert found.df == pytest.approx(max(df, 2)) and found.n == (3, 5)
    assert found.p == pytest.approx(2 * scipy_stats.t.sf(abs(m / error), found.df))
    half = scipy_stats.t.ppf(0.975, found.df) * error
    assert (found.low, found.high) == pytest.approx((m - half, m + half))
    other = compare_pretrainings({None: trials(bare)}, made(table))
    assert (other.t, other.p) == pytest.approx((-found.t, found.p))


def test_where_trials_add_nothing_it_is_the_t_test_of_the_pretrainings():
    """Trials of a pretraining that all say the same count once."""
    seeds = np.array([0.1, 0.4, 0.35])
    found = compare_pretrainings(made(np.repeat(seeds[:, None], 6, 1)), {None: trials(np.zeros(6))})
    alone = paired(seeds, np.zeros(3))
    assert (found.t, found.df, found.p) == pytest.approx((alone.t, 2, alone.p))
    assert (found.low, found.high) == pytest.approx((alone.low, alone.high))


def test_pretrainings_of_one_seed_are_paired_and_others_are_not():
    one, two = np.random.default_rng(3).normal(size=(2, 3, 4))
    crossed = compare_pretrainings(made(one), made(two))
    assert crossed.n == (3, 4) and crossed.difference == pytest.approx((one - two).mean())
    moved = {seed + 7: row for seed, row in made(two).items()}
    found = compare_pretrainings(made(one), moved)
    expected = scipy_stats.ttest_ind(one.mean(1), two.mean(1), equal_var=False)
    assert (found.t, found.p) == pytest.approx((expected.statistic, expected.pvalue)) and found.n == (3, 3)
    unlike = {seed: {index + 50: pair for index, pair in row.items()} for seed, row in made(two).items()}
    found = compare_pretrainings(made(one), unlike)
    assert found.p == pytest.approx(scipy_stats.ttest_rel(one.mean(1), two.mean(1)).pvalue)


@pytest.mark.parametrize(("seed_sd", "trial_sd"), [(0.0, 1.0), (2.0, 1.0), (2.0, 0.0), (1.0, 3.0)])
def test_chance_is_believed_in_one_case_of_twenty_at_most(seed_sd, trial_sd):
    """Three pretrainings of six trials without any effect; the t-test over all eighteen trials believes far too much."""
    rng, nested, naive, count = np.random.default_rng(0), 0, 0, 600
    for _ in range(count):
        noise = rng.normal(size=(3, 6)) + seed_sd * rng.normal(size=(3, 1)) + trial_sd * rng.normal(size=6)
        nested += compare_pretrainings(made(noise), {None: trials(np.zeros(6))}).p < 0.05
        naive += scipy_stats.ttest_1samp(noise.ravel(), 0).pvalue < 0.05
    assert nested / count < 0.075
    if seed_sd == 2:
        assert naive / count > 0.2


def test_an_effect_without_any_spread_is_certain_and_none_is_none():
    flat = np.full((2, 3), 0.25)
    assert compare_pretrainings(made(flat), {None: trials([0.0, 0.0, 0.0])}).p == 0
    assert compare_pretrainings(made(flat), {None: trials([0.25] * 3)}).p == 1
