"""Pictures of predictions: outlines of classes over three slices of a scan, and test samples of a fine-tuning."""

import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from p2w.ct.orientation import Grid
from p2w.errors import UserError
from p2w.files import write_atomic
from p2w.finetune.task_types import TaskType
from p2w.finetune.trial import PREDICTIONS
from p2w.finetune.trials import FineTuning
from p2w.inference.finetuned_model import load_finetuned

AXES = ("axial, patient's left on the right", "coronal", "sagittal, front on the left")
RED, CYAN = "#ff3b30", "#00e5ff"
LEGEND = 12  # names of classes beside the picture, at most
# Of a slice of a mask: where each class is
Classes = Callable[[NDArray[Any]], Mapping[str, NDArray[np.bool_]]]


def draw_preview(
    path: Path,
    voxels: NDArray[Any],
    mask: NDArray[Any],
    grid: Grid,
    title: str,
    classes: Classes = lambda mask: {"": mask != 0},
) -> None:
    """Draw a PNG of the axial slice with most of the mask, and the coronal and sagittal slices through the middle of it.

    `voxels`, `mask`: canonical [z,y,x]; without any mask, the middle of the scan. `classes` says where each class is, which
    gets an outline of its own; the largest have their names beside. Raises UserError where it cannot write.
    """
    from matplotlib import colormaps  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.lines import Line2D  # noqa: PLC0415

    where, spacing = _middle(mask), grid.spacing[::-1]
    figure = Figure(figsize=(13, 5), layout="constrained")
    palette = colormaps["tab10"].colors  # type: ignore[attr-defined]  # of a listed colour map
    outlined: dict[str, tuple[int, Any]] = {}  # name -> voxels, colour
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
                outlined[name] = outlined.get(name, (0, colour))[0] + int(np.count_nonzero(inside)), colour
        panel.set_title(f"{AXES[axis]}: {'zyx'[axis]} = {where[axis]}", fontsize=9)
        panel.set_axis_off()
    largest = sorted((name for name in outlined if name), key=lambda name: -outlined[name][0])[:LEGEND]
    if largest:
        lines = [Line2D([], [], color=outlined[name][1]) for name in largest]
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


SAMPLE_COUNT = 4  # test samples in a picture
SAMPLES = "figures/predictions.png"


def draw_test_samples(fine_tuning: FineTuning, device: torch.device) -> Path | None:
    """Draw RUN/figures/predictions.png: four test samples, from the worst to the best, by the trial of `p2w predict`.

    Of a segmentation it draws the slice with most of the mask, with the outlines of the mask and of the prediction; of a
    classification with one probability the middle slice, from the lowest probability to the highest. Returns None where
    there is nothing to draw: no finished trial with weights, no foreground in the test samples, shards that are gone, or
    another kind of task. Raises OSError where it cannot write.
    """
    kind = fine_tuning.kind
    if not kind.per_voxel and kind.columns(kind.classes) != ("probability",):
        return None
    try:
        model = load_finetuned(fine_tuning.folder, device)
        with np.load(model.file.parent / PREDICTIONS, allow_pickle=False) as arrays:
            kept = {name: arrays[name] for name in arrays.files if name != "records"}
        chosen, titles = _choose_samples(kept)
        if not len(chosen):
            return None
        rows = fine_tuning.rows["test"][chosen]
        voxels, targets = fine_tuning.source.read(rows)
    except (UserError, OSError, ValueError, LookupError):
        return None
    predicted = model.predictions(voxels.to(device), None).cpu().numpy()
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(8.0, 2.2), layout="constrained", facecolor="black")
    low, high = model.window
    for at, (panel, title) in enumerate(zip(figure.subplots(1, SAMPLE_COUNT).flat, titles, strict=False)):
        truth = targets[at, 0].numpy() if kind.per_voxel else np.zeros(voxels.shape[2:], np.uint8)
        z = _middle(truth)[0]
        spacing = fine_tuning.source.spacing_mm[rows[at]]
        panel.imshow(
            voxels[at, 0, z].numpy(), cmap="gray", vmin=low, vmax=high, aspect=float(spacing[1] / spacing[2]),
            interpolation="nearest",
        )  # fmt: skip
        if kind.per_voxel:
            for own, answer, colour in _outlines(model.kind, truth[z], predicted[at][..., z, :, :]):
                for inside, drawn, style in ((own, CYAN, "dashed"), (answer, colour, "solid")):
                    if inside.any() and not inside.all():
                        panel.contour(inside, levels=[0.5], colors=[drawn], linewidths=1.3, linestyles=style)
        panel.set_title(title, fontsize=9, color="white")
    for panel in figure.axes:
        panel.set_axis_off()
    packed = io.BytesIO()
    figure.savefig(packed, dpi=130, format="png")
    path = fine_tuning.folder / SAMPLES
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, packed.getvalue())
    return path


def _choose_samples(kept: Mapping[str, NDArray[Any]]) -> tuple[NDArray[np.int64], list[str]]:
    """Positions among the test samples at even ranks, and a title for each, of the arrays of predictions.npz.

    Masks: by Dice, of all classes together, among the samples with foreground. Classification: by probability.
    """
    if "counts" in kept:
        hit, found, true = (kept["counts"][:, 0, :3] if "thresholds" in kept else kept["counts"].sum(1)).T
        score = np.where(true > 0, 2 * hit / np.maximum(found + true, 1), np.nan)
        name = "Dice"
    else:
        score, name = kept["probability"].reshape(-1).astype(np.float64), "probability"
    order = np.argsort(score, kind="stable")[: int(np.isfinite(score).sum())]
    ranks = np.unique(np.linspace(0, len(order) - 1, min(SAMPLE_COUNT, len(order))).round().astype(int))
    chosen = order[ranks]
    label = kept.get("label")
    labels = [f", label {label[at]}" if label is not None else "" for at in chosen]
    return chosen, [f"{name} {score[at]:.2f}{more}" for at, more in zip(chosen, labels, strict=True)]


def _outlines(
    kind: TaskType, truth: NDArray[Any], predicted: NDArray[np.float32]
) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.bool_], Any]]:
    """Yield for each class in a slice the true mask (H, W), the predicted one, and a colour.

    `predicted`: (H, W), or (K, H, W).
    """
    from matplotlib import colormaps  # noqa: PLC0415

    palette = colormaps["tab10"].colors  # type: ignore[attr-defined]  # of a listed colour map
    if not kind.layers():
        yield truth != 0, predicted > 0.5, RED
    elif kind.by_threshold:  # a bit for each
        for bit, own in enumerate(predicted):
            yield (truth >> bit) & 1 == 1, own > 0.5, palette[bit % len(palette)]
    else:  # numbers of classes, 0 is background
        answer = predicted.argmax(0)
        for number in range(1, len(predicted)):
            yield truth == number, answer == number, palette[number % len(palette)]
