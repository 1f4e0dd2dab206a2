"""How fast is crop-resize-normalise on the CPU, next to the usual ways? 16 wholes 64x128x128 -> 32x64x64, paper's boxes.

    python bench/crop_resize.py                      # peers that this Python can import; `make bench-peers` has them all
    python bench/crop_resize.py --rounds 31 --threads 1 2 4

Ways are interleaved, one call each a round, and compared within a round: read ratios. Boxes are rounded outwards to
voxels, so that slicing peers can do them at all; ours does not gain by it. Peers do less: they do not clip, and slicing is
not timed. Equal conventions are compared with equal: without antialiasing all but torchio and grid_sample give our
numbers to 1e-5 (`differs` says by how much each does); with it, DALI's filter is another triangle than torch's and PIL's.
`cpu_ms` is the process' CPU time: on one thread it does not count what others took. The GPU's kernel: bench/kernel.py.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, Goal, Row, over, save, show
from torch import Tensor

from p2w.geometry import crop_resize, part_and_whole, sample_boxes
from p2w.rng import SampleKeys

BATCH, SHAPE, SIZE = 16, (64, 128, 128), (32, 64, 64)
PLAIN, SMOOTH, BOTH = "without antialiasing", "antialiased", "part and target"
Ways = dict[tuple[str, str], Callable[[], Any]]


def inputs(batch: int = BATCH, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Wholes (B, D, H, W) of noise, and the paper's boxes (B, 6), rounded outwards."""
    generator = torch.Generator().manual_seed(0)
    wholes = torch.randint(-1000, 1001, (batch, *SHAPE), dtype=torch.int16, generator=generator)
    boxes = sample_boxes(SampleKeys(0, 0, torch.arange(batch)), 0, SHAPE)
    return wholes.to(device), torch.cat([boxes[:, :3].floor(), boxes[:, 3:].ceil()], 1).to(device)


def level(voxels: Tensor) -> Tensor:
    """HU of any shape -> float32 with -1000..1000 HU as 0..1, as users scale by hand."""
    return voxels.float().add_(1000).mul_(1 / 2000)


def slices(wholes: Tensor, boxes: Tensor) -> list[Tensor]:
    """The crops of boxes (B, 6) with whole-number edges out of wholes (B, D, H, W), without a copy."""
    corners = boxes.long().tolist()
    return [w[z:z1, y:y1, x:x1] for w, (z, y, x, z1, y1, x1) in zip(wholes, corners, strict=True)]


def interpolate(crops: Any) -> Tensor:
    """Crops (d, h, w) -> (B, 1, d, h, w) of SIZE by torch's trilinear interpolation."""
    return torch.cat([F.interpolate(level(c)[None, None], size=SIZE, mode="trilinear") for c in crops])


def grid_sample(wholes: Tensor, boxes: Tensor) -> Tensor:
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


def monai(crops: list[Tensor], antialias: bool) -> Callable[[], Tensor]:
    """Its antialiasing is a Gaussian before the resize."""
    from monai.transforms import Resize  # noqa: PLC0415

    resize = Resize(SIZE, mode="trilinear", align_corners=False, anti_aliasing=antialias)
    return lambda: torch.stack([torch.as_tensor(resize(level(c)[None])) for c in crops])


def kornia(wholes: Tensor, boxes: Tensor) -> Callable[[], Tensor]:
    """`crop_by_boxes3d`: a warp of the batch by eight corners each, aligned at voxel centres as ours is."""
    from kornia.geometry.transform import crop_by_boxes3d  # noqa: PLC0415

    def corners(low: Tensor, high: Tensor) -> Tensor:
        """(B, 8, 3) x y z: front face clockwise from its upper left corner, then the back face."""
        order = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (1, 1, 1), (0, 1, 1)]
        ends = (low.flip(1), high.flip(1))
        return torch.stack([torch.stack([ends[e[k]][:, k] for k in range(3)], 1) for e in order], 1)

    size = torch.tensor(SIZE, dtype=torch.float32).expand(len(boxes), 3)
    scale = (boxes[:, 3:] - boxes[:, :3]) / size
    source = corners(boxes[:, :3] + scale / 2 - 0.5, boxes[:, 3:] - scale / 2 - 0.5)
    target = corners(torch.zeros_like(size), size - 1)
    return lambda: crop_by_boxes3d(level(wholes)[:, None], source, target, align_corners=True)


def torchio(crops: list[Tensor]) -> Callable[[], Tensor]:
    """`Resize`, which is SimpleITK's resampling of each image."""
    import torchio as tio  # noqa: PLC0415

    resize = tio.Resize(SIZE)
    return lambda: torch.stack([resize(tio.ScalarImage(tensor=level(c)[None])).data for c in crops])


