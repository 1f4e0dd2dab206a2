"""From subjects to numbers: features and contrastive losses shared by the ranks, the rest by rank 0 from the cache."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from p2w.analysis import contrast, retrieval
from p2w.analysis.cache import Cache, Key
from p2w.analysis.embed import tsne
from p2w.analysis.features import Array, Features, PartSet, extract
from p2w.analysis.pairs import Floats, cosines, draw_pairs, separability
from p2w.analysis.protocol import Settings
from p2w.analysis.subjects import Subject
from p2w.data.progress import Progress
from p2w.data.stream import ShardSet
from p2w.world import World

SETS = ("parts", "scales", "whole", "scatter")  # what every network is shown
Tick = Callable[[str, int], None]  # of whom, how many


@dataclass
class Measure:
    """One analysis: the same wholes, parts, pairs and tests for every subject."""

    settings: Settings
    sets: dict[str, PartSet]
    shards: ShardSet
    data: str  # fingerprint of the data set
    ids: NDArray[np.int64]
    world: World
    cache: Cache

    def wholes(self, name: str) -> NDArray[np.int64]:
        """Ids whose parts of this set are cut."""
        return self.settings.scattered(self.ids) if name == "scatter" else self.ids

    def key(self, subject: Subject, name: str) -> Key:
        """What these features follow from."""
        ids = self.wholes(name).tolist()
        return name, (subject.identity, repr(self.sets[name]), self.settings.batch, self.data, ids)

    def features(self, subject: Subject, name: str) -> Array:
        """(W, P, C), once `fill` has made them."""
        return self.cache.read(self.key(subject, name))

    def fill(self, jobs: Sequence[tuple[Subject, str]]) -> None:
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

    def _fill_one(self, subject: Subject, name: str, features: Features, tick: Tick) -> None:
        found = extract(
            features, subject.view, self.sets[name], self.shards, self.wholes(name), self.world,
            batch=self.settings.batch, tick=lambda parts: tick(subject.label, parts),
        )  # fmt: skip
        self.cache.write(self.key(subject, name), found)

    def contrast_key(self, subject: Subject) -> Key:
        """What its contrastive losses follow from."""
        s = self.settings
        return "contrast", (self.key(subject, "parts"), s.tests, s.negatives, s.temperature, s.seed)

    def contrast(self, subjects: Sequence[Subject]) -> None:
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

    def _contrast_of(self, subject: Subject, mine: range, tick: Tick) -> torch.Tensor:
        s = self.settings
        return contrast.contrastive_losses(
            torch.from_numpy(self.features(subject, "parts")).to(self.world.device),
            tests=s.tests, negatives=s.negatives, temperature=s.temperature, seed=s.seed, wholes=mine,
            tick=lambda: tick(subject.label, 1),
        )  # fmt: skip

    def contrastive_loss(self, subject: Subject) -> float:
        """Mean over tests and wholes, once `contrast` has made them."""
        return float(self.cache.read(self.contrast_key(subject)).mean())

    def numbers(self, subject: Subject) -> tuple[dict[str, Any], tuple[Floats, Floats]]:
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
                **retrieval.scores(retrieval.among_wholes(own, gallery), len(gallery)),
                "another_part": retrieval.scores(retrieval.among_parts(own), len(gallery)),
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

    def places(self, subject: Subject) -> Floats:
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
