"""The commands `p2w table1`, `p2w table2` and `p2w fig3`: options, reading of runs, writing of files."""

import io
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from p2w.analysis.plots import BLUE, GREY, ORANGE, new_figure
from p2w.errors import UserError
from p2w.files import write_atomic
from p2w.finetune.results import FineTuningResult, collect
from p2w.reproduce import paper_numbers, render
from p2w.reproduce.fig3 import Figure3, Panel, build_fig3, fig3_csv, fig3_sentence, fig3_to_json
from p2w.reproduce.render import latex, table_csv, terminal
from p2w.reproduce.table import Table, table_to_json
from p2w.reproduce.table_builder import TableChoice, build_table, numbers_by_task, values_by_task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TABLE1_USAGE = """`p2w table1 RUNS`: how starting points do on the five tasks, beside the paper's Table 1.

    p2w table1 runs/table1                          prints it; writes runs/table1/tables/table1.csv, .tex, .json, tables.html
    p2w table1 runs/a runs/b --out tables --fraction 0.1 --against Scratch
    p2w table1 runs/table1 --metric ncs=iou         another metric: auc, iou, mean_iou, dice

RUNS are folders that p2w finetune wrote, or any folders above them. A run stands in the row of its label (--label of p2w
finetune); `random` is the paper's Scratch. Cells that miss trials say how many there are.
"""

TABLE2_USAGE = """`p2w table2 RUNS`: what the scale of the parts and skip connections change, beside the paper's Table 2.

    p2w table2 runs/table2                          prints it; writes runs/table2/tables/table2.csv, .tex, .json, tables.html
    p2w table2 runs/table2 --fraction ncc=0.45 ncs=0.1

A run stands in the row of the scale of parts that its network was pretrained with. `w/ skips`: pretrained with skip
connections, and both encoder and decoder fine-tuned; in all other rows the decoder starts at random. NCC with 45 %, NCS with
10 % of the training data, unless --fraction says otherwise. Networks that started at random have a row of their own.
"""

FIG3_USAGE = """`p2w fig3 RUNS`: does a checkpoint that reconstructs better transfer better? Beside the paper's Fig. 3.

    p2w fig3 runs/fig3                  prints r; writes runs/fig3/tables/fig3.png, .pdf, .csv, .json, tables.html
    p2w fig3 runs/fig3 --fraction ncc=0.45 ncs=0.1

RUNS are folders that p2w finetune wrote from checkpoints of a run (--init RUN@STEP), or any folders above them. Each
is a point of the plot: 1 - validation MSE of the pretraining, and the mean score of its fine-tunings. NCC with 45 %, NCS
with 10 % of the training data, unless --fraction says otherwise.
"""


@dataclass(frozen=True)
class TableOptions:
    """Command line of `p2w table1`, `table2` and `fig3`."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUNS [RUNS ...]")]
    """Folders that p2w finetune wrote, or folders above them."""
    out: Path | None = None
    """Where files are written; default is `tables` in the first of RUNS."""
    metric: tuple[str, ...] = ()
    """Metric to compare: NAME for all tasks, or TASK=NAME …; default is the paper's, else AUC or IoU."""
    fraction: tuple[str, ...] = ()
    """Share of the training data of the runs to use: VALUE for all tasks, or TASK=VALUE …; default is the paper's, else the
    only one among the runs."""
    ours: str = ""
    """The row that is tested against the others; default Parts2Whole, in Table 2 its own range [1/16,1/4]."""
    against: str = ""
    """The row to test it against; default is the best of the others for each task."""
    correction: Annotated[str, tyro.conf.arg(metavar="{holm,none}")] = "holm"
    """Correction for the comparisons with the best of a column: Holm's, or none, as in the paper."""

    @property
    def folder(self) -> Path:
        """The folder to write to."""
        return self.out or self.runs[0] / "tables"

    def choice(self, ours: str) -> TableChoice:
        """The options as a TableChoice, with `ours` as the default row. Raises UserError for wrong values."""
        if self.correction not in ("holm", "none"):
            raise UserError(f"--correction {self.correction}: must be holm or none")
        metric, fraction = (
            values_by_task(self.metric, "--metric"),
            numbers_by_task(self.fraction, "--fraction"),
        )
        return TableChoice(metric, fraction, self.ours or ours, self.against, self.correction == "holm")


