"""The text of goals and bars."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent.parent / "bench"))

from common import Goal, Row, over, rotate, save
from table import markdown, times


@pytest.mark.parametrize(
    ("value", "bound", "at_least", "met"),
    [(3.0, 3.0, True, True), (2.9, 3.0, True, False), (0.2, 0.15, False, False), (0.1, 0.15, False, True)],
)
def test_goals(value, bound, at_least, met):
    assert Goal("", value, bound, at_least).met is met
    assert Goal("", float("nan"), bound, at_least).met is False


def test_turns_are_taken_and_the_first_does_not_count():
    order = []
    found = rotate({name: lambda name=name: order.append(name) or len(order) for name in "ab"}, rounds=2)
    assert order == list("ababab") and found == {"a": [3, 5], "b": [4, 6]}
    assert over([10, 20, 90], [10, 10, 30]) == 2  # the median of 1, 2, 3


def test_a_table_says_how_often_ours_is_as_fast(tmp_path):
    rows = [Row("g", "p2w", 300.0, "samples/s", "ours"), Row("g", "a peer", 100.0, "samples/s")]
    result = save(
        tmp_path / "r.json", "how fast?", "python r.py", rows, [Goal("times a peer", 3.0, 3.0)], skipped=["x"]
    )
    assert (
        times(result["rows"][1], result["rows"]) == "3.00" and times(result["rows"][0], result["rows"]) == ""
    )
    text = markdown({"r": result})
    assert "| r | times a peer | 3 | >= 3 | yes |" in text and "| r | x | | | skipped |" in text
    bars = [line.split("`")[1] for line in text.splitlines() if line.startswith(("| p2w |", "| a peer |"))]
    assert bars == ["█" * 30, "░" * 10]
