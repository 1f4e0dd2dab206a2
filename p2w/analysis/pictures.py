"""The pictures people look at while it trains: part | reconstruction | whole, or what else a pretext has."""

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from p2w.analysis import figures
from p2w.analysis.looks import read, spread
from p2w.analysis.validation import VALIDATION_SEED
from p2w.data.stream import ShardSet
from p2w.errors import UserError
from p2w.geometry import Keys
from p2w.log import Log
from p2w.pretext.protocol import Pretext

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CANDIDATES, SHOWN = 24, 4


class Pictures:
    """Shows rank 0 in TensorBoard what becomes of four wholes with much to see. Yields no numbers."""

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
        """Show plain pixels, which matplotlib's titles would make ten times as dear; other ranks have nothing to do."""
        if self.log.speaks:
            columns = self._columns()
            self.log.picture(f"{', '.join(columns)}; each axial, coronal", figures.strip(columns), step)
        return ()

    def figure(self) -> "Figure":
        """The network as it stands, in evaluation mode."""
        return figures.slices(self._columns())

    def _columns(self) -> dict[str, Tensor]:
        """Titles and volumes; the answer, where it is a volume, stands before what was asked."""
        shown = self.pretext.panels(self.views)
        if not self.pretext.reconstructs:
            return shown
        *given, asked = shown
        answer = {"reconstruction": self.model(self.views.input)}
        return {title: shown[title] for title in given} | answer | {asked: shown[asked]}

    def volumes(self) -> bytes:
        """What was reconstructed as an npz file, for the slider of report.html; analysis/reconstructions.npz is alike.

        `whole` (W, d, h, w), `part` and `output` (W, S, d, h, w), uint8, 0..255 for 0..1; `keys` (W,); `extent_mm`
        (W, 3), edges z y x of the whole; `scale` (S,), here one NaN: each part has the volume that training gave it.
        """
        views, packed = self.views, io.BytesIO()
        part, output = grey(views.input)[:, None], grey(self.model(views.input))[:, None]
        np.savez_compressed(
            packed, whole=grey(views.target), part=part, output=output,
            scale=np.array([np.nan]), keys=np.array(self.keys), extent_mm=self.extent_mm,
        )  # fmt: skip
        return packed.getvalue()


def grey(volumes: Tensor) -> NDArray[np.uint8]:
    """(B, 1, d, h, w) in [0, 1] -> (B, d, h, w)."""
    return (volumes[:, 0].float().clamp(0, 1) * 255).round().byte().cpu().numpy()


def telling_wholes(shards: ShardSet, split: str) -> tuple[Tensor, Tensor]:
    """Voxels (4, D, H, W) int16 and ids (4,): of evenly spread wholes, those with the largest standard deviation."""
    ids = spread(shards.ids(split), CANDIDATES)
    voxels, good = read(shards, ids)
    if not good.any():
        raise UserError(
            f"{shards.where}: not one of {len(ids)} sub-scans of '{split}' can be read; run p2w verify on it"
        )
    voxels, ids = voxels[torch.from_numpy(good)], ids[good]
    best = voxels.flatten(1)[:, ::16].float().std(1).argsort(descending=True, stable=True)[:SHOWN]
    return voxels[best], torch.from_numpy(ids)[best]
