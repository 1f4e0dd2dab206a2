"""A table of the series in a folder, from headers alone; choosing among them by expressions over its columns.

    slice_thickness <= 3 and kernel ~ 'B30'        ~ is a regular expression, found anywhere in the text
    not (description ~ 'abd' or contrast)          a column by itself: whether the header says anything there
    year >= 2015 and body_part == 'CHEST'

Numbers compare with < <= > >= == !=, text with == != ~. A comparison with what a header does not say is false.
"""

import csv
import io
import json
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from p2w.ct.discover import ScanListing, ScanSource
from p2w.ct.orientation import BadScan, Grid, reason_of
from p2w.ct.scan import stored_grid
from p2w.errors import UserError

Value = float | str | None
NUMBERS = (
    "year", "slice_thickness", "spacing_z", "spacing_y", "spacing_x", "slices", "rows", "columns", "kvp",
)  # fmt: skip
TEXTS = (
    "name", "uid", "patient", "study", "series", "acquisition", "modality", "description", "body_part", "kernel",
    "contrast", "maker", "action", "why",
)  # fmt: skip
SHOWN = (
    "patient", "year", "description", "kernel", "slice_thickness", "spacing_z", "spacing_y", "slices", "contrast", "name",
    "action", "why",
)  # fmt: skip
WIDEST = 60  # characters of a column that is not the last


@dataclass(frozen=True)
class SeriesRow:
    """A row of the table: values by column, None where headers say nothing, and the scan if it can be cut."""

    values: dict[str, Value]
    source: ScanSource | None = None


def series_rows(found: ScanListing, action: Callable[[Grid], str]) -> list[SeriesRow]:
    """A row for every scan, bad or left-out series of a listing, in the order of their names.

    `action` says what would be done with a scan of that stored grid; it raises BadScan where it is not of use.
    """
    rows = []
    for source in found.sources:
        values = _values(source)
        try:
            grid = stored_grid(source)
            values |= _geometry(grid)
            values["action"] = action(grid) + (", resampled" if source.resampled else "")
            values["why"] = source.resampled or None
        except (BadScan, OSError) as error:
            values |= {"action": "refuse", "why": reason_of(error)}
        rows.append(SeriesRow(values, source))
    for what, entries in (("refuse", found.bad), ("leave out", found.left_out)):
        for where, why in entries:
            known = found.infos.get(where)
            values = _values(replace(known, name=where) if known else ScanSource("", where, ()))
            values |= {"slices": float(len(known.files)) if known else None, "action": what, "why": why}
            rows.append(SeriesRow(values))
    return sorted(rows, key=lambda row: str(row.values["name"]))


def _values(source: ScanSource) -> dict[str, Value]:
    info = source.info
    found: dict[str, Value] = dict.fromkeys((*NUMBERS, *TEXTS))
    found |= {"name": source.name, "uid": source.uid or None, "year": float(info.year) or None}
    found |= {"slice_thickness": info.thickness_mm or None, "kvp": info.kvp or None}
    for column in TEXTS[2:-2]:
        found[column] = getattr(info, column) or None
    return found


def _geometry(grid: Grid) -> dict[str, Value]:
    x, y, z = grid.spacing
    columns, rows, slices = grid.size
    return {
        "spacing_z": round(z, 4), "spacing_y": round(y, 4), "spacing_x": round(x, 4), "slices": float(slices),
        "rows": float(rows), "columns": float(columns),
    }  # fmt: skip


def _plain(value: Value) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def table_text(rows: Sequence[SeriesRow]) -> str:
    """The table for people: the columns in `SHOWN`, aligned."""
    cells = [list(SHOWN)] + [[_cell(row.values[column]) for column in SHOWN] for row in rows]
    widths = [min(WIDEST, max(len(line[i]) for line in cells)) for i in range(len(SHOWN))]
    lines = (
        "  ".join(
            [text[:WIDEST].ljust(width) for text, width in zip(line[:-1], widths, strict=False)] + line[-1:]
        )
        for line in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: Value) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else value


def table_json(rows: Sequence[SeriesRow]) -> str:
    """All columns as a JSON list of objects."""
    return json.dumps(
        [{column: _plain(value) for column, value in row.values.items()} for row in rows], indent=1
    )