def dali(crops: list[Tensor], antialias: bool, threads: int) -> Callable[[], Any]:
    """DALI's own pipeline on the CPU, fed with arrays that are in memory already."""
    from nvidia.dali import fn, pipeline_def, types  # noqa: PLC0415

    arrays = [c.contiguous().numpy()[..., None] for c in crops]

    @pipeline_def(batch_size=BATCH, num_threads=threads, device_id=None, prefetch_queue_depth=1)
    def pipeline() -> Any:
        voxels = fn.external_source(source=lambda: arrays, layout="DHWC", dtype=types.INT16, ndim=4)
        small = fn.resize(
            voxels, size=list(SIZE), interp_type=types.INTERP_LINEAR, antialias=antialias, dtype=types.FLOAT
        )
        return (small + 1000.0) * (1 / 2000)

    built = pipeline()
    built.build()
    return lambda: torch.from_numpy(built.run()[0].as_array()).movedim(-1, 1)


def has(name: str) -> bool:
    """Whether the module is installed."""
    return importlib.util.find_spec(name) is not None


def cpu_ways(threads: int) -> Ways:
    """The ways to crop and resize a batch on the CPU, by (group, name); each is a function without arguments."""
    wholes, boxes = inputs()
    crops = slices(wholes, boxes)
    part, target = (torch.empty(BATCH, 1, *SIZE) for _ in range(2))
    ways: Ways = {
        (PLAIN, "p2w"): lambda: crop_resize(wholes, boxes, SIZE, antialias=False, out=part),
        (PLAIN, "slice + F.interpolate"): lambda: interpolate(crops),
        (PLAIN, "F.grid_sample"): lambda: grid_sample(wholes, boxes),
        (SMOOTH, "p2w"): lambda: crop_resize(wholes, boxes, SIZE, out=part),
        (BOTH, "p2w, antialiased"): lambda: part_and_whole(wholes, boxes, SIZE, out=(part, target))[0],
        (BOTH, "slice + F.interpolate, not antialiased"): lambda: (interpolate(crops), interpolate(wholes))[
            0
        ],
    }
    if has("monai"):
        ways |= {(PLAIN, "MONAI Resize"): monai(crops, False), (SMOOTH, "MONAI Resize"): monai(crops, True)}
    if has("kornia"):
        ways[PLAIN, "kornia crop_by_boxes3d"] = kornia(wholes, boxes)
    if has("torchio"):
        ways[PLAIN, "torchio Resize"] = torchio(crops)
    if has("nvidia") and has("nvidia.dali"):
        ways |= {(kind, "DALI CPU"): dali(crops, kind == SMOOTH, threads) for kind in (PLAIN, SMOOTH)}
    return ways


def differences(ways: Ways) -> dict[str, float]:
    """Largest difference from ours of the same kind, in window units, on white noise."""
    return {
        f"{kind}, {name}": float((torch.as_tensor(way()) - ways[kind, "p2w"]().clone()).abs().max())
        for (kind, name), way in ways.items()
        if kind != BOTH and name != "p2w"
    }


def interleave(ways: Ways, rounds: int) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(wall, CPU) seconds of every way in every round, after two rounds to warm up."""
    seconds: dict[tuple[str, str], list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(-2, rounds):
        for name, way in ways.items():
            start, cpu = time.perf_counter(), time.process_time()
            way()
            if turn >= 0:
                seconds[name].append((time.perf_counter() - start, time.process_time() - cpu))
    return seconds


def main() -> None:
    """Time all ways to crop and resize, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS / "crop_resize.json")
    options = parser.parse_args()
    rows, goals, cpu_ms = [], [], {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        ways = cpu_ways(threads)
        differs = differences(ways)
        assert differs[f"{PLAIN}, slice + F.interpolate"] < 1e-5, "the ways do not do the same"
        seconds = interleave(ways, options.rounds)
        wall = {name: [BATCH / s[0] for s in times] for name, times in seconds.items()}
        for (kind, name), rates in wall.items():
            note = f"differs {differs[f'{kind}, {name}']:.0e}" if f"{kind}, {name}" in differs else ""
            group = f"crop-resize {kind}, {threads} thread(s)"
            ours = "ours" if name.startswith("p2w") else "peer"
            rows.append(Row(group, name, median(rates), "samples/s", ours, (min(rates), max(rates)), note))
        cpu_ms[threads] = {", ".join(n): 1e3 * median(s[1] for s in t) / BATCH for n, t in seconds.items()}
        fast = max((n for n in wall if n[0] == PLAIN and n[1] != "p2w"), key=lambda n: median(wall[n]))
        text = f"times the fastest without antialiasing ({fast[1]}), {threads} thread(s)"
        goals.append(Goal(text, over(wall[PLAIN, "p2w"], wall[fast]), 1.0))
        if (SMOOTH, "DALI CPU") in wall:
            ratio = over(wall[SMOOTH, "p2w"], wall[SMOOTH, "DALI CPU"])
            goals.append(Goal(f"times DALI antialiased, {threads} thread(s)", ratio, 1.5))
    command = f"python bench/crop_resize.py --rounds {options.rounds}"
    show(
        save(
            options.out, "samples/s of crop-resize-normalise on the CPU", command, rows, goals, cpu_ms=cpu_ms
        )
    )


if __name__ == "__main__":
    main()
