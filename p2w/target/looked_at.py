"""A scan that a fine-tuned network looks at: its images turned to LPS, windows or candidates of it, and the way back."""

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from p2w.data.find import Source, find_scans
from p2w.data.grid import BadScan, Grid, to_canonical
from p2w.data.progress import Progress
from p2w.data.scan import read_image, read_scan, stored_grid
from p2w.errors import UserError
from p2w.target import crops
from p2w.target.crops import Place
from p2w.target.fitted import Fitted
from p2w.target.sliding import Windows, on_scan, slices
from p2w.target.tasks import ct, pairs, tables
from p2w.target.tasks.bms import scale, scaled

Cut = Callable[[Place], NDArray[np.int16]]  # one channel's crop, in stored values
SCORED = (("x", "coordX"), ("y", "coordY"), ("z", "coordZ"), ("series", "seriesuid", "scan", ""))


@dataclass(frozen=True)
class Subject:
    """`cuts` one a channel; `grid` canonical, `stored_grid` as the first image's file has it."""

    name: str
    uid: str
    cuts: tuple[Cut, ...]
    voxels: NDArray[Any]  # of the first channel, canonical [z,y,x]
    grid: Grid
    stored_grid: Grid

    def crop(self, place: Place) -> NDArray[np.int16]:
        """(C, D, H, W)."""
        return np.stack([cut(place) for cut in self.cuts])

    def stored(self, mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A canonical volume in the order of the file."""
        _, order, flips = self.stored_grid.canonical()
        out = np.zeros(self.stored_grid.size[::-1], np.uint8)
        to_canonical(out, order, flips)[...] = mask
        return out

    def shown(self) -> NDArray[Any]:
        """What a preview is drawn over."""
        return self.voxels


def read_subject(paths: Sequence[Path], fitted: Fitted) -> Subject:
    """Read the images of a scan, one a channel, on one grid. Raises UserError in one line for any that cannot be used."""
    sources = [_source(path) for path in paths]
    cuts: list[Cut] = []
    grids: list[Grid] = []
    first: NDArray[Any] | None = None
    for path, source in zip(paths, sources, strict=True):
        try:
            voxels, grid, cut = _channel(source, fitted)
        except (BadScan, OSError) as error:
            raise UserError(f"{path}: {error}") from error
        cuts.append(cut)
        grids.append(grid)
        first = voxels if first is None else first
        if said := pairs.apart(grids[0], grid):
            raise UserError(f"{path}: {said.replace('its image', str(paths[0]))}")
    assert first is not None
    name = paths[0].name
    return Subject(name, sources[0].uid, tuple(cuts), first, grids[0], stored_grid(sources[0]))


def _source(path: Path) -> Source:
    if not path.exists():
        raise UserError(f"{path}: no such file; name a scan with --scan")
    if not path.is_dir():
        return pairs.as_source(path.name, str(path))
    found = find_scans([str(path)], str(path / ".out"))  # there is none: nothing is left out
    if len(found.sources) != 1:
        why = f"; {found.bad[0][0]}: {found.bad[0][1]}" if found.bad else ""
        raise UserError(f"{path}: {len(found.sources)} scans in it, one is needed{why}")
    return found.sources[0]


def _channel(source: Source, fitted: Fitted) -> tuple[NDArray[Any], Grid, Cut]:
    """Voxels, grid and crops in stored values, as the task's data was prepared."""
    if fitted.in_hu:
        scan = read_scan(source)
        return scan.voxels, scan.grid, lambda place: ct.hu(scan.voxels, place)
    image = read_image(source)
    low, high = scale("image", image)
    return image.values, image.grid, lambda place: scaled(image.values, place, low, high)


def windows_of(subject: Subject, fitted: Fitted, overlap: float) -> Windows:
    """The windows of a scan, at the spacing that the network was trained at."""
    z, y, x = (int(n) for n in subject.voxels.shape)
    step = (1.0, 1.0, 1.0)
    if fitted.spacing_mm is not None:
        ratio = np.array(fitted.spacing_mm) / crops.spacing_zyx(subject.grid)
        near = np.where(np.abs(ratio - 1) < 1e-3, 1.0, ratio)
        step = (float(near[0]), float(near[1]), float(near[2]))
    return Windows((z, y, x), fitted.size, step, overlap)


def mask_of(
    subject: Subject, fitted: Fitted, overlap: float, threshold: float, batch: int, dtype: torch.dtype | None
) -> NDArray[np.uint8]:
    """0 and 1 on the canonical grid [z,y,x]."""
    windows = windows_of(subject, fitted, overlap)
    device = next(fitted.network.parameters()).device
    levels, across = len(windows.starts(0)), len(windows.starts(1)) * len(windows.starts(2))
    progress = Progress(levels * math.ceil(across / batch), "batches of windows")

    def predict(places: list[Place]) -> NDArray[np.float32]:
        stack = torch.from_numpy(np.stack([subject.crop(place) for place in places]))
        found = fitted.probabilities(stack.to(device), dtype).cpu().numpy()
        progress.step(f"{len(windows):,} windows in all")
        progress.tick()
        return found

    mask = np.zeros(windows.shape, np.uint8)
    with progress:
        for z, image in enumerate(on_scan(slices(windows, predict, batch), windows)):
            mask[z] = image > threshold
    return mask


def scores_of(
    subject: Subject, fitted: Fitted, table: Path, batch: int, dtype: torch.dtype | None
) -> tuple[str, int]:
    """CSV x,y,z,probability, one row a candidate of this scan in the table's order, and how many.

    Raises UserError for a candidate outside the scan, or none in it.
    """
    device = next(fitted.network.parameters()).device
    world: list[tuple[float, float, float]] = []
    for line, (x, y, z, series) in tables.read(str(table), SCORED):
        if series and series not in (subject.uid, pairs.stem(subject.name), subject.name):
            continue
        at = [
            tables.number(str(table), line, name, text) for name, text in zip("xyz", (x, y, z), strict=True)
        ]
        voxel = crops.to_voxel(subject.grid, np.array(at[::-1]))
        if ((voxel < -0.5) | (voxel > np.array(subject.voxels.shape) - 0.5)).any():
            where = ", ".join(f"{value:.1f}" for value in voxel[::-1])
            raise UserError(
                f"{table}, line {line}: voxel ({where}) is outside {subject.name}; x, y, z are LPS mm"
            )
        world.append((at[0], at[1], at[2]))
    if not world:
        raise UserError(f"{table}: names no candidate of {subject.name}")
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("x", "y", "z", "probability"))
    for start in range(0, len(world), batch):
        some = world[start : start + batch]
        centres = [crops.to_voxel(subject.grid, np.array(at[::-1])) for at in some]
        places = [Place.round(one, fitted.size, subject.grid, fitted.spacing_mm) for one in centres]
        stack = torch.from_numpy(np.stack([subject.crop(place) for place in places])).to(device)
        found = fitted.probabilities(stack, dtype).cpu().tolist()
        rows.writerows((*at, f"{value:.6f}") for at, value in zip(some, found, strict=True))
    return text.getvalue(), len(world)
