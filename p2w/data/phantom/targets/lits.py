"""lcs: abdomens in LiTS' format: volume-N.nii.gz and segmentation-N.nii.gz, liver 1, tumours in it 2.

A chest phantom's lower half, where liver, spleen and stomach lie against one another with like HU.
"""

from pathlib import Path

import numpy as np

from p2w.data.phantom.labels import Label
from p2w.data.phantom.scan import make_scan
from p2w.data.phantom.targets.images import blob, write_image

Shape = tuple[int, int, int]


def write_patient(folder: Path, seed: int, number: int, shape: Shape) -> None:
    """One volume and its segmentation."""
    rng = np.random.default_rng([seed, number, 3])
    deep = (int(shape[0] * 2), shape[1], shape[2])
    scan = make_scan(int(np.random.SeedSequence([seed, number, 103]).generate_state(1)[0]), deep)
    below = _abdomen(scan.labels == Label.LIVER, shape[0])
    hu, labels = scan.voxels[below].copy(), scan.labels[below]
    liver = labels == Label.LIVER
    segmentation = liver.astype(np.uint8)
    inside = np.argwhere(liver)
    for _ in range(int(rng.integers(1, 6)) if len(inside) else 0):
        centre = inside[rng.integers(len(inside))].astype(float)
        radius = float(np.clip(rng.lognormal(np.log(9), 0.5), 4, 28))
        box, depth = blob(hu.shape, scan.spacing_mm, centre, radius, rng)
        edge = max(scan.spacing_mm)
        cover = np.clip(depth / edge + 0.5, 0, 1) * liver[box]
        change = float(rng.choice([-1, -1, -1, 1])) * rng.uniform(18, 55)
        hu[box] = np.rint(hu[box] + cover * change).astype(np.int16)
        segmentation[box][(cover > 0.5)] = 2
    flipped = number % 4 == 1
    for name, values in (("volume", hu), ("segmentation", segmentation)):
        write_image(folder / f"{name}-{number}.nii.gz", values, scan.spacing_mm, scan.origin_mm, flipped)


def _abdomen(liver: np.ndarray, depth: int) -> slice:
    """As many slices as asked for, from the lowest on: that is where the liver is."""
    return slice(0, min(depth, liver.shape[0]))
