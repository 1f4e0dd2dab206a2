"""A table for the terminal, for a spreadsheet, and for a paper."""

import csv
import io
import re
from dataclasses import asdict

from p2w.tables.table import BEST, EQUIVALENT, Cell, Claim, Number, Table

DASH = "\u2013"


def amount(mean: Number, sd: Number) -> str:
    """`98.67±0.23`; without a deviation the mean alone, without a mean a dash."""
    if mean is None:
        return DASH
    return f"{mean:.2f}" + ("" if sd is None else f"±{sd:.2f}")


def probability(p: Number) -> str:
    """`p = 0.012`, `p < 0.001`; a dash where there is none."""
    if p is None:
        return DASH
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def sizes(claim: Claim) -> str:
    """`10 pairs`, or the trials of both: `10 and 7`."""
    return f"{claim.pairs[0]} pairs" if len(claim.pairs) == 1 else " and ".join(map(str, claim.pairs))


def sentence(claim: Claim, table: Table) -> str:
    """One comparison in words."""
    title = next((column.title for column in table.columns if column.task == claim.task), claim.task)
    where = "" if claim.source == "here" else "the paper's numbers: "
    why = f", {claim.why}" if claim.why else ""
    apart = DASH if claim.difference is None else f"{claim.difference:+.2f}"
    return (
        f"{title}: {where}{claim.ours} {apart} against {claim.other}, {probability(claim.p)}, over the tasks by Holm "
        f"{probability(claim.p_holm)} ({claim.test}, n = {sizes(claim)}{why})"
    )


def terminal(table: Table) -> None:
    """Print it: the paper's number below each of ours, claims and notes under it."""
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
    for line in (*(sentence(claim, table) for claim in table.claims), *table.notes):
        console.print(line, markup=False, soft_wrap=True)


def csv_text(table: Table) -> str:
    """One line a cell, with every number unrounded; lists of trials are joined by blanks."""
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
    """Text as LaTeX takes it; two hyphens stay two, characters that no pdflatex knows become question marks."""
    pieces = ("".join(SPECIAL.get(letter, letter) for letter in piece) for piece in text.split("--"))
    made = "-{}-".join(pieces)
    return re.sub(r"[^\x20-\x7e\u00a0-\u017f]", "?", made)


def latex(table: Table) -> str:
    """A `table` for booktabs: ours above, the paper's below, notes under it. Input it from a document of yours."""
    width, caption = len(table.columns) + 1, table.title.partition(": ")[2].capitalize() or table.title
    head = " & ".join(["", *(tex(column.head) for column in table.columns)])
    blocks = [rf"\multicolumn{{{width}}}{{l}}{{\emph{{Here}}}} \\"]
    blocks += [_latex_row(table, row, here=True) for row in table.rows if any(_has(table, row, here=True))]
    blocks += [r"\midrule", rf"\multicolumn{{{width}}}{{l}}{{\emph{{Paper}}}} \\"]
    blocks += [_latex_row(table, row, here=False) for row in table.rows if any(_has(table, row, here=False))]
    body = "\n".join(blocks)
    said = " ".join(
        tex(line) for line in (*(sentence(one, table) + "." for one in table.claims), *table.notes)
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
