"""Tables that name samples: CSV files of candidates and of splits, read with a line number in every complaint."""

import csv
import math
import os
from collections.abc import Iterator, Sequence

from crc32c import crc32c

from p2w.errors import UserError


def read(path: str, columns: Sequence[Sequence[str]]) -> Iterator[tuple[int, list[str]]]:
    """Line number and the values of the columns asked for; each column by any of its names, in any case.

    A column whose names end with "" may be lacking: its values are "" then. Raises UserError.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file)
            head = [name.strip().lower() for name in next(rows, [])]
            at = [_column(path, head, names) for names in columns]
            for row in rows:
                if not any(value.strip() for value in row):
                    continue
                if len(row) != len(head):
                    raise UserError(
                        f"{path}, line {rows.line_num}: {len(row)} values, its head has {len(head)}"
                    )
                yield rows.line_num, [row[i].strip() if i >= 0 else "" for i in at]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: is no CSV table ({error})") from error


def _column(path: str, head: list[str], names: Sequence[str]) -> int:
    found = [head.index(name.lower()) for name in names if name.lower() in head]
    if found:
        return found[0]
    if "" in names:
        return -1
    raise UserError(f"{path}: no column {names[0]} in its head ({', '.join(head)[:200]})")


def number(path: str, line: int, name: str, text: str) -> float:
    """A finite number. Raises UserError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{path}, line {line}: {name} {text!r} is no number")
    return value


def label(path: str, line: int, text: str) -> int:
    """0 or 1. Raises UserError."""
    if text not in ("0", "1", "0.0", "1.0"):
        raise UserError(f"{path}, line {line}: class {text!r}: 0 or 1")
    return int(text[0])


def checksum(path: str) -> str:
    """CRC-32C of a file, as manifests spell it. Raises UserError."""
    crc = 0
    try:
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                crc = crc32c(piece, crc)
    except OSError as error:
        raise UserError(f"{os.fspath(path)}: cannot be read ({error.strerror})") from error
    return f"crc32c:{crc:08x}"
