"""The pretext of the whole family: two parts of a whole shall be alike, and unlike those of other wholes."""

from typing import cast

from torch import Tensor

from p2w.config import Config
from p2w.errors import UserError
from p2w.geometry import Keys
from p2w.model.protocol import Encoder, Network, Output
from p2w.pretext.contrast.head import Head
from p2w.pretext.contrast.negatives import Batch, Negatives, Queue
from p2w.pretext.contrast.parts import mirrored, part_of
from p2w.pretext.protocol import Views, check_size


class ContrastNetwork(Network):
    """Encoder, head, and where negatives come from. All that couples wholes happens in here.

    A part alone (B, 1, d, h, w) becomes embeddings (B, C). With another part and the wholes' ids, on all ranks together, the
    answer is each whole's loss, cosine of its pair, and whether it was told apart: (B,) each.
    """

    def __init__(self, encoder: Encoder, head: Head, negatives: Negatives, in_batch: Batch) -> None:
        super().__init__()
        self.encoder, self.head, self.negatives, self.in_batch = encoder, head, negatives, in_batch
        encoder.only_pooled()

    def forward(self, part: Tensor, other: Tensor | None = None, ids: Tensor | None = None) -> Output:
        """Judge validation by its own batch where the negatives are remembered ones, so that steps compare."""
        if other is None or ids is None:
            return cast(Tensor, self.head(self.encoder.pooled(part)))
        judge = self.negatives if self.training or not self.negatives.remembers else self.in_batch
        answer: Output = judge(self.encoder, self.head, part, other, ids)
        return answer


class Contrast:
    """A member of the family: `kind` says where negatives come from. Parts are functions of (seed, epoch, id) alone."""

    reconstructs = False

    def __init__(self, config: Config, kind: type[Negatives]) -> None:
        """Raise UserError for a batch too small to hold negatives, or too large for the queue."""
        enough_wholes(config)
        if kind is Queue and config.contrast.queue < config.data.batch:
            raise UserError(
                f"contrast.queue={config.contrast.queue}: must hold a batch, {config.data.batch}; pass --contrast.queue 4096"
            )
        self.config, self.kind = config, kind

    def sample(self, batch_BDHW: Tensor, keys: Keys) -> Views:
        """Wholes, int16 HU (B, D, H, W) -> parts 0 and 1 of each, (B, 1, d, h, w) in [0, 1], and the wholes' ids (B,)."""
        part, other = (part_of(batch_BDHW, keys, number, self.config) for number in (0, 1))
        other = mirrored(other, keys) if self.kind.mirrors else other
        return Views(part, other, beside=(other, keys.ids))

    def build(self, encoder: Encoder) -> Network:
        """Encoder, head, and what remembers. Raises UserError for a size that the encoder does not take."""
        check_size(self.config.pretext.size, encoder)
        settings, passes = self.config.contrast, self.config.optim.accumulate
        head = Head(encoder.channels[-1], settings)
        negatives = self.kind(settings, encoder, head, passes)
        return ContrastNetwork(encoder, head, negatives, Batch(settings, encoder, head, passes))

    def loss(self, output: Output, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the wholes; `cosine` of the positive pairs, and the share that is `told` apart from all negatives."""
        losses, cosine, told = output
        return losses.mean(), {"cosine": cosine.mean(), "told": told.mean()}

    def panels(self, views: Views) -> dict[str, Tensor]:
        """The two parts."""
        return {"part": views.input, "another part": views.target}


def enough_wholes(config: Config) -> None:
    """Raise UserError where a pass holds a single whole: it would have nothing to differ from."""
    if config.data.batch < 2 * config.optim.accumulate:
        raise UserError(
            f"data.batch={config.data.batch} in optim.accumulate={config.optim.accumulate} passes: {config.pretext.name} "
            "needs two wholes a pass; pass a larger --data.batch"
        )
