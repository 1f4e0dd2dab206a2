"""The pictures people look at while it trains: part | reconstruction | whole of four fixed wholes."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from p2w.analysis import figures
from p2w.analysis.looks import read, spread
from p2w.analysis.validation import VALIDATION_SEED
from p2w.data.stream import ShardSet
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
            self.views = pretext.sample(voxels.to(device), Keys(VALIDATION_SEED, 0, ids.to(device)))

    def __call__(self, step: int) -> Iterable[tuple[str, float]]:
        """Show plain pixels, which matplotlib's titles would make ten times as dear; other ranks have nothing to do."""
        if self.log.speaks:
            views = self.views
            pixels = figures.strip(views.input, self.model(views.input), views.target)
            self.log.picture("part, reconstruction, whole; each axial, coronal", pixels, step)
        return ()

    def figure(self) -> "Figure":
        """The network as it stands, in evaluation mode."""
        return figures.triptych(self.views.input, self.model(self.views.input), self.views.target)


def telling_wholes(shards: ShardSet, split: str) -> tuple[Tensor, Tensor]:
    """Voxels (4, D, H, W) int16 and ids (4,): of evenly spread wholes, those with the largest standard deviation."""
    ids = spread(shards.ids(split), CANDIDATES)
    voxels = read(shards, ids)
    best = voxels.flatten(1)[:, ::16].float().std(1).argsort(descending=True, stable=True)[:SHOWN]
    return voxels[best], torch.from_numpy(ids)[best]
