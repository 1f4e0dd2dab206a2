"""Images of examples: part, reconstruction and whole; reconstructions by scale of the part; a part's nearest wholes."""

import dataclasses
import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from p2w import geometry
from p2w.analysis import plots, similarity
from p2w.analysis.feature_sources import AnalysedRun, FeatureSource, autocast
from p2w.analysis.features import PartSet, TrainingWholes, cut_parts
from p2w.analysis.measure import RECONSTRUCTION_SCALES, Measure
from p2w.analysis.monitors import VALIDATION_SEED, read_sub_scans
from p2w.errors import UserError
from p2w.files import write_atomic
from p2w.log import Log
from p2w.pretext.protocol import Pretext
from p2w.rng import SampleKeys, stratified_ids
from p2w.stream.local import ShardSet
from p2w.train.optim import Precision
from p2w.world import World

if TYPE_CHECKING:
    from matplotlib.figure import Figure


CANDIDATES = 24  # wholes that are read
DRAWN = 4  # those of them with the highest contrast


class Pictures:
    """Draws four wholes with high contrast, as the pretext shows them, in TensorBoard. Rank 0 only; yields no numbers."""

    def __init__(
        self, pretext: Pretext, model: nn.Module, shards: ShardSet, split: str, device: torch.device, log: Log
    ) -> None:
        self.pretext, self.model, self.log = pretext, model, log
        if log.speaks:
            voxels, ids = high_contrast_wholes(shards, split)
            self.keys = [shards.key(int(row)) for row in ids]
            self.extent_mm = shards.spacing_mm[ids.numpy()] * shards.size_in_voxels(ids.numpy())
            real = shards.real_voxels(ids.numpy(), device)
            self.views = pretext.sample(
                voxels.to(device), SampleKeys(VALIDATION_SEED, 0, ids.to(device), real)
            )

    def __call__(self, step: int) -> Iterable[tuple[str, float]]:
        """Draw pixels only, because a figure with titles by matplotlib takes ten times as long."""
        if self.log.speaks:
            columns = self._columns()
            self.log.picture(f"{', '.join(columns)}; each axial, coronal", plots.image_strip(columns), step)
        return ()

    def figure(self) -> "Figure":
        """The figure of the current network, which must be in evaluation mode."""
        return plots.middle_slices(self._columns())

    def _columns(self) -> dict[str, Tensor]:
        """{title: volumes}; a reconstruction comes before the last column, which is its target."""
        columns = self.pretext.image_columns(self.views)
        if not self.pretext.reconstructs:
            return columns
        *inputs, target = columns
        output = {"reconstruction": self._output()}
        return {title: columns[title] for title in inputs} | output | {target: columns[target]}

    def _output(self) -> Tensor:
        """The network's volumes (B, 1, d, h, w). Where the loss has a mask, the network may need to know it too."""
        views = self.views
        extra = () if views.mask is None else views.extra_inputs
        volumes: Tensor = self.model(views.input, *extra)
        return volumes

    def volumes(self) -> bytes:
        """The reconstructions as an npz file, for the slider of report.html; analysis/reconstructions.npz has this form too.

        `whole` (W, d, h, w), `part` and `output` (W, S, d, h, w), uint8, 0..255 for 0..1; `keys` (W,); `extent_mm`
        (W, 3), edges z, y, x of the whole; `scale` (S,), here one NaN, because parts have the scales of training.
        """
        views, packed = self.views, io.BytesIO()
        part, output = grey(views.input)[:, None], grey(self._output())[:, None]
        np.savez_compressed(
            packed, whole=grey(views.target), part=part, output=output,
            scale=np.array([np.nan]), keys=np.array(self.keys), extent_mm=self.extent_mm,
        )  # fmt: skip
        return packed.getvalue()


def grey(volumes: Tensor) -> NDArray[np.uint8]:
    """Volumes (B, 1, d, h, w) in [0, 1] as (B, d, h, w) uint8."""
    return (volumes[:, 0].float().clamp(0, 1) * 255).round().byte().cpu().numpy()


