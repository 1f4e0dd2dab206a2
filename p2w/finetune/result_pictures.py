"""Pictures of a trial's test samples as PNG: ROC curves, predicted over true numbers, a measure by patient."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
MOST = 12  # classes that are drawn


def roc_curves(score: Floats, truth: Floats, names: Sequence[str]) -> bytes:
    """The ROC curve of each class against all others; scores (N, K), truth (N, K) of 0, 1, or NaN: unknown."""
    from sklearn.metrics import roc_curve  # noqa: PLC0415  (a second of imports)

    figure, axes = _figure()
    for k, name in list(enumerate(names))[:MOST]:
        known = np.isfinite(truth[:, k])
        positive = truth[known, k] > 0.5
        if positive.any() and not positive.all():
            false, true, _ = roc_curve(positive, score[known, k])
            axes.plot(false, true, label=f"{name} ({positive.sum()} of {len(positive)})")
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, zorder=0)
    axes.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    return _png(figure, axes)


def agreement(predicted: Floats, truth: Floats, names: Sequence[str]) -> bytes:
    """Predicted numbers (N, K) over the true ones, NaN: unknown; a column beside another."""
    count = min(len(names), MOST)
    figure, grid = _figure(count)
    for k, axes in zip(range(count), np.atleast_1d(grid), strict=True):
        known = np.isfinite(truth[:, k])
        axes.scatter(truth[known, k], predicted[known, k], s=12)
        ends = [*truth[known, k], *predicted[known, k]] or [0.0, 1.0]
        axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color="0.7", linewidth=0.8, zorder=0)
        axes.set(xlabel=f"{names[k]}, true", ylabel="predicted")
    return _png(figure, None)


def by_patient(values: Floats, names: Sequence[str], measure: str) -> bytes:
    """A dot for every patient's value in [0, 1] of each class, (patients, K), and a line at their mean."""
    figure, axes = _figure()
    for k in range(min(len(names), MOST)):
        own = values[np.isfinite(values[:, k]), k]
        across = k + np.linspace(-0.2, 0.2, len(own)) if len(own) > 1 else np.full(len(own), float(k))
        axes.scatter(across, np.sort(own), s=12)
        if len(own):
            axes.plot([k - 0.3, k + 0.3], [own.mean()] * 2, color="0.3", linewidth=1)
    axes.set(ylim=(-0.02, 1.02), ylabel=f"{measure}, a dot a patient")
    axes.set_xticks(
        range(min(len(names), MOST)), [name[:24] for name in names[:MOST]], rotation=30, ha="right"
    )
    return _png(figure, None)


def _figure(columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(5 * columns, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns)


def _png(figure: Any, legend: Any) -> bytes:
    if legend is not None and legend.get_legend_handles_labels()[1]:
        legend.legend(fontsize=8)
    packed = io.BytesIO()
    figure.savefig(packed, dpi=100, format="png")
    return packed.getvalue()
