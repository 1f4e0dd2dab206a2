"""Which number of a column is best, which do not differ from it significantly, and whether ours differs from the others."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from p2w.tables.table import BEST, EQUIVALENT, Claim, Number
from p2w.target.statistics import LEVEL, Comparison, Summary, Trials, compare, holm, summarise, values, welch


@dataclass(frozen=True)
class Mark:
    """What is said of one row of a column: the test against the best, its p, and the p after correction."""

    mark: str
    test: str = ""
    p: Number = None
    p_used: Number = None


def known(value: float) -> Number:
    """A number for JSON; None for one that is none."""
    return value if math.isfinite(value) else None


def summary_of(one: Trials | Summary) -> Summary:
    """Of trials, or of what the paper has of them."""
    return one if isinstance(one, Summary) else summarise(values(one))


def test(a: Trials | Summary, b: Trials | Summary) -> Comparison:
    """Paired where both are trials with the same seeds; Welch's where the paper's summaries are all there is."""
    if isinstance(a, Summary) or isinstance(b, Summary):
        return welch(summary_of(a), summary_of(b))
    return compare(a, b)


def marks(column: Mapping[str, Trials | Summary], correct: bool) -> dict[str, Mark]:
    """Best and equivalent rows; a row with fewer than two trials is not judged, nor is one that stands alone.

    `correct`: Holm over the comparisons with the best of this column; else each p by itself, as in the paper.
    """
    judged = {row: one for row, one in column.items() if summary_of(one).n > 1}
    if len(judged) < 2:
        return {}
    best = max(judged, key=lambda row: summary_of(judged[row]).mean)
    found = {row: test(judged[best], one) for row, one in judged.items() if row != best}
    used = [one.p for one in found.values()]
    used = holm(used) if correct else used
    said = {best: Mark(BEST)}
    for (row, one), p in zip(found.items(), used, strict=True):
        told = one.method + (f" ({one.why})" if one.why else "")
        said[row] = Mark(EQUIVALENT if p >= LEVEL else "", told, known(one.p), known(p))
    return said


def claims(
    columns: Mapping[str, Mapping[str, Trials | Summary]], ours: str, against: str, source: str
) -> list[Claim]:
    """Ours against the best of the others (`against` empty) or a named row, task by task; Holm over the tasks."""
    made = []
    for task, column in columns.items():
        judged = {row: one for row, one in column.items() if summary_of(one).n > 1}
        others = [row for row in judged if row != ours and against in ("", row)]
        if ours not in judged or not others:
            continue
        other = max(others, key=lambda row: summary_of(judged[row]).mean)
        one = test(judged[ours], judged[other])
        made.append(
            Claim(
                task, ours, other, known(one.difference), one.method, list(one.n), known(one.t), known(one.df),
                known(one.p), None, one.why, source,
            )
        )  # fmt: skip
    adjusted = holm([math.nan if claim.p is None else claim.p for claim in made])
    return [replace(claim, p_holm=known(p)) for claim, p in zip(made, adjusted, strict=True)]
