"""The interface of pretexts. Shapes: B, C, D, H, W = batch, channel, slice, row, column; all axes z, y, x."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor, nn

from p2w.errors import UserError
from p2w.geometry import Size
from p2w.model.encoder import Encoder, Network, Output
from p2w.pretext.settings import RunConfig, Shows
from p2w.rng import SampleKeys


@dataclass(frozen=True)
class Views:
    """What one batch of sub-scans became; the first axis of every tensor counts the sub-scans.

    `input` (B, C, d, h, w) in [0, 1] goes to the network, followed by `extra_inputs`, should the network need more (another
    part, the ids of the sub-scans); `target` and `mask` are for the loss alone.
    """

    input: Tensor
    target: Tensor
    mask: Tensor | None = None
    extra_inputs: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.input)

    def rows(self, some: slice) -> "Views":
        """The views of some of the samples."""
        mask = None if self.mask is None else self.mask[some]
        extra = tuple(tensor[some] for tensor in self.extra_inputs)
        return replace(self, input=self.input[some], target=self.target[some], mask=mask, extra_inputs=extra)

    def split(self, passes: int) -> "list[Views]":
        """Equal shares of the samples, in order; `passes` divides their number."""
        share = len(self) // passes
        return [self.rows(slice(n * share, (n + 1) * share)) for n in range(passes)]


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are optimised alike: their rate is `lr_factor` times that of the schedule.

    `weight_decay` None: that of `optim.weight_decay`.
    """

    parameters: list[nn.Parameter]
    lr_factor: float = 1.0
    weight_decay: float | None = None


class Pretext(ABC):
    """A proxy task: the base class of all. All randomness comes from the keys, so a batch can be replayed.

    A subclass sets what has no default here (`summary`, `reconstructs`, `shows`) and writes `sample`, `build`, `loss` and
    `image_columns`. Its `__init__` takes `config.pretext` and then the groups of settings that `groups` names, in order.
    """

    summary: ClassVar[str]
    """What the network is shown -> what it is asked for, in a few words, for the table in docs/methods.md."""

    groups: ClassVar[Mapping[str, type]] = {}
    """Name -> dataclass of each group of settings that this pretext reads; a group of `Config` and of the command line."""

    @property
    def kept_edge(self) -> float:
        """Share of an edge of what it `shows` that is left after the pretext has cut more away, before it resizes.

        The network's voxels are finer by it: cards and nnU-Net's plans state their spacing.
        """
        return 1.0

    capturable: bool = False
    """Whether network and loss are made of device operations alone, the same ones at every step, so that a CUDA graph of one
    step stands for all. A pretext with an `after_step` of its own is never captured."""

    knows_wholes: bool = False
    """Whether it learns something of each whole for itself, by its id, which it takes up again in later epochs. It is then
    refused for sets of which every epoch cuts other wholes."""

    compares_wholes: bool = False
    """Whether the loss of a whole depends on the other wholes of its pass, over all ranks. Such a pass keeps its size in a
    run that continues with fewer ranks."""

    @property
    @abstractmethod
    def reconstructs(self) -> bool:
        """Whether the network answers with a volume (B, 1, d, h, w) in [0, 1] to be compared with `target`.

        Then `network(views.input)` alone gives that volume without talking to other ranks, for rank 0 to draw it.
        """

    @property
    @abstractmethod
    def shows(self) -> Shows:
        """What the encoder sees, "part", "crop" or "whole" (see `Shows`); it may depend on the settings."""

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        """Make the pretext from a run's configuration. Raises UserError for settings that do not go together."""
        return cls(config.pretext, *(getattr(config, group) for group in cls.groups))  # type: ignore[call-arg]

    @abstractmethod
    def sample(self, batch_BDHW: Tensor, keys: SampleKeys, step: int = 0) -> Views:
        """Sub-scans, int16 HU (B, D, H, W) on the device -> views on the same device.

        `step`: how many steps of the run are done. It is 0 where no step is taken (validation, pictures, analysis), so that
        losses of different steps are losses of the same task.
        """

    @abstractmethod
    def build(self, encoder: Encoder) -> Network:
        """Put the decoder or head of this task behind the encoder. Raises UserError where the two do not go together."""

    @abstractmethod
    def loss(self, output: Output, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, a mean over the samples of `views`, and further scalars worth logging.

        The loss of a sample may depend on other samples only through `output`: validation asks for one at a time. A further
        scalar `mse` is the mean squared error of a reconstruction, and is plotted instead of a loss of several terms.
        """

    @abstractmethod
    def image_columns(self, views: Views) -> dict[str, Tensor]:
        """Titles and volumes (B, 1, d, h, w) in [0, 1] of what is shown and what is asked, for pictures."""

    def parameter_groups(self, network: nn.Module) -> list[ParameterGroup]:
        """The groups that the optimizer treats differently; each trainable parameter is in exactly one of them.

        A run continues only with as many groups as its checkpoints have.
        """
        return [ParameterGroup(list(network.parameters()))]

    def after_step(self, network: nn.Module, step: int) -> None:  # noqa: B027  most have nothing to update
        """Update what gradients do not train, such as a teacher, after the optimizer's step number `step` (0 is the first).

        Called without gradients, on all ranks, with the network itself (not DDP's wrapper). It may change buffers and
        parameters that need no gradient, in place, and nothing else: these are in every checkpoint, and they are
        restored if a step is skipped because its gradient was not finite. On a GPU the host learns too late that a step was
        skipped, so the method runs for it too, and the device undoes it; state on the host would keep it.
        """


def has_after_step(pretext: object) -> bool:
    """Whether the pretext has work to do after a step."""
    return getattr(type(pretext), "after_step", Pretext.after_step) is not Pretext.after_step


def check_size(size: Size, encoder: Encoder) -> None:
    """Raise UserError where the edges of the network's input, in voxels, are no multiples of the encoder's strides, or
    leave its coarsest features fewer voxels than it can normalise."""
    by, least = encoder.divisor, encoder.least_voxels
    fits = [max(stride, edge // stride * stride) for edge, stride in zip(size, by, strict=True)]
    few = math.prod(edge // stride for edge, stride in zip(fits, by, strict=True)) < least
    wide = 2 if few else 1
    remedy = f"pass e.g. --pretext.size {fits[0]} {wide * fits[1]} {wide * fits[2]}"
    if any(edge < stride or edge % stride for edge, stride in zip(size, by, strict=True)):
        same = len(set(by)) == 1
        rule = f"{by[0]}, the encoder's stride" if same else f"its own of {by}, the encoder's strides"
        raise UserError(f"pretext.size={size}: each edge must be a multiple of {rule}; {remedy}")
    if few:
        raise UserError(
            f"pretext.size={size}: at the encoder's stride, {by[-1]}, its coarsest features must be {least} voxels at "
            f"least, to be normalised; {remedy}"
        )
