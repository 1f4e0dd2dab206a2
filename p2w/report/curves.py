"""Curves over steps and time as inline SVG, in the page's font and in its colours, light or dark."""

import io
import math
import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from p2w.report.markup import Markup, safe, tag
from p2w.report.run_reader import RunFacts, child, floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# Placeholders for colours that the page's style sheet sets, for light and dark (Okabe and Ito's colour-blind safe palette).
INK, BLUE, ORANGE, GREY = "#010101", "#010102", "#010103", "#010104"
VARIABLES = {INK: "currentColor", BLUE: "var(--blue)", ORANGE: "var(--orange)", GREY: "var(--grey)"}
DRAWN = {
    "step", "time", "train/loss", "val/loss", "val/loss_mean_image", "train/lr", "train/grad_norm",
    "similarity/auc", "similarity/positive", "similarity/negative", "speed/samples_per_s", "speed/waiting_share",
}  # fmt: skip
OTHERS = 6  # most curves of metrics that are not in CHARTS
POINTS = 400  # most points of a curve; more are averaged, because a chart is a few hundred pixels wide
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.size": 9, "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "legend.frameon": False,
    "legend.fontsize": 8, "lines.linewidth": 1.5, "lines.markersize": 3.5, "axes.grid": True, "grid.color": INK,
    "grid.alpha": 0.12, "grid.linewidth": 0.6,
    "text.parse_math": False,
}  # fmt: skip

Draw = Callable[["Axes", RunFacts], bool]  # returns False when there is nothing to draw


def charts(facts: RunFacts) -> list[Markup]:
    """All charts that have data, each as a figure with its caption."""
    known = [chart(name, draw, caption, facts) for name, (draw, caption) in CHARTS.items()]
    names = sorted({name for record in facts.records for name in record})
    more = [name for name in names if name not in DRAWN and not _is_contrastive(name)][:OTHERS]
    others = [chart(name, partial(_plain, name=name), words_of(name)[1], facts) for name in more]
    return [drawn for drawn in (*known, *others) if drawn]


METRICS = {  # further metrics of metrics.jsonl -> label of the axis, caption
    "similarity/rank": (
        "effective rank",
        "Effective rank of the features: over how many directions they spread.",
    ),
    "speed/checkpoint_stall_s": ("waiting (s)", "Time that training waited for a checkpoint."),
    "speed/looking_share": (
        "share of time",
        "Share of the time spent on validation and on comparing features.",
    ),
    "data/bad_samples": ("sub-scans", "Sub-scans that were damaged, and for which another one stood in."),
    "data/bad_share": ("share of sub-scans", "Share of damaged sub-scans, for which another one stood in."),
}


def words_of(name: str) -> tuple[str, str]:
    """Axis label and caption of a metric without a chart of its own: `val/x_loss` is "x loss", "X loss, validation."."""
    group, _, rest = name.rpartition("/")
    words = rest.replace("_", " ").replace("-", " ")
    where = {"val": "validation", "train": "training"}.get(group, group.replace("/", " ").replace("_", " "))
    caption = f"{words[:1].upper()}{words[1:]}{', ' if where else ''}{where}."
    return METRICS.get(name, (words[:30], caption))


def _is_contrastive(name: str) -> bool:
    return name.startswith(("contrastive", "contrast/")) and "loss" in name


def chart(name: str, draw: Draw, caption: str, facts: RunFacts) -> Markup | None:
    """One chart as a figure with its caption; None where `draw` says that it has nothing."""
    import matplotlib  # noqa: PLC0415  (half a second)
    from matplotlib.figure import Figure  # noqa: PLC0415

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.subplots()
        if not draw(axes, facts):
            return None
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return tag("figure", _inline(file.getvalue(), caption), tag("figcaption", caption), class_="chart")


def _inline(svg: str, label: str) -> Markup:
    """Matplotlib's SVG file as an element of the page: without prologue and ids, and with the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    opening = f'<svg {box[0] if box else ""} role="img" aria-label="{safe(label)}">'
    svg = re.sub(r"<svg [^>]*>", lambda _: opening, svg, count=1)
    for placeholder, colour in VARIABLES.items():
        svg = svg.replace(placeholder, colour)
    return Markup(svg)


def thin(x: list[float], y: list[float]) -> tuple[list[float], list[float]]:
    """Points averaged to at most POINTS; values that are not finite are left out."""
    keep = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if len(keep) > POINTS:
        keep = [tuple(block.mean(0)) for block in np.array_split(np.array(keep), POINTS)]
    return [a for a, _ in keep], [b for _, b in keep]


def _line(axes: "Axes", facts: RunFacts, name: str, label: str, style: str = "-", **how: Any) -> bool:
    """Draw a metric over steps."""
    steps, values = thin(*facts.series(name))
    if steps:
        axes.plot(steps, values, style, label=label, **how)
        axes.set_xlabel("optimizer step")
    return bool(steps)


def _loss(axes: "Axes", facts: RunFacts) -> bool:
    training = _line(axes, facts, facts.loss("train"), "training", color=GREY)
    validation = _line(axes, facts, facts.loss("val"), "validation", "o-", color=BLUE)
    floor = facts.series("val/loss_mean_image")[1]
    if floor and floor[0] > 0:
        axes.axhline(floor[0], color=ORANGE, linestyle="--", label="always the mean image")
    axes.set_ylabel("mean squared error\n(1 = (window width)²)" if floor else "loss of the pretext")
    log_axis(axes)
    return training or validation


def log_axis(axes: "Axes") -> None:
    """A logarithmic y axis with plain numbers, if all values are positive."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter  # noqa: PLC0415

    values = [value for line in axes.lines for value in np.ravel(line.get_ydata())]
    if not values or min(values) <= 0:
        return
    axes.set_yscale("log")
    if max(values) / min(values) < 200:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _separability(axes: "Axes", facts: RunFacts) -> bool:
    axes.axhline(0.5, color=ORANGE, linestyle="--", label="no separability")
    axes.set_ylim(0.45, 1.01)
    axes.set_ylabel("area under the ROC curve")
    return _line(axes, facts, "similarity/auc", "AUC of parts", "o-", color=BLUE)


