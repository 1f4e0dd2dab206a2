"""Negatives from the batch, and from a queue."""

import copy

import torch
from torch import Tensor, nn

from p2w.model.protocol import Encoder
from p2w.pretext.contrast.head import Head
from p2w.pretext.contrast.losses import Answer, both, info_nce, strangers, unit
from p2w.pretext.contrast.ranks import gather, gather_with_gradient
from p2w.pretext_config import ContrastConfig


class Negatives(nn.Module):
    """Where negatives come from. Called on all ranks, with two parts (B, 1, d, h, w) of each of their wholes and ids (B,).

    `passes`: of a step, see optim.accumulate. `remembers`: what it holds is of training wholes and of earlier steps, so that
    validation is judged by the wholes of its own batch instead. `mirrors`: its second parts are mirrored at random.
    """

    remembers = mirrors = False

    def __init__(self, config: ContrastConfig, encoder: Encoder, head: Head, passes: int) -> None:
        super().__init__()
        self.config = config

    def forward(self, encoder: Encoder, head: Head, part: Tensor, other: Tensor, ids: Tensor) -> Answer:
        """Compare the parts."""
        raise NotImplementedError


def in_batch(one: Tensor, two: Tensor, ids: Tensor, temperature: float) -> Answer:
    """Embeddings (B, C) of two parts of each whole, against each other and both parts of all other wholes of all ranks."""
    everyone = gather_with_gradient(torch.cat((one, two), 1))
    others = torch.cat(everyone.chunk(2, 1))
    allowed = strangers(ids, gather(ids)).repeat(1, 2)
    return both(
        info_nce(one, two, others, allowed, temperature), info_nce(two, one, others, allowed, temperature)
    )


class Batch(Negatives):
    """SimCLR: the batch over all ranks, with gradients. Of a pass, where a step has several."""

    def forward(self, encoder: Encoder, head: Head, part: Tensor, other: Tensor, ids: Tensor) -> Answer:
        """One pass of the encoder over both parts; each part is the anchor once."""
        one, two = head(encoder.pooled(torch.cat((part, other)))).chunk(2)
        return in_batch(one, two, ids, self.config.temperature)


class Queue(Negatives):
    """MoCo: the last `contrast.queue` parts as a copy of encoder and head saw them, which follows these slowly.

    The queue begins as random directions of no whole. It is the same on all ranks: after each pass, what all of them
    have embedded goes in. Following is once a step; where a step has several passes it is spread over them.
    """

    remembers = True

    def __init__(self, config: ContrastConfig, encoder: Encoder, head: Head, passes: int) -> None:
        super().__init__(config, encoder, head, passes)
        self.slow_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.slow_head = copy.deepcopy(head).requires_grad_(False)
        self.rate = 1 - config.momentum ** (1 / passes)
        self.queue: Tensor
        self.ids: Tensor
        self.next: Tensor
        self.register_buffer("queue", unit(torch.randn(config.queue, head.channels)))
        self.register_buffer("ids", torch.full((config.queue,), -1))
        self.register_buffer("next", torch.zeros((), dtype=torch.int64))

    def forward(self, encoder: Encoder, head: Head, part: Tensor, other: Tensor, ids: Tensor) -> Answer:
        """First part through the encoder, second through its follower, which then goes into the queue."""
        anchor = head(encoder.pooled(part))
        with torch.no_grad():
            self._follow(encoder, head)
            positive = self.slow_head(self.slow_encoder.pooled(other))
        allowed = ids[:, None] != self.ids[None, :]
        answer = info_nce(anchor, positive, self.queue.clone(), allowed, self.config.temperature)
        self._put(gather(positive), gather(ids))
        return answer

    def _follow(self, encoder: Encoder, head: Head) -> None:
        slow: list[Tensor] = [*self.slow_encoder.parameters(), *self.slow_head.parameters()]
        torch._foreach_lerp_(slow, [*encoder.parameters(), *head.parameters()], self.rate)

    @torch.no_grad()
    def _put(self, vectors: Tensor, ids: Tensor) -> None:
        """The newest in the place of the oldest."""
        places = (self.next + torch.arange(len(ids), device=ids.device)) % len(self.queue)
        self.queue.index_copy_(0, places, vectors)
        self.ids.index_copy_(0, places, ids)
        self.next.add_(len(ids)).remainder_(len(self.queue))
