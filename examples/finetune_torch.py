"""Plain torch on a pretrained encoder: a classification head, a few steps on crops of a phantom scan.

    python examples/finetune_torch.py runs/paper     a run, a checkpoint, an exported file or folder

The question is whether the middle of a crop is lung. With scans of your own, replace `crops`.
"""

import sys

import numpy as np
import torch
from torch import nn

import p2w
from p2w.errors import UserError, exits
from p2w.phantom import LUNGS, PhantomScan, make_scan

SIZE = (32, 32, 64)  # voxels, z y x: edges divisible by encoder.strides[-1]
STEPS, BATCH = 10, 4


def crops(scan: PhantomScan, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops (BATCH, 1, D, H, W) as encoders want them, HU of -1000 to 1000 scaled to [0, 1]; and 1.0 for lung, else 0.0."""
    corners = rng.integers(0, np.subtract(scan.voxels.shape, SIZE), (BATCH, 3), endpoint=True)
    boxes = [tuple(slice(c, c + n) for c, n in zip(corner, SIZE, strict=True)) for corner in corners]
    hu = np.stack([scan.voxels[box] for box in boxes]).astype(np.float32).clip(-1000, 1000)
    middle = tuple((corners + np.array(SIZE) // 2).T)
    return torch.from_numpy((hu + 1000) / 2000)[:, None], torch.from_numpy(
        np.isin(scan.labels[middle], LUNGS).astype(np.float32)
    )


@exits
def main() -> int:
    """Encoder, head, ten steps."""
    if len(sys.argv) != 2:
        raise UserError("name what holds the weights: python examples/finetune_torch.py runs/paper")
    encoder = p2w.load(sys.argv[1])
    head = nn.Linear(encoder.channels[-1], 1)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=1e-3)
    scan, rng = make_scan(seed=0, shape=(64, 128, 128)), np.random.default_rng(0)
    for step in range(STEPS):
        volumes, lung = crops(scan, rng)
        logits = head(encoder.pooled(volumes))[:, 0]  # or encoder(volumes): features, fine to coarse
        loss = nn.functional.binary_cross_entropy_with_logits(logits, lung)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}  loss {loss.item():.4f}")
    return 0


if __name__ == "__main__":
    main()
