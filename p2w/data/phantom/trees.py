"""Trees that fill a space: bronchi and vessels."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2w.data.phantom.frame import Floats
from p2w.data.phantom.tubes import Balls


@dataclass(frozen=True)
class Tree:
    """Branches of one tree. `load`: how many terminal points a branch feeds."""

    start: Floats  # (M, 3) body mm
    bend: Floats  # (M, 3) control point: leaves in the parent's direction
    end: Floats  # (M, 3)
    load: NDArray[np.intp]  # (M,)
    parent: NDArray[np.intp]  # (M,) -1 for the root

    def samples(self, radius: Floats, step_mm: float) -> tuple[Balls, NDArray[np.intp]]:
        """Balls along all branches of `radius` (M,) mm, and the branch (N,) each is on."""
        length = np.linalg.norm(self.end - self.start, axis=1)
        count = np.maximum(2, np.ceil(length / np.maximum(step_mm, radius * 0.4))).astype(int)
        branch = np.repeat(np.arange(len(count)), count)
        order = np.arange(len(branch)) - np.repeat(np.cumsum(count) - count, count)
        t = (order / count[branch])[:, None]
        points = (
            (1 - t) ** 2 * self.start[branch] + 2 * t * (1 - t) * self.bend[branch] + t**2 * self.end[branch]
        )
        before = np.where(self.parent >= 0, np.minimum(radius[self.parent], radius * 1.3), radius)
        return Balls(points, before[branch] + (radius - before)[branch] * np.minimum(1, 2 * t[:, 0])), branch


def grow(
    rng: np.random.Generator, root: Floats, direction: Floats, seeds: Floats, step: tuple[float, float]
) -> Tree:
    """A tree from `root` that reaches all `seeds` (N, 3): each branch goes part of the way to the middle of
    its seeds and parts them.

    The volume-filling rule of Tawhai et al. (2000, doi 10.1114/1.1289457), all branches of a generation at
    once.
    """
    owner = np.zeros(len(seeds), np.intp)
    tips, heads = root[None].astype(float), direction[None] / np.linalg.norm(direction)
    number = np.array([-1])  # of the branch that ends in each tip
    parts: list[tuple[Floats, Floats, Floats, NDArray[np.intp], NDArray[np.intp]]] = []
    made = 0
    for _ in range(40):
        count = np.bincount(owner, minlength=len(tips))
        middle = _mean(seeds, owner, count)
        away = middle - tips
        reach = np.linalg.norm(away, axis=1, keepdims=True) + 1e-6
        heading = away / reach + 0.3 * heads + rng.normal(0, 0.07, away.shape)
        heading /= np.linalg.norm(heading, axis=1, keepdims=True)
        last = (count == 1)[:, None]
        length = reach * np.where(last, 0.9, rng.uniform(*step, size=(len(tips), 1)))
        length = np.maximum(length, 2.0)
        ends = tips + np.where(last, away / reach, heading) * length
        parts.append((tips, tips + heads * length * 0.4, ends, count, number))
        mine = np.arange(made, made + len(tips))
        made += len(tips)
        go_on = count[owner] > 1
        seeds, owner = seeds[go_on], owner[go_on]
        if not len(seeds):
            break
        axis = _split_axes(seeds, owner, middle, ends - tips, tips=len(tips), rng=rng)
        side = ((seeds - middle[owner]) * axis[owner]).sum(axis=1) > 0
        alive, owner = np.unique(owner * 2 + side, return_inverse=True)
        tips, number, heads = ends[alive // 2], mine[alive // 2], heading[alive // 2]
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Tree(*columns)


def _mean(points: Floats, owner: NDArray[np.intp], count: NDArray[np.intp]) -> Floats:
    sums = [np.bincount(owner, points[:, a], len(count)) for a in range(3)]
    return np.stack(sums, axis=1) / np.maximum(count, 1)[:, None]


def _split_axes(
    seeds: Floats,
    owner: NDArray[np.intp],
    middle: Floats,
    ways: Floats,
    *,
    tips: int,
    rng: np.random.Generator,
) -> Floats:
    """For each tip the direction (3,) in which its seeds spread most, across the way it came."""
    off = seeds - middle[owner]
    spread = np.empty((tips, 3, 3))
    for i in range(3):
        for j in range(i, 3):
            spread[:, i, j] = spread[:, j, i] = np.bincount(owner, off[:, i] * off[:, j], tips)
    way = ways / np.linalg.norm(ways, axis=1, keepdims=True)
    across = np.eye(3) - 0.8 * way[:, :, None] * way[:, None, :]
    axis = np.linalg.eigh(across @ spread @ across)[1][:, :, 2]
    axis *= np.sign(axis[np.arange(tips), np.abs(axis).argmax(axis=1)])[:, None]  # eigh leaves the sign open
    return axis + rng.normal(0, 0.12, axis.shape)
