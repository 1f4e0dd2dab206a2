"""An image and its mask: found by their names, read, and laid over one another."""

import os
import re
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from p2w.data.find import IMAGES, Source, safe_uid, shown, walk
from p2w.data.grid import BadScan, Grid
from p2w.data.scan import Image, read_image
from p2w.errors import UserError
from p2w.target import crops

APART = 0.1  # voxels that a corner of the mask may be away from the image's


def files_below(root: str, out: str) -> dict[str, str]:
    """Name (relative, with /) -> path of every image file below a folder, in a fixed order; `out` is passed over."""
    paths = {shown(os.path.relpath(path, root)): path for path in walk(root, out)}
    return {name: path for name, path in paths.items() if name.lower().endswith(IMAGES)}


def stem(name: str) -> str:
    """A file's name without the ending of its format."""
    ending = max((ending for ending in IMAGES if name.lower().endswith(ending)), key=len, default="")
    return name[: len(name) - len(ending)] if ending else name


def matching(pattern: str, names: Iterable[str]) -> dict[str, str]:
    """What the `*` of a pattern stands for -> name; the pattern is of the path below the folder, or its end.

    Raises UserError for a pattern without exactly one `*`, and where two names match with one text.
    """
    if pattern.count("*") != 1:
        raise UserError(
            f"pattern {pattern!r}: has to have one *, which stands for the case, such as '*_ct.nii.gz'"
        )
    before, after = (re.escape(part) for part in pattern.split("*"))
    found: dict[str, str] = {}
    for name in names:
        if match := re.fullmatch(f"(?:.*/)??{before}(.+){after}", name) or re.fullmatch(
            f"{before}(.+){after}", name
        ):
            if match[1] in found:
                raise UserError(
                    f"pattern {pattern!r}: {found[match[1]]} and {name} both are case {match[1]!r}: rename one"
                )
            found[match[1]] = name
    return found


def as_source(name: str, path: str, uid: str | None = None) -> Source:
    """An image file as a scan to be read."""
    return Source(safe_uid(uid or stem(name)), name, (path,))


def read_mask(
    source: Source, grid: Grid, shape: tuple[int, ...], labels: tuple[int, ...], resample: bool
) -> tuple[NDArray[np.uint8], Image]:
    """The mask as 0 and 1 on an image's grid, and the file; `labels`: what is foreground, () for all but 0.

    Raises BadScan when it holds anything but whole numbers, or lies elsewhere than the image and is not to be resampled
    (by nearest neighbour).
    """
    try:
        image = read_image(source)
    except BadScan as error:
        raise BadScan(f"mask {source.name}: {error}") from error
    values = image.values
    if values.dtype.kind == "f" and (values != np.rint(values)).any():
        raise BadScan(f"mask {source.name}: values that are no whole numbers: it is no mask")
    mask = (np.isin(values, labels) if labels else values != 0).astype(np.uint8)
    said = apart(grid, image.grid)
    if said is None:
        return mask, image
    if not resample:
        raise BadScan(
            f"mask {source.name}: {said}; --resample-masks lays it over the image by nearest neighbour"
        )
    return _laid_over(mask, image.grid, grid, shape), image


def apart(one: Grid, other: Grid) -> str | None:
    """How two grids differ, None when they are the same to a tenth of a voxel."""
    if one.size != other.size:
        sizes = [" x ".join(map(str, grid.size)) for grid in (other, one)]
        return f"is of {sizes[0]} voxels (x, y, z), its image of {sizes[1]}"
    last = np.array(one.size[::-1]) - 1
    corners = np.stack(np.meshgrid(*[[0, n] for n in last], indexing="ij"), -1).reshape(-1, 3)
    gap = crops.to_voxel(one, crops.to_world(other, corners)) - corners
    most = float(np.abs(gap).max())
    return f"lies up to {most:.1f} voxels away from its image" if most > APART else None


def _laid_over(mask: NDArray, of: Grid, grid: Grid, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Nearest neighbour on another grid, 0 beyond the mask."""
    to, start = crops.affine(grid)
    origin = crops.to_voxel(of, start)
    matrix = np.stack([crops.to_voxel(of, start + to[:, axis]) - origin for axis in range(3)], axis=1)
    return ndimage.affine_transform(mask, matrix, origin, output_shape=shape, order=0, mode="constant")
