"""Contrastive pretexts: the features of two parts of a whole become alike, and unlike those of other wholes.

Parts2Whole and a contrastive loss in one framework: what the paper names as its future (in its conclusion).

The encoder sees two parts of each whole in one pass. Each is to reconstruct the whole, and the bottlenecks of the two are
to be alike and unlike those of other wholes: mean squared error + `contrast.weight` x InfoNCE, negatives of all ranks.
"""

import functools
from dataclasses import replace
from typing import Any, ClassVar, Protocol, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from p2w import geometry, rng
from p2w.errors import UserError
from p2w.model import build_encoder
from p2w.model.decoder import build_decoder
from p2w.model.encoder import Encoder, Network, Output
from p2w.pretext.contrastive.objectives import (
    ContrastConfig,
    ContrastiveObjective,
    InBatch,
    MocoQueue,
    ProjectionHead,
    in_batch_loss,
)
from p2w.pretext.parts2whole import Parts2Whole
from p2w.pretext.protocol import Pretext, Views, check_size
from p2w.pretext.settings import RunConfig, Shows
from p2w.pretext.volume_ops import IntensityConfig, intensity_transform
from p2w.rng import SampleKeys

MIRRORS = 1000  # the keys' number for which axes are mirrored; parts are counted from 0


class ContrastRunConfig(RunConfig, Protocol):
    """A run's configuration with the groups of settings that this family reads."""

    @property
    def contrast(self) -> ContrastConfig:
        """Settings of the family."""

    @property
    def intensity(self) -> IntensityConfig:
        """How the parts' intensities are changed."""

    @property
    def train(self) -> Any:
        """How long the run is."""


def cut_part(batch_BDHW: Tensor, keys: SampleKeys, part: int, settings: ContrastRunConfig) -> Tensor:
    """Part number `part` of wholes int16 HU (B, D, H, W) -> (B, 1, d, h, w) in [0, 1], its intensities transformed."""
    config = settings.pretext
    shape = (batch_BDHW.shape[1], batch_BDHW.shape[2], batch_BDHW.shape[3])
    boxes = geometry.sample_boxes(keys, part, shape, config.volume_fraction, config.max_aspect)
    parts = geometry.crop_resize(
        batch_BDHW, boxes, config.size, window_hu=config.window_hu, antialias=config.antialias
    )
    return intensity_transform(parts, keys, part, settings.intensity)


def mirrored(parts: Tensor, keys: SampleKeys) -> Tensor:
    """Parts (B, 1, d, h, w), each mirrored along z, y, x with probability 1/2, independently."""
    turned = rng.uniforms(keys, MIRRORS, 3) < 0.5
    for axis in range(3):
        parts = torch.where(turned[:, axis].view(-1, 1, 1, 1, 1), parts.flip(2 + axis), parts)
    return parts


SMALL = 0.25  # volume of a small part, as a share of the least volume of a part
RIM = 0.25  # share of a cube's edge that a jigsaw leaves out, so that cubes do not fit edge to edge; PIRL: 1 - 64 / 85
JIGSAW, SMALL_PARTS = 1001, 1002  # the keys' numbers for a jigsaw, and for small parts
MANY = 64  # at most so many small parts has a whole; each has a key of its own


def cut_small_parts(batch_BDHW: Tensor, keys: SampleKeys, settings: ContrastRunConfig) -> Tensor:
    """Wholes int16 HU (B, D, H, W) -> `contrast.small_parts` further parts of each, (B, V, d', h', w') in [0, 1]."""
    config, count = settings.pretext, settings.contrast.small_parts
    shape = (batch_BDHW.shape[1], batch_BDHW.shape[2], batch_BDHW.shape[3])
    least = config.volume_fraction[0]
    numbers = torch.arange(count, device=keys.ids.device)
    real = None if keys.real is None else keys.real.repeat_interleave(count, 0)
    each = SampleKeys(keys.seed, keys.epoch, (keys.ids[:, None] * MANY + numbers).flatten(), real)
    boxes = geometry.sample_boxes(each, SMALL_PARTS, shape, (SMALL * least, least), config.max_aspect)
    parts = _cut_boxes(batch_BDHW, boxes.view(-1, count, 6), settings)
    return intensity_transform(parts.flatten(0, 1)[:, None], each, SMALL_PARTS, settings.intensity).view_as(
        parts
    )


