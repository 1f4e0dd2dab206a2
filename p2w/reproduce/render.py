"""Renders tables for the terminal, as CSV and as LaTeX, and tables.html with all tables and figures."""

import base64
import csv
import io
import re
import time
from dataclasses import asdict
from pathlib import Path

from p2w import __version__
from p2w.errors import UserError
from p2w.report.markup import Markup, document, join_markup, safe, table, tag
from p2w.reproduce import fig3
from p2w.reproduce.table import BEST, EQUIVALENT, Cell, Claim, Number, Table, load_table

DASH = "\u2013"


def amount(mean: Number, sd: Number) -> str:
    """`98.67±0.23`; the mean alone without a deviation, a dash without a mean."""
    if mean is None:
        return DASH
    return f"{mean:.2f}" + ("" if sd is None else f"±{sd:.2f}")


def probability(p: Number) -> str:
    """`p = 0.012` or `p < 0.001`; a dash for None."""
    if p is None:
        return DASH
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def sizes(claim: Claim) -> str:
    """The sample sizes of a comparison as text: `10 pairs`, or `10 and 7` for unpaired trials."""
    return f"{claim.pairs[0]} pairs" if len(claim.pairs) == 1 else " and ".join(map(str, claim.pairs))


def claim_sentence(claim: Claim, table: Table) -> str:
    """A comparison as a sentence."""
    title = next((column.title for column in table.columns if column.task == claim.task), claim.task)
    where = "" if claim.source == "here" else "the paper's numbers: "
    why = f", {claim.why}" if claim.why else ""
    return (
        f"{title}: {where}{claim.ours} {effect(claim)} against {claim.other}, {probability(claim.p_holm)} by Holm over the "
        f"tasks ({claim.test}, n = {sizes(claim)}{why}; by itself {probability(claim.p)})"
    )


def effect(claim: Claim) -> str:
    """The difference with its 95 % interval, where there is one: `+4.42 (0.70 to 8.14)`; a dash without a difference."""
    if claim.difference is None:
        return DASH
    around = "" if claim.low is None or claim.high is None else f" ({claim.low:.2f} to {claim.high:.2f})"
    return f"{claim.difference:+.2f}{around}"


def terminal(table: Table) -> None:
    """Print the table, with the paper's number below each of ours, then claims and notes."""
    from rich.cells import cell_len  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table as Rich  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    console = Console(highlight=False)
    if not console.is_terminal:  # a file has no edge
        console = Console(highlight=False, width=max(160, console.width))
    shown = Rich(title=table.title, title_justify="left", title_style="bold", show_lines=True)
    shown.add_column("", no_wrap=True, min_width=max(map(cell_len, table.rows)))
    for column in table.columns:
        shown.add_column(column.head)
    styles = {BEST: "bold", EQUIVALENT: "underline"}
    ends = {BEST: " *", EQUIVALENT: " ≈"}
    for row in table.rows:
        cells = []
        for column in table.columns:
            one = table.cell(row, column.task)
            text = Text(amount(one.mean, one.sd), style=styles.get(one.mark, "")) + Text(
                ends.get(one.mark, "")
            )
            if one.missing:
                lacks = f"\n{one.missing} trials" if one.planned else f" {one.missing}"
                text += Text(lacks, style="yellow" if one.planned else "dim")
            if one.paper_mean is not None:
                text += Text(
                    f"\npaper {amount(one.paper_mean, one.paper_sd)}{ends.get(one.paper_mark, '')}",
                    style="dim",
                )
            cells.append(text)
        shown.add_row(Text(row), *cells)
    console.print(shown)
    for line in (*(claim_sentence(claim, table) for claim in table.claims), *table.notes):
        console.print(line, markup=False, soft_wrap=True)


def table_csv(table: Table) -> str:
    """CSV with one line for each cell and unrounded numbers; lists of trials are joined by spaces."""
    file = io.StringIO()
    names = [
        "table",
        "metric",
        "fraction",
        *(key for key in asdict(table.cells[0]) if key != "folder"),
        "folder",
    ]
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    of = {column.task: column for column in table.columns}
    for one in table.cells:
        line = {key: " ".join(map(str, v)) if isinstance(v, list) else v for key, v in asdict(one).items()}
        column = of[one.task]
        writer.writerow({"table": table.name, "metric": column.metric, "fraction": column.fraction, **line})
    return file.getvalue()


SPECIAL = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "≈": r"$\approx$",
    "≥": r"$\geq$",
    DASH: "--", "[": "{[}", "]": "{]}", ">": r"$>$", "<": r"$<$", "…": r"\dots{}",
}  # fmt: skip


def tex(text: str) -> str:
    """Text escaped for LaTeX; two hyphens stay two, and characters that pdflatex lacks become question marks."""
    pieces = ("".join(SPECIAL.get(letter, letter) for letter in piece) for piece in text.split("--"))
    made = "-{}-".join(pieces)
    return re.sub(r"[^\x20-\x7e\u00a0-\u017f]", "?", made)


