"""How long does resampling a scan take, next to SimpleITK with and without antialiasing? One thread each.

    python bench/resample.py                # 512 x 512 x 200 voxels of noise
    python bench/resample.py --slices 400 --rounds 9

Rounds are interleaved, and ratios are taken within a round. Ours clips to the window and averages over the triangle filter
where voxels get larger. SimpleITK's linear interpolation alone aliases; its usual way against that is a Gaussian along every
axis that shrinks (sigma: half the new voxel) before it.
At 5 mm the interpolation looks at 1 voxel in 32 or fewer. To convert all of them to float32 and do nothing else ("reading
every voxel") takes longer, so the goal there is the Gaussian's time.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import SimpleITK as sitk
from common import RESULTS, Goal, over, rotate, row, save, show

from p2w.ct.orientation import Grid
from p2w.ct.resample import Spacing, resample

# mm z, y, x: of the scan, and wanted.
CASES: dict[str, tuple[Spacing, Spacing]] = {
    "1.25 0.7 0.7 -> 2 1 1": ((1.25, 0.7, 0.7), (2.0, 1.0, 1.0)),
    "0.625 0.8 0.8 -> 1 1 1": ((0.625, 0.8, 0.8), (1.0, 1.0, 1.0)),
    "5 0.7 0.7 -> 1.5 1 1": ((5.0, 0.7, 0.7), (1.5, 1.0, 1.0)),
    "1 0.7 0.7 -> 2 2 2": ((1.0, 0.7, 0.7), (2.0, 2.0, 2.0)),
    "1 0.7 0.7 -> 5 5 5": ((1.0, 0.7, 0.7), (5.0, 5.0, 5.0)),
}
MOST = 2.0  # times SimpleITK's time


def ways(voxels: np.ndarray, old: Spacing, new: Spacing) -> dict[str, Callable[[], float]]:
    """Functions that resample once and return million stored voxels a second."""
    grid = Grid(voxels.shape[::-1], old[::-1], (0.0, 0.0, 0.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
    made = resample(voxels, grid, new)[1]
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(grid.spacing)

    def timed(work: Callable[[], object]) -> Callable[[], float]:
        def once() -> float:
            began = time.perf_counter()
            work()
            return voxels.size / 1e6 / (time.perf_counter() - began)

        return once

    def antialiased() -> sitk.Image:
        smooth = sitk.Cast(image, sitk.sitkFloat32)
        for axis, (before, after) in enumerate(zip(grid.spacing, made.spacing, strict=True)):
            if after > before:
                smooth = sitk.RecursiveGaussian(
                    smooth, after / 2, False, sitk.RecursiveGaussianImageFilter.ZeroOrder, axis
                )
        return sitk.Resample(smooth, *to)

    def converted() -> None:
        slab = np.empty(voxels.shape[1:], np.float32)
        for stored in voxels:
            np.copyto(slab, stored)

    to = (made.size, sitk.Transform(), sitk.sitkLinear, made.origin, made.spacing, made.direction)
    return {
        "p2w, antialiased": timed(lambda: resample(voxels, grid, new, (-1000, 1000))),
        "SimpleITK, linear": timed(lambda: sitk.Resample(image, *to)),
        "SimpleITK, Gaussian and linear": timed(antialiased),
        "reading every voxel": timed(converted),
    }


def main() -> None:
    """Measure, save and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slices", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    voxels = np.random.default_rng(0).integers(-1000, 1001, (options.slices, 512, 512)).astype(np.int16)
    rows, goals = [], []
    for name, (old, new) in CASES.items():
        rates = rotate(ways(voxels, old, new), options.rounds)
        ours, theirs, smooth, _ = rates.values()
        rows += [
            row(name, way, found, "Mvoxel/s", kind)
            for (way, found), kind in zip(rates.items(), ("ours", "peer", "peer", "bound"), strict=True)
        ]
        goals.append(
            Goal(
                f"of SimpleITK's time with its Gaussian, {name} mm", over(smooth, ours), MOST, at_least=False
            )
        )
        if new != (5.0, 5.0, 5.0):
            goals.append(
                Goal(f"of SimpleITK's time alone, {name} mm", over(theirs, ours), MOST, at_least=False)
            )
    command = f"python bench/resample.py --slices {options.slices} --rounds {options.rounds}"
    show(
        save(RESULTS / "resample.json", "resampling a scan against SimpleITK's interpolation", command, rows, goals),
    )  # fmt: skip


if __name__ == "__main__":
    main()
