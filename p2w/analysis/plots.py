"""Figures of a run and of an analysis (paper, Fig. 2) with Matplotlib, in colours that colour-blind people tell apart."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2w.analysis.similarity import auc, similarity_file
from p2w.files import write_atomic
from p2w.log import read_metrics
from p2w.stats import Correlation

if TYPE_CHECKING:
    from matplotlib.figure import Figure


BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"  # Okabe and Ito's colour-blind safe palette


def new_figure(**settings: Any) -> "Figure":
    """An empty figure. Matplotlib is imported here, because it takes half a second that --help and other ranks save."""
    import matplotlib  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    matplotlib.use("Agg")
    return Figure(**settings)


def middle_slices(columns: dict[str, Tensor]) -> "Figure":
    """Middle slices of a few volumes (B, 1, d, h, w) in [0, 1]: axial and coronal of each title, one row a volume."""
    rows = min(4, *map(len, columns.values()))
    height = 1.9 * rows + 0.5
    figure = new_figure(figsize=(11.5 / 3 * len(columns), height))
    axes = figure.subplots(1, 2 * len(columns))
    figure.subplots_adjust(0.005, 0.01, 0.995, 1 - 0.45 / height, wspace=0.03)
    for pair, (name, volumes) in enumerate(columns.items()):
        stack = volumes[:rows, 0].float().cpu().numpy()
        planes = (stack[:, stack.shape[1] // 2], stack[:, ::-1, stack.shape[2] // 2])
        for axis, stacked, view in zip(axes[2 * pair :], planes, ("axial", "coronal"), strict=False):
            # A column is one image, because 24 axes take a second to draw. Blank voxels separate the rows.
            gap = max(1, stacked.shape[1] // 24)
            column = np.pad(stacked, ((0, 0), (0, gap), (0, 0)), constant_values=np.nan)
            # In a chest CT, voxels are about 2.5 times as thick as wide; panels are square for both planes.
            axis.imshow(
                column.reshape(-1, column.shape[2])[:-gap],
                cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="nearest",
            )  # fmt: skip
            axis.set_axis_off()
            axis.set_title(f"{name}\n{view}", fontsize=9)
    return figure


def image_strip(columns: dict[str, Tensor]) -> NDArray[np.uint8]:
    """As `middle_slices` without text: grey pixels (rows, columns) of square panels, which are fast to draw."""
    edge = max(128, *(volumes.shape[-1] for volumes in columns.values()))
    drawn = []
    for volumes in columns.values():
        stack = volumes[:4, :1].float()
        for plane in (stack[:, :, stack.shape[2] // 2], stack.flip(2)[:, :, :, stack.shape[3] // 2]):
            grey = torch.nn.functional.interpolate(plane, (edge, edge))[:, 0].clamp(0, 1) * 255
            drawn.append(torch.nn.functional.pad(grey, (1, 1, 1, 1), value=255).flatten(0, 1))
    return torch.cat(drawn, 1).byte().cpu().numpy()


def loss_curve(run: Path) -> "Figure":
    """Training and validation loss over steps; for a reconstruction, the best constant output as a line."""
    records = read_metrics(run)
    kind = "mse" if any("val/mse" in record for record in records) else "loss"  # mse: one term of several
    figure = new_figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for name, colour, label, style in (
        (f"train/{kind}", GREY, "training", "-"),
        (f"val/{kind}", BLUE, "validation", "o-"),
    ):
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            axis.plot(
                *zip(*points, strict=True), style, color=colour, label=label, markersize=4, linewidth=1.3
            )
    floor = [record["val/loss_mean_image"] for record in records if "val/loss_mean_image" in record]
    if floor:
        axis.axhline(floor[0], color=ORANGE, linestyle="--", label="always the mean image")
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("mean squared error (1 = 2000 HU)²" if floor else "loss of the pretext")
    axis.set_yscale("log")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
    axis.grid(alpha=0.3, which="both")
    return figure


def similarity_histogram(run: Path, steps: tuple[int, ...]) -> "Figure":
    """Cosine similarity of positive and negative pairs at the given steps, side by side."""
    pairs = {}
    for step in steps:
        with np.load(similarity_file(run, step)) as saved:
            pairs[step] = (saved["positive"], saved["negative"])
    # One axis for all: before training all cosines agree to a few millionths, which an axis of its own would hide.
    low = min(float(min(positive.min(), negative.min())) for positive, negative in pairs.values())
    bins = np.linspace(min(low, 0.99), 1, 41)
    figure = new_figure(figsize=(4.6 * len(steps), 3.4), layout="constrained")
    axes = figure.subplots(1, len(steps), squeeze=False, sharex=True)[0]
    for axis, (step, (positive, negative)) in zip(axes, pairs.items(), strict=True):
        axis.hist(negative, bins, color=ORANGE, alpha=0.65, density=True, label="parts of different images")
        axis.hist(positive, bins, color=BLUE, alpha=0.65, density=True, label="parts of one image")
        axis.set_title(f"step {step}: AUC {auc(positive, negative):.3f}", fontsize=10)
        axis.set_xlabel("cosine similarity of features")
        axis.set_ylabel("density")
        axis.legend(fontsize=8, loc="upper left")
    return figure


def save_figure(figure: "Figure", run: Path, name: str) -> Path:
    """Write `RUN/figures/NAME.png` and `NAME.pdf`; returns the first's path."""
    path = run / "figures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    for form in ("pdf", "png"):
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=130, format=form)
        write_atomic(path.with_suffix(f".{form}"), drawn.getvalue())
    return path


