"""A pretrained encoder in MONAI's SegResNet or SwinUNETR: segments the lungs of a phantom scan, a few steps.

    pip install 'parts2whole[examples]'
    python examples/monai_networks.py runs/paper SegResNet     a run, a checkpoint, an exported file or folder
    python examples/monai_networks.py runs/paper SwinUNETR

The encoder takes the place of the network's own, and the decoder is MONAI's. MONAI's transforms give the input that the
encoder's card asks for: axes, spacing, intensities. Files come through `LoadImaged(keys, ensure_channel_first=True)` first.
"""

import sys

import numpy as np
import torch
from monai.data import MetaTensor
from monai.losses import DiceCELoss
from monai.networks.nets import SegResNet, SwinUNETR
from monai.transforms import Compose, Orientationd, ScaleIntensityRanged, Spacingd, SpatialPadd
from torch import Tensor, nn

import p2w
from p2w.errors import UserError, exits
from p2w.model import Encoder
from p2w.phantom import LUNGS, make_scan

SIZE = (32, 32, 64)  # voxels, z y x: edges divisible by 32
STEPS, BATCH, CHANNELS = 4, 1, 24  # CHANNELS: of the finest level of MONAI's decoder


class EncoderSegResNet(SegResNet):
    """SegResNet whose encoder is ours: volumes (B, 1, D, H, W) in [0, 1] -> logits (B, classes, D, H, W)."""

    def __init__(self, encoder: Encoder, classes: int) -> None:
        levels = len(encoder.strides)  # 1, 2, 4, …
        super().__init__(
            3, CHANNELS, out_channels=classes, blocks_down=(1,) * levels, blocks_up=(1,) * (levels - 1)
        )
        del self.convInit, self.down_layers
        self.encoder = encoder
        widths = [CHANNELS * 2**level for level in range(levels)]
        self.fit = nn.ModuleList(nn.Conv3d(c, w, 1) for c, w in zip(encoder.channels, widths, strict=True))

    def encode(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The coarsest features, and all of them fine to coarse, as wide as the decoder has them."""
        features = [fit(one) for fit, one in zip(self.fit, self.encoder(x), strict=True)]
        return features[-1], features


class Levels(nn.Module):
    """Our features at strides 2 to 32, as wide as SwinUNETR's; those that the encoder lacks are made of the one before."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder, self.have = encoder, [stride in encoder.strides for stride in (2, 4, 8, 16, 32)]
        channels = dict(zip(encoder.strides, encoder.channels, strict=True))
        widths = [CHANNELS * 2**level for level in range(5)]
        self.fit = nn.ModuleList(
            nn.Conv3d(channels[2 << i], w, 1) if self.have[i] else nn.Conv3d(w // 2, w, 2, stride=2)
            for i, w in enumerate(widths)
        )

    def forward(self, x: Tensor, normalize: bool) -> list[Tensor]:
        """(B, 1, D, H, W) -> five levels of features."""
        features, levels = iter(self.encoder(x)[self.encoder.strides.count(1) :]), []
        for fit, there in zip(self.fit, self.have, strict=True):
            levels.append(fit(next(features) if there else levels[-1]))
        return levels


def network_of(name: str, encoder: Encoder, classes: int) -> nn.Module:
    """The network with the encoder in it."""
    if name == "SegResNet":
        return EncoderSegResNet(encoder, classes)
    network = SwinUNETR(encoder.in_channels, classes, feature_size=CHANNELS)
    network.swinViT = Levels(encoder)
    return network


def transforms(card: dict) -> Compose:
    """MONAI's transforms from "image", in HU, and "label" to what the encoder was trained on: z, y, x, LPS, in [0, 1]."""
    both, fed = ("image", "label"), card["input"]
    spacing = fed["spacing_mm_zyx"]["network"]  # None: the run did not record it
    resample = [Spacingd(both, spacing, mode=("bilinear", "nearest"))] if spacing else []
    scale = ScaleIntensityRanged("image", *fed["window_hu"], 0, 1, clip=True)
    return Compose(
        [
            Orientationd(both, "SPL", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
            *resample,
            scale,
            SpatialPadd(both, SIZE),
        ]
    )


@exits
def main() -> int:
    """Network, input, loss, four steps."""
    if len(sys.argv) != 3 or sys.argv[2] not in ("SegResNet", "SwinUNETR"):
        raise UserError("name weights and network: python examples/monai_networks.py runs/paper SegResNet")
    network = network_of(sys.argv[2], p2w.load(sys.argv[1]), classes=2)
    dice_and_entropy = DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    scan, rng = make_scan(seed=0, shape=(64, 128, 128)), np.random.default_rng(0)
    z, y, x = scan.spacing_mm
    affine = np.array([[0, 0, -x, 0], [0, -y, 0, 0], [z, 0, 0, 0], [0, 0, 0, 1]])  # RAS+ of a z, y, x array
    arrays = {"image": scan.voxels, "label": np.isin(scan.labels, LUNGS)}
    images = {key: MetaTensor(array[None].astype(np.float32), affine=affine) for key, array in arrays.items()}
    images = transforms(p2w.card(sys.argv[1]))(images)
    volume, mask = images["image"].as_tensor()[0], images["label"].as_tensor()[0]
    for step in range(STEPS):
        corners = rng.integers(0, np.subtract(volume.shape, SIZE), (BATCH, 3), endpoint=True)
        boxes = [tuple(slice(c, c + n) for c, n in zip(corner, SIZE, strict=True)) for corner in corners]
        volumes, masks = (torch.stack([one[box] for box in boxes])[:, None] for one in (volume, mask))
        loss = dice_and_entropy(network(volumes), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}  loss {loss.item():.4f}")
    return 0


if __name__ == "__main__":
    main()
