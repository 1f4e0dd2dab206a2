"""Is the GPU's crop-resize right, one launch a batch, and near the speed of a copy? 64x128x128 -> 32x64x64, paper's boxes.

    python bench/kernel.py                 # on a GPU; without one, the CPU's path is held to the oracle, the rest skipped
    python bench/kernel.py --step-ms 23.5  # what a training step of 16 samples takes here, if bench/step.py has not said it
    python bench/kernel.py --sweep         # also every tuning of TUNINGS: microseconds, registers, spills (half a minute)

Right: fresh random wholes and boxes at every run, outputs filled with NaN before, all compared with float64 NumPy
(tests/kernels/crop_resize_oracle.py). Fast: part and target of a batch against a per-sample loop of slice +
F.interpolate, against DALI on the GPU where it is installed, and against a copy of as many bytes, at batch 16 and 128.
Batch 128 (320 MiB) does not fit the L2 cache; at batch 16 (40 MiB) several batches take turns, so that none is found there.
Torch, NumPy and p2w alone, so that it runs on bare GPU machines.
"""

import argparse
import functools
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, Goal, Row, over, rotate, row, save, show
from crop_resize import PLAIN, SIZE, has, inputs, interpolate, slices
from torch import Tensor

from p2w import rng
from p2w.geometry import part_and_whole, sample_boxes
from p2w.rng import SampleKeys

sys.path.append(str(Path(__file__).parent.parent / "tests" / "kernels"))
from crop_resize_oracle import resize_batch

CALLS = 20  # a timed turn, at least: one call is shorter than the clock can tell
CACHES = 256 << 20  # bytes, several times the L2 cache of any card (50 MiB on an H100)
STEP_MS = 20.0  # of 16 samples of the paper's network, where bench/step.py has not measured it
TUNINGS: tuple[dict[str, int], ...] = (
    {}, {"slices": 4}, {"slices": 16}, {"slices": 32}, {"num_warps": 8}, {"num_warps": 8, "slices": 16},
    {"elements": 4096}, {"elements": 4096, "slices": 16}, {"elements": 4096, "num_warps": 8},
    {"elements": 4096, "tile_w": 32},
)  # fmt: skip


def wrong(device: str, seed: int) -> float:
    """Largest difference from the oracle, in window units; NaN where an output was not written."""
    generator = torch.Generator().manual_seed(seed)
    wholes = torch.randint(-1300, 1301, (4, 64, 128, 128), dtype=torch.int16, generator=generator)
    boxes = sample_boxes(SampleKeys(seed, 0, torch.arange(4)), 0, (64, 128, 128))
    part, target = (torch.full((4, 1, *SIZE), torch.nan, device=device) for _ in range(2))
    part_and_whole(wholes.to(device), boxes.to(device), SIZE, out=(part, target))
    everything = np.array([[0, 0, 0, 64, 128, 128]] * 4)
    pairs = ((part, boxes.numpy()), (target, everything))
    return float(
        max(np.abs(got.cpu().numpy() - resize_batch(wholes.numpy(), at, SIZE)).max() for got, at in pairs)
    )


