"""Estimates from the configuration alone: parameters, FLOPs, memory, and the speed at any number of ranks.

The time of a step is the arithmetic of a rank's samples, plus the part of the all-reduce that the backward pass does not
hide, plus a constant; or the time to read the samples, if that is longer. `bench/scaling.py` measures these rates on its
machine and compares the forecast with runs of one and of two processes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from p2w.config import Config
from p2w.model import Network
from p2w.model.forms import FoldCost
from p2w.model.unet3d import UpBlock, fold_cost_of
from p2w.pretext.protocol import Pretext
from p2w.rng import SampleKeys
from p2w.train.watchdog import STOP_POLL_S


@dataclass(frozen=True)
class RunCost:
    """Costs of a run. FLOPs are of forward and backward pass, an addition and a multiplication count 2; bytes per rank."""

    parameters: int
    encoder_parameters: int
    flops_per_sample: int
    """FLOPs with every module in its plain form (p2w.model.forms)."""
    state_bytes: int
    activation_bytes: int
    checkpoint_bytes: int
    folds: tuple[FoldCost, ...] = ()
    """FLOPs, forward and backward, of both forms of each up-sampling that can be folded with its next convolution."""
    passes: int = 1
    """Forward and backward passes of a step (optim.accumulate)."""

    @property
    def folded_flops_per_sample(self) -> int:
        """FLOPs with every up-sampling folded that can be; the folding itself is not included."""
        return self.flops_per_sample - sum(one.plain - one.folded for one in self.folds)

    @property
    def fold_flops(self) -> int:
        """FLOPs to fold them all, which is done once a pass for any number of samples."""
        return sum(one.fold for one in self.folds)

    def flops(self, samples: float) -> float:
        """FLOPs of a pass of `samples` on a rank, with an up-sampling folded where that is fewer FLOPs."""
        saved = sum(max(0.0, samples * (one.plain - one.folded) - one.fold) for one in self.folds)
        return samples * self.flops_per_sample - saved

    def total(self, batch: int, ranks: int, steps: int) -> str:
        """FLOPs of the whole run, of `batch` samples a step over all ranks, as text for the terminal."""
        passes = ranks * self.passes * steps
        plain = self.flops_per_sample * batch * steps
        fewer = self.flops(batch / ranks / self.passes) * passes
        text = f"{_peta(fewer)} PFLOP forward and backward"
        if fewer < plain:
            text += f", up-samplings folded where that is less arithmetic; {_peta(plain)} in plain forms"
        return text

    def lines(self) -> list[str]:
        """Text for the terminal."""
        folded = [
            f"                {self.folded_flops_per_sample / 1e9:,.0f} with every up-sampling folded (p2w.model.forms), "
            f"and {self.fold_flops / 1e9:,.0f} a pass for folding"
        ]
        return [
            f"parameters      {self.parameters / 1e6:.2f} M, encoder {self.encoder_parameters / 1e6:.2f} M",
            f"arithmetic      {self.flops_per_sample / 1e9:,.0f} GFLOP a sample, forward and backward",
            *(folded if self.folds else []),
            f"memory a rank   {self.state_bytes / 2**30:.2f} GiB weights, gradients and optimizer, "
            f"{self.activation_bytes / 2**30:.2f} GiB activations (estimate)",
        ]


def _peta(flops: float) -> str:
    """A number of FLOPs in PFLOP; small ones with two digits that count."""
    return f"{flops / 1e15:,.0f}" if flops >= 1e16 else f"{flops / 1e15:.2g}"


def run_cost(
    config: Config, build: Callable[[], tuple[Pretext, Network]], samples: int, bytes_per_value: int
) -> RunCost:
    """Costs for a rank with `samples` samples a pass and activations of `bytes_per_value` bytes.

    `build` makes the pretext and its network. It runs on torch's meta device, which has shapes without data, so a large
    network is counted in a second on any machine.
    """
    with torch.device("meta"):
        pretext, model = build()
    keys = SampleKeys(0, 0, torch.zeros(1, dtype=torch.int64))
    views = pretext.sample(torch.zeros((1, *config.pretext.size), dtype=torch.int16), keys)
    inputs = [tensor.to("meta") for tensor in (views.input, *views.extra_inputs)]
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            saved[id(tensor)] = tensor.numel() * bytes_per_value
            alive.append(tensor)
        return tensor

    folds = _count_folds(model)
    alive: list[Tensor] = []  # references to the tensors, so that ids stay unique while we count
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        counter = FlopCounterMode(display=False)
        with counter:
            output = model(*inputs)
            outputs = output if isinstance(output, tuple) else (output,)
            sum(one.float().sum() for one in outputs if one.requires_grad).backward()
    parameters = sum(p.numel() for p in model.parameters())
    averages = 1 if config.optim.name == "sgd" else 2  # the optimizer's tensors for each parameter
    return RunCost(
        parameters=parameters,
        encoder_parameters=sum(p.numel() for p in model.encoder.parameters()),
        flops_per_sample=counter.get_total_flops(),
        state_bytes=4 * (2 + averages) * parameters,
        activation_bytes=sum(saved.values()) * samples,
        checkpoint_bytes=4 * (1 + averages) * parameters,
        folds=tuple(folds),
        passes=config.optim.accumulate,
    )


def _count_folds(model: nn.Module) -> list[FoldCost]:
    """A list that fills while `model` runs one sample: FLOPs of both forms of each up-sampling that can be folded.

    A backward pass counts as two forward passes: the gradients of inputs and of weights.
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


