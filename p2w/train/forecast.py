"""How fast a run would be at any number of ranks: arithmetic, all-reduce and reading, each piece with its source.

A step of a rank takes its samples' arithmetic, what of the all-reduce is not hidden behind the backward pass, and a fixed
share; or, where reading is slower than all that, its reading. `bench/scaling.py` measures the pieces
of the machine it runs on and compares the forecast with runs of one and of two processes.
"""

import math
from dataclasses import dataclass, replace

from p2w.train.cost import Cost

BUCKET_BYTES = (
    25 << 20
)  # of gradients that DDP sums at a time; the last one has no backward pass to hide behind
BACKWARD = (
    2 / 3
)  # of a step's arithmetic: the gradients of inputs and of weights, each as much as the forward pass
SAMPLE_BYTES = 2 << 20  # a sub-scan
READ_BYTES_PER_S = 7e9  # of a rank: bench/stream.py, two readers on two cores, warm page cache, checksums


@dataclass(frozen=True)
class Pieces:
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
class Forecast:
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


def all_reduce_s(pieces: Pieces, nbytes: float, ranks: int, per_node: int) -> float:
    """Sum `nbytes` over ranks: a ring, or a tree where hops cost more than bytes; NCCL takes the faster one too."""
    if ranks == 1:
        return 0.0
    speed = pieces.near_bytes_per_s
    if ranks > per_node:
        speed = min(speed, pieces.far_bytes_per_s)
    ring = 2 * (ranks - 1) / ranks * nbytes / speed + 2 * (ranks - 1) * pieces.hop_s
    tree = 2 * nbytes / speed + 2 * math.ceil(math.log2(ranks)) * pieces.hop_s
    return min(ring, tree)


def forecast(
    pieces: Pieces, *, ranks: int, per_node: int, batch: int, flops_per_sample: float, gradient_bytes: float,
    sample_bytes: float,
) -> Forecast:  # fmt: skip
    """A step of `batch` samples over `ranks` ranks, `per_node` of them on a node."""
    own = batch / ranks
    arithmetic = own * flops_per_sample / pieces.flops_per_s
    reduce = all_reduce_s(pieces, gradient_bytes, ranks, per_node)
    last = reduce * min(1.0, BUCKET_BYTES / gradient_bytes)
    exposed = reduce if pieces.hidden == 0 else max(last, reduce - pieces.hidden * arithmetic)
    read = own * sample_bytes / pieces.read_bytes_per_s
    step = max(arithmetic + exposed + pieces.step_s, read)
    return Forecast(ranks, batch, arithmetic, reduce, exposed, read, step)


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


def known(device: str) -> tuple[str, Pieces] | None:
    """(its short name, pieces at the peak) of a GPU by the name that torch gives it; None for others."""
    for name, (flops, near, far) in PEAK.items():
        if name in device:
            source = (
                f"{SUSTAINED[0]:.0%} (MLPerf's best 3D U-Net) to {SUSTAINED[1]:.0%} (the goal) of "
                f"{flops / 1e12:,.0f} TFLOP/s; {near / 1e9:.0f} GB/s in a node, {far / 1e9:.0f} between nodes (data sheets)"
            )
            return name, Pieces(flops, near, far, sources=source)
    return None


def between(pieces: Pieces) -> tuple[Pieces, Pieces]:
    """Pieces at the peak -> at the low and the high end of what is sustained."""
    low, high = (replace(pieces, flops_per_s=share * pieces.flops_per_s) for share in SUSTAINED)
    return low, high


def describe(cost: Cost, card: str, *, ranks: int, per_node: int, batch: int, steps: int) -> list[str]:
    """Lines for a person: these ranks on `card`, as torch names it; one and eight H100 where that is not a known one."""
    here = known(card)
    name, pieces = here or known("H100") or ("", Pieces(1, 1, 1))
    sizes = {"batch": batch, "sample_bytes": SAMPLE_BYTES, "gradient_bytes": 4 * cost.parameters}
    lines = []
    for count, node in [(ranks, per_node)] if here else [(1, 8), (8, 8)]:
        if batch % count:
            continue
        samples = batch / count / cost.passes
        flops = cost.flops(samples) / samples
        slow, fast = (
            forecast(one, ranks=count, per_node=node, flops_per_sample=flops, **sizes)
            for one in between(pieces)
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
