"""Estimates from the configuration alone: parameters, FLOPs, memory, steps, and the speed at any number of ranks.

A step of a rank takes its samples' arithmetic, what of the all-reduce is not hidden behind the backward pass, and a fixed
share; or, where reading is slower than all that, its reading. `bench/scaling.py` measures the pieces
of the machine it runs on and compares the forecast with runs of one and of two processes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from p2w.config import Config
from p2w.model import Network
from p2w.model.fold import FoldCost
from p2w.model.unet3d import UpBlock, fold_cost_of
from p2w.pretext.protocol import Pretext
from p2w.rng import SampleKeys


@dataclass(frozen=True)
class RunCost:
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


def run_cost(
    config: Config, build: Callable[[], tuple[Pretext, Network]], share: int, bytes_per_value: int
) -> RunCost:
    """Count for a rank that takes `share` samples a pass, its activations in `bytes_per_value` bytes.

    The network runs on torch's meta device: shapes without data, so `large` is counted in a second on any machine.
    """
    with torch.device("meta"):
        pretext, model = build()
    keys = SampleKeys(0, 0, torch.zeros(1, dtype=torch.int64))
    given = pretext.sample(torch.zeros((1, *config.pretext.size), dtype=torch.int16), keys)
    passed = [tensor.to("meta") for tensor in (given.input, *given.extra_inputs)]
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
    return RunCost(
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


BUCKET_BYTES = (
    25 << 20
)  # of gradients that DDP sums at a time; the last one has no backward pass to hide behind
BACKWARD = (
    2 / 3
)  # of a step's arithmetic: the gradients of inputs and of weights, each as much as the forward pass
SAMPLE_BYTES = 2 << 20  # a sub-scan
READ_BYTES_PER_S = 7e9  # of a rank: bench/stream.py, two readers on two cores, warm page cache, checksums


@dataclass(frozen=True)
class MachineRates:
    """What a rank's machine does; `sources` says where each figure is from."""

    flops_per_s: float  # sustained in forward and backward passes
    near_bytes_per_s: float  # into and out of a rank, to ranks of its node
    far_bytes_per_s: float  # the same to other nodes
    hop_s: float = 5e-6  # from rank to rank, however few bytes
    step_s: float = 0.0  # a step's cost that does not depend on its samples: update, launches
    read_bytes_per_s: float = READ_BYTES_PER_S  # of a rank
    hidden: float = (
        BACKWARD  # share of the arithmetic behind which sums are hidden; 0 where the same cores do both
    )
    sources: str = ""


@dataclass(frozen=True)
class ThroughputForecast:
    """Seconds of a step, and what they are made of."""

    ranks: int
    batch: int
    arithmetic_s: float
    all_reduce_s: float
    exposed_s: float  # of the all-reduce: not hidden
    read_s: float
    step_s: float

    @property
    def samples_per_s(self) -> float:
        """Over all ranks."""
        return self.batch / self.step_s

    @property
    def limit(self) -> str:
        """What a faster machine would need more of."""
        if self.read_s >= self.step_s:
            return "reading"
        return "all-reduce" if self.exposed_s > self.arithmetic_s else "arithmetic"


def all_reduce_s(pieces: MachineRates, nbytes: float, ranks: int, per_node: int) -> float:
    """Sum `nbytes` over ranks: a ring, or a tree where hops cost more than bytes; NCCL takes the faster one too."""
    if ranks == 1:
        return 0.0
    speed = pieces.near_bytes_per_s
    if ranks > per_node:
        speed = min(speed, pieces.far_bytes_per_s)
    ring = 2 * (ranks - 1) / ranks * nbytes / speed + 2 * (ranks - 1) * pieces.hop_s
    tree = 2 * nbytes / speed + 2 * math.ceil(math.log2(ranks)) * pieces.hop_s
    return min(ring, tree)


