"""What do an encoder's features tell of a target task before they are fine-tuned?

    python bench/evidence/frozen.py TARGETS/ncc random runs/p2w runs/autoencoder     # AUC at each level, rank of the last

A logistic regression on each level's features, their mean and maximum over space, fitted on all training samples and
judged on the test samples. Batch norm takes the statistics of the task's own samples, as at the start of fine-tuning.
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
from p2w.tasks.reader import TargetSet, open_target

WIDTH, BATCH = 8, 64


def unit(source: TargetSet, split: str) -> tuple[Tensor, NDArray[Any]]:
    """Samples (N, 1, D, H, W) in [0, 1] and labels (N,); of a set with folds, those where fold 0 is tested on."""
    voxels, labels = source.read(source.rows(split, 0 if source.folds else None))
    low, high = source.window
    return ((voxels.float() - low) / (high - low)).clamp(0, 1), labels.numpy()


@torch.no_grad()
def pooled(encoder: nn.Module, x: Tensor) -> list[NDArray[np.float32]]:
    """(N, 2 C) of every level."""
    encoder.train()
    parts = [encoder(some) for some in x.split(BATCH)]
    return [
        torch.cat([torch.cat((level.mean((2, 3, 4)), level.amax((2, 3, 4))), 1) for level in levels]).numpy()
        for levels in zip(*parts, strict=True)
    ]


def told(encoder: nn.Module, source: TargetSet) -> list[float]:
    """AUC on the test samples, level by level, from the finest to the bottleneck."""
    (x, labels), (x_test, labels_test) = unit(source, "train"), unit(source, "test")
    found = []
    for seen, asked in zip(pooled(encoder, x), pooled(encoder, x_test), strict=True):
        fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000)).fit(seen, labels)
        found.append(float(roc_auc_score(labels_test, fitted.decision_function(asked))))
    return found


def rank(encoder: nn.Module, source: TargetSet) -> float:
    """Effective rank of the bottleneck's mean features of the test samples."""
    features = pooled(encoder, unit(source, "test")[0])[-1].astype(np.float64)
    return effective_rank(features[:, : features.shape[1] // 2])


def encoder_of(start: str | Path) -> nn.Module:
    """`random`, with seed 0, or what a run has learned."""
    torch.manual_seed(0)
    return build_encoder("unet3d", WIDTH) if str(start) == "random" else p2w.load(start)


def main() -> None:
    source = open_target(sys.argv[1])
    for start in sys.argv[2:]:
        encoder = encoder_of(start)
        print(
            start,
            *(f"{auc:.3f}" for auc in told(encoder, source)),
            f"rank {rank(encoder, source):.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