def cut_jigsaw(batch_BDHW: Tensor, keys: SampleKeys, settings: ContrastRunConfig) -> Tensor:
    """Wholes int16 HU (B, D, H, W) -> eight cubes of part 1 of each in random order, (B, 8, d', h', w') in [0, 1]."""
    config, shape = settings.pretext, (batch_BDHW.shape[1], batch_BDHW.shape[2], batch_BDHW.shape[3])
    boxes = geometry.sample_boxes(keys, 1, shape, config.volume_fraction, config.max_aspect)[:, None]
    u = rng.uniforms(keys, JIGSAW, 32)
    octant = u[:, :8].argsort(dim=1, stable=True)  # which octant each cube is of
    corner = torch.stack((octant // 4, octant // 2 % 2, octant % 2), 2)
    half = (boxes[..., 3:] - boxes[..., :3]) / 2
    low = boxes[..., :3] + (corner + RIM * u[:, 8:].view(-1, 8, 3).float()) * half
    high = torch.minimum(low + (1 - RIM) * half, boxes[..., 3:])
    cubes = _cut_boxes(batch_BDHW, torch.cat((low, high), 2), settings)
    together = cubes.flatten(1, 2)[:, None]  # one change of intensities for a part, as for others
    return intensity_transform(together, keys, 1, settings.intensity).view_as(cubes)


def _cut_boxes(batch_BDHW: Tensor, boxes: Tensor, settings: ContrastRunConfig) -> Tensor:
    """Boxes (B, V, 6) of the wholes, each at half a part's edges: (B, V, d', h', w') in [0, 1]."""
    config, size = settings.pretext, half_size(settings)
    cut = [
        geometry.crop_resize(batch_BDHW, one, size, window_hu=config.window_hu, antialias=config.antialias)
        for one in boxes.unbind(1)
    ]
    return torch.cat(cut, 1)


def half_size(settings: ContrastRunConfig) -> geometry.Size:
    """The size of small parts and of a jigsaw's cubes: half the edges of a part, rounded up to the encoder's multiples."""
    by = _divisor(settings.model.name, settings.model.width)
    edges = [
        -(-edge // (2 * multiple)) * multiple
        for edge, multiple in zip(settings.pretext.size, by, strict=True)
    ]
    return edges[0], edges[1], edges[2]


@functools.cache
def _divisor(encoder: str, width: int) -> tuple[int, int, int]:
    """The numbers that the edges of an encoder's input must be multiples of."""
    with torch.device("meta"):
        return build_encoder(encoder, width).divisor


class ContrastiveNetwork(Network):
    """Encoder, head, and the objective that compares wholes. Nothing else depends on more than one whole.

    A part alone (B, 1, d, h, w) becomes embeddings (B, C). With another part and the wholes' ids, on all ranks together, the
    answer is each whole's loss, cosine of its pair, and whether it was nearer than all negatives: (B,) each.
    """

    def __init__(
        self, encoder: Encoder, head: ProjectionHead, negatives: ContrastiveObjective, in_batch: InBatch
    ) -> None:
        super().__init__()
        self.encoder, self.head, self.negatives, self.in_batch = encoder, head, negatives, in_batch
        encoder.only_pooled()

    def forward(
        self, part: Tensor, other: Tensor | None = None, ids: Tensor | None = None, more: Tensor | None = None
    ) -> Output:
        """In validation, an objective with a memory is replaced by that of the batch, so that losses of steps compare."""
        if other is None or ids is None:
            return cast(Tensor, self.head(self.encoder.pooled(part)))
        judge = self.negatives if self.training or not self.negatives.remembers else self.in_batch
        answer: Output = judge(self.encoder, self.head, part, other, ids, more)
        return answer


class ContrastivePretext(Pretext):
    """A pretext of this family: `kind` is its objective. Parts are functions of (seed, epoch, id) alone."""

    summary = "two parts of a whole -> alike, unlike those of others"
    groups: ClassVar = {"contrast": ContrastConfig, "intensity": IntensityConfig}
    reconstructs = False
    compares_wholes = True
    shows: Shows = "part"
    kind: ClassVar[type[ContrastiveObjective]]

    def __init__(self, config: ContrastRunConfig) -> None:
        """Raise UserError for a batch too small to hold negatives, or too large for the queue."""
        check_batch(config)
        self.settings = self._resolved(config)
        if self.kind is MocoQueue and config.contrast.queue < config.data.batch:
            raise UserError(
                f"contrast.queue={config.contrast.queue}: must hold a batch, {config.data.batch}; pass --contrast.queue 4096"
            )
        self.config = config

    def _resolved(self, config: ContrastRunConfig) -> ContrastConfig:
        """The settings with the method's own temperature where it is left open, and no queue for SwAV where a pass has as
        many wholes as there are prototypes."""
        settings = config.contrast
        if settings.temperature is None:
            settings = replace(settings, temperature=self.kind.own_temperature)
        if config.data.batch // config.optim.accumulate >= settings.prototypes:
            settings = replace(settings, swav_queue=0)
        return settings

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        """The family also reads how large a batch is and in how many passes it comes."""
        return cls(cast(ContrastRunConfig, config))

    def sample(self, batch_BDHW: Tensor, keys: SampleKeys, step: int = 0) -> Views:
        """Wholes, int16 HU (B, D, H, W) -> parts 0 and 1 of each, (B, 1, d, h, w) in [0, 1], and the wholes' ids (B,); for
        SwAV and PIRL also small parts or a jigsaw's cubes (B, V, d', h', w')."""
        part, other = (cut_part(batch_BDHW, keys, number, self.config) for number in (0, 1))
        other = mirrored(other, keys) if self.kind.mirrors(self.settings) else other
        more = self.kind.views(self.settings)
        cut = {"small parts": cut_small_parts, "jigsaw": cut_jigsaw}
        others = (cut[more](batch_BDHW, keys, self.config),) if more else ()
        return Views(part, other, extra_inputs=(other, keys.ids, *others))

    def build(self, encoder: Encoder) -> Network:
        """Encoder, head, and the objective. Raises UserError for a size that the encoder does not take."""
        check_size(self.config.pretext.size, encoder)
        settings = self.settings
        if self.kind.views(settings):
            check_size(half_size(self.config), encoder)
        head = ProjectionHead(encoder.channels[-1], settings)
        negatives = self.kind(settings, encoder, head)
        return ContrastiveNetwork(encoder, head, negatives, InBatch(settings, encoder, head))

    def loss(self, output: Output, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the wholes; `cosine` of the positive pairs, and `accuracy`, the share nearer than all negatives."""
        losses, cosine, nearest = output
        return losses.mean(), {"cosine": cosine.mean(), "accuracy": nearest.mean()}

    def image_columns(self, views: Views) -> dict[str, Tensor]:
        """The two parts."""
        return {"part": views.input, "another part": views.target}


def check_batch(config: ContrastRunConfig) -> None:
    """Raise UserError where a pass has a single whole, which would have no negatives."""
    if config.data.batch < 2 * config.optim.accumulate:
        raise UserError(
            f"data.batch={config.data.batch} in optim.accumulate={config.optim.accumulate} passes: {config.pretext.name} "
            "needs two wholes a pass; pass a larger --data.batch"
        )


class BothNetwork(Network):
    """A part alone (B, 1, d, h, w) becomes its whole, as in Parts2Whole.

    With another part and the wholes' ids, on all ranks together, the answer is the whole from the first part, from the
    second if `both`, and of every whole InfoNCE, cosine, and whether its pair is nearer than all negatives, (B,) each.
    """

    def __init__(
        self, encoder: Encoder, decoder: nn.Module, head: ProjectionHead, both: bool, temperature: float
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.head = encoder, decoder, head
        self.both, self.temperature = both, temperature

    def forward(self, x: Tensor, other: Tensor | None = None, ids: Tensor | None = None) -> Output:
        """One pass of the encoder."""
        if other is None or ids is None:
            return torch.sigmoid(self.decoder(self.encoder(x)).float())
        features: list[Tensor] = self.encoder(torch.cat((x, other)))
        one, two = self.head(features[-1].float().mean(dim=(2, 3, 4))).chunk(2)
        asked = features if self.both else [level[: len(x)] for level in features]
        volumes = torch.sigmoid(self.decoder(asked).float())
        return (*volumes.split(len(x)), *in_batch_loss(one, two, ids, self.temperature))


class Parts2WholeContrast(Pretext):
    """Two parts a whole and step, functions of (seed, epoch, id) alone; the first is the one that Parts2Whole shows."""

    summary = "two parts -> their whole, and bottlenecks alike, unlike those of other wholes"
    groups: ClassVar = {"contrast": ContrastConfig, "intensity": IntensityConfig}
    reconstructs = True
    shows: Shows = "part"

    def __init__(self, config: ContrastRunConfig) -> None:
        """Raise UserError for a batch too small to hold negatives."""
        check_batch(config)
        self.config = config

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        """Like the family, it also reads how large a batch is and in how many passes it comes."""
        return cls(cast(ContrastRunConfig, config))

    def sample(self, batch_BDHW: Tensor, keys: SampleKeys, step: int = 0) -> Views:
        """Wholes, int16 HU (B, D, H, W) -> part and whole, (B, 1, d, h, w) in [0, 1]; as extra inputs another part and
        the ids (B,)."""
        views = Parts2Whole(self.config.pretext, self.config.intensity).sample(batch_BDHW, keys)
        return Views(
            views.input, views.target, extra_inputs=(cut_part(batch_BDHW, keys, 1, self.config), keys.ids)
        )

    def build(self, encoder: Encoder) -> Network:
        """Encoder, decoder (skips off unless asked), sigmoid, and a projection head."""
        check_size(self.config.pretext.size, encoder)
        settings = self.config.contrast
        decoder = build_decoder(encoder, self.config.pretext.skips)
        head = ProjectionHead(encoder.channels[-1], settings)
        temperature = InBatch.own_temperature if settings.temperature is None else settings.temperature
        return BothNetwork(encoder, decoder, head, settings.both, temperature)

    def loss(self, output: Output, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error + weight x InfoNCE, in float32. For the log: both terms, and cosine and accuracy as
        in `ContrastivePretext.loss`."""
        *volumes, losses, cosine, nearest = cast(tuple[Tensor, ...], output)
        mse = torch.stack([mse_loss(volume.float(), views.target.float()) for volume in volumes]).mean()
        infonce = losses.mean()
        terms = {
            "mse": mse.detach(),
            "infonce": infonce.detach(),
            "cosine": cosine.mean(),
            "accuracy": nearest.mean(),
        }
        return mse + self.config.contrast.weight * infonce, terms

    def image_columns(self, views: Views) -> dict[str, Tensor]:
        """Part and whole."""
        return {"part": views.input, "whole": views.target}
