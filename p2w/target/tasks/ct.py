"""What the tasks on CT share: reading a scan, and a crop of it as HU in the window."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2w.data.grid import Grid
from p2w.data.scan import INT16
from p2w.target import crops
from p2w.target.crops import Place
from p2w.target.record import WINDOW_HU
from p2w.target.tasks.protocol import LeftOut, Mark, Sample

AIR = WINDOW_HU[0]


def told(role: str, name: str, nbytes: int, checksum: int) -> dict[str, Any]:
    """A file, as the manifest names it."""
    return {"role": role, "file": name, "nbytes": nbytes, "checksum": f"crc32c:{checksum:08x}"}


def hu(voxels: NDArray, place: Place) -> NDArray[np.int16]:
    """A crop, rounded to whole HU and clipped to the window; air where the scan ends."""
    crop = place.cut(voxels, AIR)
    return np.clip(np.rint(crop), *WINDOW_HU).astype(np.int16)


def sample(
    channels: Sequence[NDArray], place: Place, grid: Grid, of: str, label: int, mask: NDArray | None = None
) -> Sample:
    """One record from crops int16 [z,y,x] and a mask of 0 and 1."""
    layers = [*channels] if mask is None else [*channels, mask.astype(np.int16)]
    spacing = place.step * crops.spacing_zyx(grid)
    centre = crops.to_world(grid, place.centre)
    return Sample(np.stack(layers), of, label, _triple(place.first), _triple(centre), _triple(spacing))


def _triple(values: NDArray) -> tuple[float, float, float]:
    z, y, x = (float(value) for value in values)
    return z, y, x


def marked(
    voxels: NDArray,
    grid: Grid,
    marks: Iterable[Mark],
    size: tuple[int, int, int],
    spacing_mm: Sequence[float] | None,
    in_voxels: bool = False,
) -> Iterator[Sample | LeftOut]:
    """One crop round each mark; marks outside the scan are left out."""
    for mark in marks:
        given = np.array(mark.xyz[::-1])
        centre = given if in_voxels else crops.to_voxel(grid, given)
        if ((centre < -0.5) | (centre > np.array(voxels.shape) - 0.5)).any() or np.abs(
            centre
        ).max() > INT16.max:
            at = ", ".join(f"{value:.6g}" for value in mark.xyz)
            where = ", ".join(f"{value:.1f}" for value in centre[::-1])
            size_xyz = " x ".join(map(str, voxels.shape[::-1]))
            yield LeftOut(f"{mark.of}: ({at}) is voxel ({where}), outside the scan of {size_xyz}")
            continue
        place = Place.round(centre, size, grid, spacing_mm)
        yield sample([hu(voxels, place)], place, grid, mark.of, mark.label)
