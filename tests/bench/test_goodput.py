"""The replay of bench/goodput.py, against the formula for random faults, and by hand."""

import math
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def goodput(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import goodput

    yield goodput
    for name in [name for name in sys.modules if name.partition(".")[0] in ("goodput", "soak", "faults")]:
        del sys.modules[name]


@pytest.mark.parametrize("interval_s", [30.0, 300.0, 1200.0])
def test_replay_gives_the_formula(goodput, interval_s):
    """Useful seconds a save interval I takes (mean + restart) (exp(I / mean) - 1) seconds of the clock."""
    mean, restart, year = 600.0, 12.0, 365 * 86400.0
    costs = goodput.MeasuredCosts(
        step_s=0.5, every=interval_s / 0.5, stall_s=0.0, lag_s=0.0, restart_s=restart
    )
    found = goodput.replay(goodput.schedule(mean, year, seed=3), year, costs)["goodput"]
    assert found == pytest.approx(interval_s / ((mean + restart) * math.expm1(interval_s / mean)), rel=0.02)


def test_replay_by_hand(goodput):
    """Steps of 1 s, a save of 1 s after every 4: killed at 7 (2 steps in), at 9 (starting) and at 20 (while it saves)."""
    costs = goodput.MeasuredCosts(step_s=1.0, every=4, stall_s=1.0, lag_s=0.0, restart_s=6.0)
    found = goodput.replay([7.0, 9.0, 19.5], 30.0, costs)  # trains from 0, 15 and 25.5
    assert found == {"goodput": round(8 / 30, 4), "lost_steps_a_fault": 2.0, "kills_within_a_save": 1}
    late = goodput.MeasuredCosts(step_s=1.0, every=4, stall_s=0.0, lag_s=1.0, restart_s=2.0)
    found = goodput.replay([8.5], 10.0, late)  # the second save is not durable after half a second
    assert found == {"goodput": 0.4, "lost_steps_a_fault": 4.5, "kills_within_a_save": 0}
