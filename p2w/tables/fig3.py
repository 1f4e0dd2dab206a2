"""`p2w fig3 RUNS`: does a checkpoint that reconstructs better transfer better? Beside the paper's Fig. 3.

    p2w fig3 runs/fig3                  prints r; writes runs/fig3/tables/fig3.png, .pdf, .csv, .json, tables.html
    p2w fig3 runs/fig3 --fraction ncc=0.45 ncs=0.1

RUNS are folders that launch/transfer.py wrote from checkpoints of a run (--init RUN@STEP), or any folders above them. Each
is a point: 1 - validation MSE of the pretraining against the mean score of its fine-tunings. NCC with 45 %, NCS with 10 % of
the training data, unless --fraction says otherwise.
"""

import io
from typing import TYPE_CHECKING

from p2w.analysis.figures import BLUE, GREY, ORANGE, blank
from p2w.tables.command import parse, read, save
from p2w.tables.figure3 import Figure3, Panel, build, csv_text, sentence, to_json
from p2w.target import paper

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(found: Figure3) -> "Figure":
    """A panel a task: checkpoints by step in colour, bars of one standard deviation, the line of least squares."""
    import numpy as np  # noqa: PLC0415

    count = len(found.panels)
    figure = blank(figsize=(5.2 * min(count, 3), 4.1 * -(-count // 3)), layout="constrained")
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
        _words(axis, panel)
    if dots is not None:
        figure.colorbar(dots, ax=list(axes[:count]), label="optimizer step of the checkpoint")
    return figure


def _words(axis: "Axes", panel: Panel) -> None:
    """Title, labels, and the paper's r in its own colour."""
    said = "no correlation" if panel.r is None else f"Pearson r = {panel.r:.2f}"
    if panel.low is not None and panel.high is not None:
        said += f" [{panel.low:.2f}, {panel.high:.2f}]"
    axis.set_title(
        f"{panel.title}, {100 * panel.fraction:g} % of the training data\n{said}, n = {len(panel.points)}",
        fontsize=10,
    )
    axis.set(xlabel="1 \u2212 validation MSE of the pretraining", ylabel=f"{panel.metric_title} (%)")
    if panel.paper_r is not None:
        axis.text(
            0.03, 0.97, f"the paper's r = {panel.paper_r:.2f}", transform=axis.transAxes, va="top", fontsize=9, color=ORANGE
        )  # fmt: skip
    axis.grid(alpha=0.3)


def main(argv: list[str]) -> int:
    """Collect, draw, write."""
    options = parse(argv, "fig3", __doc__ or "")
    found = build(read(options), options.choice(paper.OURS))
    figure, files = draw(found), dict[str, str | bytes]()
    for kind in ("png", "pdf"):
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=130, format=kind)
        files[f"fig3.{kind}"] = drawn.getvalue()
    for line in (*(sentence(panel) for panel in found.panels), *found.notes):
        print(line)
    save(options.folder, files | {"fig3.csv": csv_text(found), "fig3.json": to_json(found)})
    return 0
