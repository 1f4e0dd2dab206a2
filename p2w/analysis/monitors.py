"""Monitors of a training run: validation loss on fixed parts, similarity and contrast of features, reconstructions.

Parts of the validation volumes are keyed by (VALIDATION_SEED, epoch 0, id): they are the same at every step, for every
number of ranks and in every run.

Probing the features takes as long as half a training step. It uses the same few validation volumes every time, and parts
of the paper's scale whatever the run trains on, so that runs with any settings can be compared.
"""

import io
import math
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from p2w import geometry
from p2w.analysis.similarity import auc, contrastive_losses, effective_rank, pair_cosines, similarity_file
from p2w.config import Config
from p2w.files import write_atomic
from p2w.log import Log
from p2w.model import Output
from p2w.model.encoder import Encoder
from p2w.pretext.protocol import Pretext, Views
from p2w.rng import SampleKeys, stratified_ids
from p2w.stream.local import DataError, ShardSet
from p2w.stream.stream import Batch, Stream
from p2w.world import World

VALIDATION_SEED = 0x9A275


def validation_keys(batch: Batch) -> SampleKeys:
    """The random keys of a validation batch's parts; they never change."""
    return SampleKeys(VALIDATION_SEED, 0, batch.ids, batch.real)


class Validation:
    """Yields `val/loss`, the mean over all validation volumes, and `val/NAME` for the loss's further scalars.

    At step 0 of a pretext that reconstructs, also `val/loss_mean_image`: the loss of the mean image, the voxel-wise mean of
    the validation targets. It is the best output that ignores the input, so a network below it does use its input.
    """

    def __init__(
        self, pretext: Pretext, model: nn.Module, stream: Callable[[], Stream], world: World
    ) -> None:
        self.pretext, self.model, self.stream, self.world = pretext, model, stream, world

    def __call__(self, step: int) -> Iterable[tuple[str, float]]:
        """Yield (name, mean over the volumes), the same on all ranks."""
        totals: Tensor | None = None  # weights, losses, further scalars
        names: list[str] = []
        for views, weight in self._views():
            output = self.model(views.input, *views.extra_inputs)
            each = [self._loss_of_one(output, views, index) for index in range(len(weight))]
            names = list(each[0][1])
            values = torch.stack([torch.stack((loss, *extras.values())).double() for loss, extras in each])
            sums = torch.cat((weight.sum()[None], weight @ values))
            totals = sums if totals is None else totals + sums
        assert totals is not None, "a validation split has at least one sub-scan"
        count, *means = self.world.sum(totals).tolist()
        for name, value in zip(("loss", *names), means, strict=True):
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


WHOLES, PARTS = 32, 3
FRACTION = (1 / 16, 1 / 4)  # a part's volume as a share of its whole (paper, section 3)
MAX_SHARE = 0.02  # of the run's time that probing should take
WARM_UP_S = 60.0  # no warning before that: the share is not yet meaningful

MonitorView = Callable[[int], Iterable[tuple[str, float]]]


