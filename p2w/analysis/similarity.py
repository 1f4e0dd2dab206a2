"""Are parts of one image closer than parts of different images? Cosine similarity of pooled features (paper, Fig. 2b).

A positive pair is two parts of one whole, a negative pair two parts of different wholes. Separability is the area under
the ROC curve (0.5: none, 1: all).
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def pair_cosines(features: Array) -> tuple[Array, Array]:
    """Cosines of all pairs of parts of one whole, and of all pairs of parts of two wholes.

    `features` is (wholes, parts, channels); a feature of zeros has cosine 0 with all others.
    """
    unit = features / np.maximum(np.linalg.norm(features, axis=2, keepdims=True), 1e-12)
    wholes, parts, channels = unit.shape
    flat, owner = unit.reshape(wholes * parts, channels), np.repeat(np.arange(wholes), parts)
    first, second = np.triu_indices(wholes * parts, 1)
    cosines = (flat @ flat.T)[first, second]
    same = owner[first] == owner[second]
    return cosines[same], cosines[~same]


def auc(positive: Array, negative: Array) -> float:
    """Area under the ROC curve: probability that a positive pair is more similar than a negative one, ties half."""
    order = np.sort(
        negative
    )  # ranks are counted here: importing scikit-learn for it would take seconds of every start
    below = np.searchsorted(order, positive, "left") + np.searchsorted(order, positive, "right")
    return float(below.sum() / (2 * len(positive) * len(negative)))


def effective_rank(features: Array) -> float:
    """Over how many directions features (n, channels) spread: from 1 to the number of channels; nan where all are one.

    The exponential of the entropy of the singular values' shares (Roy, Vetterli 2007), of the features less their mean.
    Needs no labels, and says what the reconstruction does not: how much of its input an encoder keeps (docs/targets.md).
    """
    values = np.linalg.svd(features - features.mean(0), compute_uv=False)
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else float("nan")


def similarity_file(run: Path, step: int) -> Path:
    """Where the cosines of `step` are kept."""
    folder = run / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"similarity-{step:08d}.npz"
