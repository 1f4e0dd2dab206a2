"""Pictures of predictions: outlines of classes over three slices of a scan."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2w.ct.orientation import Grid
from p2w.errors import UserError

AXES = ("axial, patient's left on the right", "coronal", "sagittal, front on the left")
RED = "#ff3b30"
LEGEND = 12  # names of classes beside the picture, at most
Classes = Callable[
    [NDArray[Any]], Mapping[str, NDArray[np.bool_]]
]  # of a slice of a mask: where each class is


def draw_preview(
    path: Path,
    voxels: NDArray[Any],
    mask: NDArray[Any],
    grid: Grid,
    title: str,
    classes: Classes = lambda mask: {"": mask != 0},
) -> None:
    """A PNG of the axial slice with most of the mask, and the coronal and sagittal slices through the middle of it.

    `voxels`, `mask`: canonical [z,y,x]; without any mask, the middle of the scan. `classes` says where each class is, which
    gets an outline of its own; the largest have their names beside. Raises UserError where it cannot write.
    """
    from matplotlib import colormaps  # noqa: PLC0415
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.lines import Line2D  # noqa: PLC0415

    where, spacing = _middle(mask), grid.spacing[::-1]
    figure = Figure(figsize=(13, 5), layout="constrained")
    FigureCanvasAgg(figure)
    palette = colormaps["tab10"].colors  # type: ignore[attr-defined]  # of a listed colour map
    shown: dict[str, tuple[int, Any]] = {}  # name -> voxels, colour
    for axis, panel in enumerate(figure.subplots(1, 3)):
        index: list[Any] = [slice(None)] * 3
        index[axis] = where[axis]
        image, outlines = voxels[tuple(index)], classes(mask[tuple(index)])
        rows, columns = (number for number in range(3) if number != axis)
        low, high = np.percentile(voxels[::4, ::8, ::8], (1, 99.5))
        panel.imshow(
            image, cmap="gray", vmin=low, vmax=high, aspect=spacing[rows] / spacing[columns],
            origin="upper" if axis == 0 else "lower", interpolation="nearest",
        )  # fmt: skip
        for number, (name, inside) in enumerate(outlines.items()):
            if inside.any():
                colour = palette[number % len(palette)] if name else RED
                panel.contour(inside, levels=[0.5], colors=[colour], linewidths=1.2)
                shown[name] = shown.get(name, (0, colour))[0] + int(np.count_nonzero(inside)), colour
        panel.set_title(f"{AXES[axis]}: {'zyx'[axis]} = {where[axis]}", fontsize=9)
        panel.set_axis_off()
    largest = sorted((name for name in shown if name), key=lambda name: -shown[name][0])[:LEGEND]
    if largest:
        lines = [Line2D([], [], color=shown[name][1]) for name in largest]
        figure.legend(lines, largest, loc="outside lower center", ncols=min(6, len(largest)), fontsize=8)
    millilitres = int(np.count_nonzero(mask)) * float(np.prod(spacing)) / 1000
    figure.suptitle(f"{title}: {millilitres:.1f} ml", fontsize=11)
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise UserError(f"{path}: not written ({error.strerror}); name another --preview") from error


def _middle(mask: NDArray[Any]) -> tuple[int, int, int]:
    """The z with most of the mask, and y and x in the middle of the mask there."""
    areas = np.count_nonzero(mask, axis=(1, 2))
    if not areas.any():
        return mask.shape[0] // 2, mask.shape[1] // 2, mask.shape[2] // 2
    z = int(areas.argmax())
    y, x = (int(np.median(at)) for at in np.nonzero(mask[z]))
    return z, y, x