def launches(wholes: Tensor, boxes: Tensor, out: tuple[Tensor, Tensor]) -> int:
    """The number of kernels that one call of `part_and_whole` launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        part_and_whole(wholes, boxes, SIZE, dtype=torch.bfloat16, out=out)
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def dali(wholes: Tensor, boxes: Tensor) -> Callable[[], Any]:
    """Part and target by `fn.resize` on the GPU, from arrays that are there already."""
    from nvidia.dali import fn, pipeline_def, types  # noqa: PLC0415
    from nvidia.dali.plugin.pytorch import DALIGenericIterator  # noqa: F401, PLC0415  (registers torch tensors)

    crops = [crop.contiguous()[..., None] for crop in slices(wholes, boxes)]
    full = [whole[..., None] for whole in wholes]

    @pipeline_def(
        batch_size=len(wholes), num_threads=4, device_id=wholes.device.index or 0, prefetch_queue_depth=1
    )
    def pipeline() -> Any:
        outputs = []
        for arrays in (crops, full):
            voxels = fn.external_source(
                source=lambda arrays=arrays: arrays, device="gpu", layout="DHWC", dtype=types.INT16, ndim=4
            )
            small = fn.resize(
                voxels, size=list(SIZE), interp_type=types.INTERP_LINEAR, antialias=True, dtype=types.FLOAT
            )
            outputs.append((small + 1000.0) * (1 / 2000))
        return tuple(outputs)

    built = pipeline()
    built.build()
    return built.run


def sets(batch: int) -> list[tuple[Tensor, Tensor, tuple[Tensor, ...]]]:
    """Wholes, boxes and outputs of several batches: no call finds its own data in the cache of the call before."""
    wholes, boxes = inputs(batch, "cuda")
    bytes_of_one = wholes.nbytes + 2 * batch * math.prod(SIZE) * 2
    return [
        (
            wholes.clone(),
            boxes,
            tuple(torch.empty(batch, 1, *SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2)),
        )
        for _ in range(max(2, -(-CACHES // bytes_of_one)))
    ]


def rate(batch: int, call: Callable[[], Any], calls: int) -> Callable[[], float]:
    """Samples/s of `calls` batches in one call, by the GPU's own clock."""

    def run() -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        call()
        ended.record()
        ended.synchronize()
        return calls * batch * 1e3 / began.elapsed_time(ended)

    return run


