"""HTML from untrusted text: everything that is not `Markup` is escaped."""

import html
import math
from collections.abc import Iterable, Sequence

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
