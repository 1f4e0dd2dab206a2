"""Measurements of the paper's Fig. 2: its protocol as settings, the numbers, and a cache of what was computed.

RUN/analysis/cache/NAME-KEY.npz holds computed arrays, so that an interrupted analysis continues. The key is a hash of
everything that they depend on (weights, settings, data). Files are written atomically and never changed; the folder may
be deleted.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from p2w.analysis import similarity
from p2w.analysis.feature_sources import FeatureSource
from p2w.analysis.features import Array, Features, PartSet, TrainingWholes, extract, log_bins, tsne
from p2w.analysis.similarity import NEGATIVES, TEMPERATURE, TESTS, Floats, cosines, draw_pairs, separability
from p2w.config import PretextConfig
from p2w.errors import UserError
from p2w.files import write_atomic, write_remedy
from p2w.geometry import Range
from p2w.progress import Progress
from p2w.rng import hash64
from p2w.stream.local import ShardSet
from p2w.world import World

SMALLEST = 1 / 16  # scale of the smallest part [P]
SUBSET = 0x5B5E7  # first word of the key that the subset of wholes is drawn with
RECONSTRUCTION_SCALES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # scales of the reconstructions


@dataclass(frozen=True)
class AnalysisSettings:
    """Sizes of the analysis. Values marked [P] are the paper's; the others are our choice."""

    parts: int = 16
    """Parts of each whole, from which pairs and contrastive tests are drawn."""
    pairs: int = 100
    """Positive pairs, and as many negative ones, of each whole [P]."""
    tests: int = TESTS
    """Contrastive tests of each whole [P]."""
    negatives: int = NEGATIVES
    """Negative pairs of a contrastive test [P]; drawn from the parts of all other wholes, with replacement."""
    temperature: float = TEMPERATURE
    """t of the contrastive loss [P]."""
    scales: int = 8
    """Number of ranges of part scale, from 1/16 to 1 and equally wide in log, in which separability is measured."""
    scale_parts: int = 6
    """Parts of each whole in each of these ranges; all their pairs are taken."""
    scatter_wholes: int = 10
    """Wholes shown by t-SNE [P]."""
    scatter_parts: int = 200
    """Parts of each of them, of scale 1/16 to 1 [P]."""
    volume_fraction: tuple[float, float] | None = None
    """Scale of the parts in pairs and tests; default: as the run was trained, 1/16 to 1/4 for one that saw no parts."""
    max_wholes: int = 0
    """Take this many wholes, a random subset that is the same for every run on the data set; 0 takes all."""
    batch: int = 16
    """Parts that go through the network at a time."""
    seed: int = 0
    """Another seed takes another subset of wholes, cuts other parts and draws other pairs."""

    def check(self) -> "AnalysisSettings":
        """Return itself. Raises UserError for values out of range."""
        least = {"parts": 2, "scale_parts": 2, "max_wholes": 0, "seed": 0}
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, int) and value < least.get(name, 1):
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {value}: must be at least {least.get(name, 1)}")
        if self.max_wholes == 1:
            raise UserError("--max-wholes 1: parts of different wholes are compared, which takes at least 2")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"--temperature {self.temperature}: must be above 0; the paper has 0.7")
        if self.volume_fraction and not 0 < self.volume_fraction[0] <= self.volume_fraction[1] <= 1:
            raise UserError(
                f"--volume-fraction {self.volume_fraction}: needs 0 < low <= high <= 1; the paper has 0.0625 0.25"
            )
        return self

    def fraction(self, pretext: PretextConfig) -> Range:
        """Scale of the parts in pairs and tests."""
        if self.volume_fraction:
            return self.volume_fraction
        trained = pretext.volume_fraction
        return trained if trained[0] < 1 else PretextConfig().volume_fraction  # an autoencoder saw no parts

    def part_sets(self, pretext: PretextConfig) -> dict[str, PartSet]:
        """The part sets. They do not use the first thousand part numbers, which are those of validation and monitors."""
        common = (pretext.max_aspect, self.seed)
        bins = log_bins(SMALLEST, self.scales)
        sets = (
            PartSet("parts", 1_000, self.parts, (self.fraction(pretext),), *common),
            PartSet("scales", 100_000, self.scale_parts, bins, *common),
            PartSet("scatter", 1_000_000, self.scatter_parts, ((SMALLEST, 1.0),), *common),
            PartSet("whole", 0, 1, ((1.0, 1.0),), *common),
        )
        return {one.name: one for one in sets}

    def wholes(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The wholes to analyse: all `ids`, or `max_wholes` of them in ascending order, those with the smallest hash.

        A stride would meet the period of the tiling: every second whole of a set of two tiles a scan is the left half of a
        chest. The subset depends on ids and seed alone, and a smaller one is part of a larger one.
        """
        if not 0 < self.max_wholes < len(ids):
            return ids
        return np.sort(ids[hash64(ids, SUBSET, self.seed).argsort()[: self.max_wholes]])

    def scattered(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The wholes that t-SNE shows, one of each of `scatter_wholes` ranges of `ids`, so that scans differ if possible."""
        stretches = np.array_split(ids, min(self.scatter_wholes, len(ids)))
        rng = np.random.default_rng([self.seed, 10])
        return np.array([rng.choice(stretch) for stretch in stretches], np.int64)


Key = tuple[str, tuple[Any, ...]]  # name, and the plain values that the array depends on


class Cache:
    """Arrays by key, in a folder that all ranks see; rank 0 writes."""

    def __init__(self, run: Path, world: World) -> None:
        self.folder, self.world = run / "analysis" / "cache", world

    def has(self, key: Key) -> bool:
        """Whether every rank sees the file of this key; a collective."""
        return not self.world.any(not self.path(key).is_file())

    def read(self, key: Key) -> NDArray[Any]:
        """The array of this key. Raises UserError when the file is missing or damaged (zip files have checksums)."""
        path = self.path(key)
        try:
            with np.load(path) as saved:
                return np.asarray(saved["value"])
        except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: cannot be read ({error}); delete it and repeat the command") from error

    def write(self, key: Key, value: NDArray[Any]) -> None:
        """Rank 0 writes, the others wait; a collective. Raises UserError when it cannot be written."""
        if self.world.is_main:
            self.write_alone(key, value)
        self.world.barrier()

    def write_alone(self, key: Key, value: NDArray[Any]) -> None:
        """As `write`, called on rank 0 alone."""
        packed, path = io.BytesIO(), self.path(key)
        np.savez(packed, value=value)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, packed.getvalue())
        except OSError as error:
            raise UserError(
                f"{path}: {error.strerror}; {write_remedy(error)}, then repeat the command"
            ) from error

    def path(self, key: Key) -> Path:
        """The file of this key."""
        name, values = key
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:20]
        return self.folder / f"{name}-{digest}.npz"


