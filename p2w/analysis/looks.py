"""Looks taken while it trains, cheap enough to be taken often: is the network becoming contrastive, and how does it draw?

A look costs as much as half a training step. It sees the same parts of the same few validation wholes at every step, rank
count and run, and parts of the paper's scale whatever the run trains on: runs of any setting compare.
"""

import io
import math
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2w import geometry
from p2w.analysis.contrast import contrastive_losses
from p2w.analysis.similarity import auc, effective_rank, pair_cosines, similarity_file
from p2w.analysis.validation import VALIDATION_SEED
from p2w.config import Config
from p2w.data.stream import DataError, ShardSet
from p2w.geometry import Keys
from p2w.log import Log, write_atomic
from p2w.model.protocol import Encoder
from p2w.world import World

WHOLES, PARTS = 32, 3
FRACTION = (1 / 16, 1 / 4)  # a part's volume as a share of its whole (paper, section 3)
SHARE = 0.02  # of the time that looks should take at most
SETTLE_S = 60.0  # before that, the share says little

Look = Callable[[int], Iterable[tuple[str, float]]]


class Similarity:
    """How alike parts are, of one image and of two, on a fixed subset of the wholes; and the contrastive loss among them.

    Yields `similarity/positive`, `/negative` (mean cosines of all pairs), `/auc` (0.5: no difference, 1: always told apart),
    `/rank` (of the parts' features) and `contrast/loss` (paper, Fig. 2c, its 5,000 negatives drawn from the parts of the
    subset's other wholes).
    Every rank keeps the voxels of its share of the subset: 64 MiB over all ranks.
    """

    def __init__(
        self, config: Config, encoder: Encoder, shards: ShardSet, split: str, world: World, log: Log,
        between: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Read this rank's share. `between` is called before each batch, and may raise to break a look off."""
        self.config, self.encoder, self.world, self.log = config.pretext, encoder, world, log
        self.between = between
        self.rows = max(1, config.data.batch // world.size)  # as many as validation passes at a time
        ids = spread(shards.ids(split), WHOLES)
        own = np.array_split(ids, world.size)[world.rank]
        mine = (
            own if len(own) else ids[:1]
        )  # more ranks than wholes: has a share in the work, not in the numbers
        steps = -(-len(ids) // (world.size * self.rows))
        place = torch.arange(steps * self.rows)
        voxels, good = read(shards, mine)
        self.order = place.clamp(max=len(mine) - 1)
        self.real = ((place < len(own)) & torch.from_numpy(good)[self.order]).to(world.device)
        self.ids, self.voxels = torch.from_numpy(mine).to(world.device), voxels.to(world.device)
        self.pairs: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None

    def __call__(self, step: int) -> Iterable[tuple[str, float]]:
        """Yield (name, value), the same on all ranks; nothing for a network that is lost or a single whole."""
        features = self._features()
        self.pairs = None
        if len(features) < 2 or not features.isfinite().all():
            return
        positive, negative = self.pairs = pair_cosines(features.numpy())
        yield "similarity/positive", float(positive.mean())
        yield "similarity/negative", float(negative.mean())
        yield "similarity/auc", auc(positive, negative)
        yield "similarity/rank", effective_rank(features.flatten(0, 1).numpy())
        tests = PARTS * (PARTS - 1)
        yield "contrast/loss", float(contrastive_losses(features, tests=tests, seed=VALIDATION_SEED).mean())

    def save(self, step: int) -> None:
        """Rank 0: keep the cosines of the last look in `RUN/figures`."""
        if self.pairs is None or not self.world.is_main:
            return
        packed = io.BytesIO()
        np.savez(packed, positive=self.pairs[0], negative=self.pairs[1])
        with self.log.tolerate("figures"):
            write_atomic(similarity_file(self.log.run, step), packed.getvalue())

    def _features(self) -> Tensor:
        """(wholes, PARTS, channels) float64 on the CPU, over all ranks by id."""
        rows = torch.cat([self._pooled(index) for index in self.order.split(self.rows)])
        ids = self.ids[self.order.to(self.ids.device)]
        features, numbers, real = (self.world.gather(part).cpu() for part in (rows, ids, self.real.float()))
        kept = real > 0
        return features[kept][numbers[kept].argsort()].double()

    def _pooled(self, index: Tensor) -> Tensor:
        """Features (rows, PARTS, channels) of the parts of some of the wholes."""
        self.between()
        config, index = self.config, index.to(self.ids.device)
        voxels, keys = self.voxels[index], Keys(VALIDATION_SEED, 0, self.ids[index])
        shape = (voxels.shape[1], voxels.shape[2], voxels.shape[3])
        each = []
        for part in range(1, 1 + PARTS):  # part 0 is the one validation reconstructs
            boxes = geometry.sample_boxes(keys, part, shape, FRACTION, config.aspect_range)
            views = geometry.crop_resize(
                voxels, boxes, config.size, window_hu=config.window_hu, antialias=config.antialias
            )
            each.append(self.encoder.pooled(views))
        return torch.stack(each, 1)


class Looks:
    """Takes all looks, says what was seen in one line, and keeps account of the time: `speed/looking_share`.

    The interval between looks is a setting and not adapted to the clock: what is logged depends on the step alone.
    """

    def __init__(self, similarity: Similarity, *others: Look, every: int, log: Log) -> None:
        self.similarity, self.every, self.log = similarity, every, log
        self.all: tuple[Look, ...] = (similarity, *others)
        self._since, self._spent, self._warned = 0.0, 0.0, False

    def __call__(self, step: int) -> Iterable[tuple[str, float]]:
        """Yield (name, value) of all of them."""
        began = time.monotonic()
        values = dict(value for look in self.all for value in look(step))
        yield from values.items()
        if "contrast/loss" in values:
            self.log.line(f"step {step}  {spoken(values)}")
        if self._since:  # the first look of a start brings imports and warm-up
            self._spent += time.monotonic() - began
            share = self._spent / (time.monotonic() - self._since)
            yield "speed/looking_share", share
            self._complain(share)
        else:
            self._since = time.monotonic()

    def _complain(self, share: float) -> None:
        """Say once that looks are too dear, and what would help."""
        settled = self.every and time.monotonic() - self._since > SETTLE_S
        if settled and share > SHARE and not self._warned:
            self._warned = True
            enough = math.ceil(self.every * share / SHARE)
            self.log.warn(
                f"looks take {share:.1%} of the time; --train.look-every {enough} would take {SHARE:.0%}"
            )


def spoken(values: dict[str, float]) -> str:
    """A look in words."""
    one, two, told = (values[f"similarity/{name}"] for name in ("positive", "negative", "auc"))
    return f"parts of one image {one:.3f}, of two {two:.3f}, AUC {told:.3f}, contrast {values['contrast/loss']:.3f}"


def spread(ids: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most `most` of the ids, evenly spread: over the scans, since the rows of a manifest stand scan by scan."""
    return ids[np.unique(np.linspace(0, len(ids) - 1, min(most, len(ids))).astype(int))]


def read(shards: ShardSet, ids: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.bool_]]:
    """Voxels (N, D, H, W) int16 of a few sub-scans, and which of them could be read; the others are zero.

    Raises DataError for one that is damaged, unless the set's policy is to go on without.
    """
    voxels, good = np.zeros((len(ids), *shards.shape), np.int16), np.ones(len(ids), np.bool_)
    with shards.reader(ids) as reader:
        for row, sub_scan in enumerate(ids):
            try:
                reader.read_into(int(sub_scan), voxels[row])
            except DataError:
                if shards.on_bad == "stop":
                    raise
                good[row] = False
    return torch.from_numpy(voxels), good