def high_contrast_wholes(shards: ShardSet, split: str) -> tuple[Tensor, Tensor]:
    """Voxels (4, D, H, W) int16 and ids (4,) of the wholes with the largest standard deviation, of a stratified subset."""
    ids = stratified_ids(shards.ids(split), CANDIDATES)
    voxels, good = read_sub_scans(shards, ids)
    if not good.any():
        raise UserError(
            f"{shards.where}: not one of {len(ids)} sub-scans of '{split}' can be read; run p2w verify on it"
        )
    voxels, ids = voxels[torch.from_numpy(good)], ids[good]
    best = voxels.flatten(1)[:, ::16].float().std(1).argsort(descending=True, stable=True)[:DRAWN]
    return voxels[best], torch.from_numpy(ids)[best]


QUERIES, HITS = 4, 4
Grey = NDArray[np.uint8]


@torch.no_grad()
def reconstructions(
    run: AnalysedRun, step: int, shards: ShardSet, split: str, world: World, precision: Precision
) -> dict[str, Any]:
    """Reconstructions from parts of growing scale, by the network at `step`. Called on rank 0 alone.

    Arrays `whole` (W, d, h, w), `part` and `output` (W, S, d, h, w) uint8, 0..255 for 0..1; `scale` (S,), `keys` (W,);
    `extent_mm` (W, 3), edges z, y, x of the whole. The random numbers for a part's position and shape are the same at all
    scales.
    """
    alone = dataclasses.replace(world, size=1)  # the other ranks do not join in
    model = run.recalibrated_network(step, alone, precision, TrainingWholes(shards, alone))
    view = run.config.pretext
    voxels, ids = high_contrast_wholes(shards, split)
    keys = SampleKeys(VALIDATION_SEED, 0, ids, shards.real_voxels(ids.numpy()))
    boxes = torch.stack(
        [
            geometry.sample_boxes(keys, 0, shards.shape, (scale, scale), view.max_aspect)
            for scale in RECONSTRUCTION_SCALES
        ],
        1,
    ).to(world.device)
    parts, outputs = [], []
    for whole, around in zip(voxels.to(world.device), boxes, strict=True):
        part = cut_parts(whole, around, view)
        with autocast(world.device, precision):
            output = model(part)
        parts.append(grey(part))
        outputs.append(grey(output))
    part_stack, output_stack = np.stack(parts), np.stack(outputs)
    return {
        "whole": part_stack[:, -1], "part": part_stack, "output": output_stack, "scale": np.array(RECONSTRUCTION_SCALES),
        "keys": np.array([shards.key(int(row)) for row in ids]),
        "extent_mm": shards.spacing_mm[ids.numpy()] * shards.size_in_voxels(ids.numpy()),
    }  # fmt: skip


def save_arrays(arrays: dict[str, Any], path: Path) -> None:
    """Write arrays as a compressed npz, atomically."""
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    write_atomic(path, packed.getvalue())


def nearest(measure: Measure, source: FeatureSource) -> list[dict[str, Any]]:
    """Rows for `plots.neighbours_figure`: parts of a few wholes, and the wholes most similar by the source's features."""
    parts, wholes = (torch.from_numpy(measure.features(source, name)) for name in ("parts", "whole"))
    gallery = similarity.l2_normalise_features(wholes[:, 0])
    queries = np.searchsorted(measure.ids, measure.wholes("scatter")[:QUERIES])
    rows = []
    for own in queries:
        similar = gallery @ similarity.l2_normalise_features(parts[own, 0])
        first = similar.argsort(descending=True, stable=True)[:HITS].tolist()
        rows.append(
            {
                "query": _picture(measure, source, "parts", own),
                "own": _picture(measure, source, "whole", own),
                "rank": int(similarity.retrieval_ranks(parts[:, 0], wholes[:, 0])[own]),
                "hits": [(_picture(measure, source, "whole", i), float(similar[i]), i == own) for i in first],
            }
        )
    return rows


def _picture(measure: Measure, source: FeatureSource, name: str, index: int) -> Grey:
    """The first part (d, h, w) of a part set, of the whole at `index` of `measure.ids`."""
    voxels = torch.empty(measure.shards.shape, dtype=torch.int16)
    measure.shards.read_into(int(measure.ids[index]), voxels)
    part_set: PartSet = measure.sets[name]
    return grey(
        cut_parts(voxels, part_set.boxes(measure.ids[index : index + 1], measure.shards)[0, :1], source.view)
    )[0]
