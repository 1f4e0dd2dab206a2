"""What a run will cost, computed from the configuration alone: parameters, arithmetic, memory, steps."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from p2w.config import Config
from p2w.geometry import Keys
from p2w.model import Network
from p2w.pretext.protocol import Pretext


@dataclass(frozen=True)
class Cost:
    """Figures of one run. FLOPs count a multiply and an add as two; bytes are per rank."""

    parameters: int
    encoder_parameters: int
    flops_per_sample: int
    state_bytes: int
    activation_bytes: int
    checkpoint_bytes: int

    def lines(self) -> list[str]:
        """For a person."""
        return [
            f"parameters      {self.parameters / 1e6:.2f} M, encoder {self.encoder_parameters / 1e6:.2f} M",
            f"arithmetic      {self.flops_per_sample / 1e9:,.0f} GFLOP a sample, forward and backward",
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
    )
