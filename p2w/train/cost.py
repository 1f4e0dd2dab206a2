"""What a run will cost, computed from the configuration alone: parameters, arithmetic, memory, steps."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from p2w.config import Config
from p2w.geometry import Keys
from p2w.model import Network
from p2w.model.fold import FoldCost
from p2w.model.unet3d import UpBlock, fold_cost_of
from p2w.pretext.protocol import Pretext


@dataclass(frozen=True)
class Cost:
    """Figures of one run. FLOPs count a multiply and an add as two, forward and backward; bytes are per rank."""

    parameters: int
    encoder_parameters: int
    flops_per_sample: int
    """With every module in its plain form (p2w.model.forms)."""
    state_bytes: int
    activation_bytes: int
    checkpoint_bytes: int
    folds: tuple[FoldCost, ...] = ()
    """Of each up-sampling that can be folded with the convolution behind it: FLOPs of either form, forward and backward."""
    passes: int = 1
    """Of a step (optim.accumulate)."""

    @property
    def folded_flops_per_sample(self) -> int:
        """With every up-sampling folded that can be, without the folding itself."""
        return self.flops_per_sample - sum(one.plain - one.folded for one in self.folds)

    @property
    def fold_flops(self) -> int:
        """Of folding them all, which is done once a pass, however many samples it has."""
        return sum(one.fold for one in self.folds)

    def flops(self, samples: float) -> float:
        """Of one pass of `samples` on a rank, with those up-samplings folded for which that is less arithmetic."""
        saved = sum(max(0.0, samples * (one.plain - one.folded) - one.fold) for one in self.folds)
        return samples * self.flops_per_sample - saved

    def lines(self) -> list[str]:
        """For a person."""
        folded = [
            f"                {self.folded_flops_per_sample / 1e9:,.0f} with every up-sampling folded (p2w.model.fold), and "
            f"{self.fold_flops / 1e9:,.0f} a pass for folding"
        ]
        return [
            f"parameters      {self.parameters / 1e6:.2f} M, encoder {self.encoder_parameters / 1e6:.2f} M",
            f"arithmetic      {self.flops_per_sample / 1e9:,.0f} GFLOP a sample, forward and backward",
            *(folded if self.folds else []),
            f"memory a rank   {self.state_bytes / 2**30:.2f} GiB weights, gradients and optimizer, "
            f"{self.activation_bytes / 2**30:.2f} GiB activations (estimate)",
        ]


def cost(
    config: Config, build: Callable[[], tuple[Pretext, Network]], share: int, bytes_per_value: int
) -> Cost:
    """Count for a rank that takes `share` samples a pass, its activations in `bytes_per_value` bytes.

    The network runs on torch's meta device: shapes without data, so `large` is counted in a second on any machine.
    """
    with torch.device("meta"):
        pretext, model = build()
    keys = Keys(0, 0, torch.zeros(1, dtype=torch.int64))
    given = pretext.sample(torch.zeros((1, *config.pretext.size), dtype=torch.int16), keys)
    passed = [tensor.to("meta") for tensor in (given.input, *given.beside)]
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            saved[id(tensor)] = tensor.numel() * bytes_per_value
            kept.append(tensor)
        return tensor

    folds = _count_folds(model)
    kept: list[Tensor] = []  # holds the tensors, so that ids stay unique while we count
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        counter = FlopCounterMode(display=False)
        with counter:
            output = model(*passed)
            answers = output if isinstance(output, tuple) else (output,)
            sum(answer.float().sum() for answer in answers if answer.requires_grad).backward()
    parameters = sum(p.numel() for p in model.parameters())
    averages = 1 if config.optim.name == "sgd" else 2  # that the optimizer keeps of every gradient
    return Cost(
        parameters=parameters,
        encoder_parameters=sum(p.numel() for p in model.encoder.parameters()),
        flops_per_sample=counter.get_total_flops(),
        state_bytes=4 * (2 + averages) * parameters,
        activation_bytes=sum(saved.values()) * share,
        checkpoint_bytes=4 * (1 + averages) * parameters,
        folds=tuple(folds),
        passes=config.optim.accumulate,
    )


def _count_folds(model: nn.Module) -> list[FoldCost]:
    """A list that fills when `model` runs one sample: of each up-sampling that can be folded, FLOPs of both forms.

    A backward pass is counted as two forward ones: the gradients of inputs and of weights.
    """
    found: list[FoldCost] = []

    def note(block: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(block, UpBlock)
        depth, height, width = given[0].shape[2:]
        forward = fold_cost_of(block, (depth, height, width))
        if forward is not None:
            found.append(FoldCost(3 * forward.plain, 3 * forward.folded, 3 * forward.fold))

    for module in model.modules():
        if isinstance(module, UpBlock):
            module.register_forward_pre_hook(note)
    return found