Floats = NDArray[np.float64]
TOL = (
    "#332288",
    "#88CCEE",
    "#44AA99",
    "#117733",
    "#999933",
    "#DDCC77",
    "#CC6677",
    "#882255",
    "#AA4499",
    "#000000",
)
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


def _grid(count: int, width: float, height: float, **settings: Any) -> tuple["Figure", list[Any]]:
    """A figure of `count` panels, at most three in a row, and its axes."""
    columns = 2 if count == 4 else min(3, count)
    rows = -(-count // columns)
    figure = new_figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **settings).ravel()
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, list(axes[:count])


def tsne_figure(points: dict[str, Floats], wholes: NDArray[np.int64], scale: Floats) -> "Figure":
    """Fig. 2a: one panel for each network, {label: points (N, 2)}.

    `wholes` (N,) is the number of the whole of each point, `scale` (N,) that of the part, 1 for wholes.
    """
    figure, axes = _grid(len(points), 4.4, 4.6)
    colours = np.array(TOL)[wholes % len(TOL)]
    for axis, (label, point) in zip(axes, points.items(), strict=True):
        for whole, marker, edge in ((False, "o", "none"), (True, "D", "black")):
            some = (scale == 1) == whole
            axis.scatter(
                point[some, 0], point[some, 1], c=colours[some], s=70 if whole else 4 + 36 * scale[some],
                marker=marker, edgecolors=edge, linewidths=1.2, alpha=1 if whole else 0.55, zorder=2 + whole,
            )  # fmt: skip
        axis.set(title=label, xlabel="t-SNE 1", ylabel="t-SNE 2", xticks=[], yticks=[])
    legend = [
        axes[0].scatter([], [], s=4 + 36 * value, color=GREY, label=f"part, {name} of the volume")
        for value, name in ((1 / 16, "1/16"), (1 / 4, "1/4"), (0.99, "1"))
    ]
    legend.append(
        axes[0].scatter([], [], s=70, marker="D", color=GREY, edgecolors="black", label="the whole")
    )
    figure.legend(
        handles=legend,
        loc="outside lower center",
        ncols=4,
        fontsize=8,
        title="colour: which whole",
        title_fontsize=8,
    )
    return figure


