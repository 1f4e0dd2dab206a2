"""How well do an encoder's features separate the classes of a target task, without fine-tuning? A linear probe.

    python bench/evidence/linear_probe.py TARGETS/ncc random runs/p2w runs/autoencoder  # AUC of each level, rank

A logistic regression on the mean and maximum over space of each level's features, fitted on all training samples and
evaluated on the test samples. Batch norm is recalibrated on the training samples, for every encoder alike.
N = samples, C = channels.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import p2w
from p2w.analysis.similarity import effective_rank
from p2w.model import build_encoder
from p2w.model.norm import recalibrated
from p2w.tasks.reader import TargetSet, open_target

WIDTH, BATCH = 8, 64


def unit(source: TargetSet, split: str) -> tuple[Tensor, NDArray[Any]]:
    """Samples (N, 1, D, H, W) in [0, 1] and labels (N,); for a set with folds, with fold 0 as the test set."""
    voxels, labels = source.read(source.rows(split, 0 if source.folds else None))
    low, high = source.window
    return ((voxels.float() - low) / (high - low)).clamp(0, 1), labels.numpy()


@torch.no_grad()
def pooled(encoder: nn.Module, x: Tensor) -> list[NDArray[np.float32]]:
    """Features (N, 2 C) of every level, of an encoder in evaluation mode."""
    parts = [encoder(some) for some in x.split(BATCH)]
    return [
        torch.cat([torch.cat((level.mean((2, 3, 4)), level.amax((2, 3, 4))), 1) for level in levels]).numpy()
        for levels in zip(*parts, strict=True)
    ]


def level_aucs(encoder: nn.Module, source: TargetSet) -> list[float]:
    """AUC on the test samples for each level, from the finest to the bottleneck."""
    (x, labels), (x_test, labels_test) = unit(source, "train"), unit(source, "test")
    encoder = recalibrated(encoder, x.split(BATCH))
    found = []
    for seen, asked in zip(pooled(encoder, x), pooled(encoder, x_test), strict=True):
        fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000)).fit(seen, labels)
        found.append(float(roc_auc_score(labels_test, fitted.decision_function(asked))))
    return found


def feature_rank(encoder: nn.Module, source: TargetSet) -> float:
    """Effective rank of the bottleneck's mean features of the test samples."""
    encoder = recalibrated(encoder, unit(source, "train")[0].split(BATCH))
    features = pooled(encoder, unit(source, "test")[0])[-1].astype(np.float64)
    return effective_rank(features[:, : features.shape[1] // 2])


def encoder_of(start: str | Path) -> nn.Module:
    """The encoder of a run, or for `random` one initialised with seed 0."""
    torch.manual_seed(0)
    return build_encoder("unet3d", WIDTH) if str(start) == "random" else p2w.load(start)


def main() -> None:
    """Print a row for each encoder of the command line."""
    source = open_target(sys.argv[1])
    for start in sys.argv[2:]:
        encoder = encoder_of(start)
        print(
            start,
            *(f"{auc:.3f}" for auc in level_aucs(encoder, source)),
            f"rank {feature_rank(encoder, source):.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
