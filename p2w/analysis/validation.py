"""Validation loss on fixed parts, beside the loss of the best constant answer.

Parts of the validation wholes are keyed by (VALIDATION_SEED, epoch 0, id): the same at every step, rank count and run.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from p2w.data.stream import Batch, Stream
from p2w.geometry import Keys
from p2w.model import Output
from p2w.pretext.protocol import Pretext, Views
from p2w.world import World

VALIDATION_SEED = 0x9A275


def validation_keys(batch: Batch) -> Keys:
    """The keys of a validation batch's parts, for ever the same."""
    return Keys(VALIDATION_SEED, 0, batch.ids)


class Validation:
    """`val/loss` over every validation whole, each once, and `val/…` of the loss's further scalars.

    At step 0, of reconstructions, also `val/loss_mean_image`.

    The mean image is the voxel-wise mean of the validation targets themselves: the answer with the lowest mean squared
    error among those that ignore their input, so a network that beats it has looked.
    """

    def __init__(
        self, pretext: Pretext, model: nn.Module, stream: Callable[[], Stream], world: World
    ) -> None:
        self.pretext, self.model, self.stream, self.world = pretext, model, stream, world

    def __call__(self, step: int) -> Iterable[tuple[str, float]]:
        """Yield (name, mean over the wholes of what the pretext's loss says), the same on all ranks."""
        totals: Tensor | None = None  # weights, losses, further scalars
        names: list[str] = []
        for views, weight in self._views():
            output = self.model(views.input, *views.beside)
            each = [self._loss_of_one(output, views, index) for index in range(len(weight))]
            names = list(each[0][1])
            told = torch.stack([torch.stack((loss, *extras.values())).double() for loss, extras in each])
            sums = torch.cat((weight.sum()[None], weight @ told))
            totals = sums if totals is None else totals + sums
        assert totals is not None, "a split to validate holds a whole at least"
        count, *values = self.world.sum(totals).tolist()
        for name, value in zip(("loss", *names), values, strict=True):
            yield f"val/{name}", value / count
        if step == 0 and self.pretext.reconstructs:
            yield "val/loss_mean_image", self._mean_image_loss()

    def _views(self) -> Iterator[tuple[Views, Tensor]]:
        with self.stream() as stream:
            for batch in stream.batches():
                views = self.pretext.sample(batch.voxels, validation_keys(batch))
                yield views, batch.weight.to(self.world.device, torch.float64)

    def _loss_of_one(self, output: Output, views: Views, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        one = slice(index, index + 1)
        own = tuple(part[one] for part in output) if isinstance(output, tuple) else output[one]
        return self.pretext.loss(own, views.rows(one))

    def _mean_image_loss(self) -> float:
        totals: list[Tensor] = []  # sum of targets, of their squares, and their number
        for views, weight in self._views():
            target = views.target.double() * weight.view(-1, 1, 1, 1, 1)
            new = [target.sum(0), (target * views.target).sum(0), weight.sum()]
            totals = [old + more for old, more in zip(totals, new, strict=True)] if totals else new
        image, square, count = (self.world.sum(total.clone()) for total in totals)
        return float((square / count - (image / count) ** 2).mean())
