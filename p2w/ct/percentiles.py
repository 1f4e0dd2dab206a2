"""Scans of other modalities than CT: each scaled by its own percentiles, since their values have no fixed unit.

The 0.5th percentile of all voxels of a scan becomes 0 and the 99.5th becomes 1; what lies beyond is clipped. Shards hold
these as int16 in the CT window, -1000 for 0 and 1000 for 1, so that every recipe's `pretext.window_hu` reads them as they
are. Target tasks (`prepare_target.py general --values percentiles`) and `p2w predict` scale by the same percentiles.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from p2w.ct.discover import ScanSource
from p2w.ct.orientation import BadScan
from p2w.ct.scan import Scan, read_image

Modality = Literal["ct", "mr", "pt"]
PERCENTILES = (0.5, 99.5)


def percentile_range(values: NDArray) -> tuple[float, float]:
    """The values of a scan that become 0 and 1: its percentiles over all voxels. Raises BadScan where they are one value."""
    low, high = (float(value) for value in np.percentile(values, PERCENTILES))
    if not low < high:
        raise BadScan(
            f"99 % of its voxels have one value, {low:g}: nothing to scale by percentiles; is it a mask or an empty image?"
        )
    return low, high


def read_scaled(source: ScanSource, window: tuple[int, int]) -> tuple[Scan, tuple[float, float]]:
    """Read a scan of any modality and scale its percentiles to `window`, int16 rounded half to even; and their values.

    Raises BadScan as `read_image` and `percentile_range` do.
    """
    image = read_image(source)
    low, high = percentile_range(image.values)
    bottom, top = window
    voxels = np.empty(image.values.shape, np.int16)
    for z, values in enumerate(
        image.values
    ):  # slice by slice, so that a whole scan is never in memory as float64
        share = np.clip((values.astype(np.float64) - low) / (high - low), 0, 1)
        voxels[z] = np.rint(bottom + share * (top - bottom))
    return Scan(source.uid, voxels, image.grid, image.nbytes, image.checksum), (low, high)
