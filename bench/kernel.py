"""Is the GPU's crop-resize right, one launch a batch, and near the speed of a copy? 64x128x128 -> 32x64x64, paper's boxes.

    python bench/kernel.py                 # on a GPU; without one, the CPU's path is held to the oracle, the rest skipped
    python bench/kernel.py --step-ms 23.5  # what a training step of 16 samples takes here, if bench/step.py has not said it

Right: fresh random wholes and boxes at every run, outputs filled with NaN before, all compared with float64 NumPy
(tests/kernels/crop_resize_oracle.py). Fast: part and target of a batch against a per-sample loop of slice +
F.interpolate, against DALI on the GPU where it is installed, and against a copy of as many bytes, at batch 16 and 256.
Torch, NumPy and p2w alone, so that it runs on bare GPU machines.
"""

import argparse
import importlib.util
import json
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

from p2w.geometry import Keys, backend, part_and_whole, sample_boxes

sys.path.append(str(Path(__file__).parent.parent / "tests" / "kernels"))
from crop_resize_oracle import resize_batch

CALLS = 10  # a timed turn: one call is shorter than the clock's own launch and wait


def wrong(device: str, seed: int) -> float:
    """Largest difference from the oracle, in window units; NaN where an output was not written."""
    generator = torch.Generator().manual_seed(seed)
    wholes = torch.randint(-1300, 1301, (4, 64, 128, 128), dtype=torch.int16, generator=generator)
    boxes = sample_boxes(Keys(seed, 0, torch.arange(4)), 0, (64, 128, 128))
    part, target = (torch.full((4, 1, *SIZE), torch.nan, device=device) for _ in range(2))
    part_and_whole(wholes.to(device), boxes.to(device), SIZE, out=(part, target))
    everything = np.array([[0, 0, 0, 64, 128, 128]] * 4)
    pairs = ((part, boxes.numpy()), (target, everything))
    return float(
        max(np.abs(got.cpu().numpy() - resize_batch(wholes.numpy(), at, SIZE)).max() for got, at in pairs)
    )


def launches(wholes: Tensor, boxes: Tensor, out: tuple[Tensor, Tensor]) -> int:
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


def timed(way: Callable[[], Any], batch: int) -> Callable[[], float]:
    def run() -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(CALLS):
            way()
        torch.cuda.synchronize()
        return CALLS * batch / (time.perf_counter() - began)

    return run


def gpu(batch: int, rounds: int) -> tuple[dict[str, list[float]], int]:
    """Rates of all ways, and launches a batch."""
    wholes, boxes = inputs(batch, "cuda")
    crops = slices(wholes, boxes)
    out = tuple(torch.empty(batch, 1, *SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copied = torch.empty(wholes.nbytes + out[0].nbytes + out[1].nbytes, dtype=torch.uint8, device="cuda")
    half = copied.nbytes // 2  # a copy reads and writes: half the bytes twice is the kernel's traffic
    ways: dict[str, Callable[[], Any]] = {
        "p2w, antialiased": lambda: part_and_whole(wholes, boxes, SIZE, dtype=torch.bfloat16, out=out),
        "copy of as many bytes": lambda: copied[:half].copy_(copied[half : 2 * half]),
        f"slice + F.interpolate, {PLAIN}": lambda: (interpolate(crops), interpolate(wholes)),
    }
    if has("nvidia") and importlib.util.find_spec("nvidia.dali"):
        ways["DALI GPU, antialiased"] = dali(wholes, boxes)
    count = launches(wholes, boxes, out)
    return rotate({name: timed(way, batch) for name, way in ways.items()}, rounds), count


def step_ms() -> float:
    """What a step of 16 samples takes on a GPU, by bench/results/step_gpu.json; 0 where there is none."""
    path = RESULTS / "step_gpu.json"
    return float(json.loads(path.read_text())["ms_of_16"]) if path.exists() else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--step-ms", type=float, default=step_ms())
    parser.add_argument("--out", type=Path, default=RESULTS / "kernel.json")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seed = time.time_ns() % 2**31
    goals = [
        Goal(
            f"differs from float64, seed {seed}, {backend(device)[0]} on {device}",
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
    for batch in (16, 256) if device == "cuda" else ():
        rates, count = gpu(batch, args.rounds)
        kinds = {"p2w": "ours", "cop": "bound"}
        group = f"part and target, batch {batch}, {torch.cuda.get_device_name()}"
        rows += [
            row(group, name, values, "samples/s", kinds.get(name[:3], "peer"))
            for name, values in rates.items()
        ]
        ours = rates["p2w, antialiased"]
        goals.append(Goal(f"launches a batch of {batch}", count, 1, at_least=False))
        goals.append(
            Goal(
                f"times the F.interpolate loop, batch {batch}",
                over(ours, rates[f"slice + F.interpolate, {PLAIN}"]),
                5,
            )
        )
        goals.append(
            Goal(f"fraction of a copy's speed, batch {batch}", over(ours, rates["copy of as many bytes"]), 0)
        )
        if "DALI GPU, antialiased" in rates:
            goals.append(
                Goal(f"times DALI GPU, batch {batch}", over(ours, rates["DALI GPU, antialiased"]), 2)
            )
        else:
            skipped.append("DALI GPU: nvidia-dali is not installed")
        if batch == 16 and args.step_ms:
            share = 16e3 / sorted(ours)[len(ours) // 2] / args.step_ms
            goals.append(Goal("of a training step", share, 0.01, at_least=False))
    command = "python bench/kernel.py"
    show(save(args.out, "crop-resize on the GPU: right, and how fast", command, rows, goals, skipped=skipped))
    for line in skipped:
        print(f"  skipped: {line}")


if __name__ == "__main__":
    main()