class SimilarityMonitor:
    """Similarity of parts of one volume and of two, on a fixed subset of the volumes, and their contrastive loss.

    Yields `similarity/positive` and `/negative` (mean cosines of all pairs), `/auc` (0.5: no difference, 1: all pairs
    separated), `/rank` (effective rank of the parts' features, from four volumes on) and `contrast/loss` (paper, Fig. 2c,
    with its 5,000 negatives drawn from the parts of the subset's other volumes).
    Every rank has the voxels of its share of the subset in memory: 64 MiB over all ranks.
    """

    def __init__(
        self, config: Config, encoder: Encoder, shards: ShardSet, split: str, world: World, log: Log,
        before_batch: Callable[[], None] = lambda: None,
        recalibrate: Callable[[Encoder], Encoder] = lambda encoder: encoder,
    ) -> None:  # fmt: skip
        """Read this rank's share. `before_batch` is called before each batch, and may raise to interrupt.

        `recalibrate` gives the encoder that is probed: a copy of the run's, in evaluation mode, whose batch norms were
        recalibrated (see `p2w.analysis.features`).
        """
        self.config, self.encoder, self.world, self.log = config.pretext, encoder, world, log
        self.before_batch, self.recalibrate = before_batch, recalibrate
        self.rows = max(1, config.data.batch // world.size)  # the batch size of validation
        ids = stratified_ids(shards.ids(split), WHOLES)
        own = np.array_split(ids, world.size)[world.rank]
        # With more ranks than volumes, a rank without any computes one that does not count: collectives need all ranks.
        mine = own if len(own) else ids[:1]
        steps = -(-len(ids) // (world.size * self.rows))
        row = torch.arange(steps * self.rows)
        voxels, good = read_sub_scans(shards, mine)
        self.order = row.clamp(max=len(mine) - 1)
        self.real = ((row < len(own)) & torch.from_numpy(good)[self.order]).to(world.device)
        self.ids, self.voxels = torch.from_numpy(mine).to(world.device), voxels.to(world.device)
        self.own = shards.real_voxels(mine, world.device)
        self.pairs: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None

    def __call__(self, step: int) -> Iterable[tuple[str, float]]:
        """Yield (name, value), the same on all ranks; nothing if features are not finite or there is only one volume."""
        features = self._features()
        self.pairs = None
        if len(features) < 2 or not features.isfinite().all():
            return
        positive, negative = self.pairs = pair_cosines(features.numpy())
        yield "similarity/positive", float(positive.mean())
        yield "similarity/negative", float(negative.mean())
        yield "similarity/auc", auc(positive, negative)
        if math.isfinite(rank := effective_rank(features.numpy())):
            yield "similarity/rank", rank
        tests = PARTS * (PARTS - 1)
        yield "contrast/loss", float(contrastive_losses(features, tests=tests, seed=VALIDATION_SEED).mean())

    def save(self, step: int) -> None:
        """Rank 0: write the cosines of the last call into `RUN/figures`."""
        if self.pairs is None or not self.world.is_main:
            return
        packed = io.BytesIO()
        np.savez(packed, positive=self.pairs[0], negative=self.pairs[1])
        with self.log.tolerate("figures"):
            write_atomic(similarity_file(self.log.run, step), packed.getvalue())

    def _features(self) -> Tensor:
        """Features (W, PARTS, C) float64 on the CPU of the volumes of all ranks, in the order of their ids."""
        encoder = self.recalibrate(self.encoder)
        rows = torch.cat([self._pooled(encoder, index) for index in self.order.split(self.rows)])
        ids = self.ids[self.order.to(self.ids.device)]
        features, numbers, real = (self.world.gather(part).cpu() for part in (rows, ids, self.real.float()))
        valid = real > 0
        return features[valid][numbers[valid].argsort()].double()

    def _pooled(self, encoder: Encoder, index: Tensor) -> Tensor:
        """Features (rows, PARTS, C) of the parts of some of the volumes."""
        self.before_batch()
        config, index = self.config, index.to(self.ids.device)
        own = None if self.own is None else self.own[index]
        voxels, keys = self.voxels[index], SampleKeys(VALIDATION_SEED, 0, self.ids[index], own)
        shape = (voxels.shape[1], voxels.shape[2], voxels.shape[3])
        each = []
        for part in range(1, 1 + PARTS):  # part 0 is the one that validation uses
            boxes = geometry.sample_boxes(keys, part, shape, FRACTION, config.max_aspect)
            views = geometry.crop_resize(
                voxels, boxes, config.size, window_hu=config.window_hu, antialias=config.antialias
            )
            each.append(encoder.pooled(views))
        return torch.stack(each, 1)


class Monitors:
    """Calls all monitors, logs a summary line, and measures their share of the time, `speed/looking_share`.

    Their interval is a setting and does not adapt to the clock, so that what is logged depends on the step alone.
    """

    def __init__(self, similarity: SimilarityMonitor, *others: MonitorView, every: int, log: Log) -> None:
        self.similarity, self.every, self.log = similarity, every, log
        self.all: tuple[MonitorView, ...] = (similarity, *others)
        self._since, self._spent, self._warned = 0.0, 0.0, False

    def __call__(self, step: int) -> Iterable[tuple[str, float]]:
        """Yield (name, value) of all monitors."""
        began = time.monotonic()
        values = dict(value for monitor in self.all for value in monitor(step))
        yield from values.items()
        if "contrast/loss" in values:
            self.log.line(f"step {step}  {summary_line(values)}")
        if self._since:  # the first call of a start is not counted: it includes imports and warm-up
            self._spent += time.monotonic() - began
            share = self._spent / (time.monotonic() - self._since)
            yield "speed/looking_share", share
            self._warn_once(share)
        else:
            self._since = time.monotonic()

    def _warn_once(self, share: float) -> None:
        """Warn once when probing takes too much of the time, with the interval that would do."""
        warm = self.every and time.monotonic() - self._since > WARM_UP_S
        if warm and share > MAX_SHARE and not self._warned:
            self._warned = True
            enough = math.ceil(self.every * share / MAX_SHARE)
            self.log.warn(
                f"probing takes {share:.1%} of the time; --train.probe-every {enough} would take {MAX_SHARE:.0%}"
            )


def summary_line(values: dict[str, float]) -> str:
    """The monitors' values as one line of text."""
    one, two, area = (values[f"similarity/{name}"] for name in ("positive", "negative", "auc"))
    return f"parts of one image {one:.3f}, of two {two:.3f}, AUC {area:.3f}, contrast {values['contrast/loss']:.3f}"


def read_sub_scans(
    shards: ShardSet, ids: NDArray[np.int64], tolerant: bool = False
) -> tuple[Tensor, NDArray[np.bool_]]:
    """Voxels (N, D, H, W) int16 of a few sub-scans, and (N,) which of them could be read; the others are zero.

    Raises DataError for a damaged one if `on_bad` of the set is "stop", unless `tolerant`.
    """
    voxels, good = np.zeros((len(ids), *shards.shape), np.int16), np.ones(len(ids), np.bool_)
    with shards.reader(ids) as reader:
        for row, sub_scan in enumerate(ids):
            try:
                reader.read_into(int(sub_scan), voxels[row])
            except DataError:
                if shards.on_bad == "stop" and not tolerant:
                    raise
                good[row] = False
    return torch.from_numpy(voxels), good
