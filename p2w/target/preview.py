"""A mask's outline over three slices of its scan, as a picture to look at."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2w.data.grid import Grid
from p2w.errors import UserError

AXES = ("axial, patient's left on the right", "coronal", "sagittal, front on the left")


def draw(path: Path, voxels: NDArray[Any], mask: NDArray[np.uint8], grid: Grid, title: str) -> None:
    """A PNG of the axial slice with most of the mask, and the coronal and sagittal slices through the middle of it.

    `voxels`, `mask`: canonical [z,y,x]; without any mask, the middle of the scan. Raises UserError where it cannot write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    where = _middle(mask)
    spacing = grid.spacing[::-1]
    figure = Figure(figsize=(13, 5), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, panel in enumerate(figure.subplots(1, 3)):
        index: list[Any] = [slice(None)] * 3
        index[axis] = where[axis]
        image, outline = voxels[tuple(index)], mask[tuple(index)]
        rows, columns = (number for number in range(3) if number != axis)
        low, high = np.percentile(voxels[::4, ::8, ::8], (1, 99.5))
        panel.imshow(
            image, cmap="gray", vmin=low, vmax=high, aspect=spacing[rows] / spacing[columns],
            origin="upper" if axis == 0 else "lower", interpolation="nearest",
        )  # fmt: skip
        if outline.any():
            panel.contour(outline, levels=[0.5], colors="#ff3b30", linewidths=1.2)
        panel.set_title(f"{AXES[axis]}: {'zyx'[axis]} = {where[axis]}", fontsize=9)
        panel.set_axis_off()
    millilitres = int(mask.sum()) * float(np.prod(spacing)) / 1000
    figure.suptitle(f"{title}: {millilitres:.1f} ml", fontsize=11)
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise UserError(f"{path}: not written ({error.strerror}); name another --preview") from error


def _middle(mask: NDArray[np.uint8]) -> tuple[int, int, int]:
    """z with most of the mask; y and x in the middle of what is there."""
    areas = mask.sum((1, 2), dtype=np.int64)
    if not areas.any():
        return mask.shape[0] // 2, mask.shape[1] // 2, mask.shape[2] // 2
    z = int(areas.argmax())
    y, x = (int(np.median(at)) for at in np.nonzero(mask[z]))
    return z, y, x