def parse_table_options(argv: list[str], name: str, description: str) -> TableOptions:
    """Parse the command line. Raises UserError when no folder is named."""
    options = tyro.cli(TableOptions, args=argv, prog=f"p2w {name}", description=description)
    if not options.runs:
        raise UserError(f"p2w {name}: no folder named; p2w {name} RUNS [RUNS ...]")
    return options


def read_results(options: TableOptions) -> list[FineTuningResult]:
    """Read the runs; problems are printed on stderr. Raises UserError when no run can be read."""
    results, problems = collect(options.runs)
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr, flush=True)
    if not results:
        raise UserError(f"{options.runs[0]}: no fine-tuning can be read, see above; repeat its command")
    return results


def write_table(table: Table, options: TableOptions) -> None:
    """Print the table; write CSV, LaTeX, JSON, and the page of all tables in the folder."""
    terminal(table)
    files = {"csv": table_csv(table), "tex": latex(table), "json": table_to_json(table)}
    save_files(options.folder, {f"{table.name}.{kind}": text for kind, text in files.items()})


def save_files(folder: Path, files: dict[str, str | bytes]) -> None:
    """Write files and the page of all tables, and print their paths. Raises UserError when they cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_atomic(folder / name, data)
        text, problems = render.render_tables(folder)
        write_atomic(folder / render.NAME, text.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(
            f"{folder}: not written ({error.strerror}); name another folder with --out"
        ) from error
    for problem in problems:
        print(f"not on the page: {problem}", file=sys.stderr, flush=True)
    print("\n".join(str(folder / name) for name in (*files, render.NAME)), flush=True)


SAME = {
    "random": "Scratch",
    "medicalnetresnet101": "MedicalNet",
    "medicalnet3dresnet101": "MedicalNet",
    "niftynetdensevnet": "NiftyNet",
    "densevnet": "NiftyNet",
    "genesis": "Models Genesis",
    "modelsgenesis": "Models Genesis",
    "p2w": paper_numbers.OURS,
}


def row_of_init(one: FineTuningResult) -> str:
    """The paper's row for a label, in any spelling; the label itself when the paper has no such row."""
    plain = re.sub(r"[^a-z0-9]", "", one.label.lower())
    known = {re.sub(r"[^a-z0-9]", "", row.lower()): row for row in paper_numbers.TABLE1}
    return SAME.get(plain) or known.get(plain) or one.label


def main_table1(argv: list[str]) -> int:
    """The command `p2w table1`."""
    options = parse_table_options(argv, "table1", TABLE1_USAGE or "")
    results = read_results(options)
    choice = options.choice(paper_numbers.OURS)
    title = "Table 1: starting points on the target tasks"
    table = build_table(
        "table1", title, results, row_of_init, paper_numbers.TABLE1, {}, tuple(paper_numbers.TASKS), choice
    )
    write_table(table, options)
    return 0


PUBLISHED = {parts.label: cells for parts, cells in paper_numbers.TABLE2.items()}


def row_of_parts(one: FineTuningResult) -> str | None:
    """The row of the parts that a network was pretrained with; None when unknown."""
    if one.volume_fraction is None:
        return "Scratch" if one.source == "random" else None
    low, high = one.volume_fraction
    for parts in paper_numbers.TABLE2:  # the exact fraction, whatever the last digit of the setting is
        if math.isclose(low, parts.low, rel_tol=0.01) and math.isclose(high, parts.high, rel_tol=0.01):
            low, high = parts.low, parts.high
    return paper_numbers.Parts(low, high, skips(one)).label


