"""Parts2Whole and a contrastive loss in one framework: what the paper names as its future (its conclusion; FACTS 6).

The encoder sees two parts of each whole in one pass. Each is to reconstruct the whole, and the bottlenecks of the two are
to be alike and unlike those of other wholes: mean squared error + `contrast.weight` x InfoNCE, negatives of all ranks.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from p2w.config import Config
from p2w.geometry import Keys
from p2w.model.decoder import build_decoder
from p2w.model.protocol import Encoder, Network, Output
from p2w.pretext.contrast.head import Head
from p2w.pretext.contrast.negatives import in_batch
from p2w.pretext.contrast.parts import part_of
from p2w.pretext.contrast.task import enough_wholes
from p2w.pretext.parts2whole import Parts2Whole
from p2w.pretext.protocol import Views, check_size


class BothNetwork(Network):
    """A part alone (B, 1, d, h, w) becomes its whole, as in Parts2Whole.

    With another part and the wholes' ids, on all ranks together, the answer is the whole from the first part, from the
    second if `both`, and InfoNCE, cosine, told (B,) each of every whole.
    """

    def __init__(
        self, encoder: Encoder, decoder: nn.Module, head: Head, both: bool, temperature: float
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
        return (*volumes.split(len(x)), *in_batch(one, two, ids, self.temperature))


class Parts2WholeContrast:
    """Two parts a whole and step, functions of (seed, epoch, id) alone; the first is the one that Parts2Whole shows."""

    reconstructs = True

    def __init__(self, config: Config) -> None:
        """Raise UserError for a batch too small to hold negatives."""
        enough_wholes(config)
        self.config = config

    def sample(self, batch_BDHW: Tensor, keys: Keys) -> Views:
        """Wholes, int16 HU (B, D, H, W) -> part, whole, beside them another part, (B, 1, d, h, w) in [0, 1], ids (B,)."""
        views = Parts2Whole(self.config.pretext, self.config.intensity).sample(batch_BDHW, keys)
        return Views(views.input, views.target, beside=(part_of(batch_BDHW, keys, 1, self.config), keys.ids))

    def build(self, encoder: Encoder) -> Network:
        """Encoder, decoder (skips off unless asked), sigmoid; a head beside."""
        check_size(self.config.pretext.size, encoder)
        settings = self.config.contrast
        decoder = build_decoder(encoder, self.config.pretext.skips)
        head = Head(encoder.channels[-1], settings)
        return BothNetwork(encoder, decoder, head, settings.both, settings.temperature)

    def loss(self, output: Output, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error + weight x InfoNCE, in float32; both terms, cosine and told beside (see contrast.task)."""
        *volumes, losses, cosine, told = cast(tuple[Tensor, ...], output)
        mse = torch.stack([mse_loss(volume.float(), views.target.float()) for volume in volumes]).mean()
        infonce = losses.mean()
        beside = {
            "mse": mse.detach(),
            "infonce": infonce.detach(),
            "cosine": cosine.mean(),
            "told": told.mean(),
        }
        return mse + self.config.contrast.weight * infonce, beside

    def panels(self, views: Views) -> dict[str, Tensor]:
        """Part and whole."""
        return {"part": views.input, "whole": views.target}