BUCKET_BYTES = 25 << 20  # of a bucket of gradients in DDP; the backward pass cannot hide the last bucket
# The backward pass's share of the arithmetic: two forward passes, for inputs and for weights
BACKWARD = 2 / 3
POLL_HOP_S = 3e-4  # from rank to rank, of the all-reduce of three numbers on the host: 0.6 ms between two ranks, measured
SAMPLE_BYTES = 2 << 20  # of a sub-scan
READ_BYTES_PER_S = 7e9  # of a rank: bench/stream.py, two readers on two cores, warm page cache, checksums


@dataclass(frozen=True)
class MachineRates:
    """Rates of a rank's machine; `sources` says where the figures come from."""

    flops_per_s: float  # sustained in forward and backward passes
    near_bytes_per_s: float  # between ranks of one node
    far_bytes_per_s: float  # between nodes
    hop_s: float = 5e-6  # latency from rank to rank
    step_s: float = 0.0  # time of a step that does not depend on its samples: update, launches
    read_bytes_per_s: float = READ_BYTES_PER_S
    # Share of the arithmetic that can hide an all-reduce; 0 where the same cores do both
    hidden: float = BACKWARD
    sources: str = ""


@dataclass(frozen=True)
class ThroughputForecast:
    """Seconds of a step and of its parts."""

    ranks: int
    batch: int
    arithmetic_s: float
    all_reduce_s: float
    exposed_s: float  # part of the all-reduce that the backward pass does not hide
    read_s: float
    step_s: float
    # Beside the step: its share of asking all ranks for stop requests and the audit of ids
    stop_s: float = 0.0

    @property
    def samples_per_s(self) -> float:
        """Samples a second over all ranks."""
        return self.batch / (self.step_s + self.stop_s)

    @property
    def limit(self) -> str:
        """What limits the speed: reading, all-reduce or arithmetic."""
        if self.read_s >= self.step_s:
            return "reading"
        return "all-reduce" if self.exposed_s > self.arithmetic_s else "arithmetic"


def all_reduce_s(rates: MachineRates, nbytes: float, ranks: int, per_node: int) -> float:
    """Seconds to sum `nbytes` over `ranks`, as a ring or a tree, whichever is faster; NCCL chooses so too."""
    if ranks == 1:
        return 0.0
    speed = rates.near_bytes_per_s
    if ranks > per_node:
        speed = min(speed, rates.far_bytes_per_s)
    ring = 2 * (ranks - 1) / ranks * nbytes / speed + 2 * (ranks - 1) * rates.hop_s
    tree = 2 * nbytes / speed + 2 * math.ceil(math.log2(ranks)) * rates.hop_s
    return min(ring, tree)


def poll_s(ranks: int) -> float:
    """Seconds of the all-reduce that asks all ranks whether one has a stop request, which also sums the audit of ids.

    It is made every STOP_POLL_S seconds, or at every step where a step takes longer.
    """
    return 2 * math.ceil(math.log2(ranks)) * POLL_HOP_S if ranks > 1 else 0.0