def skips(one: FineTuningResult) -> bool:
    """Whether it was pretrained with skip connections; when unknown, whether the pretrained decoder was used."""
    return one.decoder == "pretrained" if one.skips is None else one.skips


def main_table2(argv: list[str]) -> int:
    """The command `p2w table2`."""
    options = parse_table_options(argv, "table2", TABLE2_USAGE or "")
    results = read_results(options)
    choice = options.choice(paper_numbers.Parts(1 / 16, 1 / 4).label)
    title = "Table 2: scale of the parts, and skip connections"
    table = build_table(
        "table2", title, results, row_of_parts, PUBLISHED, paper_numbers.FRACTIONS,
        tuple(paper_numbers.FRACTIONS), choice,
    )  # fmt: skip
    write_table(table, options)
    return 0


def draw_fig3(found: Figure3) -> "Figure":
    """A panel for each task: checkpoints, their step by colour, error bars of one standard deviation, a regression line."""
    import numpy as np  # noqa: PLC0415

    count = len(found.panels)
    figure = new_figure(figsize=(5.2 * min(count, 3), 4.1 * -(-count // 3)), layout="constrained")
    axes = figure.subplots(-(-count // 3), min(count, 3), squeeze=False).ravel()
    for axis in axes[count:]:
        axis.set_axis_off()
    steps = [point.step for panel in found.panels for point in panel.points] or [0]
    dots = None
    for axis, panel in zip(axes, found.panels, strict=False):
        x = np.array([point.quality for point in panel.points])
        y = np.array([point.mean for point in panel.points])
        spread = np.array([point.sd or 0.0 for point in panel.points])
        axis.errorbar(x, y, spread, fmt="none", ecolor=GREY, elinewidth=0.8, capsize=2, zorder=1)
        if panel.r is not None:
            slope, height = np.polyfit(x - x.mean(), y, 1)
            ends = np.array([x.min(), x.max()])
            axis.plot(ends, height + slope * (ends - x.mean()), color=BLUE, linewidth=1.2, zorder=2)
        dots = axis.scatter(
            x, y, c=[point.step for point in panel.points], cmap="cividis", vmin=min(steps), vmax=max(steps),
            edgecolors="black", linewidths=0.4, s=34, zorder=3,
        )  # fmt: skip
        _label_panel(axis, panel)
    if dots is not None:
        figure.colorbar(dots, ax=list(axes[:count]), label="optimizer step of the checkpoint")
    return figure


def _label_panel(axis: "Axes", panel: Panel) -> None:
    """Set the title and labels, and write the paper's r in its own colour."""
    correlation = "no correlation" if panel.r is None else f"Pearson r = {panel.r:.2f}"
    if panel.low is not None and panel.high is not None:
        correlation += f" [{panel.low:.2f}, {panel.high:.2f}]"
    axis.set_title(
        f"{panel.title}, {100 * panel.fraction:g} % of the training data\n{correlation}, n = {len(panel.points)}",
        fontsize=10,
    )
    axis.set(xlabel="1 \u2212 validation MSE of the pretraining", ylabel=f"{panel.metric_title} (%)")
    if panel.paper_r is not None:
        axis.text(
            0.03, 0.97, f"the paper's r = {panel.paper_r:.2f}", transform=axis.transAxes, va="top", fontsize=9, color=ORANGE
        )  # fmt: skip
    axis.grid(alpha=0.3)


def main_fig3(argv: list[str]) -> int:
    """The command `p2w fig3`."""
    options = parse_table_options(argv, "fig3", FIG3_USAGE or "")
    found = build_fig3(read_results(options), options.choice(paper_numbers.OURS))
    figure, files = draw_fig3(found), dict[str, str | bytes]()
    for kind in ("png", "pdf"):
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=130, format=kind)
        files[f"fig3.{kind}"] = drawn.getvalue()
    for line in (*(fig3_sentence(panel) for panel in found.panels), *found.notes):
        print(line)
    save_files(options.folder, files | {"fig3.csv": fig3_csv(found), "fig3.json": fig3_to_json(found)})
    return 0
