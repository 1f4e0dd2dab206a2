"""Crops with their masks: tiles that cover what is to be found, or one crop round each object."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from p2w.data.grid import Grid
from p2w.errors import UserError
from p2w.target import crops
from p2w.target.crops import Place
from p2w.target.tasks import ct
from p2w.target.tasks.protocol import LeftOut, Sample

HALF = 0.5  # a voxel belongs to the mask when more than this of it does
Channels = Callable[[Place], Sequence[NDArray]]  # crops int16 [z,y,x] of a place


@dataclass(frozen=True)
class Tiles:
    """How a scan with a mask is cut into tiles."""

    spacing: tuple[float, float, float] | None = None
    """mm z y x of a sample's voxels; left out: the scan's own."""
    stride: float = 1.0
    """Distance of neighbouring tiles in sizes of a tile: 1 = none overlap, 0.5 = half of each."""
    min_foreground: float = 0.01
    """Leave out tiles of which a smaller share is foreground; 0 keeps all that hold any."""
    max_tiles: int = 0
    """Tiles kept of each scan, drawn by --seed; 0: all."""
    resample_masks: bool = False
    """Lay a mask whose geometry is not its image's over it by nearest neighbour, instead of refusing it."""
    seed: int = 0
    """Draws what is drawn: the tiles that are kept, the split where there is chance in it."""

    def check_tiles(self) -> None:
        """Raise UserError for values that make no tiles."""
        if self.spacing is not None and not all(0.01 <= mm <= 100 for mm in self.spacing):
            raise UserError(f"--spacing {' '.join(map(str, self.spacing))}: mm z y x, each from 0.01 to 100")
        if not 0.1 <= self.stride <= 10:
            raise UserError(f"--stride {self.stride:g}: from 0.1 to 10 sizes of a tile")
        if not 0 <= self.min_foreground < 1:
            raise UserError(
                f"--min-foreground {self.min_foreground:g}: a share of the voxels, from 0 to below 1"
            )
        if self.max_tiles < 0:
            raise UserError(f"--max-tiles {self.max_tiles}: 1 or more a scan, or 0 for all")


def tiled(
    channels: Channels, mask: NDArray, grid: Grid, size: tuple[int, int, int], how: Tiles, uid: str
) -> Iterator[Sample | LeftOut]:
    """Tiles over the bounding box of the mask, in the order of z, y, x."""
    box = ndimage.find_objects(mask)
    if not box or box[0] is None:
        yield LeftOut(f"{uid}: the mask is empty")
        return
    low, high = [part.start for part in box[0]], [part.stop for part in box[0]]
    step = np.ones(3) if how.spacing is None else np.array(how.spacing) / crops.spacing_zyx(grid)
    kept = []
    for number, centre in enumerate(crops.tiles(low, high, size, step, how.stride)):
        place = Place.round(centre, size, grid, how.spacing)
        piece = place.cut(mask, 0) > HALF
        if piece.any() and piece.mean() >= how.min_foreground:
            kept.append((number, place, piece))
    if how.max_tiles and len(kept) > how.max_tiles:
        order = np.argsort([draw(how.seed, uid, str(number)) for number, *_ in kept], kind="stable")
        kept = [kept[i] for i in sorted(order[: how.max_tiles])]
    if not kept:
        yield LeftOut(f"{uid}: no tile has {how.min_foreground:.0%} foreground")
    for number, place, piece in kept:
        yield ct.sample(channels(place), place, grid, f"tile {number}", -1, piece)


@dataclass(frozen=True)
class Round:
    """Crops round one object: their voxels, how many, and how far off its middle."""

    size: tuple[int, int, int]
    spacing: Sequence[float] | None  # mm of a sample's voxels, None: the scan's own
    jitter: float  # up to half of this share of a crop's size, along each axis
    crops: int
    seed: int

    def check(self) -> None:
        """Raise UserError for options that make no crops."""
        if not 0 <= self.jitter <= 0.9:
            raise UserError(f"--jitter {self.jitter:g}: from 0 (centred) to 0.9 of the crop's size")
        if not 1 <= self.crops <= 1000:
            raise UserError(f"--crops {self.crops}: from 1 to 1000 of each object")
        if self.crops > 1 and not self.jitter:
            raise UserError(f"--crops {self.crops} with --jitter 0 would be the same crop {self.crops} times")


def around(
    channels: Channels,
    mask: NDArray,
    grid: Grid,
    how: Round,
    name: str,
    of: str,
    everything: NDArray | None = None,
) -> Iterator[Sample | LeftOut]:
    """Crops round the middle of the mask's bounding box, each moved by chance, a function of seed and `name`.

    Without moving, a network learns that what it looks for is in the middle. `of`: what the samples are of.
    `everything`: a mask of which this one is a part, where a sample is to show other parts of it too.
    """
    box = ndimage.find_objects(mask)
    if not box or box[0] is None:
        yield LeftOut(f"{of}: the mask is empty")
        return
    centre = np.array([(part.start + part.stop - 1) / 2 for part in box[0]])
    step = np.ones(3) if how.spacing is None else np.array(how.spacing) / crops.spacing_zyx(grid)
    for crop in range(how.crops):
        move = np.array([draw(how.seed, name, f"{crop} {axis}") - 0.5 for axis in "zyx"])
        place = Place.round(
            centre + move * how.jitter * np.array(how.size) * step, how.size, grid, how.spacing
        )
        piece = place.cut(mask if everything is None else everything, 0) > HALF
        if piece.any():
            yield ct.sample(channels(place), place, grid, of, -1, piece)
        else:
            yield LeftOut(f"{of}: too small to fill a voxel of the sample")


def draw(seed: int, uid: str, what: str) -> float:
    """A number from 0 to below 1, a function of these three alone."""
    digest = hashlib.sha256(f"{seed}:{uid}:{what}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
