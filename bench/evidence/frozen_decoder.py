"""What do an encoder's coarsest features hold of where in the body a voxel lies? A linear decoder of them, encoder frozen.

Batch norm of the encoder is recalibrated on the training crops, and its coarsest features of all crops are computed once.
The decoder is one transposed convolution whose kernel and stride are the features' stride: without skips, each cell of the
features draws the voxels below it. Its weights are the ridge regression of the one-hot mask, in closed form, so that
nothing depends on a learning rate or on how long a decoder is trained. `transfer.py` calls this for every starting point.
Shapes: N = crops, C, D, H, W = channels, slices, rows, columns; features (N, C, D/s, H/s, W/s) for a stride of s;
K = classes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from p2w.analysis.feature_sources import autocast
from p2w.finetune.task_types import TaskType, task_type
from p2w.model import Encoder
from p2w.model.norm import recalibrated
from p2w.tasks.reader import TargetSet
from p2w.train.optim import choose_precision
from p2w.world import World

SHOWN = 64  # crops at a time
SPLITS = ("train", "val", "test")
PENALTIES = tuple(10.0**power for power in range(-4, 3))  # times the mean square of the features
SHARE = 2 / 3  # of the training patients, drawn anew for each decoder


@dataclass(frozen=True)
class Crops:
    """Crops (N, 1, D, H, W) in [0, 1], masks (N, 1, D, H, W) and the patient of each crop, by split."""

    kind: TaskType
    voxels: dict[str, Tensor]
    masks: dict[str, Tensor]
    patients: dict[str, list[str]]

    @staticmethod
    def read(source: TargetSet) -> "Crops":
        """All crops of a set, in memory."""
        low, high = source.window
        voxels, masks, patients = {}, {}, {}
        for split in SPLITS:
            rows = source.rows(split, None)
            read, masks[split] = source.read(rows)
            voxels[split] = ((read.float() - low) / (high - low)).clamp(0, 1)
            patients[split] = [source.patient[row] for row in rows]
        return Crops(task_type(source.kind).for_set(source.meta), voxels, masks, patients)

    def drawn(self, seed: int) -> Tensor:
        """Positions of the training crops of SHARE of the training patients."""
        own = self.patients["train"]
        names = sorted(set(own))
        kept = set(np.random.default_rng(seed).permutation(names)[: round(SHARE * len(names))].tolist())
        return torch.tensor([at for at, name in enumerate(own) if name in kept])


@torch.no_grad()
def coarsest(encoder: Encoder, crops: Crops, world: World) -> dict[str, Tensor]:
    """The coarsest features of all crops, float32, with batch norm recalibrated on the training crops."""
    precision = choose_precision("auto", world.device)
    with autocast(world.device, precision):
        fixed = recalibrated(encoder, crops.voxels["train"].split(SHOWN))
        return {
            split: torch.cat([fixed(some)[-1].float() for some in crops.voxels[split].split(SHOWN)])
            for split in SPLITS
        }


def cells(features: Tensor) -> Tensor:
    """(N, C, d, h, w) -> (N d h w, C), float64."""
    return features.permute(0, 2, 3, 4, 1).flatten(0, 3).double()


def blocks(masks: Tensor, size: torch.Size, classes: int) -> Tensor:
    """Masks (N, 1, D, H, W) of class numbers -> one-hot (N d h w, V K): the V voxels below each of the cells (d, h, w)."""
    steps = [edge // cell for edge, cell in zip(masks.shape[2:], size, strict=True)]
    (d, h, w), (a, b, c) = size, steps
    below = masks.long().view(-1, d, a, h, b, w, c).permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(0, 3)
    return torch.nn.functional.one_hot(below, classes).flatten(1).double()


def volumes(drawn: Tensor, shape: torch.Size, size: torch.Size, classes: int) -> Tensor:
    """The inverse of `blocks`: (N d h w, V K) -> (N, K, D, H, W) for masks of `shape` (N, 1, D, H, W)."""
    (d, h, w), edges = size, shape[2:]
    a, b, c = (edge // cell for edge, cell in zip(edges, size, strict=True))
    apart = drawn.view(-1, d, h, w, a, b, c, classes).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return apart.reshape(-1, classes, *edges)


def decode(features: dict[str, Tensor], crops: Crops, seed: int) -> dict[str, Any]:
    """Fit a decoder on the patients that `seed` draws, its penalty chosen by the validation error; judge it on the test.

    Returns `val_error`, the mean squared error of the one-hot mask on the validation crops; `explained`, the share of the
    variance of the test crops' one-hot masks (about the training crops' mean at each voxel below a cell) that is explained;
    and the metrics of the task.
    """
    kind, size = crops.kind, features["train"].shape[2:]
    chosen, count = crops.drawn(seed), len(crops.kind.classes)
    x = {split: cells(some[chosen] if split == "train" else some) for split, some in features.items()}
    y = {
        split: blocks(some[chosen] if split == "train" else some, size, count)
        for split, some in crops.masks.items()
    }
    middle, spread, mean = x["train"].mean(0), x["train"].std(0).clamp(min=1e-6), y["train"].mean(0)
    x = {split: (some - middle) / spread for split, some in x.items()}
    square, product = x["train"].T @ x["train"], x["train"].T @ (y["train"] - mean)
    unit = len(x["train"]) * torch.eye(len(square), dtype=torch.float64)
    fits = {penalty: torch.linalg.solve(square + penalty * unit, product) for penalty in PENALTIES}
    errors = {
        penalty: float((x["val"] @ weights + mean - y["val"]).square().mean())
        for penalty, weights in fits.items()
    }
    penalty = min(errors, key=lambda one: errors[one])
    drawn = x["test"] @ fits[penalty] + mean
    error, variance = (float((some - y["test"]).square().mean()) for some in (drawn, mean.expand_as(drawn)))
    logits = volumes(drawn, crops.masks["test"].shape, size, count)
    found = kind.measure(kind.record(logits.float(), crops.masks["test"]), crops.patients["test"])
    return {
        "seed": seed, "penalty": penalty, "val_error": errors[penalty], "explained": 1 - error / variance, "test": found,
    }  # fmt: skip