def similarity_figure(
    pairs: dict[str, tuple[Floats, Floats]], numbers: dict[str, dict[str, float]]
) -> "Figure":
    """Fig. 2b: histograms of the cosines of positive and negative pairs, one panel for each network, one common axis."""
    low = min(float(min(positive.min(), negative.min())) for positive, negative in pairs.values())
    bins = np.linspace(min(low, 0.99), 1, 61)
    figure, axes = _grid(len(pairs), 4.2, 3.4, sharex=True)
    for axis, (label, (positive, negative)) in zip(axes, pairs.items(), strict=True):
        for values, colour, name in (
            (negative, ORANGE, "negative: two wholes"),
            (positive, BLUE, "positive: one whole"),
        ):
            share = np.full(values.size, 1 / values.size)
            axis.hist(values.ravel(), bins, weights=share, color=colour, alpha=0.6, label=name)
        found, low = numbers[label], min(float(positive.min()), float(negative.min()))
        if low > bins[-2]:  # all values are in one bar
            axis.text(
                0.5, 0.5, f"all within {1 - low:.0e} of 1", transform=axis.transAxes, ha="center", fontsize=9
            )
        axis.tick_params(labelbottom=True)
        axis.set_title(f"{label}\nAUC {found['auc']:.3f}, d' {found['d_prime']:.2f}", fontsize=10)
        axis.set(xlabel="cosine similarity of features", ylabel="share of pairs")
        axis.legend(fontsize=8, loc="upper left")
    return figure


def scale_figure(
    curves: dict[str, dict[str, list[float]]], trained: tuple[float, float], own: str
) -> "Figure":
    """AUC and d' of pairs of parts by scale; grey marks the scales that the network `own` was trained on."""
    figure, (left, right) = _grid(2, 5, 3.6)
    note = f"scales that {own} was trained on"
    for index, (label, curve) in enumerate(curves.items()):
        style = {"color": LINES[index % len(LINES)], "marker": MARKERS[index % len(MARKERS)], "markersize": 5}
        left.plot(curve["scale"], curve["auc"], label=label, **style)
        right.plot(curve["scale"], curve["d_prime"], label=label, **style)
    for axis, name in ((left, "AUC"), (right, "d'")):
        if trained[0] < trained[1]:
            axis.axvspan(*trained, color=GREY, alpha=0.15, linewidth=0, label=note)
        else:
            axis.axvline(trained[0], color=GREY, linewidth=3, alpha=0.5, label=note)
        axis.set_xscale("log", base=2)
        axis.set_xticks([1 / 16, 1 / 8, 1 / 4, 1 / 2, 1], ["1/16", "1/8", "1/4", "1/2", "1"])
        axis.set(
            xlabel="scale of both parts (share of the whole's volume)",
            ylabel=f"separability of pairs ({name})",
        )
        axis.grid(alpha=0.3)
    left.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    left.legend(fontsize=8)
    return figure


def contrastive_figure(
    steps: Sequence[int], loss: Sequence[float], mse: Sequence[float], found: Correlation,
    early: Sequence[int] = (),
) -> "Figure":  # fmt: skip
    """Fig. 2c: contrastive loss (not trained) and validation MSE over checkpoints, and one against the other.

    `early` steps have a red ring: their MSE was logged with running statistics that still held what they began with.
    """
    figure, (left, right) = _grid(2, 5.2, 3.6)
    twin = left.twinx()
    for axis, values, colour, style, name in (
        (left, loss, BLUE, "o-", "contrastive loss (nats)"),
        (twin, mse, ORANGE, "s--", "validation MSE, (1 = 2000 HU)²"),
    ):
        axis.plot(steps, values, style, color=colour, markersize=4)
        axis.set_ylabel(name, color=colour)
        axis.tick_params(axis="y", colors=colour)
    left.set_xlabel("optimizer step of the checkpoint")
    dots = right.scatter(mse, loss, c=list(steps), cmap="cividis", edgecolors="black", linewidths=0.4)
    figure.colorbar(dots, ax=right, label="optimizer step")
    rings = [at for at, step in enumerate(steps) if step in early]
    if rings:
        right.scatter(
            [mse[at] for at in rings], [loss[at] for at in rings], s=90, facecolors="none", edgecolors="red",
            label="early: batch norm's statistics not settled",
        )  # fmt: skip
        right.legend(fontsize=8)
    interval = "" if np.isnan(found.low) else f", 95 % interval {found.low:.2f} to {found.high:.2f}"
    title = f"Pearson r = {found.r:.3f}{interval}"
    if np.isnan(found.r):
        title = "too few checkpoints for a correlation"
    right.set_title(f"{title}, n = {found.n}", fontsize=10)
    right.set(xlabel="validation MSE, (1 = 2000 HU)²", ylabel="contrastive loss (nats)")
    right.grid(alpha=0.3)
    return figure