PART_SETS = ("parts", "scales", "whole", "scatter")  # of which every source's features are computed
Tick = Callable[[str, int], None]  # called with the source's label and the number that is done


@dataclass
class Measure:
    """One analysis: the same wholes, parts, pairs and tests for every source."""

    settings: AnalysisSettings
    sets: dict[str, PartSet]
    shards: ShardSet
    data: str  # fingerprint of the data set
    ids: NDArray[np.int64]
    world: World
    cache: Cache

    @functools.cached_property
    def training(self) -> TrainingWholes:
        """What batch norm is recalibrated on."""
        return TrainingWholes(self.shards, self.world)

    def wholes(self, name: str) -> NDArray[np.int64]:
        """Ids of the wholes of which the part set `name` is cut."""
        return self.settings.scattered(self.ids) if name == "scatter" else self.ids

    def key(self, source: FeatureSource, name: str) -> Key:
        """Cache key of a source's features of a part set."""
        ids = self.wholes(name).tolist()
        return name, (source.identity, repr(self.sets[name]), self.settings.batch, self.data, ids)

    def features(self, source: FeatureSource, name: str) -> Array:
        """Features (W, P, C) from the cache, after `fill`."""
        return self.cache.read(self.key(source, name))

    def fill(self, jobs: Sequence[tuple[FeatureSource, str]]) -> None:
        """Compute the features of all jobs (source, part set) that are not in the cache, with a progress bar."""
        missing = [job for job in jobs if not self.cache.has(self.key(*job))]
        share = [-(-len(self.wholes(name)) // self.world.size) * self.sets[name].count for _, name in missing]
        source, features = None, None
        with self._progress(sum(share), "parts encoded") as tick:
            for source_of, name in missing:
                if source_of is not source:
                    features = None  # one network at a time
                    source, features = source_of, source_of.load(self.training)
                assert features is not None
                self._fill_one(source_of, name, features, tick)

    def _fill_one(self, source: FeatureSource, name: str, features: Features, tick: Tick) -> None:
        found = extract(
            features, source.view, self.sets[name], self.shards, self.wholes(name), self.world,
            batch=self.settings.batch, tick=lambda parts: tick(source.label, parts),
        )  # fmt: skip
        self.cache.write(self.key(source, name), found)

    def contrast_key(self, source: FeatureSource) -> Key:
        """Cache key of a source's contrastive losses."""
        s = self.settings
        return "contrast", (self.key(source, "parts"), s.tests, s.negatives, s.temperature, s.seed)

    def contrast(self, sources: Sequence[FeatureSource]) -> None:
        """Compute every source's contrastive losses (W,) that are not in the cache; each rank tests a range of wholes."""
        missing = [source for source in sources if not self.cache.has(self.contrast_key(source))]
        count, world = len(self.ids), self.world
        share = -(-count // world.size)
        mine = range(min(world.rank * share, count), min((world.rank + 1) * share, count))
        with self._progress(len(mine) * len(missing), "contrastive tests of wholes") as tick:
            for source in missing:
                losses = torch.zeros(count, dtype=torch.float64)
                losses[mine.start : mine.stop] = self._contrast_of(source, mine, tick)
                self.cache.write(self.contrast_key(source), world.sum(losses).numpy())

    def _contrast_of(self, source: FeatureSource, mine: range, tick: Tick) -> torch.Tensor:
        s = self.settings
        return similarity.contrastive_losses(
            torch.from_numpy(self.features(source, "parts")).to(self.world.device),
            tests=s.tests, negatives=s.negatives, temperature=s.temperature, seed=s.seed, wholes=mine,
            tick=lambda: tick(source.label, 1),
        )  # fmt: skip

    def contrastive_loss(self, source: FeatureSource) -> float:
        """Mean over tests and wholes, from the cache, after `contrast`."""
        return float(self.cache.read(self.contrast_key(source)).mean())

    def numbers(self, source: FeatureSource) -> tuple[dict[str, Any], tuple[Floats, Floats]]:
        """Separability (over all scales and by scale) and retrieval; and cosines (W, N) of positive and negative pairs."""
        s = self.settings
        parts, wholes, scales = (self.features(source, name) for name in ("parts", "whole", "scales"))
        pairs = cosines(parts, draw_pairs(len(parts), s.parts, s.pairs, s.seed))
        all_of_them = s.scale_parts * (s.scale_parts - 1) // 2
        drawn = draw_pairs(len(scales), s.scale_parts, all_of_them, s.seed)
        per_scale = [separability(*cosines(some, drawn)) for some in np.split(scales, s.scales, axis=1)]
        own, gallery = torch.from_numpy(parts), torch.from_numpy(wholes[:, 0])
        found = {
            "similarity": separability(*pairs),
            "by_scale": {
                "scale": [float(np.sqrt(low * high)) for low, high in self.sets["scales"].fractions],
                "auc": [one["auc"] for one in per_scale],
                "d_prime": [one["d_prime"] for one in per_scale],
            },
            "retrieval": {
                **similarity.retrieval_scores(similarity.among_wholes(own, gallery), len(gallery)),
                "another_part": similarity.retrieval_scores(similarity.among_parts(own), len(gallery)),
            },
            "contrastive_loss": self.contrastive_loss(source),
        }
        return found, pairs

    def scatter(self) -> tuple[NDArray[np.int64], Floats]:
        """The number of the whole (N,) and the scale (N,) of each point of t-SNE; parts first, then wholes."""
        ids = self.wholes("scatter")
        scale = self.sets["scatter"].scale(ids, self.shards)
        whole = np.arange(len(ids))
        return np.append(whole.repeat(scale.shape[1]), whole), np.append(scale.ravel(), np.ones(len(ids)))

    def tsne_points(self, source: FeatureSource) -> Floats:
        """The points (N, 2) of t-SNE, cached by rank 0, because t-SNE takes long."""
        key = "tsne", (self.key(source, "scatter"), self.settings.seed)
        if not self.cache.path(key).is_file():
            parts, whole = self.features(source, "scatter"), self.features(source, "whole")
            whole = whole[np.searchsorted(self.ids, self.wholes("scatter")), 0]
            self.cache.write_alone(
                key, tsne(np.concatenate((parts.reshape(-1, parts.shape[2]), whole)), self.settings.seed)
            )
        return self.cache.read(key)

    @contextlib.contextmanager
    def _progress(self, total: int, what: str) -> Iterator[Tick]:
        """Rank 0 shows a progress bar of its own share: number done, rate, time left."""
        if not self.world.is_main or not total:
            yield lambda note, count: None
            return
        with Progress(total, what) as bar:

            def tick(note: str, count: int) -> None:
                for _ in range(count):
                    bar.step(note)
                bar.tick()

            yield tick
