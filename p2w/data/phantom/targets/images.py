"""Phantoms as files: NIfTI volumes and their masks in LPS order."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray


def write_image(
    path: Path,
    values: NDArray,
    spacing_zyx: Sequence[float],
    origin_zyx: Sequence[float],
    flipped: bool = False,
) -> None:
    """Values [z,y,x] in LPS order; `flipped`: stored with rows and columns reversed, and a direction that says so."""
    spacing, origin = np.array(spacing_zyx[::-1], float), np.array(origin_zyx[::-1], float)
    image = sitk.GetImageFromArray(np.ascontiguousarray(values[:, ::-1, ::-1] if flipped else values))
    if flipped:
        last = np.array(values.shape[::-1]) - 1
        origin = origin + np.array([1, 1, 0]) * last * spacing
        image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(origin.tolist())
    try:
        sitk.WriteImage(image, str(path), useCompression=True, compressionLevel=1)
    except RuntimeError as error:  # what SimpleITK makes of a full disk or a folder it may not write
        raise OSError(f"{path} cannot be written: {str(error).splitlines()[-1]}") from None


def blob(
    shape: tuple[int, int, int],
    spacing: Sequence[float] | NDArray,
    centre: NDArray,
    radius_mm: float,
    rng: np.random.Generator,
    rough: float = 0.15,
) -> tuple[tuple[slice, slice, slice], NDArray[np.float32]]:
    """A lump with bumps: the box of voxels round it, and mm inside its surface (negative outside); centre in voxels."""
    step = np.array(spacing)
    reach = (1.6 * radius_mm + 2 * step.max()) / step
    low = np.maximum(np.floor(centre - reach), 0).astype(int)
    high = np.maximum(np.minimum(np.ceil(centre + reach) + 1, shape).astype(int), low)
    box = (slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2]))
    grid = np.meshgrid(*(np.arange(a, b) for a, b in zip(low, high, strict=True)), indexing="ij")
    offset = (np.stack(grid, axis=-1) - centre) * step
    stretch = rng.uniform(0.75, 1.3, 3)
    gap = np.linalg.norm(offset * stretch, axis=-1)
    way = offset / (np.linalg.norm(offset, axis=-1, keepdims=True) + 1e-6)
    bumps = sum(np.cos(way @ (rng.normal(size=3) * f) + rng.uniform(0, 6)) for f in (1.5, 2.5, 4.0))
    return box, (radius_mm * (1 + rough / 2 * np.asarray(bumps)) - gap).astype(np.float32)
