"""Rubik's cubes: a volume as a grid of cubes that are moved and turned. N = cubes, numbered z, y, x; x runs fastest."""

import functools
import itertools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2w.geometry import Size
from p2w.pretext.views import flipped


def split(volumes: Tensor, grid: Size) -> Tensor:
    """(B, 1, d, h, w) -> its cubes, (B, N, d / grid, h / grid, w / grid)."""
    batch, _, *edges = volumes.shape
    a, b, c = grid
    d, h, w = (edge // count for edge, count in zip(edges, grid, strict=True))
    return volumes.reshape(batch, a, d, b, h, c, w).permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, -1, d, h, w)


def join(cubes: Tensor, grid: Size) -> Tensor:
    """The inverse of `split`."""
    batch, _, d, h, w = cubes.shape
    a, b, c = grid
    whole = cubes.view(batch, a, b, c, d, h, w).permute(0, 1, 4, 2, 5, 3, 6)
    return whole.reshape(batch, 1, a * d, b * h, c * w)


def turn(cubes: Tensor, flags: Tensor) -> Tensor:
    """Cubes (B, N, d, h, w), each turned by 180° about z where flags[..., 0], and about y where flags[..., 1].

    Both together are a turn about x: the two flags name all four orientations that half turns lead to. Quarter turns
    would need cubes of equal edges.
    """
    about_z, about_y = flags.unbind(-1)
    axes = torch.stack((about_y, about_z, about_z ^ about_y), -1)  # a half turn flips the other two axes
    return flipped(cubes.flatten(0, 1), axes.flatten(0, 1)).view_as(cubes)


@functools.cache
def permutations(count: int) -> NDArray[np.int64]:
    """(count, 8): orders of eight cubes far from one another, always the same ones.

    From the identity on, the next is the one whose smallest Hamming distance to those before is largest; among equals
    the one with the largest sum of distances, then the first in lexicographic order.
    """
    every = np.array(list(itertools.permutations(range(8))), np.int8)
    chosen, nearest, total = [0], np.full(len(every), 9), np.zeros(len(every), np.int64)
    while len(chosen) < count:
        distance = (every != every[chosen[-1]]).sum(1)
        nearest, total = np.minimum(nearest, distance), total + distance
        chosen.append(int(np.argmax(nearest * (9 * len(chosen)) + total)))
    return every[chosen].astype(np.int64)
