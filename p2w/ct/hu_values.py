"""Whether voxels are HU: air near -1000, soft tissue and water near 0, nothing that no CT has.

Measured on twenty CTs of chest, abdomen and limbs (LIDC-IDRI, RIDER, TCGA-THCA, 4D-Lung, soft-tissue sarcoma): the most
frequent value above -500 HU is -100 (fat) to 55 (muscle), of those below it -1005 (air) to -885 (lung). With the rescale
applied twice, all have their peak at the lowest value looked at, and 24 to 49 % of their voxels lie, spread, below -1500.
"""

import numpy as np
from numpy.typing import NDArray

from p2w.ct.orientation import BadScan

PADDING_HU = (
    -1500
)  # scanners write -2000, -3024 or -32768 outside the field of view; no tissue or air is that low
AIR_HU = -200  # air and lung lie below, fat and everything denser above
RARE = 1e-3  # share of voxels; a CT of a body has more air than this, and more tissue
TISSUE_FROM, TISSUE_TO = -500, 3100  # HU; where the peak of soft tissue is looked for
TISSUE_PEAK = (-200, 200)  # HU; fat, water, brain, muscle, blood with contrast
AIR_TO = -350  # HU; below it the peak of air is looked for
AIR_PEAK = (-1250, -650)  # HU; air to lung
PADDING_KINDS = 3  # values that padding may have
MOST_SPREAD = (
    0.02  # share of voxels below PADDING_HU that may have other values: the edge of resampled padding
)
MOST_DENSE = 0.01  # share of voxels above TISSUE_TO: metal and little else
MOST_SATURATED = 0.01  # share of voxels that may have the highest value, where it is
BONE_HU = 700  # above: of dense bone alone there is less than MOST_SATURATED
NO_CT_HU = 30_000  # no CT has such values, metal included
CLEARLY = 1.5  # times as frequent as anything in the expected range
FEWEST_VALUES = 3  # different values, below which an image is a drawing that has no peaks
BIN = 10  # HU of a bin of the histograms

REMEDY = "if they are HU all the same, --assume-hu takes them"


def check_hu(voxels: NDArray[np.int16]) -> None:
    """Raise BadScan unless voxels [z,y,x] are HU, apart from padding.

    Every fourth row and column of every second slice is looked at. Masks, MR or PET images, values scaled to [0, 1] and raw
    scanner units have no values below -200, where air is; a scan of air or padding alone has none above. Values that were
    rescaled twice or not at all, inverted, stretched to a window or multiplied have the peaks of air or tissue elsewhere.
    """
    sample = voxels[::2, ::4, ::4]
    inside = sample[sample > PADDING_HU]
    if inside.size < RARE * sample.size:
        raise BadScan("not CT values: nothing but padding")
    low, high = int(inside.min()), int(inside.max())
    if np.count_nonzero(inside < AIR_HU) < RARE * inside.size:
        raise BadScan(
            f"not CT values: {low} … {high} and nearly none below {AIR_HU} HU, where air is: a mask, "
            "another modality, or no rescale (raw values: the intercept, often -1024, was not applied); of a scan "
            "without air, such as a brain without its skull, --assume-hu takes the values as they are"
        )
    if np.count_nonzero(inside > AIR_HU) < RARE * inside.size:
        raise BadScan(f"not CT values: {low} … {high} and nearly none above {AIR_HU} HU, where tissue is")
    if np.count_nonzero(inside < AIR_PEAK[1]) < RARE * inside.size:
        raise BadScan(
            f"not HU: {low} … {high} and nearly none below {AIR_PEAK[1]} HU, where air and lung are: are values multiplied, "
            f"or is there no air in it? {REMEDY}"
        )
    _check_tails(sample, inside, high)
    _check_peaks(inside)


def _check_tails(sample: NDArray[np.int16], inside: NDArray[np.int16], high: int) -> None:
    """Raise BadScan where too many voxels are lower or higher than those of a CT."""
    impossible = np.count_nonzero(inside >= NO_CT_HU)
    if impossible > RARE * sample.size:
        raise BadScan(
            f"not HU: {impossible / sample.size:.1%} of the voxels are above {NO_CT_HU:,}: padding that its header does not "
            "tell (PixelPaddingValue)"
        )
    below = np.sort(np.unique(sample[sample <= PADDING_HU], return_counts=True)[1])
    spread = int(below[:-PADDING_KINDS].sum())
    if spread > MOST_SPREAD * sample.size:
        raise BadScan(
            f"not HU: {spread / sample.size:.0%} of the voxels lie, spread, below {PADDING_HU}, where nothing is: was the "
            f"rescale applied twice, or are values multiplied? {REMEDY}"
        )
    if np.count_nonzero(inside > TISSUE_TO) > MOST_DENSE * inside.size:
        raise BadScan(
            f"not HU: {np.count_nonzero(inside > TISSUE_TO) / inside.size:.0%} of the voxels are above {TISSUE_TO}, where "
            f"only metal is: are values multiplied, or stretched to a window? {REMEDY}"
        )
    saturated = np.count_nonzero(inside == high)
    if high >= BONE_HU and saturated > MOST_SATURATED * inside.size:
        raise BadScan(
            f"not HU: {saturated / inside.size:.0%} of the voxels have the highest value, {high}: were values stretched "
            f"to a window? {REMEDY}"
        )


def _check_peaks(inside: NDArray[np.int16]) -> None:
    """Raise BadScan where the most frequent values are not those of air and of soft tissue."""
    ranges = (
        ("soft tissue", TISSUE_FROM, TISSUE_TO, TISSUE_PEAK),
        ("air", PADDING_HU, AIR_TO, AIR_PEAK),
    )
    for name, low, high, (least, most) in ranges:
        peak = _peak_outside(inside, low, high, least, most)
        if peak is not None:
            raise BadScan(
                f"not HU: the peak of {name} is at {peak}, not from {least} to {most}: was the rescale applied twice or not "
                f"at all, or are values inverted, multiplied or stretched to a window? {REMEDY}"
            )


def _peak_outside(inside: NDArray[np.int16], low: int, high: int, least: int, most: int) -> int | None:
    """The most frequent value from `low` to below `high` where that is not from `least` to `most`, by a clear margin.

    The histogram is smoothed over 50 HU; None where too few voxels or values are in it.
    """
    chosen = inside[(inside > low) & (inside < high)]
    if chosen.size < RARE * inside.size:
        return None
    counts = np.bincount(chosen.astype(np.int32) - low, minlength=high - low)
    if np.count_nonzero(counts) < FEWEST_VALUES:
        return None
    smooth = np.convolve(counts.reshape(-1, BIN).sum(axis=1), np.ones(5), "same")
    allowed = smooth[(least - low) // BIN : (most - low) // BIN + 1].max()
    if smooth.max() <= CLEARLY * allowed:
        return None
    return int(smooth.argmax()) * BIN + low + BIN // 2