def latex(table: Table) -> str:
    """A LaTeX `table` for booktabs, to be included in a document: our rows, the paper's rows, notes."""
    width, caption = len(table.columns) + 1, table.title.partition(": ")[2].capitalize() or table.title
    head = " & ".join(["", *(tex(column.head) for column in table.columns)])
    blocks = [rf"\multicolumn{{{width}}}{{l}}{{\emph{{Here}}}} \\"]
    blocks += [_latex_row(table, row, here=True) for row in table.rows if any(_has(table, row, here=True))]
    blocks += [r"\midrule", rf"\multicolumn{{{width}}}{{l}}{{\emph{{Paper}}}} \\"]
    blocks += [_latex_row(table, row, here=False) for row in table.rows if any(_has(table, row, here=False))]
    body = "\n".join(blocks)
    said = " ".join(
        tex(line) for line in (*(claim_sentence(one, table) + "." for one in table.claims), *table.notes)
    )
    return rf"""% p2w {table.name}; needs \usepackage{{booktabs}}
\begin{{table}}
\centering\small
\caption{{{tex(caption)}}}
\label{{tab:{table.name}}}
\begin{{tabular}}{{l{"r" * len(table.columns)}}}
\toprule
{head} \\
\midrule
{body}
\bottomrule
\end{{tabular}}
\par\smallskip\footnotesize\raggedright
{said}
\end{{table}}
"""


def _has(table: Table, row: str, here: bool) -> list[bool]:
    cells = (table.cell(row, column.task) for column in table.columns)
    return [bool(one.planned) if here else one.paper_mean is not None for one in cells]


def _latex_row(table: Table, row: str, here: bool) -> str:
    cells = (_latex_cell(table.cell(row, column.task), here) for column in table.columns)
    return " & ".join([tex(row), *cells]) + r" \\"


def _latex_cell(one: Cell, here: bool) -> str:
    mean, sd, mark = (one.mean, one.sd, one.mark) if here else (one.paper_mean, one.paper_sd, one.paper_mark)
    text = tex(amount(mean, sd))
    text = {BEST: rf"\textbf{{{text}}}", EQUIVALENT: rf"\underline{{{text}}}"}.get(mark, text)
    return text + (rf" \tiny({one.missing})" if here and one.missing and one.planned else "")


NAME = "tables.html"
TABLES = ("table1", "table2")
LARGEST_PICTURE = 3 << 20  # bytes
STYLE = """
td .paper { display: block; color: var(--soft); font-size: .92em; }
td .lacks { color: var(--orange); }
td b { font-weight: 700; } u { text-decoration-thickness: 1.5px; text-underline-offset: 2px; }
td, th { white-space: nowrap; } td.wide { white-space: normal; overflow-wrap: anywhere; min-width: 18ch; }
"""


def render_tables(folder: Path) -> tuple[str, list[str]]:
    """The page of the tables and figures in `folder`, and one line for each damaged file, which is left out."""
    sections, problems = [], []
    for name in (*TABLES, "fig3"):
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        try:
            sections.append(_figure(path) if name == "fig3" else _section(load_table(path)))
        except UserError as error:
            problems.append(str(error))
    head = tag("header", tag("h1", "Target tasks"), tag("p", "With the numbers of the paper, in percent."))
    foot = tag("p", f"Written {time.strftime('%Y-%m-%d %H:%M %Z')} by p2w {__version__}.", class_="note")
    return document("Target tasks", join_markup((head, *sections, foot)), STYLE), problems


def _section(one: Table) -> Markup:
    """A table, the claims, notes, and the trials of each number."""
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
    """The claims, one row for each task; the paper's numbers below ours."""
    titles = {column.task: column.title for column in one.columns}
    rows = [
        (
            titles[claim.task], "here" if claim.source == "here" else "the paper's numbers", claim.other,
            effect(claim), probability(claim.p_holm), probability(claim.p), claim.test, sizes(claim), claim.why,
        )
        for claim in one.claims
    ]  # fmt: skip
    names = (
        "task", "of", "against", "difference (95 %)", "Holm over the tasks", "by itself", "test", "n", "",
    )  # fmt: skip
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
    """Fig. 3 from its JSON file and the PNG next to it."""
    figure = fig3.load_fig3(path)
    try:
        data = path.with_suffix(".png").read_bytes()
    except OSError as error:
        raise UserError(f"{path.with_suffix('.png')}: {error.strerror}; make it again: p2w fig3") from error
    if not data.startswith(b"\x89PNG\r\n\x1a\n") or len(data) > LARGEST_PICTURE:
        raise UserError(f"{path.with_suffix('.png')}: no PNG, or too large; make it again: p2w fig3")
    image = f'<img alt="{safe(figure.title)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
    lines = [*(tag("li", fig3.fig3_sentence(panel)) for panel in figure.panels)]
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
