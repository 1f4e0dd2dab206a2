"""Features of many parts of every whole, computed by all ranks together; their t-SNE (paper, Fig. 2a); and batch norm's
running statistics, computed anew on training wholes before a network's features are judged.

Part p of whole k is a function of (seed, k, p) alone, and a batch has parts of one whole only, so features are the same for
any number of ranks. W, P, C = wholes, parts of each, channels; d, h, w = the network's input.

Monitors, analyses and everything that reads features of a run judge the network that `TrainingWholes.recalibrate` gives, so
that its weights alone are judged: the running statistics that training leaves are those of its last steps, and those of an
untrained network are mean 0 and variance 1. The network sees what its pretext shows in training, of WHOLES training wholes
spread over the set (`stratified_ids`), in BATCHES batches of ROWS. These are functions of the data set alone: the same at
every step, in every run on it, and for any number of ranks.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from p2w import geometry
from p2w.analysis.monitors import VALIDATION_SEED, read_sub_scans
from p2w.config import PretextConfig
from p2w.errors import UserError
from p2w.geometry import Range
from p2w.model.norm import recalibrated
from p2w.pretext.protocol import Pretext
from p2w.rng import SampleKeys, stratified_ids
from p2w.stream.local import DataError, ShardSet
from p2w.world import World, gather_rows

Features = Callable[[Tensor], Tensor]  # parts (B, 1, d, h, w) float32 in [0, 1] -> (B, C)
Array = NDArray[np.float32]
Module = TypeVar("Module", bound=nn.Module)

WHOLES, BATCHES, ROWS = 64, 8, 16  # that batch norm is recalibrated on
IDENTITY = [
    "batch norm recalibrated, stratified",
    WHOLES,
    BATCHES,
    ROWS,
]  # part of the key of cached features
SEED = VALIDATION_SEED + 0xBA7C4
# Of the initial running statistics, mean 0 and variance 1, in those of an early checkpoint, at least.
EARLY_SHARE = 0.01
MOMENTUM = 0.1  # weight of a batch in the running statistics, in every network here


@dataclass(frozen=True)
class PartSet:
    """Which parts to cut from every whole: `each` of every range of volume `fractions`, uniform within the range.

    Parts are numbered from `first`; the number is part of the random key.
    """

    name: str
    first: int
    each: int
    fractions: tuple[Range, ...]
    max_aspect: float = 4.0
    seed: int = 0

    @property
    def count(self) -> int:
        """Number of parts of one whole, P."""
        return self.each * len(self.fractions)

    def boxes(self, ids: NDArray[np.int64], shards: ShardSet) -> Tensor:
        """Boxes (W, P, 6) float32 of the wholes `ids`, range by range; see p2w.geometry."""
        real = shards.real_voxels(ids)
        keys = SampleKeys(VALIDATION_SEED + self.seed, 0, torch.from_numpy(ids), real)
        numbered = [
            (self.first + index * self.each + part, fraction)
            for index, fraction in enumerate(self.fractions)
            for part in range(self.each)
        ]
        each = [
            geometry.sample_boxes(keys, part, shards.shape, fraction, self.max_aspect)
            for part, fraction in numbered
        ]
        return torch.stack(each, 1)

    def scale(self, ids: NDArray[np.int64], shards: ShardSet) -> NDArray[np.float64]:
        """(W, P): volume of each part as a fraction of its whole's."""
        boxes = self.boxes(ids, shards).double().numpy()
        volumes: NDArray[np.float64] = (boxes[..., 3:] - boxes[..., :3]).prod(-1)
        return volumes / shards.size_in_voxels(ids).prod(1)[:, None]


def log_bins(low: float, count: int) -> tuple[Range, ...]:
    """`count` ranges from `low` to 1, equally wide in log scale."""
    edges = np.geomspace(low, 1, count + 1)
    edges[-1] = 1.0
    return tuple((float(a), float(b)) for a, b in itertools.pairwise(edges))


