"""Tests and corrections against formulas written out in float64, on made-up trials and on the paper's published numbers."""

import math

import numpy as np
import pytest
from scipy.integrate import quad

from p2w.reproduce import paper_numbers
from p2w.stats import Summary, compare, holm, paired, summarise, welch


def two_sided_p(t, df):
    """The area of Student's density beyond |t|, by quadrature."""
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    return 2 * quad(lambda x: scale * (1 + x * x / df) ** (-(df + 1) / 2), abs(t), math.inf)[0]


def trials(values, seeds=None):
    return {
        index: (seed, value)
        for index, (seed, value) in enumerate(zip(seeds or range(99), values, strict=False))
    }


def test_the_standard_deviation_divides_by_n_minus_one():
    found = summarise([1.0, 2.0, 4.0])
    assert (found.mean, found.sd, found.n) == pytest.approx((7 / 3, math.sqrt(7 / 3), 3))
    assert math.isnan(summarise([1.0]).sd) and math.isnan(summarise([]).mean)


@pytest.mark.parametrize("n", [2, 5, 10])
def test_paired_against_the_formula(n):
    rng = np.random.default_rng(n)
    a, b = rng.normal(0.9, 0.02, (2, n))
    apart = a - b
    t = apart.mean() / (math.sqrt(sum((apart - apart.mean()) ** 2) / (n - 1)) / math.sqrt(n))
    found = compare(trials(a), trials(b))
    assert found.method == "paired t-test" and found.n == (n,) and found.why == ""
    assert (found.t, found.df, found.difference) == pytest.approx((t, n - 1, apart.mean()))
    assert found.p == pytest.approx(two_sided_p(t, n - 1), abs=1e-8)


def test_pairs_are_by_index_and_only_those_that_both_have():
    a = {0: (0, 0.5), 1: (1, 0.6), 3: (3, 0.8), 4: (4, 0.7)}
    b = {4: (4, 0.6), 3: (3, 0.6), 1: (1, 0.5), 2: (2, 0.1)}
    assert compare(a, b) == paired([0.6, 0.8, 0.7], [0.5, 0.6, 0.6])


def test_other_seeds_are_not_paired():
    found = compare(trials([0.5, 0.6, 0.7]), trials([0.5, 0.55, 0.6], seeds=[0, 7, 2]))
    assert found.method == "Welch's t-test" and "seeds of trial 1 differ" in found.why and found.n == (3, 3)
    alone = compare({0: (0, 0.5), 1: (1, 0.6)}, {2: (2, 0.5), 3: (3, 0.7)})
    assert alone.method == "Welch's t-test" and "0 trials in common" in alone.why


def test_equal_differences():
    same, shifted = paired([0.5, 0.6], [0.5, 0.6]), paired([0.75, 0.5], [0.5, 0.25])
    assert (same.t, same.p) == (0.0, 1.0) and (shifted.t, shifted.p) == (math.inf, 0.0)
    assert math.isnan(paired([0.5], [0.4]).p)
    assert (
        welch(Summary(1, 0, 3), Summary(1, 0, 3)).p == 1 and welch(Summary(1, 0, 3), Summary(0, 0, 3)).p == 0
    )
    assert math.isnan(welch(Summary(1, math.nan, 1), Summary(0, 1, 3)).p)


def welch_by_hand(a, b):
    one, two = a.sd**2 / a.n, b.sd**2 / b.n
    t = (a.mean - b.mean) / math.sqrt(one + two)
    df = (one + two) ** 2 / (one**2 / (a.n - 1) + two**2 / (b.n - 1))
    return t, df, two_sided_p(t, df)


def test_which_differences_of_table_1_are_significant():
    """Ours against the best of the others, from published means and deviations of ten trials."""
    others = {
        "ncc": "I3D",
        "ncs": "Models Genesis",
        "lcs": "MedicalNet",
        "ecc": "Models Genesis",
        "bms": "Models Genesis",
    }
    significant = {}
    for task, label in others.items():
        ours, other = paper_numbers.TABLE1[paper_numbers.OURS][task], paper_numbers.TABLE1[label][task]
        assert other.mean == max(
            row[task].mean for name, row in paper_numbers.TABLE1.items() if name != paper_numbers.OURS
        )
        found = welch(ours, other)
        assert (found.t, found.df, found.p) == pytest.approx(welch_by_hand(ours, other), abs=1e-8)
        significant[task] = found.p < 0.05
    assert significant == {"ncc": True, "ncs": False, "lcs": True, "ecc": False, "bms": False}
    # By pencil: 0.41 / sqrt((0.23² + 0.27²) / 10) = 3.656 on 17.6 degrees of freedom.
    ncc = welch(paper_numbers.TABLE1[paper_numbers.OURS]["ncc"], paper_numbers.TABLE1["I3D"]["ncc"])
    assert (ncc.t, ncc.df) == pytest.approx((3.656, 17.56), abs=0.01) and 0.001 < ncc.p < 0.002


def test_differences_to_the_best_range_of_table_2():
    """By its own numbers, [1/16,1/4] differs from the wider range on both tasks, from the narrower on NCS alone."""
    significant = {}
    for task in ("ncc", "ncs"):
        best, wider, narrower = (
            paper_numbers.TABLE2[paper_numbers.Parts(1 / 16, high)][task] for high in (1 / 4, 1 / 2, 1 / 8)
        )
        for name, other in (("wider", wider), ("narrower", narrower)):
            found = welch(best, other)
            assert found.p == pytest.approx(welch_by_hand(best, other)[2], abs=1e-8)
            significant[task, name] = found.p < 0.05
    assert significant == {
        ("ncc", "wider"): True, ("ncc", "narrower"): False, ("ncs", "wider"): True, ("ncs", "narrower"): True,
    }  # fmt: skip


def test_holm_against_its_definition():
    rng = np.random.default_rng(0)
    for count in (1, 2, 7):
        p = rng.uniform(0, 0.2, count)
        for at, adjusted in enumerate(holm(p.tolist())):
            smaller = [q for q in p if q <= p[at]]
            naive = max(min(1, (count - sum(r < q for r in p)) * q) for q in smaller)
            assert adjusted == pytest.approx(naive)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    left = holm([0.02, math.nan, 0.5])
    assert left[0] == 0.04 and math.isnan(left[1]) and left[2] == 0.5
