"""Contrastive pretexts: the features of two parts of a whole become alike, and unlike those of other wholes.

Parts2Whole and a contrastive loss in one framework: what the paper names as its future (in its conclusion).

The encoder sees two parts of each whole in one pass. Each is to reconstruct the whole, and the bottlenecks of the two are
to be alike and unlike those of other wholes: mean squared error + `contrast.weight` x InfoNCE, negatives of all ranks.
"""

from typing import ClassVar, Protocol, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from p2w import geometry, rng
from p2w.errors import UserError
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

    def forward(self, part: Tensor, other: Tensor | None = None, ids: Tensor | None = None) -> Output:
        """In validation, an objective with a memory is replaced by that of the batch, so that losses of steps compare."""
        if other is None or ids is None:
            return cast(Tensor, self.head(self.encoder.pooled(part)))
        judge = self.negatives if self.training or not self.negatives.remembers else self.in_batch
        answer: Output = judge(self.encoder, self.head, part, other, ids)
        return answer


class ContrastivePretext(Pretext):
    """A pretext of this family: `kind` is its objective. Parts are functions of (seed, epoch, id) alone."""

    summary = "two parts of a whole -> alike, unlike those of others"
    groups: ClassVar = {"contrast": ContrastConfig, "intensity": IntensityConfig}
    reconstructs = False
    shows: Shows = "part"
    kind: ClassVar[type[ContrastiveObjective]]

    def __init__(self, config: ContrastRunConfig) -> None:
        """Raise UserError for a batch too small to hold negatives, or too large for the queue."""
        check_batch(config)
        if self.kind is MocoQueue and config.contrast.queue < config.data.batch:
            raise UserError(
                f"contrast.queue={config.contrast.queue}: must hold a batch, {config.data.batch}; pass --contrast.queue 4096"
            )
        self.config = config

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        """The family also reads how large a batch is and in how many passes it comes."""
        return cls(cast(ContrastRunConfig, config))

    def sample(self, batch_BDHW: Tensor, keys: SampleKeys, step: int = 0) -> Views:
        """Wholes, int16 HU (B, D, H, W) -> parts 0 and 1 of each, (B, 1, d, h, w) in [0, 1], and the wholes' ids (B,)."""
        part, other = (cut_part(batch_BDHW, keys, number, self.config) for number in (0, 1))
        other = mirrored(other, keys) if self.kind.mirrors else other
        return Views(part, other, extra_inputs=(other, keys.ids))

    def build(self, encoder: Encoder) -> Network:
        """Encoder, head, and the objective. Raises UserError for a size that the encoder does not take."""
        check_size(self.config.pretext.size, encoder)
        settings = self.config.contrast
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
        return BothNetwork(encoder, decoder, head, settings.both, settings.temperature)

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
