"""Measurements of the paper's Fig. 2: its protocol as settings, the cache of what is computed, and the numbers.

What an analysis has computed once, so that an interrupted one continues: RUN/analysis/cache/NAME-KEY.npz.

The key is a hash of all that the numbers follow from (weights, settings, data). Files are written whole or not at all, and
never changed; the folder may be deleted.
"""

import contextlib
import dataclasses
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
from p2w.analysis.features import Array, Features, PartSet, extract, log_bins, tsne
from p2w.analysis.similarity import NEGATIVES, TEMPERATURE, TESTS, Floats, cosines, draw_pairs, separability
from p2w.config import PretextConfig
from p2w.errors import UserError
from p2w.files import write_atomic
from p2w.geometry import Range
from p2w.progress import Progress
from p2w.stream.local import ShardSet
from p2w.world import World

SMALLEST = 1 / 16  # the smallest part that is shown and measured [P]
GROWING = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # scales of the reconstructions


@dataclass(frozen=True)
class AnalysisSettings:
    """Sizes of the analysis. Marked [P]: the paper's; the others are our choice."""

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
    """Ranges of part scale, from 1/16 to 1 and equally wide in log, in which separability is measured."""
    scale_parts: int = 6
    """Parts of each whole in each of these ranges; all their pairs are taken."""
    scatter_wholes: int = 10
    """Wholes shown by t-SNE [P]."""
    scatter_parts: int = 200
    """Parts of each of them, of scale 1/16 to 1 [P]."""
    volume_fraction: tuple[float, float] | None = None
    """Scale of the parts in pairs and tests; default: as the run was trained, 1/16 to 1/4 for one that saw no parts."""
    max_wholes: int = 0
    """Take this many wholes, evenly spread; 0 takes all."""
    batch: int = 16
    """Parts that go through the network at a time."""
    seed: int = 0
    """Another seed cuts other parts and draws other pairs."""

    def check(self) -> "AnalysisSettings":
        """Raises UserError for numbers that make no sense."""
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
        """What is cut. The first thousand parts are left to validation and to what training itself looks at."""
        common = (pretext.aspect_range, self.seed)
        bins = log_bins(SMALLEST, self.scales)
        sets = (
            PartSet("parts", 1_000, self.parts, (self.fraction(pretext),), *common),
            PartSet("scales", 100_000, self.scale_parts, bins, *common),
            PartSet("scatter", 1_000_000, self.scatter_parts, ((SMALLEST, 1.0),), *common),
            PartSet("whole", 0, 1, ((1.0, 1.0),), *common),
        )
        return {one.name: one for one in sets}

    def wholes(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those that are analysed: all, or `max_wholes` evenly spread."""
        count = min(len(ids), self.max_wholes or len(ids))
        return ids[np.linspace(0, len(ids) - 1, count).astype(int)]

    def scattered(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those that t-SNE shows, one of each of `scatter_wholes` stretches: of different scans where there are as many."""
        stretches = np.array_split(ids, min(self.scatter_wholes, len(ids)))
        rng = np.random.default_rng([self.seed, 10])
        return np.array([rng.choice(stretch) for stretch in stretches], np.int64)


Key = tuple[str, tuple[Any, ...]]  # name, and the plain values that the array follows from


class Cache:
    """Arrays by key, in a folder that all ranks see; rank 0 writes."""

    def __init__(self, run: Path, world: World) -> None:
        self.folder, self.world = run / "analysis" / "cache", world

    def has(self, key: Key) -> bool:
        """Whether every rank sees it; a collective."""
        return not self.world.any(not self.path(key).is_file())

    def read(self, key: Key) -> NDArray[Any]:
        """Raises UserError when it is gone or damaged (zip keeps a checksum)."""
        path = self.path(key)
        try:
            with np.load(path) as saved:
                return np.asarray(saved["value"])
        except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: cannot be read ({error}); delete it and repeat the command") from error

    def write(self, key: Key, value: NDArray[Any]) -> None:
        """Rank 0 writes, the others wait; a collective. Raises UserError when the disk takes no more."""
        if self.world.is_main:
            self.keep(key, value)
        self.world.barrier()

    def keep(self, key: Key, value: NDArray[Any]) -> None:
        """The same for what rank 0 makes alone."""
        packed, path = io.BytesIO(), self.path(key)
        np.savez(packed, value=value)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, packed.getvalue())
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; make room, then repeat the command") from error

    def path(self, key: Key) -> Path:
        """Where it is kept."""
        name, follows = key
        digest = hashlib.sha256(json.dumps(follows, sort_keys=True).encode()).hexdigest()[:20]
        return self.folder / f"{name}-{digest}.npz"


SETS = ("parts", "scales", "whole", "scatter")  # what every network is shown
Tick = Callable[[str, int], None]  # of whom, how many


