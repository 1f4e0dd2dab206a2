"""tables.html: every table and figure of a folder on one page that needs no network, in the style of a run's report."""

import base64
import time
from pathlib import Path

from p2w import __version__
from p2w.analysis.report.markup import Markup, join, safe, table, tag
from p2w.analysis.report.page import HERE
from p2w.errors import UserError
from p2w.tables import figure3
from p2w.tables.formats import DASH, amount, probability, sizes
from p2w.tables.table import BEST, EQUIVALENT, Cell, Table, load

NAME = "tables.html"
TABLES = ("table1", "table2")
LARGEST_PICTURE = 3 << 20  # bytes
STYLE = """
td .paper { display: block; color: var(--soft); font-size: .92em; }
td .lacks { color: var(--orange); }
td b { font-weight: 700; } u { text-decoration-thickness: 1.5px; text-underline-offset: 2px; }
td, th { white-space: nowrap; } td.wide { white-space: normal; overflow-wrap: anywhere; min-width: 18ch; }
"""


def render(folder: Path) -> tuple[str, list[str]]:
    """The page of what lies in `folder`, and one line for each file that is damaged and so not on it."""
    sections, problems = [], []
    for name in (*TABLES, "fig3"):
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        try:
            sections.append(_figure(path) if name == "fig3" else _section(load(path)))
        except UserError as error:
            problems.append(str(error))
    head = tag("header", tag("h1", "Target tasks"), tag("p", "Beside the numbers of the paper, in percent."))
    foot = tag("p", f"Written {time.strftime('%Y-%m-%d %H:%M %Z')} by p2w {__version__}.", class_="note")
    return _document(join((head, *sections, foot))), problems


def _document(body: Markup) -> str:
    """Head and foot; the policy lets nothing run and nothing be fetched, whatever the files hold."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{safe("Target tasks")} · p2w</title>
<style>
{(HERE / "style.css").read_text()}{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def _section(one: Table) -> Markup:
    """A table, what is claimed of ours, notes, and what lies behind each number."""
    head = ("", *(column.head for column in one.columns))
    rows = [(row, *(_cell(one.cell(row, column.task)) for column in one.columns)) for row in one.rows]
    titles = {column.task: column.title for column in one.columns}
    behind = [
        (
            cell.row, titles[cell.task], f"{cell.n} of {cell.planned}", f"{probability(cell.p)}",
            f"{probability(cell.p_used)}", cell.test, " ".join(f"{value:.2f}" for value in cell.values), cell.folder,
        )
        for cell in one.cells if cell.planned
    ]  # fmt: skip
    names = ("row", "task", "trials", "against the best", "corrected", "test", "values", "folder")
    parts = [tag("h2", one.title), table(head, rows)]
    if one.claims:
        parts += [tag("h3", f"{one.claims[0].ours} against the others"), _claims(one)]
    parts.append(tag("ul", *(tag("li", note) for note in one.notes), class_="note"))
    if behind:
        parts.append(tag("details", tag("summary", "Trials behind the numbers"), table(names, behind)))
    return tag("section", *parts)


def _claims(one: Table) -> Markup:
    """What is claimed of ours, a row a task; the paper's numbers below ours."""
    titles = {column.task: column.title for column in one.columns}
    rows = [
        (
            titles[claim.task], "here" if claim.source == "here" else "the paper's numbers", claim.other,
            DASH if claim.difference is None else f"{claim.difference:+.2f}", probability(claim.p),
            probability(claim.p_holm), claim.test, sizes(claim), claim.why,
        )
        for claim in one.claims
    ]  # fmt: skip
    names = ("task", "of", "against", "difference", "by itself", "Holm over the tasks", "test", "n", "")
    return table(names, rows)


def _cell(one: Cell) -> Markup:
    text: object = amount(one.mean, one.sd)
    text = {BEST: tag("b", text), EQUIVALENT: tag("u", text)}.get(one.mark, text)
    lacks = tag("span", f" {one.missing}", class_="lacks" if one.planned else "note") if one.missing else ""
    if one.paper_mean is None:
        return tag("div", text, lacks)
    printed: object = amount(one.paper_mean, one.paper_sd)
    printed = {BEST: tag("b", printed), EQUIVALENT: tag("u", printed)}.get(one.paper_mark, printed)
    return tag("div", text, lacks, tag("span", "paper ", printed, class_="paper"))


def _figure(path: Path) -> Markup:
    """Fig. 3 with its picture, which lies beside its numbers."""
    figure = figure3.load(path)
    try:
        data = path.with_suffix(".png").read_bytes()
    except OSError as error:
        raise UserError(f"{path.with_suffix('.png')}: {error.strerror}; make it again: p2w fig3") from error
    if not data.startswith(b"\x89PNG\r\n\x1a\n") or len(data) > LARGEST_PICTURE:
        raise UserError(f"{path.with_suffix('.png')}: no PNG, or too large; make it again: p2w fig3")
    image = f'<img alt="{safe(figure.title)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
    lines = [*(tag("li", figure3.sentence(panel)) for panel in figure.panels)]
    names = ("task", "step", "1 \u2212 validation MSE", "mean score", "s.d.", "fine-tunings", "folder")
    rows = [
        (panel.title, point.step, f"{point.quality:.5f}", f"{point.mean:.2f}", amount(point.sd, None),
         f"{point.n} of {point.planned}", point.folder)
        for panel in figure.panels for point in panel.points
    ]  # fmt: skip
    return tag(
        "section",
        tag("h2", figure.title),
        tag("div", tag("figure", Markup(image)), class_="pictures"),
        tag("ul", *lines),
        tag("ul", *(tag("li", note) for note in figure.notes), class_="note"),
        tag("details", tag("summary", "Checkpoints behind the figure"), table(names, rows)),
    )