def forecast_throughput(
    pieces: MachineRates, *, ranks: int, per_node: int, batch: int, flops_per_sample: float, gradient_bytes: float,
    sample_bytes: float,
) -> ThroughputForecast:  # fmt: skip
    """A step of `batch` samples over `ranks` ranks, `per_node` of them on a node."""
    own = batch / ranks
    arithmetic = own * flops_per_sample / pieces.flops_per_s
    reduce = all_reduce_s(pieces, gradient_bytes, ranks, per_node)
    last = reduce * min(1.0, BUCKET_BYTES / gradient_bytes)
    exposed = reduce if pieces.hidden == 0 else max(last, reduce - pieces.hidden * arithmetic)
    read = own * sample_bytes / pieces.read_bytes_per_s
    step = max(arithmetic + exposed + pieces.step_s, read)
    return ThroughputForecast(ranks, batch, arithmetic, reduce, exposed, read, step)


PEAK = {  # name in torch's -> dense bf16 FLOP/s, bytes/s to a GPU beside, bytes/s to another node; makers' data sheets
    "B200": (2250e12, 900e9, 50e9),
    "H200": (989e12, 450e9, 50e9),
    "H100": (989e12, 450e9, 50e9),
    "A100": (312e12, 300e9, 25e9),
}
SUSTAINED = (
    0.28,
    0.50,
)  # of the peak: MLPerf's best 3D U-Net; our goal, 680 samples/s of 580 GFLOP on an H200


def known_device(device: str) -> tuple[str, MachineRates] | None:
    """(its short name, pieces at the peak) of a GPU by the name that torch gives it; None for others."""
    for name, (flops, near, far) in PEAK.items():
        if name in device:
            source = (
                f"{SUSTAINED[0]:.0%} (MLPerf's best 3D U-Net) to {SUSTAINED[1]:.0%} (the goal) of "
                f"{flops / 1e12:,.0f} TFLOP/s; {near / 1e9:.0f} GB/s in a node, {far / 1e9:.0f} between nodes (data sheets)"
            )
            return name, MachineRates(flops, near, far, sources=source)
    return None


def link_rates(pieces: MachineRates) -> tuple[MachineRates, MachineRates]:
    """Pieces at the peak -> at the low and the high end of what is sustained."""
    low, high = (replace(pieces, flops_per_s=share * pieces.flops_per_s) for share in SUSTAINED)
    return low, high


def describe_scaling(
    cost: RunCost, card: str, *, ranks: int, per_node: int, batch: int, steps: int
) -> list[str]:
    """Lines for a person: these ranks on `card`, as torch names it; one and eight H100 where that is not a known one."""
    here = known_device(card)
    name, pieces = here or known_device("H100") or ("", MachineRates(1, 1, 1))
    sizes = {"batch": batch, "sample_bytes": SAMPLE_BYTES, "gradient_bytes": 4 * cost.parameters}
    lines = []
    for count, node in [(ranks, per_node)] if here else [(1, 8), (8, 8)]:
        if batch % count:
            continue
        samples = batch / count / cost.passes
        flops = cost.flops(samples) / samples
        slow, fast = (
            forecast_throughput(one, ranks=count, per_node=node, flops_per_sample=flops, **sizes)
            for one in link_rates(pieces)
        )
        hours = [one.step_s * steps / 3600 for one in (fast, slow)]
        rates = f"{slow.samples_per_s:,.0f}-{fast.samples_per_s:,.0f} samples/s"
        times = f"{hours[0]:,.1f}-{hours[1]:,.1f} h"
        sums = f"all-reduce {1e3 * fast.all_reduce_s:.1f} ms beside a step of {1e3 * fast.step_s:.1f}"
        lines.append(f"{count} x {name}: {rates}, {times}; {sums}; limit: {fast.limit}")
    return [
        *lines,
        f"assumed: {pieces.sources}; up-samplings folded where that is less arithmetic; launches "
        "are not counted: few samples a rank sustain less",
    ]
