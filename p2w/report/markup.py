"""HTML pages from untrusted text: everything that is not `Markup` is escaped.

Functions and not jinja2's templates, which torch brings along: most of a page is computed (which rows, captions and numbers
there are), types are checked here, and a template would only move the tags, which are the lesser part, to another language.
"""

import base64
import hashlib
import html
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).parent  # of style.css and the scripts

DASH, TIMES, NO_BREAK = "\u2013", " \u00d7 ", "\u00a0"
UNITS = re.compile(
    r"(?<=[\d)]) (?=(?:%|s|ms|min|h|d|mm|HU|KiB|MiB|GiB|M parameters|voxels|samples|epochs|steps)\b|%)"
)


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def safe(value: object) -> Markup:
    """A value as HTML; escaped unless it is Markup."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def tag(name: str, /, *inside: object, **attributes: object) -> Markup:
    """`<name attributes>inside</name>`; a trailing underscore of an attribute's name is dropped, others become dashes."""
    spelled = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
    )
    return Markup(f"<{name}{spelled}>{''.join(map(safe, inside))}</{name}>")


def join_markup(parts: Iterable[object]) -> Markup:
    """The parts one after the other."""
    return Markup("\n".join(map(safe, parts)))


def keep_units(text: str) -> str:
    """The text with every number and its unit on one line, by no-break spaces. Not for commands, which are copied."""
    return UNITS.sub(NO_BREAK, text)


def command_lines(text: str) -> Markup:
    """A block of commands that a narrow screen breaks between words, never inside `--run-dir`; copied, it is `text`."""
    lines = [" ".join(tag("span", word) for word in line.split(" ")) for line in text.split("\n")]
    return tag("pre", Markup("\n".join(lines)), class_="command")


def table(
    head: Sequence[object], rows: Iterable[Sequence[object]], kind: str = "", label: str = ""
) -> Markup:
    """A table that scrolls on a narrow screen; without `head`, the first column has the titles of the rows.

    One that has a `label` is announced by it, and can be scrolled by the keyboard.
    """

    def cells(row: Sequence[object]) -> list[Markup]:
        return [
            tag("td", cell) if head or at else tag("th", cell, scope="row") for at, cell in enumerate(row)
        ]

    body = [tag("tr", *cells(row)) for row in rows]
    top = [tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head)))] if head else []
    kind = f"scroll {kind}" if head else f"scroll facts {kind}"
    region = {"role": "region", "tabindex": "0", "aria_label": label} if label else {}
    return tag("div", tag("table", *top, tag("tbody", *body)), class_=kind.strip(), **region)


def figure(value: float, digits: int = 4) -> str:
    """A number as text; a dash for NaN."""
    if math.isnan(value):
        return DASH
    if value and (abs(value) < 10**-digits or abs(value) >= 1e6):
        return f"{value:.2e}"
    return f"{value:.{digits}f}"


def several(count: int, one: str, many: str = "") -> str:
    """`1 scan`, `2 scans`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def document(title: str, body: Markup, style: str = "", script: str = "") -> str:
    """An HTML document in the house style. Its policy allows this script alone and no requests, whatever `body` contains."""
    policy, code = "default-src 'none'; img-src data:; style-src 'unsafe-inline'", ""
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy, code = f"{policy}; script-src 'sha256-{digest}'", f"<script>{script}</script>\n"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{safe(title)} · p2w</title>
<style>
{(HERE / "style.css").read_text()}{style}</style>
</head>
<body>
<main>
{body}
</main>
{code}</body>
</html>
"""