def forecast_throughput(
    rates: MachineRates, *, ranks: int, per_node: int, batch: int, flops_per_sample: float, gradient_bytes: float,
    sample_bytes: float,
) -> ThroughputForecast:  # fmt: skip
    """Forecast of a step of `batch` samples over `ranks` ranks, `per_node` of them on each node."""
    own = batch / ranks
    arithmetic = own * flops_per_sample / rates.flops_per_s
    reduce = all_reduce_s(rates, gradient_bytes, ranks, per_node)
    last = reduce * min(1.0, BUCKET_BYTES / gradient_bytes)
    exposed = reduce if rates.hidden == 0 else max(last, reduce - rates.hidden * arithmetic)
    read = own * sample_bytes / rates.read_bytes_per_s
    step = max(arithmetic + exposed + rates.step_s, read)
    stop = poll_s(ranks) * min(1.0, step / STOP_POLL_S)
    return ThroughputForecast(ranks, batch, arithmetic, reduce, exposed, read, step, stop)


PEAK = {  # part of torch's name: dense bf16 FLOP/s, bytes/s within a node, bytes/s between nodes; from data sheets
    "B200": (2250e12, 900e9, 50e9),
    "H200": (989e12, 450e9, 50e9),
    "H100": (989e12, 450e9, 50e9),
    "A100": (312e12, 300e9, 25e9),
}
# Shares of the peak: MLPerf's best 3D U-Net; our goal, 680 samples/s of 580 GFLOP on an H200.
SUSTAINED = (0.28, 0.50)


def known_device(device: str) -> tuple[str, MachineRates] | None:
    """(short name, peak rates) of a GPU by torch's name for it; None for an unknown one."""
    for name, (flops, near, far) in PEAK.items():
        if name in device:
            source = (
                f"{SUSTAINED[0]:.0%} (MLPerf's best 3D U-Net) to {SUSTAINED[1]:.0%} (the goal) of "
                f"{flops / 1e12:,.0f} TFLOP/s; {near / 1e9:.0f} GB/s in a node, {far / 1e9:.0f} between nodes (data sheets)"
            )
            return name, MachineRates(flops, near, far, sources=source)
    return None


def sustained_rates(rates: MachineRates) -> tuple[MachineRates, MachineRates]:
    """Peak rates -> rates at the low and at the high end of SUSTAINED."""
    low, high = (replace(rates, flops_per_s=share * rates.flops_per_s) for share in SUSTAINED)
    return low, high


def describe_scaling(
    cost: RunCost, card: str, *, ranks: int, per_node: int, batch: int, steps: int
) -> list[str]:
    """Text for the terminal: the speed of these ranks on the GPU `card` (torch's name), or of one and eight H100."""
    here = known_device(card)
    name, rates = here or known_device("H100") or ("", MachineRates(1, 1, 1))
    sizes = {"batch": batch, "sample_bytes": SAMPLE_BYTES, "gradient_bytes": 4 * cost.parameters}
    lines = []
    for count, node in [(ranks, per_node)] if here else [(1, 8), (8, 8)]:
        if batch % count:
            continue
        samples = batch / count / cost.passes
        flops = cost.flops(samples) / samples
        slow, fast = (
            forecast_throughput(one, ranks=count, per_node=node, flops_per_sample=flops, **sizes)
            for one in sustained_rates(rates)
        )
        hours = [(one.step_s + one.stop_s) * steps / 3600 for one in (fast, slow)]
        speed = f"{slow.samples_per_s:,.0f}-{fast.samples_per_s:,.0f} samples/s"
        times = f"{hours[0]:,.1f}-{hours[1]:,.1f} h"
        sums = f"all-reduce {1e3 * fast.all_reduce_s:.1f} ms for a step of {1e3 * fast.step_s:.1f}"
        polls = f", stop requests {1e3 * fast.stop_s:.2f}" if count > 1 else ""
        lines.append(f"{count} x {name}: {speed}, {times}; {sums}{polls}; limit: {fast.limit}")
    folded = "up-samplings folded where that is less arithmetic; " if cost.folds else ""
    return [
        *lines,
        f"assumed: {rates.sources}; {folded}launches are not counted: few samples a rank sustain less",
    ]