def _cosines(axes: "Axes", facts: RunFacts) -> bool:
    axes.set_ylabel("mean cosine similarity")
    one = _line(axes, facts, "similarity/positive", "parts of one image", "o-", color=BLUE)
    two = _line(axes, facts, "similarity/negative", "parts of two images", "s--", color=ORANGE)
    return one or two


def _contrastive(axes: "Axes", facts: RunFacts) -> bool:
    axes.set_ylabel("contrastive loss (nat)")
    names = sorted({name for record in facts.records for name in record if _is_contrastive(name)})
    for name, colour in zip(names, (BLUE, ORANGE, GREY), strict=False):
        _line(axes, facts, name, name, "o-", color=colour)
    later = child(facts.summary, "over_checkpoints")
    pairs = zip(floats(later.get("steps")), floats(later.get("contrastive_loss")), strict=False)
    steps, values = thin(*map(list, zip(*pairs, strict=True))) if later.get("steps") else ([], [])
    if steps:
        axes.plot(steps, values, "s--", color=ORANGE, label="analysis of the checkpoints")
        axes.set_xlabel("optimizer step")
    return bool(axes.lines)


def _rate(axes: "Axes", facts: RunFacts) -> bool:
    axes.set_ylabel("learning rate")
    drawn = _line(axes, facts, "train/lr", "", color=BLUE)
    axes.set_ylim(bottom=0)
    return drawn


def _gradient(axes: "Axes", facts: RunFacts) -> bool:
    drawn = _line(axes, facts, "train/grad_norm", "", color=BLUE)
    axes.set_ylabel("gradient norm")
    log_axis(axes)
    lost = [
        step for step, value in zip(*facts.series("train/grad_norm"), strict=True) if not math.isfinite(value)
    ]
    if lost:
        axes.plot(
            lost, np.full(len(lost), 0.03), "x", color=ORANGE, transform=axes.get_xaxis_transform(),
            label="not finite: skipped", clip_on=False,
        )  # fmt: skip
    return drawn


def _hours(facts: RunFacts, name: str) -> tuple[list[float], list[float], str, float, float]:
    """Times and values of a metric, the unit of time, its seconds, and when the run began (seconds since 1970)."""
    points = [
        (r["time"], r[name]) for r in facts.records if name in r and math.isfinite(r.get("time", math.nan))
    ]
    first = facts.records[0].get("time", math.nan) if facts.records else math.nan
    began = min([first, *(clock for clock in facts.clocks() if clock <= first)], default=first)
    span = max((when for when, _ in points), default=0) - began
    unit, seconds = next((u for u in (("min", 60.0), ("h", 3600.0)) if span < 180 * u[1]), ("d", 86400.0))
    return [(when - began) / seconds for when, _ in points], [v for _, v in points], unit, seconds, began


def _over_time(axes: "Axes", facts: RunFacts, name: str, factor: float = 1.0) -> bool:
    """Draw a metric over wall-clock time, with a vertical line at each restart."""
    times, values, unit, seconds, began = _hours(facts, name)
    for label, start in zip(("started again", *[""] * len(facts.starts)), facts.clocks()[1:], strict=False):
        axes.axvline((start - began) / seconds, color=ORANGE, linestyle=":", label=label)
    times, values = thin(times, values)
    breaks = np.searchsorted(times, [(start - began) / seconds for start in facts.clocks()])
    # No line across the time between two starts
    for piece in np.split(np.column_stack((times, values)), breaks):
        axes.plot(piece[:, 0], piece[:, 1] * factor, color=BLUE)
    axes.set_xlabel(f"time since the first start ({unit})")
    axes.set_ylim(bottom=0)
    return bool(times)


def _throughput(axes: "Axes", facts: RunFacts) -> bool:
    axes.set_ylabel("samples / s, all ranks")
    return _over_time(axes, facts, "speed/samples_per_s")


def _waiting(axes: "Axes", facts: RunFacts) -> bool:
    axes.set_ylabel("waiting for data (% of time)")
    return _over_time(axes, facts, "speed/waiting_share", 100)


def _plain(axes: "Axes", facts: RunFacts, name: str) -> bool:
    """Draw a metric that is not in CHARTS, if it has two values or more."""
    axes.set_ylabel(words_of(name)[0])
    return len(facts.series(name)[0]) > 1 and _line(axes, facts, name, "", "o-", color=BLUE)


CHARTS: dict[str, tuple[Draw, str]] = {
    "loss": (
        _loss,
        "Loss. Below the dashed line, the network does better than any output that ignores the input.",
    ),
    "separability": (
        _separability,
        "Separability: how likely two parts of one image are more similar than parts of two.",
    ),
    "cosines": (
        _cosines,
        "Similarity of features. The larger the gap between the lines, the better features separate images.",
    ),
    "contrastive": (
        _contrastive,
        "Contrastive loss, measured but not trained. In the paper it falls together with the MSE.",
    ),
    "rate": (_rate, "Learning rate."),
    "gradient": (
        _gradient,
        "Gradient norm, over all weights. A step whose gradient is not finite changes nothing.",
    ),
    "throughput": (_throughput, "Throughput, without validation."),
    "waiting": (_waiting, "Time that rank 0 waited for data."),
}