def graphed(batch: int, calls: list[Callable[[], Any]]) -> Callable[[], float]:
    """As `rate`, of calls that are captured once and then replayed: without Python's time between launches."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(max(1, CALLS // len(calls))):
            for call in calls:
                call()
    return rate(batch, graph.replay, max(1, CALLS // len(calls)) * len(calls))


def copies(wholes: Tensor, out: tuple[Tensor, ...]) -> Callable[[], Any]:
    """A copy that reads and writes as many bytes, together, as the kernel has to."""
    half = (wholes.nbytes + sum(one.nbytes for one in out)) // 2
    source, sink = (torch.empty(half, dtype=torch.uint8, device="cuda") for _ in range(2))
    return lambda: sink.copy_(source)


def ours(wholes: Tensor, boxes: Tensor, out: tuple[Tensor, ...]) -> Callable[[], Any]:
    """A function that cuts part and whole into `out`."""
    return lambda: part_and_whole(wholes, boxes, SIZE, dtype=torch.bfloat16, out=(out[0], out[1]))


def gpu(batch: int, rounds: int) -> tuple[dict[str, list[float]], int]:
    """Rates of all ways, and launches a batch."""
    data = sets(batch)
    wholes, boxes, out = data[0]
    crops = slices(wholes, boxes)
    ways = {
        "p2w, antialiased": graphed(batch, [ours(*one) for one in data]),
        "copy of as many bytes": graphed(batch, [copies(one[0], one[2]) for one in data]),
        f"slice + F.interpolate, {PLAIN}": rate(batch, lambda: (interpolate(crops), interpolate(wholes)), 1),
    }
    if batch <= 16:  # the same batch again and again, from the L2 cache where it fits
        ways["p2w, antialiased, cached"] = graphed(batch, [ours(*data[0])])
    if has("nvidia") and importlib.util.find_spec("nvidia.dali"):
        ways["DALI GPU, antialiased"] = rate(batch, dali(wholes, boxes), 1)
    return rotate(ways, rounds), launches(wholes, boxes, (out[0], out[1]))


def sweep(rounds: int) -> list[dict[str, Any]]:
    """Every Tuning of TUNINGS: microseconds a batch, registers and spills. What fails says why and is passed over."""
    from p2w.kernels.crop_resize_triton import Tuning, run  # noqa: PLC0415  triton is optional

    found: list[dict[str, Any]] = []
    data = {batch: sets(batch) for batch in (16, 128)}
    for settings in TUNINGS:
        line: dict[str, Any] = dict(settings)
        options = {"window_hu": (-1000.0, 1000.0), "antialias": True, "tuning": Tuning(**settings)}
        for batch, several in data.items():
            calls = [functools.partial(run, whole, boxes, *out, **options) for whole, boxes, out in several]
            try:
                binary = calls[0]()
                way = graphed(batch, calls)
            except Exception as error:  # too many registers or too much shared memory for this card
                line["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
                break
            line |= {"registers": binary.n_regs, "spills": binary.n_spills}
            line[f"us_of_{batch}"] = round(batch * 1e6 / statistics.median(way() for _ in range(rounds)), 1)
        found.append(line)
        print(f"  {json.dumps(line)}", flush=True)
    return found


def step_ms() -> float:
    """What a step of 16 samples takes on a GPU, by bench/results/step_gpu.json; STEP_MS where there is none."""
    path = RESULTS / "step_gpu.json"
    return float(json.loads(path.read_text())["ms_of_16"]) if path.exists() else STEP_MS


def main() -> None:
    """Check and time the kernel on this GPU, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--step-ms", type=float, default=step_ms())
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "kernel.json")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seed = time.time_ns() % 2**31
    goals = [
        Goal(
            f"differs from float64, seed {seed}, {rng.backend(device)[0]} on {device}",
            wrong(device, seed),
            1e-5,
            at_least=False,
        )
    ]
    rows: list[Row] = []
    skipped = []
    if device == "cpu":
        skipped = [
            "no CUDA device: launches a batch, F.interpolate loop, DALI GPU, fraction of a copy, share of the step"
        ]
    microseconds = {}
    for batch in (16, 128) if device == "cuda" else ():
        rates, count = gpu(batch, args.rounds)
        kinds = {"p2w": "ours", "cop": "bound"}
        group = f"part and target, batch {batch}, {torch.cuda.get_device_name()}"
        size = (
            math.prod((64, 128, 128)) + 2 * math.prod(SIZE)
        ) * 2  # bytes of a sample, int16 in and bf16 out
        rows += [
            row(
                group, name, values, "samples/s", kinds.get(name[:3], "peer"),
                f"{statistics.median(values) * size / 1e9:,.0f} GB/s",
            )
            for name, values in rates.items()
        ]  # fmt: skip
        mine, copied = rates["p2w, antialiased"], rates["copy of as many bytes"]
        microseconds[batch] = round(batch * 1e6 / statistics.median(mine), 1)
        loop = rates[f"slice + F.interpolate, {PLAIN}"]
        goals.append(Goal(f"launches a batch of {batch}", count, 1, at_least=False))
        goals.append(Goal(f"times the F.interpolate loop, batch {batch}", over(mine, loop), 5))
        text = f"fraction of a copy's speed, batch {batch}"
        goals.append(Goal(text, over(mine, copied), 0.5 if batch == 128 else 0.0))
        if "DALI GPU, antialiased" in rates:
            goals.append(
                Goal(f"times DALI GPU, batch {batch}", over(mine, rates["DALI GPU, antialiased"]), 2)
            )
        else:
            skipped.append("DALI GPU: nvidia-dali is not installed")
        if batch == 16:
            share = microseconds[16] / 1e3 / args.step_ms
            goals.append(Goal(f"of a training step of {args.step_ms:g} ms", share, 0.005, at_least=False))
    more: dict[str, Any] = {"skipped": skipped, "microseconds": microseconds}
    if args.sweep and device == "cuda":
        more["sweep"] = sweep(args.rounds)
    command = "python bench/kernel.py"
    show(save(args.out, "crop-resize on the GPU: right, and how fast", command, rows, goals, **more))
    for line in skipped:
        print(f"  skipped: {line}")


if __name__ == "__main__":
    main()