@dataclass
class Measure:
    """One analysis: the same wholes, parts, pairs and tests for every subject."""

    settings: AnalysisSettings
    sets: dict[str, PartSet]
    shards: ShardSet
    data: str  # fingerprint of the data set
    ids: NDArray[np.int64]
    world: World
    cache: Cache

    def wholes(self, name: str) -> NDArray[np.int64]:
        """Ids whose parts of this set are cut."""
        return self.settings.scattered(self.ids) if name == "scatter" else self.ids

    def key(self, subject: FeatureSource, name: str) -> Key:
        """What these features follow from."""
        ids = self.wholes(name).tolist()
        return name, (subject.identity, repr(self.sets[name]), self.settings.batch, self.data, ids)

    def features(self, subject: FeatureSource, name: str) -> Array:
        """(W, P, C), once `fill` has made them."""
        return self.cache.read(self.key(subject, name))

    def fill(self, jobs: Sequence[tuple[FeatureSource, str]]) -> None:
        """Features of all jobs (subject, part set) into the cache, with progress over those that are not there yet."""
        missing = [job for job in jobs if not self.cache.has(self.key(*job))]
        share = [-(-len(self.wholes(name)) // self.world.size) * self.sets[name].count for _, name in missing]
        subject, features = None, None
        with self._progress(sum(share), "parts looked at") as tick:
            for subject_of, name in missing:
                if subject_of is not subject:
                    features = None  # one network at a time
                    subject, features = subject_of, subject_of.load()
                assert features is not None
                self._fill_one(subject_of, name, features, tick)

    def _fill_one(self, subject: FeatureSource, name: str, features: Features, tick: Tick) -> None:
        found = extract(
            features, subject.view, self.sets[name], self.shards, self.wholes(name), self.world,
            batch=self.settings.batch, tick=lambda parts: tick(subject.label, parts),
        )  # fmt: skip
        self.cache.write(self.key(subject, name), found)

    def contrast_key(self, subject: FeatureSource) -> Key:
        """What its contrastive losses follow from."""
        s = self.settings
        return "contrast", (self.key(subject, "parts"), s.tests, s.negatives, s.temperature, s.seed)

    def contrast(self, subjects: Sequence[FeatureSource]) -> None:
        """Contrastive losses (W,) of every subject into the cache; each rank tests a stretch of the wholes."""
        missing = [subject for subject in subjects if not self.cache.has(self.contrast_key(subject))]
        count, world = len(self.ids), self.world
        share = -(-count // world.size)
        mine = range(min(world.rank * share, count), min((world.rank + 1) * share, count))
        with self._progress(len(mine) * len(missing), "wholes tested by contrast") as tick:
            for subject in missing:
                losses = torch.zeros(count, dtype=torch.float64)
                losses[mine.start : mine.stop] = self._contrast_of(subject, mine, tick)
                self.cache.write(self.contrast_key(subject), world.sum(losses).numpy())

    def _contrast_of(self, subject: FeatureSource, mine: range, tick: Tick) -> torch.Tensor:
        s = self.settings
        return similarity.contrastive_losses(
            torch.from_numpy(self.features(subject, "parts")).to(self.world.device),
            tests=s.tests, negatives=s.negatives, temperature=s.temperature, seed=s.seed, wholes=mine,
            tick=lambda: tick(subject.label, 1),
        )  # fmt: skip

    def contrastive_loss(self, subject: FeatureSource) -> float:
        """Mean over tests and wholes, once `contrast` has made them."""
        return float(self.cache.read(self.contrast_key(subject)).mean())

    def numbers(self, subject: FeatureSource) -> tuple[dict[str, Any], tuple[Floats, Floats]]:
        """Separability, by scale too, and retrieval; and the cosines of positive and negative pairs (W, N)."""
        s = self.settings
        parts, wholes, scales = (self.features(subject, name) for name in ("parts", "whole", "scales"))
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
            "contrastive_loss": self.contrastive_loss(subject),
        }
        return found, pairs

    def scatter(self) -> tuple[NDArray[np.int64], Floats]:
        """Of the points of t-SNE, parts first: which whole (N,), and scale (N,)."""
        ids = self.wholes("scatter")
        scale = self.sets["scatter"].scale(ids, self.shards.shape)
        kinds = np.arange(len(ids))
        return np.append(kinds.repeat(scale.shape[1]), kinds), np.append(scale.ravel(), np.ones(len(ids)))

    def places(self, subject: FeatureSource) -> Floats:
        """Those points (N, 2); rank 0 keeps them, t-SNE takes a while."""
        key = "tsne", (self.key(subject, "scatter"), self.settings.seed)
        if not self.cache.path(key).is_file():
            parts, whole = self.features(subject, "scatter"), self.features(subject, "whole")
            whole = whole[np.searchsorted(self.ids, self.wholes("scatter")), 0]
            self.cache.keep(
                key, tsne(np.concatenate((parts.reshape(-1, parts.shape[2]), whole)), self.settings.seed)
            )
        return self.cache.read(key)

    @contextlib.contextmanager
    def _progress(self, total: int, what: str) -> Iterator[Tick]:
        """Rank 0 shows how many of its own share are done, the rate and the time left."""
        if not self.world.is_main or not total:
            yield lambda note, count: None
            return
        with Progress(total, what) as shown:

            def tick(note: str, count: int) -> None:
                for _ in range(count):
                    shown.step(note)
                shown.tick()

            yield tick