def table_csv(rows: Sequence[SeriesRow]) -> str:
    """All columns as CSV with a head; what headers do not say is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*TEXTS, *NUMBERS))
    for row in rows:
        values = [_plain(row.values[column]) for column in (*TEXTS, *NUMBERS)]
        writer.writerow("" if value is None else value for value in values)
    return text.getvalue()


def choose(
    found: ScanListing, action: Callable[[Grid], str], select: str = "", one_per_study: str = ""
) -> ScanListing:
    """The listing with only those scans that `select` is true of, and with `one_per_study` "thinnest" one of each study.

    The others are left out, with the reason. Raises UserError for an expression that is none, or when no scan remains.
    """
    wanted = parse_expression(select) if select else lambda values: True
    rows = [row for row in series_rows(found, action) if row.source is not None]
    # By uid: scans of several patients under one SeriesInstanceUID may share their name.
    left_out = {
        row.values["uid"]: f"not selected (--select {select!r})" for row in rows if not wanted(row.values)
    }
    if one_per_study:
        best: dict[Value, SeriesRow] = {}
        for row in (row for row in rows if row.values["uid"] not in left_out):
            study = row.values["study"] or row.values["uid"]
            other = best.get(study)
            if other is None or _thickness(row) < _thickness(other):
                best[study] = row
        kept = {row.values["uid"] for row in best.values()}
        for row in rows:
            if row.values["uid"] not in kept:
                left_out.setdefault(
                    row.values["uid"], "another series of its study is thinner (--one-per-study)"
                )
    sources = [source for source in found.sources if source.uid not in left_out]
    for source in found.sources:
        if source.uid in left_out:
            found.left_out.append((source.name, left_out[source.uid]))
            found.infos[source.name] = source
    used, every = ({file for one in some for file in one.files} for some in (sources, found.sources))
    if every - used:  # a file of several frames may hold several scans
        found.passed_over["files of scans that were not chosen"] += len(every - used)
    if not sources:
        raise UserError(
            f"--select {select!r}: none of {len(found.sources)} scans is chosen; look at them with --list"
        )
    found.sources = sources
    found.left_out.sort()
    return found


def _thickness(row: SeriesRow) -> tuple[bool, float, float, str]:
    """Sorts usable scans first, then by slice distance, thickness, and name."""
    spacing, thick = row.values["spacing_z"], row.values["slice_thickness"]
    far = float("inf")
    return (
        row.values["action"] == "refuse",
        spacing if isinstance(spacing, float) else far,
        thick if isinstance(thick, float) else far,
        str(row.values["name"]),
    )


TOKEN = re.compile(r"\s*(?:(<=|>=|==|!=|[<>~()])|('[^']*'|\"[^\"]*\")|(\d+\.?\d*|\.\d+)|([A-Za-z_]\w*))")
COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
Test = Callable[[dict[str, Value]], bool]
DEEPEST = 50  # brackets


def parse_expression(text: str) -> Test:
    """A function that says whether the expression is true of a row's values. Raises UserError."""
    return _Parser(text).parse()


class _Parser:
    """Recursive descent over the tokens of one expression; nothing is evaluated as Python."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = list(self._split())
        self.at = self.depth = 0

    def _split(self) -> Iterator[tuple[str, str]]:
        at = 0
        while self.text[at:].strip():
            match = TOKEN.match(self.text, at)
            if match is None:
                raise self.error(f"{self.text[at:].strip()[:20]!r} is no part of an expression")
            kind = ("operator", "text", "number", "word")[
                next(i for i in range(4) if match[i + 1] is not None)
            ]
            yield kind, match[match.lastindex or 0]
            at = match.end()

    def error(self, why: str) -> UserError:
        columns = ", ".join(sorted((*NUMBERS, *TEXTS)))
        return UserError(
            f'--select {self.text!r}: {why}; an expression over {columns}, such as "slice_thickness <= 3"'
        )

    def parse(self) -> Test:
        found = self._either()
        if self.at < len(self.tokens):
            raise self.error(f"{self.tokens[self.at][1]!r} is not expected there")
        return found

    def _peek(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    def _take(self) -> tuple[str, str]:
        if self.at == len(self.tokens):
            raise self.error("it ends too early")
        self.at += 1
        return self.tokens[self.at - 1]

    def _either(self) -> Test:
        parts = [self._all()]
        while self._peek() == "or":
            self.at += 1
            parts.append(self._all())
        return parts[0] if len(parts) == 1 else lambda values: any(part(values) for part in parts)

    def _all(self) -> Test:
        parts = [self._one()]
        while self._peek() == "and":
            self.at += 1
            parts.append(self._one())
        return parts[0] if len(parts) == 1 else lambda values: all(part(values) for part in parts)

    def _one(self) -> Test:
        self.depth += 1
        if self.depth > DEEPEST:
            raise self.error(f"brackets and `not` more than {DEEPEST} deep")
        try:
            return self._negated_or_bracketed()
        finally:
            self.depth -= 1

    def _negated_or_bracketed(self) -> Test:
        if self._peek() == "not":
            self.at += 1
            inner = self._one()
            return lambda values: not inner(values)
        if self._peek() == "(":
            self.at += 1
            inner = self._either()
            if self._take()[1] != ")":
                raise self.error("a bracket is not closed")
            return inner
        return self._comparison()

    def _comparison(self) -> Test:
        kind, column = self._take()
        if kind != "word" or column not in (*NUMBERS, *TEXTS):
            raise self.error(f"{column!r} is no column")
        sign = self._peek()
        if sign not in COMPARE and sign != "~":
            return lambda values: values[column] is not None
        self.at += 1
        kind, text = self._take()
        if kind != ("number" if column in NUMBERS else "text") or (sign == "~" and column in NUMBERS):
            form = "a number" if column in NUMBERS else "text in quotes"
            raise self.error(f"{column} {sign} {text}: {column} is compared with {form}")
        if sign == "~":
            try:
                pattern = re.compile(text[1:-1], re.IGNORECASE)
            except re.error as error:
                raise self.error(f"{text} is no regular expression ({error})") from error
            return lambda values: values[column] is not None and bool(pattern.search(str(values[column])))
        if column in TEXTS and sign not in ("==", "!="):
            raise self.error(f"{column} {sign} {text}: text compares with ==, != and ~")
        compare, limit = COMPARE[sign], float(text) if column in NUMBERS else text[1:-1]
        return lambda values: values[column] is not None and compare(values[column], limit)
