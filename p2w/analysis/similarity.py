"""Are parts of one image closer than parts of different images? Cosine similarity of pooled features (paper, Fig. 2b).

For every validation whole a few parts are cut, as in training but with fixed keys. A positive pair is two parts of one
whole, a negative pair two parts of different wholes. Separability is the area under the ROC curve (0.5: none, 1: all).
"""

import io
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2w import geometry
from p2w.analysis.validation import VALIDATION_SEED
from p2w.config import PretextConfig
from p2w.data.stream import Stream
from p2w.geometry import Keys
from p2w.log import Log, write_atomic
from p2w.model.protocol import Encoder
from p2w.world import World

Array = NDArray[np.float64]


class Similarity:
    """`similarity/positive`, `/negative` (mean cosines) and `/auc`, and both sets of cosines in `RUN/figures`."""

    def __init__(
        self, config: PretextConfig, encoder: Encoder, stream: Callable[[], Stream], world: World, log: Log,
        parts: int = 6,
    ) -> None:  # fmt: skip
        self.config, self.encoder, self.stream, self.world = config, encoder, stream, world
        self.log, self.parts = log, parts

    def __call__(self, step: int) -> Iterable[tuple[str, float]]:
        """Yield (name, value), the same on all ranks."""
        features = self._features()
        if len(features) < 2 or not np.isfinite(features).all():  # a network that is lost has no angles
            return
        positive, negative = pair_cosines(features)
        if self.world.is_main:
            self._save(step, positive, negative)
        yield "similarity/positive", float(positive.mean())
        yield "similarity/negative", float(negative.mean())
        yield "similarity/auc", auc(positive, negative)

    def _save(self, step: int, positive: Array, negative: Array) -> None:
        packed = io.BytesIO()
        np.savez(packed, positive=positive, negative=negative)
        with self.log.tolerate("figures"):
            write_atomic(similarity_file(self.log.run, step), packed.getvalue())

    def _features(self) -> Array:
        """(wholes, parts, channels) over all ranks, by id: pairs are the same for any number of ranks."""
        rows, ids, weights = [], [], []
        with self.stream() as stream:
            for batch in stream.batches():
                each = [self._pooled(batch.voxels, batch.ids, part) for part in range(self.parts)]
                rows.append(torch.stack(each, 1))
                ids.append(batch.ids)
                weights.append(batch.weight)
        features, number, weight = (self.world.gather(torch.cat(part)).cpu() for part in (rows, ids, weights))
        real = weight > 0
        return features[real][number[real].argsort()].double().numpy()

    def _pooled(self, voxels: Tensor, ids: Tensor, part: int) -> Tensor:
        config = self.config
        shape = (voxels.shape[1], voxels.shape[2], voxels.shape[3])
        # Part 0 is the one validation reconstructs; these come after it.
        keys = Keys(VALIDATION_SEED, 0, ids)
        boxes = geometry.sample_boxes(keys, 1 + part, shape, config.volume_fraction, config.aspect_range)
        views = geometry.crop_resize(
            voxels, boxes, config.size, window_hu=config.window_hu, antialias=config.antialias
        )
        return self.encoder.pooled(views)


def pair_cosines(features: Array) -> tuple[Array, Array]:
    """Cosines of all pairs within a whole, and of as many pairs across wholes.

    `features` is (wholes, parts, channels). Negative pairs take part i of a whole and part j of another, the other
    being 1, 2, … wholes further on in turn, so that every whole is in as many negative pairs as positive ones.
    """
    unit = features / np.maximum(np.linalg.norm(features, axis=2, keepdims=True), 1e-12)
    wholes, parts, _ = unit.shape
    positive, negative = [], []
    shift = 0
    for i in range(parts):
        for j in range(i + 1, parts):
            positive.append((unit[:, i] * unit[:, j]).sum(1))
            other = np.roll(unit[:, j], -(1 + shift % (wholes - 1)), axis=0)
            negative.append((unit[:, i] * other).sum(1))
            shift += 1
    return np.concatenate(positive), np.concatenate(negative)


def auc(positive: Array, negative: Array) -> float:
    """Area under the ROC curve: probability that a positive pair is more similar than a negative one, ties half."""
    from sklearn.metrics import roc_auc_score  # noqa: PLC0415  (2 s of imports, only once a network is looked at)

    truth = np.concatenate((np.ones(len(positive)), np.zeros(len(negative))))
    return float(roc_auc_score(truth, np.concatenate((positive, negative))))


def similarity_file(run: Path, step: int) -> Path:
    """Where the cosines of `step` are kept."""
    folder = run / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"similarity-{step:08d}.npz"
