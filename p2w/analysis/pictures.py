"""The pictures people look at while it trains: part | reconstruction | whole of four fixed wholes."""

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from p2w.analysis import figures
from p2w.analysis.validation import VALIDATION_SEED
from p2w.data.stream import DataError, ShardSet
from p2w.geometry import Keys
from p2w.log import Log
from p2w.pretext.protocol import Pretext

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CANDIDATES, SHOWN = 24, 4


class Pictures:
    """Shows rank 0 in TensorBoard how four wholes with much to see are reconstructed. Yields no numbers."""

    def __init__(
        self, pretext: Pretext, model: nn.Module, shards: ShardSet, split: str, device: torch.device, log: Log
    ) -> None:
        self.pretext, self.model, self.log = pretext, model, log
        if log.speaks:
            voxels, ids = telling_wholes(shards, split)
            self.keys = [shards.key(int(row)) for row in ids]
            self.extent_mm = shards.spacing_mm[ids.numpy()] * shards.shape
            self.views = pretext.sample(voxels.to(device), Keys(VALIDATION_SEED, 0, ids.to(device)))

    def __call__(self, step: int) -> Iterable[tuple[str, float]]:
        """Draw; the other ranks have nothing to do."""
        if self.log.speaks:
            self.log.picture("reconstruction", self.figure(), step)
        return ()

    def figure(self) -> "Figure":
        """The network as it stands, in evaluation mode."""
        return figures.triptych(self.views.input, self.model(self.views.input), self.views.target)

    def volumes(self) -> bytes:
        """The same as an npz file, for the slider of report.html, which holds for analysis/reconstructions.npz too.

        `whole` (W, d, h, w), `part` and `output` (W, S, d, h, w), uint8, 0..255 for 0..1; `keys` (W,); `extent_mm`
        (W, 3), edges z y x of the whole; `scale` (S,), here one NaN: each part has the volume that training gave it.
        """
        views, packed = self.views, io.BytesIO()
        part, output = _grey(views.input)[:, None], _grey(self.model(views.input))[:, None]
        np.savez_compressed(
            packed, whole=_grey(views.target), part=part, output=output,
            scale=np.array([np.nan]), keys=np.array(self.keys), extent_mm=self.extent_mm,
        )  # fmt: skip
        return packed.getvalue()


def _grey(volumes: Tensor) -> NDArray[np.uint8]:
    """(B, 1, d, h, w) in [0, 1] -> (B, d, h, w)."""
    return (volumes[:, 0].float().clamp(0, 1) * 255).round().byte().cpu().numpy()


def telling_wholes(shards: ShardSet, split: str) -> tuple[Tensor, Tensor]:
    """Voxels (4, D, H, W) int16 and ids (4,): of evenly spread wholes, those with the largest standard deviation."""
    ids = shards.ids(split)
    spread = ids[np.unique(np.linspace(0, len(ids) - 1, min(CANDIDATES, len(ids))).astype(int))]
    voxels = np.empty((len(spread), *shards.shape), np.int16)
    good = np.ones(len(spread), bool)
    with shards.reader(spread) as reader:
        for row, sub_scan in enumerate(spread):
            try:
                reader.read_into(int(sub_scan), voxels[row])
            except DataError:
                good[row] = False
                if shards.on_bad == "stop" or (not good[: row + 1].any() and row + 1 == len(spread)):
                    raise
    voxels, spread = voxels[good], spread[good]
    best = np.argsort(-voxels.reshape(len(voxels), -1)[:, ::16].std(1))[:SHOWN]
    return torch.from_numpy(voxels[best]), torch.from_numpy(spread[best])