@dataclass(frozen=True)
class ImageTile:
    """One image of a mosaic: the middle axial slice of `volume` (d, h, w), 0..255, with a frame if `colour` is set."""

    volume: NDArray[np.uint8]
    title: str = ""
    colour: str = ""


def _mosaic(rows: Sequence[Sequence[ImageTile | None]], title: str = "") -> "Figure":
    """Tiles of one size in a grid, on a single axis, because fifty axes would take seconds to draw."""
    height, width = next(tile for row in rows for tile in row if tile is not None).volume.shape[1:]
    head, gap, columns = 2 * height // 7, max(1, width // 16), max(map(len, rows))
    size = (columns * (width + gap), len(rows) * (height + head))
    inches = 1.5 * columns
    figure = new_figure(figsize=(inches, inches * size[1] / size[0] + 0.3))
    axis = figure.add_axes((0.0, 0.0, 1.0, 1 - 0.3 / (inches * size[1] / size[0] + 0.3)))
    canvas = np.full((size[1], size[0]), np.nan)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            if tile is None:
                continue
            top, left = i * (height + head) + head, j * (width + gap)
            canvas[top : top + height, left : left + width] = tile.volume[len(tile.volume) // 2]
            axis.text(
                left + width / 2, top - 0.03 * height, tile.title, ha="center", va="bottom", fontsize=7.5
            )
            if tile.colour:
                x, y = [left, left + width], [top, top + height]
                outline = (x[0], x[1], x[1], x[0], x[0]), (y[0], y[0], y[1], y[1], y[0])
                axis.plot(*outline, color=tile.colour, linewidth=3, clip_on=False)
    axis.imshow(
        canvas, cmap="gray", vmin=0, vmax=255, extent=(0, size[0], size[1], 0), interpolation="nearest"
    )
    axis.set(xlim=(-gap, size[0]), ylim=(size[1] + gap, 0), aspect="auto")
    axis.set_axis_off()
    figure.text(0.5, 1 - 0.06 / figure.get_figheight(), title, ha="center", va="top", fontsize=10)
    return figure


def reconstruction_figure(
    whole: NDArray[np.uint8], part: NDArray[np.uint8], output: NDArray[np.uint8], scale: Sequence[float]
) -> "Figure":
    """Parts of growing scale in the upper row, their reconstructions in the lower row, the whole at the right.

    `whole` (W, d, h, w), `part` and `output` (W, S, d, h, w), 0..255.
    """
    rows: list[list[ImageTile | None]] = []
    for target, parts, outputs in zip(whole, part, output, strict=True):
        names = [
            f"part, 1/{1 / value:.0f} of the volume" if value < 1 else "the whole as the part"
            for value in scale
        ]
        errors = [np.mean(((made.astype(float) - target) / 255) ** 2) for made in outputs]
        rows.append(
            [*(ImageTile(*pair) for pair in zip(parts, names, strict=True)), ImageTile(target, "target")]
        )
        rows.append(
            [ImageTile(made, f"output, MSE {error:.4f}") for made, error in zip(outputs, errors, strict=True)]
        )
    return _mosaic(rows, "Middle axial slices; MSE of the whole volume, (1 = 2000 HU)²")


def neighbours_figure(rows: Sequence[dict[str, Any]], label: str) -> "Figure":
    """One row for each query: the query, its own whole, and the most similar wholes.

    A row has `query` and `own` (d, h, w) uint8, `rank` of its own whole, and `hits`: (volume, cosine, is its own).
    """
    tiles: list[list[ImageTile | None]] = []
    for row in rows:
        line: list[ImageTile | None] = [
            ImageTile(row["query"], "query: a part"),
            ImageTile(row["own"], f"its whole: rank {row['rank']}"),
        ]
        for rank, (volume, cosine, own) in enumerate(row["hits"], 1):
            name = "its whole" if own else "another"
            line.append(ImageTile(volume, f"{rank}: {name}\ncosine {cosine:.4f}", BLUE if own else ORANGE))
        tiles.append(line)
    return _mosaic(tiles, f"{label}: nearest wholes by cosine similarity (middle axial slices)")
