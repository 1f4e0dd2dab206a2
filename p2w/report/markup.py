"""HTML pages from untrusted text: everything that is not `Markup` is escaped."""

import base64
import hashlib
import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).parent  # of style.css and the scripts

DASH, TIMES = "\u2013", " \u00d7 "


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


def table(head: Sequence[object], rows: Iterable[Sequence[object]], kind: str = "") -> Markup:
    """A table that scrolls on a narrow screen; without `head`, the first column has the titles of the rows."""
    body = [
        tag("tr", *(tag("th" if not head and not at else "td", cell) for at, cell in enumerate(row)))
        for row in rows
    ]
    top = [tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head)))] if head else []
    return tag("div", tag("table", *top, tag("tbody", *body)), class_=f"scroll {kind}".strip())


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
