"""Pictures of a run: part | reconstruction | whole, loss curve, similarity before and after. As PNG and PDF; colours that
colour-blind people tell apart."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2w.analysis.similarity import auc, similarity_file
from p2w.log import read_metrics, write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"  # Okabe and Ito's colour-blind safe palette


def blank(**settings: Any) -> "Figure":
    """An empty figure. Matplotlib comes in here: half a second that --help and ranks other than 0 are spared."""
    import matplotlib  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    matplotlib.use("Agg")
    return Figure(**settings)


def slices(columns: dict[str, Tensor]) -> "Figure":
    """Middle slices of a few volumes (B, 1, d, h, w) in [0, 1]: axial and coronal of each title, one row a volume."""
    rows = min(4, *map(len, columns.values()))
    height = 1.9 * rows + 0.5
    figure = blank(figsize=(11.5 / 3 * len(columns), height))
    axes = figure.subplots(1, 2 * len(columns))
    figure.subplots_adjust(0.005, 0.01, 0.995, 1 - 0.45 / height, wspace=0.03)
    for pair, (name, volumes) in enumerate(columns.items()):
        stack = volumes[:rows, 0].float().cpu().numpy()
        planes = (stack[:, stack.shape[1] // 2], stack[:, ::-1, stack.shape[2] // 2])
        for axis, stacked, view in zip(axes[2 * pair :], planes, ("axial", "coronal"), strict=False):
            # A column is one image: 24 axes took a second to draw. Blank voxels part the rows.
            gap = max(1, stacked.shape[1] // 24)
            column = np.pad(stacked, ((0, 0), (0, gap), (0, 0)), constant_values=np.nan)
            # Sub-scan voxels are about 2.5 times as thick as wide in a chest CT; square panels show both planes alike.
            axis.imshow(
                column.reshape(-1, column.shape[2])[:-gap],
                cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="nearest",
            )  # fmt: skip
            axis.set_axis_off()
            axis.set_title(f"{name}\n{view}", fontsize=9)
    return figure


def strip(columns: dict[str, Tensor]) -> NDArray[np.uint8]:
    """The same without words: grey pixels (rows, columns) of square panels, for a look that must cost next to nothing."""
    edge = max(128, *(volumes.shape[-1] for volumes in columns.values()))
    drawn = []
    for volumes in columns.values():
        stack = volumes[:4, :1].float()
        for plane in (stack[:, :, stack.shape[2] // 2], stack.flip(2)[:, :, :, stack.shape[3] // 2]):
            grey = torch.nn.functional.interpolate(plane, (edge, edge))[:, 0].clamp(0, 1) * 255
            drawn.append(torch.nn.functional.pad(grey, (1, 1, 1, 1), value=255).flatten(0, 1))
    return torch.cat(drawn, 1).byte().cpu().numpy()


def loss_curve(run: Path) -> "Figure":
    """Training and validation loss over steps; of a reconstruction also the best constant answer, as a line."""
    records = read_metrics(run)
    kind = (
        "mse" if any("val/mse" in record for record in records) else "loss"
    )  # where that is one term of several
    figure = blank(figsize=(6, 3.6), layout="constrained")
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
        axis.axhline(floor[0], color=ORANGE, linestyle="--", label="always answering the mean image")
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
    # One axis for all: at the start every pair is alike to a few millionths, and an axis of its own would hide that.
    low = min(float(min(positive.min(), negative.min())) for positive, negative in pairs.values())
    bins = np.linspace(min(low, 0.99), 1, 41)
    figure = blank(figsize=(4.6 * len(steps), 3.4), layout="constrained")
    axes = figure.subplots(1, len(steps), squeeze=False, sharex=True)[0]
    for axis, (step, (positive, negative)) in zip(axes, pairs.items(), strict=True):
        axis.hist(negative, bins, color=ORANGE, alpha=0.65, density=True, label="parts of different images")
        axis.hist(positive, bins, color=BLUE, alpha=0.65, density=True, label="parts of one image")
        axis.set_title(f"step {step}: AUC {auc(positive, negative):.3f}", fontsize=10)
        axis.set_xlabel("cosine similarity of features")
        axis.set_ylabel("density")
        axis.legend(fontsize=8, loc="upper left")
    return figure


def save(figure: "Figure", run: Path, name: str) -> Path:
    """Write `RUN/figures/NAME.png` and `NAME.pdf`; returns the first's path."""
    path = run / "figures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    for form in ("pdf", "png"):
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=130, format=form)
        write_atomic(path.with_suffix(f".{form}"), drawn.getvalue())
    return path