@torch.no_grad()
def extract(
    features: Features, view: PretextConfig, part_set: PartSet, shards: ShardSet, ids: NDArray[np.int64],
    world: World, *, batch: int = 16, tick: Callable[[int], None] = lambda parts: None,
) -> Array:  # fmt: skip
    """Features (W, P, C) float32 of the wholes `ids`, in that order, on every rank; each rank computes a range of them.

    `view` gives the size, window and antialiasing of the network's input. `tick` is called after each whole with its number
    of parts. Raises DataError for a sub-scan that cannot be read.
    """
    share = -(-len(ids) // world.size)
    mine = ids[world.rank * share : (world.rank + 1) * share]
    boxes = part_set.boxes(mine, shards).to(world.device)
    voxels = torch.empty(shards.shape, dtype=torch.int16)
    rows: list[Tensor] = []
    with shards.reader(mine) as reader:
        for row, sub_scan in enumerate(mine):
            reader.read_into(int(sub_scan), voxels)
            whole = voxels.to(world.device)
            rows.append(
                torch.cat([features(cut_parts(whole, some, view)) for some in boxes[row].split(batch)])
            )
            tick(part_set.count)
    return _gather_rows(rows, share, part_set.count, len(ids), world)


def cut_parts(whole: Tensor, boxes: Tensor, view: PretextConfig) -> Tensor:
    """Parts (B, 1, d, h, w) in [0, 1], cut by boxes (B, 6) from one whole (D, H, W) int16 in HU."""
    repeated = whole.expand(len(boxes), *whole.shape)
    return geometry.crop_resize(
        repeated, boxes, view.size, window_hu=view.window_hu, antialias=view.antialias
    )


def _gather_rows(rows: Sequence[Tensor], share: int, parts: int, count: int, world: World) -> Array:
    """All ranks' rows (P, C) as (W, P, C). A rank may have fewer rows than its share, or none and so not know C."""
    channels = torch.tensor([rows[0].shape[1] if rows else 0])
    widest = int(world.gather(channels).max())
    stacked = torch.zeros((share, parts, widest), device=world.device)
    for row, values in enumerate(rows):
        stacked[row] = values
    return world.gather(stacked)[:count].cpu().numpy()


def histogram(parts: Tensor, bins: int = 64) -> Tensor:
    """Intensity histogram (B, bins) of parts in [0, 1], as shares of the voxels; it does not depend on their positions."""
    count = len(parts)
    index = (parts.flatten(1) * bins).long().clamp_(0, bins - 1)
    index += torch.arange(count, device=parts.device)[:, None] * bins
    counts = torch.bincount(index.flatten(), minlength=count * bins)
    return counts.view(count, bins).float() / parts[0].numel()


def pixels(parts: Tensor, size: tuple[int, int, int] = (4, 8, 8)) -> Tensor:
    """Parts averaged down to `size` and flattened, (B, voxels)."""
    return torch.nn.functional.adaptive_avg_pool3d(parts, size).flatten(1)


# Features without a network. If they separate parts as well as a network does, the network may have learned no more.
BASELINES: dict[str, Features] = {"histogram": histogram, "pixels": pixels}

PERPLEXITY = 30.0


def tsne(features: NDArray[np.floating], seed: int) -> NDArray[np.float64]:
    """Features (N, C) -> points (N, 2), by Euclidean distance (van der Maaten and Hinton 2008).

    Features are first centred and divided by their standard deviation: those of an untrained network differ only in the
    sixth digit, which float32 distances would lose. t-SNE itself does not depend on the scale.
    """
    from sklearn.manifold import TSNE  # noqa: PLC0415  (2 s of imports)

    wide = features.astype(np.float64)
    wide -= wide.mean(0)
    spread = wide.std()
    if len(wide) < 3 or spread == 0:  # all features are equal
        return np.zeros((len(wide), 2))
    perplexity = min(PERPLEXITY, (len(wide) - 1) / 3)
    model = TSNE(perplexity=perplexity, init="pca", learning_rate="auto", random_state=seed)
    return np.asarray(model.fit_transform(wide / spread), np.float64)


class TrainingWholes:
    """The wholes that batch norm is recalibrated on. Each rank reads those of its own batches, when they are first needed.

    The inputs that were cut from them for the last pretext stay in the host's memory, since a monitor needs them again and
    again. A whole that cannot be read is left out; training reports it when it reads it.
    """

    def __init__(self, shards: ShardSet, world: World) -> None:
        self.shards, self.world = shards, world
        ids = shards.ids("train")
        groups = max(1, min(WHOLES, len(ids)) // ROWS)
        chosen = stratified_ids(ids, min(len(ids), groups * ROWS))
        self.groups = [chosen[group::groups] for group in range(groups)]  # each spread over all scans
        self._pretext: Pretext | None = None
        self._cut: dict[int, Tensor] = {}  # by the number of the batch

    def recalibrate(
        self, network: Module, pretext: Pretext, before_batch: Callable[[], None] = lambda: None
    ) -> Module:
        """A copy of a network or encoder with statistics of these wholes, in evaluation mode; the network stays as it is.

        A collective. `before_batch` is called equally often on all ranks, and may raise to interrupt. Raises UserError where
        there is batch norm and no training whole, and DataError where none of a batch can be read.
        """
        return recalibrated(
            network, self._inputs(pretext, before_batch), lambda rows: gather_rows(rows, self.world, BATCHES)
        )

    def _inputs(self, pretext: Pretext, before_batch: Callable[[], None]) -> Iterator[Tensor]:
        """This rank's batches (ROWS, 1, d, h, w): those numbered rank, rank + ranks, …"""
        if not len(self.groups[0]):
            raise UserError(
                f"{self.shards.where}: no sub-scan in split 'train', and batch norm is recalibrated on training wholes; cut "
                "the set with a smaller --val-fraction"
            )
        if pretext is not self._pretext:
            self._pretext, self._cut = pretext, {}
        for first in range(0, BATCHES, self.world.size):
            before_batch()
            number = first + self.world.rank
            if number < BATCHES:
                if number not in self._cut:
                    self._cut_group(pretext, number % len(self.groups))
                yield self._cut[number].to(self.world.device)

    def _cut_group(self, pretext: Pretext, group: int) -> None:
        """This rank's batches of a group: one view of each of its wholes, or as many as fill ROWS where they are fewer."""
        voxels, good = read_sub_scans(self.shards, self.groups[group], tolerant=True)
        if not good.any():
            raise DataError(
                f"{self.shards.where}: none of {len(good)} training sub-scans can be read; run p2w verify on it"
            )
        device, kept = self.world.device, torch.from_numpy(np.flatnonzero(good))
        voxels, chosen = voxels[kept].to(device), self.groups[group][good]
        ids, real = torch.from_numpy(chosen).to(device), self.shards.real_voxels(chosen, device)
        times = math.ceil(ROWS / len(self.groups[group]))
        for number in range(group, BATCHES, len(self.groups)):
            if number % self.world.size == self.world.rank:
                epoch = number // len(self.groups) * times
                views = [
                    pretext.sample(voxels, SampleKeys(SEED, epoch + time, ids, real)).input
                    for time in range(times)
                ]
                self._cut[number] = torch.cat(views).cpu()


def is_early(step: int, passes: int = 1) -> bool:
    """Whether running statistics still hold more than EARLY_SHARE of their initial values after `step` steps.

    The losses that were logged until then were computed with them. `passes`: of a step, see optim.accumulate.
    """
    return bool((1 - MOMENTUM) ** (step * passes) > EARLY_SHARE)
