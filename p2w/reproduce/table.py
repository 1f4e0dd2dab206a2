"""The values of a table, for its renderers; stored as JSON, which the page of all tables reads.

Means and deviations are in percent, as in the paper; p-values and fractions are not. None stands for a missing value.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from p2w.errors import UserError, first_line
from p2w.files import parse_json

BEST, EQUIVALENT = "best", "equivalent"
Number = float | None


@dataclass(frozen=True)
class Column:
    """A task: the metric to compare, and the share of its training data."""

    task: str
    title: str
    metric: str
    metric_title: str
    fraction: Number
    fingerprint: str

    @property
    def head(self) -> str:
        """E.g. `NCC AUC`, with the share of the training data if it is not all."""
        share = "" if self.fraction in (None, 1) else f", {100 * (self.fraction or 0):g} % of the data"
        return f"{self.title} {self.metric_title}{share}"


@dataclass(frozen=True)
class Cell:
    """The trials of one starting point on one task; `paper_*` are the paper's values of this cell.

    `p` is of the test against the best of the column; `p_used` is p after correction, which decides `mark`; `planned` is 0
    without a run.
    """

    row: str
    task: str
    mean: Number = None
    sd: Number = None
    n: int = 0
    planned: int = 0
    mark: str = ""
    test: str = ""
    p: Number = None
    p_used: Number = None
    paper_mean: Number = None
    paper_sd: Number = None
    paper_mark: str = ""
    trials: list[int] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    folder: str = ""

    @property
    def missing(self) -> str:
        """`7 of 10` for missing trials, `no run`, or nothing."""
        if self.planned == 0:
            return "no run"
        return "" if self.n == self.planned else f"{self.n} of {self.planned}"


@dataclass(frozen=True)
class Claim:
    """A test of our row against another on one task; `source` says whether from trials here or the paper's numbers."""

    task: str
    ours: str
    other: str
    difference: Number
    test: str
    pairs: list[int]
    t: Number
    df: Number
    p: Number
    p_holm: Number
    why: str
    source: str
    low: Number = None  # 95 % interval of the difference; None in files of earlier versions
    high: Number = None


@dataclass(frozen=True)
class Table:
    """Rows and columns by name, a cell for each pair, the claims for our row, and footnotes."""

    name: str
    title: str
    rows: list[str]
    columns: list[Column]
    cells: list[Cell]
    claims: list[Claim]
    notes: list[str]

    def cell(self, row: str, task: str) -> Cell:
        """The cell of a row and a task."""
        return next(cell for cell in self.cells if (cell.row, cell.task) == (row, task))


def table_to_json(table: Table) -> str:
    """JSON that `load_table` reads."""
    return json.dumps(dataclasses.asdict(table), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


MAYBE = (float, None)
COLUMN = {
    "task": str,
    "title": str,
    "metric": str,
    "metric_title": str,
    "fraction": MAYBE,
    "fingerprint": str,
}
CELL: dict[str, Any] = dict.fromkeys(("mean", "sd", "p", "p_used", "paper_mean", "paper_sd"), MAYBE)
CELL |= dict.fromkeys(("row", "task", "mark", "test", "paper_mark", "folder"), str)
CELL |= {"n": int, "planned": int, "trials": [int], "seeds": [int], "values": [float]}
CLAIM: dict[str, Any] = dict.fromkeys(("task", "ours", "other", "test", "why", "source"), str)
CLAIM |= dict.fromkeys(("difference", "t", "df", "p", "p_holm"), MAYBE) | {"pairs": [int]}
FORM = {"name": str, "title": str, "rows": [str], "columns": [COLUMN], "cells": [CELL], "claims": [CLAIM]}
FORM |= {"notes": [str]}


def load_table(path: Path) -> Table:
    """Read what `table_to_json` wrote. Raises UserError when it is missing or damaged."""
    try:
        tree = parse_json(path.read_bytes(), FORM)
        for name, kind in {"columns": Column, "cells": Cell, "claims": Claim}.items():
            tree[name] = [kind(**entry) for entry in tree[name]]
        table = Table(**tree)
        lacking = {(row, c.task) for row in table.rows for c in table.columns} - {
            (c.row, c.task) for c in table.cells
        }
        if lacking:
            raise ValueError(f"no cell {min(lacking)}")
        return table
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; make it again: p2w {path.stem}") from error
    except (ValueError, TypeError) as error:
        said = first_line(error)
        raise UserError(f"{path}: damaged ({said}); make it again: p2w {path.stem}") from error
