"""MONAI's U-Net decoder on a pretrained encoder: segments the lungs of a phantom scan, a few steps.

    pip install 'parts2whole[examples]'
    python examples/monai_unet_decoder.py runs/paper     a run, a checkpoint, an exported file or folder

Any encoder whose finest features have the input's size (unet3d, resencl, vit3d): MONAI's blocks see channels and strides.
"""

import itertools
import sys

import numpy as np
import torch
from monai.losses import DiceCELoss
from monai.networks.blocks import UnetOutBlock, UnetUpBlock
from torch import Tensor, nn

import p2w
from p2w.errors import UserError, exits
from p2w.model import Encoder
from p2w.phantom import LUNGS, make_scan

SIZE = (32, 32, 64)  # voxels, z y x: edges divisible by encoder.strides[-1]
STEPS, BATCH = 10, 2


class UNet(nn.Module):
    """Our encoder, MONAI's decoder: volumes (B, 1, D, H, W) in [0, 1] -> logits (B, classes, D, H, W)."""

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        levels = list(itertools.pairwise(zip(encoder.channels, encoder.strides, strict=True)))
        self.ups = nn.ModuleList(
            UnetUpBlock(
                3,
                cin,
                cout,
                kernel_size=3,
                stride=1,
                upsample_kernel_size=coarse // fine,
                norm_name="instance",
            )
            for (cout, fine), (cin, coarse) in reversed(levels)
        )
        self.head = UnetOutBlock(3, encoder.channels[0], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Down through the encoder, up through MONAI's blocks, with skips."""
        *skips, x = self.encoder(x)
        for up, skip in zip(self.ups, reversed(skips), strict=True):
            x = up(x, skip)
        return self.head(x)


@exits
def main() -> int:
    """Network, loss, ten steps."""
    if len(sys.argv) != 2:
        raise UserError("name what holds the weights: python examples/monai_unet_decoder.py runs/paper")
    network = UNet(p2w.load(sys.argv[1]), classes=2)
    dice_and_entropy = DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    scan, rng = make_scan(seed=0, shape=(64, 128, 128)), np.random.default_rng(0)
    volume = torch.from_numpy((scan.voxels.astype(np.float32).clip(-1000, 1000) + 1000) / 2000)
    lung = torch.from_numpy(np.isin(scan.labels, LUNGS).astype(np.int64))
    for step in range(STEPS):
        corners = rng.integers(0, np.subtract(volume.shape, SIZE), (BATCH, 3), endpoint=True)
        boxes = [tuple(slice(c, c + n) for c, n in zip(corner, SIZE, strict=True)) for corner in corners]
        volumes, masks = (torch.stack([whole[box] for box in boxes])[:, None] for whole in (volume, lung))
        loss = dice_and_entropy(network(volumes), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}  loss {loss.item():.4f}")
    return 0


if __name__ == "__main__":
    main()
