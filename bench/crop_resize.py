"""How fast is crop-resize-normalise, next to the usual ways? 16 wholes 64x128x128 -> 32x64x64, paper's boxes.

    python bench/crop_resize.py                      # prints, and writes bench/results/crop_resize.json
    python bench/crop_resize.py --rounds 51 --threads 1 2 4 --out /tmp/here.json

Ways are interleaved, one call each a round, and compared within a round, because other work on a machine
slows whole stretches of time: read `times_ours` (median of the rounds' ratios), not milliseconds of two runs.
`cpu_ms` is the process' CPU time: on one thread it does not count what others took.
Boxes are rounded outwards to voxels, so that slicing peers can do them at all; ours does not gain by it.
Peers are given less to do: they do not clip. MONAI and DALI are timed where they can be imported.
argparse and torch alone, so that it runs on bare GPU machines.
"""

import argparse
import importlib.util
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from p2w.geometry import Keys, backend, crop_resize, part_and_whole, sample_boxes

BATCH, SHAPE, SIZE = 16, (64, 128, 128), (32, 64, 64)
Ways = dict[str, Callable[[], object]]
Seconds = dict[str, list[tuple[float, float]]]  # name -> (wall, CPU) a round


def inputs(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    wholes = torch.randint(-1000, 1001, (BATCH, *SHAPE), dtype=torch.int16, generator=generator)
    boxes = sample_boxes(Keys(0, 0, torch.arange(BATCH)), 0, SHAPE)
    return wholes.to(device), torch.cat([boxes[:, :3].floor(), boxes[:, 3:].ceil()], 1).to(device)


def level(voxels):
    return voxels.float().add_(1000).mul_(1 / 2000)


def slices(wholes, boxes):
    corners = boxes.long().tolist()
    return [w[z:z1, y:y1, x:x1] for w, (z, y, x, z1, y1, x1) in zip(wholes, corners, strict=True)]


def interpolate(crops):
    return torch.cat([F.interpolate(level(c)[None, None], size=SIZE, mode="trilinear") for c in crops])


def grid_sample(wholes, boxes):
    """One call for the batch; it samples the crop's outermost half voxels from outside the crop."""
    axes = []
    for k, (n, size) in enumerate(zip(SHAPE, SIZE, strict=True)):
        start, end = boxes[:, k, None], boxes[:, k + 3, None]
        axes.append((start + (torch.arange(size) + 0.5) * (end - start) / size) * 2 / n - 1)
    shape = (len(boxes), *SIZE)
    grid = [
        a.view(len(boxes), *[size if k == j else 1 for j, size in enumerate(SIZE)]).expand(shape)
        for k, a in enumerate(axes)
    ]
    return F.grid_sample(
        level(wholes)[:, None], torch.stack(grid[::-1], 4), padding_mode="border", align_corners=False
    )


def monai(crops):
    from monai.transforms import Resize  # noqa: PLC0415  optional peer

    resize = Resize(SIZE, mode="trilinear", align_corners=False)
    return torch.stack([resize(level(c)[None]) for c in crops])


def dali_pipeline(crops, antialias, threads):
    """DALI's own pipeline on the CPU, fed with arrays that are in memory already."""
    from nvidia.dali import fn, pipeline_def, types  # noqa: PLC0415  optional peer

    arrays = [c.contiguous().numpy()[..., None] for c in crops]

    @pipeline_def(batch_size=BATCH, num_threads=threads, device_id=None, prefetch_queue_depth=1)
    def pipeline():
        voxels = fn.external_source(source=lambda: arrays, layout="DHWC", dtype=types.INT16, ndim=4)
        small = fn.resize(
            voxels, size=list(SIZE), interp_type=types.INTERP_LINEAR, antialias=antialias, dtype=types.FLOAT
        )
        return (small + 1000.0) * (1 / 2000)

    built = pipeline()
    built.build()
    return built


def cpu_ways(threads: int) -> Ways:
    wholes, boxes = inputs()
    crops = slices(wholes, boxes)
    part, target = (torch.empty(BATCH, 1, *SIZE) for _ in range(2))
    ways: Ways = {
        "ours, antialiased": lambda: crop_resize(wholes, boxes, SIZE, out=part),
        "ours, plain": lambda: crop_resize(wholes, boxes, SIZE, antialias=False, out=part),
        "ours, antialiased part and target": lambda: part_and_whole(wholes, boxes, SIZE, out=(part, target)),
        "slice + F.interpolate": lambda: interpolate(crops),
        "slice + F.interpolate, part and target": lambda: (interpolate(crops), interpolate(wholes)),
        "F.grid_sample": lambda: grid_sample(wholes, boxes),
    }
    difference = (ways["ours, plain"]() - ways["slice + F.interpolate"]()).abs().max()
    assert difference < 1e-5, f"the ways do not do the same: {difference}"
    if importlib.util.find_spec("monai"):
        ways["MONAI Resize"] = lambda: monai(crops)
    if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"):
        for name, antialias in (("DALI CPU, antialiased", True), ("DALI CPU, plain", False)):
            ways[name] = dali_pipeline(crops, antialias, threads).run
    return ways


def interleave(ways: Ways, rounds: int, wait: Callable[[], None] = lambda: None) -> Seconds:
    """(wall, CPU) seconds of every way in every round, after two rounds to warm up."""
    seconds: Seconds = {name: [] for name in ways}
    for turn in range(-2, rounds):
        for name, way in ways.items():
            wait()
            start, cpu = time.perf_counter(), time.process_time()
            way()
            wait()
            if turn >= 0:
                seconds[name].append((time.perf_counter() - start, time.process_time() - cpu))
    return seconds


def table(seconds: Seconds, ours: str) -> dict[str, dict[str, float]]:
    rows = {}
    for name, times in seconds.items():
        wall, cpu = zip(*times, strict=True)
        ratio, cpu_ratio = (
            median(t[k] / o[k] for t, o in zip(times, seconds[ours], strict=True)) for k in range(2)
        )
        rows[name] = {
            "median_ms": round(1e3 * median(wall), 3),
            "best_ms": round(1e3 * min(wall), 3),
            "times_ours": round(ratio, 3),
            "cpu_ms": round(1e3 * median(cpu), 3),
            "cpu_times_ours": round(cpu_ratio, 3),
        }
        print(f"  {name:40s}" + "".join(f"  {k} {v:8.2f}" for k, v in rows[name].items()))
    return rows


def gpu(rounds: int) -> dict | str:
    if not torch.cuda.is_available():
        return "skipped: no CUDA device (bandwidth of the kernel, number of launches, loop of F.interpolate)"
    wholes, boxes = inputs("cuda")
    crops = slices(wholes, boxes)
    part, target = (torch.empty(BATCH, 1, *SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    # Ten batches a call: one is shorter than the clock's own launch and wait.
    copied = torch.empty(wholes.nbytes + part.nbytes + target.nbytes, dtype=torch.uint8, device="cuda")
    half = copied.nbytes // 2  # a copy reads and writes: half the bytes twice is the kernel's traffic
    ways: Ways = {
        "ours, antialiased part and target": lambda: [
            part_and_whole(wholes, boxes, SIZE, dtype=torch.bfloat16, out=(part, target)) for _ in range(10)
        ],
        "copy of as many bytes": lambda: [copied[:half].copy_(copied[half : 2 * half]) for _ in range(10)],
        "slice + F.interpolate, part and target": lambda: [
            (interpolate(crops), interpolate(wholes)) for _ in range(10)
        ],
    }
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        part_and_whole(wholes, boxes, SIZE, dtype=torch.bfloat16, out=(part, target))
        torch.cuda.synchronize()
    launches = sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())
    rows = table(interleave(ways, rounds, torch.cuda.synchronize), "ours, antialiased part and target")
    return {
        "device": torch.cuda.get_device_name(),
        "backend": backend("cuda"),
        "launches_a_batch": launches,
        "fraction_of_copy_bandwidth": rows["copy of as many bytes"]["times_ours"],
        "ten_batches": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "crop_resize.json")
    options = parser.parse_args()
    cpu = {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        print(f"CPU, {threads} thread(s), {BATCH} wholes {SHAPE} -> {SIZE}")
        cpu[f"{threads} threads"] = table(interleave(cpu_ways(threads), options.rounds), "ours, antialiased")
    print("GPU")
    result = {
        "machine": machine(),
        "batch": BATCH,
        "shape": SHAPE,
        "size": SIZE,
        "cpu": cpu,
        "gpu": gpu(options.rounds),
    }
    print(f"  {result['gpu']}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def machine() -> dict[str, object]:
    cpu = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ": unknown")
    return {
        "cpu": cpu.split(":")[1].strip(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],  # above the cores: other work was timed too
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
