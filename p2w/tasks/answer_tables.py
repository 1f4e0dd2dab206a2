"""Answers to learn about a scan, or about a point in it: columns of a CSV or TSV table. No torch.

    scan,patient,label             --answer class: one of several classes, as text or whole numbers
    scan,emphysema,nodule          --answer labels: columns of 0, 1, or nothing where it is unknown
    scan,age                       --answer value: numbers, or nothing where it is unknown

An empty cell is unknown: a row without any value is left out and counted, other unknown values take no part in loss and
metrics. `nan`, `NA` and the like are refused, since they are as often a mistake as a missing value.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from p2w.errors import UserError
from p2w.tasks import source_files
from p2w.tasks.label_values import check_class_names
from p2w.tasks.task import MOST_LABEL, MULTI_CLASS, MULTI_LABEL, REGRESSION, Triple

KINDS = {"class": MULTI_CLASS, "labels": MULTI_LABEL, "value": REGRESSION}
SCAN = ("scan", "series", "seriesuid", "path", "image", "file")
NOT_KNOWN = ("nan", "na", "n/a", "none", "null", "inf", "-inf", "+inf", "infinity", "-infinity", "?")
WHOLE: Triple = (math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class AnswerRow:
    """One row: which scan, where in it (LPS mm, `WHOLE` for all of it), and the answer."""

    line: int
    scan: str
    patient: str  # "": the table does not say
    split: str
    fold: int
    xyz: Triple
    label: int  # -1: there are targets instead
    targets: tuple[float, ...]


@dataclass
class AnswerTable:
    """The rows with an answer, the names of the classes or columns, and how many rows have no answer."""

    kind: str
    classes: tuple[str, ...] = ()
    rows: list[AnswerRow] = field(default_factory=list)
    unanswered: int = 0


def read_answers(
    path: str, answer: str, columns: Sequence[str], label_names: Sequence[str], points: bool
) -> AnswerTable:
    """Read a table; `points`: with columns x, y, z. `label_names`: NAME=TEXT of classes, in their order; () for all found.

    Raises UserError, with file and line, for whatever breaks the rules above.
    """
    check_class_names("--answer-columns", columns)
    if answer == "class" and len(columns) != 1:
        raise UserError(
            f"--answer-columns {' '.join(columns)}: --answer class takes one column; several: --answer labels"
        )
    wanted = [SCAN, ("patient", "patientid", ""), ("split", ""), ("fold", "")]
    wanted += [(axis, f"coord{axis}") for axis in "xyz"] if points else []
    read = list(source_files.read_csv(path, [*wanted, *((column,) for column in columns)]))
    if not read:
        raise UserError(f"{path}: has no row")
    head = len(wanted)
    for line, values in read:
        for column, text in zip(columns, values[head:], strict=True):
            if text.lower() in NOT_KNOWN:
                raise UserError(
                    f"{path}, line {line}: {column} {text!r} is no answer: leave the cell empty where it is unknown"
                )
    if not any(text for _, values in read for text in values[head:]):
        raise UserError(f"{path}: no row has a value of {', '.join(columns)}")
    table = AnswerTable(KINDS[answer], tuple(columns))
    if answer == "class":
        labels = [(line, values[head]) for line, values in read]
        classes = _declared(label_names) if label_names else _found_classes(path, labels)
        table.classes = tuple(classes.values())
        numbers = {text: number for number, text in enumerate(classes)}
        _check_classes(path, labels, classes)
    for line, values in read:
        given = values[head:]
        if not any(given):
            table.unanswered += 1
            continue
        label, targets = -1, tuple[float, ...]()
        if answer == "class":
            label = numbers[given[0]]
        else:
            targets = tuple(
                _number(path, line, c, text, answer) for c, text in zip(columns, given, strict=True)
            )
        table.rows.append(_row(path, line, values, points, label, targets))
    if answer != "class":
        _check_columns(path, table, answer)
    _check_patients(path, table.rows)
    return table


def _row(
    path: str, line: int, values: Sequence[str], points: bool, label: int, targets: tuple[float, ...]
) -> AnswerRow:
    scan, patient, split, fold = values[:4]
    if not scan:
        raise UserError(f"{path}, line {line}: no scan")
    source_files.parse_split(path, line, split)
    xyz = WHOLE
    if points:
        x, y, z = (
            source_files.parse_number(path, line, axis, text)
            for axis, text in zip("xyz", values[4:7], strict=True)
        )
        xyz = (x, y, z)
    return AnswerRow(
        line, scan, patient, split, source_files.parse_fold(path, line, fold), xyz, label, targets
    )


def _number(path: str, line: int, column: str, text: str, answer: str) -> float:
    if not text:
        return math.nan
    value = source_files.parse_number(path, line, column, text)
    if answer == "labels" and value not in (0.0, 1.0):
        raise UserError(f"{path}, line {line}: {column} {text!r}: 0, 1, or nothing where it is unknown")
    return value


def _declared(label_names: Sequence[str]) -> dict[str, str]:
    """Text of the table -> name of the class, in the order that --label-names declares."""
    classes: dict[str, str] = {}
    for text in label_names:
        name, equals, own = text.rpartition("=")
        if not equals or not own.strip() or own.strip() in classes:
            raise UserError(f"--label-names {text!r}: NAME=TEXT, such as malignant=1, each text once")
        classes[own.strip()] = name.strip()
    check_class_names("--label-names", list(classes.values()))
    return classes


def _found_classes(path: str, rows: Sequence[tuple[int, str]]) -> dict[str, str]:
    """The classes of a table that declares none: its texts in alphabetical order, or whole numbers in theirs.

    Raises UserError for numbers with gaps, which are as often a slip as a class without a case, and for fractions.
    """
    texts = sorted({text for _, text in rows if text})
    ways: dict[object, str] = {}
    for text in texts:
        other = ways.setdefault(_meaning(text), text)
        if other != text:
            raise UserError(f"{path}: writes one class in two ways ({other}, {text}): choose one")
    if all(text.lstrip("+-").isdecimal() for text in texts) and texts:
        numbers = sorted({int(text) for text in texts})
        if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            raise UserError(
                f"{path}: classes {', '.join(map(str, numbers))[:80]} are not contiguous: correct the table, name "
                "them all with --label-names, or take --answer value for numbers"
            )
        return {text: text for text in sorted(texts, key=int)}
    for line, text in rows:
        try:
            fraction = bool(text) and not float(text).is_integer()
        except ValueError:
            continue
        if fraction:
            raise UserError(
                f"{path}, line {line}: class {text!r} is a fraction: for numbers take --answer value"
            )
    check_class_names(path, texts)
    return {text: text for text in texts}


def _meaning(text: str) -> object:
    """What a text of a class says: a number, or words in any case; 1, 01 and 1.0 say the same."""
    try:
        return float(text)
    except ValueError:
        return " ".join(text.casefold().split())


def _check_classes(path: str, rows: Sequence[tuple[int, str]], classes: dict[str, str]) -> None:
    """Raise UserError unless the classes found are those declared, two or more, and few enough."""
    for line, text in rows:
        if text and text not in classes:
            named = ", ".join(f"{name}={own}" for own, name in classes.items())
            raise UserError(f"{path}, line {line}: class {text!r} is not declared: {named[:120]}")
    present = {text for _, text in rows}
    lacks = [name for text, name in classes.items() if text not in present]
    if lacks:
        raise UserError(f"{path}: class {lacks[0]} has no case; declare only classes that the table holds")
    if not 2 <= len(classes) <= MOST_LABEL:
        raise UserError(f"{path}: {len(classes)} class(es): from 2 to {MOST_LABEL} can be told apart")


def _check_columns(path: str, table: AnswerTable, answer: str) -> None:
    """Raise UserError for a column that has the same value for all scans, or none."""
    for number, column in enumerate(table.classes):
        known = {row.targets[number] for row in table.rows if not math.isnan(row.targets[number])}
        if len(known) < 2:
            said = f"is {known.pop():g} wherever it is known" if known else "has no value"
            need = "both 0 and 1 are needed" if answer == "labels" else "there is nothing to learn"
            raise UserError(f"{path}: column {column} {said}: {need}")


def _check_patients(path: str, rows: Sequence[AnswerRow]) -> None:
    """Raise UserError where a scan is of two patients, or a patient in two splits or folds."""
    of: dict[str, AnswerRow] = {}
    split_of: dict[str, AnswerRow] = {}
    for row in rows:
        first = of.setdefault(row.scan, row)
        if first.patient != row.patient:
            raise UserError(
                f"{path}, line {row.line}: scan {row.scan} is of patient {row.patient or '(none)'}, in line {first.line} of "
                f"{first.patient or '(none)'}: a scan has one"
            )
        before = split_of.setdefault(row.patient or row.scan, row)
        if (before.split, before.fold) != (row.split, row.fold):
            raise UserError(
                f"{path}, line {row.line}: patient {row.patient or row.scan} is in another split or fold than in line "
                f"{before.line}: a patient has one"
            )


def refuse_two_rows(path: str, rows: Sequence[AnswerRow]) -> None:
    """Raise UserError where two rows are of one scan; for tables of whole scans."""
    lines: dict[str, int] = {}
    for row in rows:
        if row.scan in lines:
            raise UserError(
                f"{path}, line {row.line}: scan {row.scan} is in line {lines[row.scan]} too: leave one of them out"
            )
        lines[row.scan] = row.line
