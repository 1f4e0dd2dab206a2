"""Nearest neighbours of a part among all wholes: does its feature name the whole it came from?

A query is a part; the gallery has one entry a whole: the whole itself (scale 1), or another part of each. The rank of a
query is the place of its own whole by cosine similarity, ties against it: a network that answers the same for all
gets the last place, not a lucky one.
"""

import numpy as np
import torch
from torch import Tensor

from p2w.analysis.pairs import TINY, check_enough

ROUNDING = 1e-12  # of a float64 cosine


@torch.no_grad()
def ranks(queries: Tensor, gallery: Tensor) -> Tensor:
    """Rank (N,) int64, from 1, of entry i of `gallery` (N, C) for query i of `queries` (N, C).

    In float64: features of a network that never learned are alike to six digits, and equal ones must tie.
    """
    similar = unit(queries) @ unit(gallery).T
    return (similar >= similar.diagonal()[:, None] - ROUNDING).sum(1)


def unit(features: Tensor) -> Tensor:
    """Features (..., C) at length 1, float64."""
    return torch.nn.functional.normalize(features.double(), dim=-1, eps=TINY)


def among_wholes(parts: Tensor, wholes: Tensor) -> Tensor:
    """Ranks (P, W) of every part, features (W, P, C), in the gallery of wholes (W, C)."""
    return torch.stack([ranks(parts[:, part], wholes) for part in range(parts.shape[1])])


def among_parts(parts: Tensor) -> Tensor:
    """Ranks (P, W) of part p of every whole, features (W, P, C), in the gallery of their parts p + 1 (after the last, 0)."""
    check_enough(*parts.shape[:2])
    count = parts.shape[1]
    return torch.stack([ranks(parts[:, part], parts[:, (part + 1) % count]) for part in range(count)])


def scores(ranks: Tensor, gallery: int) -> dict[str, float]:
    """Share of ranks that are 1 and at most 5, mean of 1 / rank; and what drawing the order by lot would give."""
    found = ranks.double()
    return {
        "top1": float((found <= 1).double().mean()),
        "top5": float((found <= 5).double().mean()),
        "mrr": float((1 / found).mean()),
        "chance_top1": 1 / gallery,
        "chance_top5": min(5, gallery) / gallery,
        "chance_mrr": float((1 / np.arange(1, gallery + 1)).mean()),
        "n_queries": found.numel(),
        "gallery": gallery,
    }
