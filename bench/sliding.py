"""How long does a network take over a whole scan, next to MONAI's sliding_window_inference? One thread each.

    python bench/sliding.py                 # some minutes on a free core
    python bench/sliding.py --rounds 9

From int16 HU to a mask uint8, the same network, windows, overlap of a half and Gaussian weights, four windows at a time.
Sizes are such that both lay the same windows: ours are evenly apart, MONAI's last one is moved inwards. The masks are
compared. Once with the U-Net of fine-tuning at width 4, and once with a convolution of one voxel, which leaves cutting and
blending alone. CPU time of the process counts, so that other work on the machine does not; ratios are taken within a round.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, Goal, over, rotate, row, save, show
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray

from p2w.ct.discover import ScanSource
from p2w.ct.orientation import Grid
from p2w.finetune.task_types import task_type
from p2w.inference.finetuned_model import FineTunedModel
from p2w.inference.predict import InferenceInput, mask_of
from p2w.model import build_encoder
from p2w.tasks import crops

OVERLAP, BATCH = 0.5, 4
LOW, HIGH = crops.WINDOW_HU
Work = Callable[[], NDArray[np.uint8]]


class Point(torch.nn.Module):
    """A convolution of one voxel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv3d(1, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, 1, D, H, W)."""
        logits: torch.Tensor = self.conv(x)
        return logits


def ways(
    network: torch.nn.Module, voxels: NDArray[np.int16], size: tuple[int, int, int]
) -> tuple[Work, Work]:
    """Ours and MONAI's: functions that make the mask of the scan."""
    card = {
        "kind": "segmentation",
        "task": {"channels": 1, "size_zyx": list(size), "window": [LOW, HIGH], "settings": {"spacing": None}},
    }
    model = FineTunedModel(Path("none"), network.eval(), card)  # type: ignore[arg-type]  # a network of no task
    grid = Grid(voxels.shape[::-1], (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
    source = ScanSource("scan", "scan", ("none",))
    cut = (lambda box: crops.crop_hu(voxels, box),)
    scan = InferenceInput("scan", "scan", cut, voxels, grid, grid, source)

    def ours() -> NDArray[np.uint8]:
        mask: NDArray[np.uint8] = mask_of(scan, model, OVERLAP, 0.5, BATCH, None, progress_bar=False)
        return mask

    @torch.no_grad()
    def theirs() -> NDArray[np.uint8]:
        x = torch.from_numpy(voxels).float().clamp_(LOW, HIGH).sub_(LOW).div_(HIGH - LOW)[None, None]
        found = sliding_window_inference(
            x, size, BATCH, lambda part: network(part).sigmoid(), OVERLAP, "gaussian", 0.125
        )
        mask: NDArray[np.uint8] = (found[0, 0] > 0.5).to(torch.uint8).numpy()
        return mask

    return ours, theirs


def main() -> None:
    """Compare the masks, then measure, save and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    size = (32, 64, 64)
    cases = {
        "the U-Net at width 4": (
            task_type("segmentation").network(build_encoder("unet3d", 4)),
            (48, 160, 96),
        ),
        "a convolution of one voxel": (Point(), (64, 256, 256)),
    }
    rows, goals = [], []
    for name, (network, shape) in cases.items():
        voxels = np.random.default_rng(0).integers(-1000, 1001, shape).astype(np.int16)
        ours, theirs = ways(network, voxels, size)
        differing = float((ours() != theirs()).mean())
        assert differing < 1e-4, f"{name}: {differing:.2%} of the voxels differ"

        def timed(work: Work, voxels: NDArray[np.int16] = voxels) -> Callable[[], float]:
            def once() -> float:
                began = time.process_time()
                work()
                return voxels.size / 1e6 / (time.process_time() - began)

            return once

        rates = rotate({"p2w": timed(ours), "MONAI": timed(theirs)}, options.rounds)
        for (way, found), kind in zip(rates.items(), ("ours", "peer"), strict=True):
            rows.append(row(name, way, found, "Mvoxel/s", kind))
        goals.append(Goal(f"times MONAI's speed, {name}", over(rates["p2w"], rates["MONAI"]), 1.0))
    show(
        save(
            RESULTS / "sliding.json",
            "a network over a whole scan, against MONAI's sliding_window_inference",
            f"python bench/sliding.py --rounds {options.rounds}",
            rows,
            goals,
        )
    )


if __name__ == "__main__":
    main()
