"""Check that voxels are HU: air near -1000, soft tissue and water near 0, and no values that a CT cannot have.

Measured on eighteen CTs of chest, abdomen and limbs (LIDC-IDRI, RIDER, TCGA-THCA, 4D-Lung, soft-tissue sarcoma): the most
frequent value above -500 HU is -100 (fat) to 55 (muscle), of those below it -1005 (air) to -885 (lung). With the rescale
applied twice, all have their peak at the lowest value looked at, and 24 to 49 % of their voxels lie, spread, below -1500.
"""

import numpy as np
from numpy.typing import NDArray

from p2w.ct.orientation import BadScan

# Scanners write -2000, -3024 or -32768 outside the field of view; no tissue or air is that low
PADDING_HU = -1500
AIR_HU = -200  # air and lung lie below, fat and everything denser above
RARE = 1e-3  # share of voxels; a CT of a body has more air than this, and more tissue
TISSUE_FROM, TISSUE_TO = -500, 3100  # HU; where the peak of soft tissue is looked for
TISSUE_PEAK = (-200, 200)  # HU; fat, water, brain, muscle, blood with contrast
AIR_TO = -350  # HU; below it the peak of air is looked for
AIR_PEAK = (-1250, -650)  # HU; air to lung
PADDING_KINDS = 3  # values that padding may have
# Share of voxels below PADDING_HU that may have other values: the edge of resampled padding
MOST_SPREAD = 0.02
MOST_DENSE = 0.01  # share of voxels above TISSUE_TO: metal and little else
MOST_SATURATED = 0.01  # share of voxels that may have the highest value, where it is
BONE_HU = 700  # above: of dense bone alone there is less than MOST_SATURATED
SCANNER_LIMIT = 3000  # HU; scanners themselves stop at 3071 or above, where metal is
NO_CT_HU = 30_000  # no CT has such values, metal included
JUMP_HU = 500  # by which voxels of adjacent slices differ at edges of organs alone
MOST_JUMPS = 0.6  # share of the voxels of a slice; at most 0.06 in real CT of 5 mm slices
LEAST_STD_HU = 50  # of a slice that shows anything
CLEARLY = 1.5  # times as frequent as anything in the expected range
FEWEST_VALUES = 3  # different values, below which an image is a drawing that has no peaks
LOWEST = 1 << 15  # of int16, without its sign
BIN = 10  # HU of a bin of the histograms

REMEDY = "if they are HU all the same, --assume-hu takes them"


def check_hu(voxels: NDArray[np.int16]) -> None:
    """Raise BadScan unless voxels [z,y,x] are HU, apart from padding.

    Every fourth row and column of every second slice is looked at. Masks, MR or PET images, values scaled to [0, 1] and raw
    scanner units have no values below -200, where air is; a scan of air or padding alone has none above. Values that were
    rescaled twice or not at all, inverted, stretched to a window or multiplied have the peaks of air or tissue elsewhere.
    """
    values = _Histogram(voxels[::2, ::4, ::4])
    inside = values.count(PADDING_HU + 1)
    if inside < RARE * values.total:
        raise BadScan("not CT values: nothing but padding")
    low, high = values.ends(PADDING_HU + 1)
    if values.count(PADDING_HU + 1, AIR_HU) < RARE * inside:
        raise BadScan(
            f"not CT values: {low} … {high} and nearly none below {AIR_HU} HU, where air is: a mask, "
            "another modality, or no rescale (raw values: the intercept, often -1024, was not applied); of a scan "
            "without air, such as a brain without its skull, --assume-hu takes the values as they are"
        )
    if values.count(AIR_HU + 1) < RARE * inside:
        raise BadScan(f"not CT values: {low} … {high} and nearly none above {AIR_HU} HU, where tissue is")
    if values.count(PADDING_HU + 1, AIR_PEAK[1]) < RARE * inside:
        raise BadScan(
            f"not HU: {low} … {high} and nearly none below {AIR_PEAK[1]} HU, where air and lung are: are values "
            f"multiplied, or is there no air in it? {REMEDY}"
        )
    _check_tails(values, inside, high)
    _check_peaks(values, inside)
    _check_slices(voxels[:, ::4, ::4])


def _check_slices(sample: NDArray[np.int16]) -> None:
    """Raise BadScan where a slice of [z,y,x] is much brighter or darker than its neighbour in most places.

    Padding and slices that are nearly constant, such as empty ones, are not compared.
    """
    before: NDArray[np.int32] | None = None
    for z, values in enumerate(sample):
        own = values.astype(np.int32)
        if own.std() < LEAST_STD_HU:
            before = None
            continue
        if before is not None:
            both = (own > PADDING_HU) & (before > PADDING_HU)
            off = np.count_nonzero(both & (np.abs(own - before) > JUMP_HU))
            if off > MOST_JUMPS * np.count_nonzero(both) and off > RARE * own.size:
                share = off / np.count_nonzero(both)
                raise BadScan(
                    f"not HU: stored slices {z - 1} and {z} are more than {JUMP_HU} HU apart in {share:.0%} of their "
                    f"voxels: has one of them a wrong rescale? {REMEDY}"
                )
        before = own


class _Histogram:
    """How often each value of int16 occurs."""

    def __init__(self, sample: NDArray[np.int16]) -> None:
        values = sample.astype(np.intp)  # the type that `bincount` takes without a copy
        values += LOWEST
        self.counts = np.bincount(values.ravel(), minlength=2 * LOWEST)
        self.total = int(sample.size)

    def between(self, low: int, high: int = LOWEST) -> NDArray[np.int64]:
        """The counts of the values from `low` to below `high`."""
        return self.counts[low + LOWEST : high + LOWEST]

    def count(self, low: int, high: int = LOWEST) -> int:
        """How many values are from `low` to below `high`."""
        return int(self.between(low, high).sum())

    def ends(self, low: int) -> tuple[int, int]:
        """The lowest and the highest value from `low` on."""
        found = np.flatnonzero(self.between(low))
        return int(found[0]) + low, int(found[-1]) + low


def _check_tails(values: _Histogram, inside: int, high: int) -> None:
    """Raise BadScan where too many voxels are lower or higher than those of a CT."""
    impossible = values.count(NO_CT_HU)
    if impossible > RARE * values.total:
        raise BadScan(
            f"not HU: {impossible / values.total:.1%} of the voxels are above {NO_CT_HU:,}: padding that its header does "
            "not tell (PixelPaddingValue)"
        )
    spread = int(np.sort(values.between(-LOWEST, PADDING_HU + 1))[:-PADDING_KINDS].sum())
    if spread > MOST_SPREAD * values.total:
        raise BadScan(
            f"not HU: {spread / values.total:.0%} of the voxels lie, spread, below {PADDING_HU}, where nothing is: was the "
            f"rescale applied twice, or are values multiplied? {REMEDY}"
        )
    dense = values.count(TISSUE_TO + 1)
    if dense > MOST_DENSE * inside:
        raise BadScan(
            f"not HU: {dense / inside:.0%} of the voxels are above {TISSUE_TO}, where only metal is: are values "
            f"multiplied, or stretched to a window? {REMEDY}"
        )
    saturated = values.count(high, high + 1)
    if BONE_HU <= high < SCANNER_LIMIT and saturated > MOST_SATURATED * inside:
        raise BadScan(
            f"not HU: {saturated / inside:.0%} of the voxels have the highest value, {high}: were values stretched "
            f"to a window? {REMEDY}"
        )


def _check_peaks(values: _Histogram, inside: int) -> None:
    """Raise BadScan where the most frequent values are not those of air and of soft tissue."""
    ranges = (("soft tissue", TISSUE_FROM, TISSUE_TO, TISSUE_PEAK), ("air", PADDING_HU, AIR_TO, AIR_PEAK))
    for name, low, high, (least, most) in ranges:
        counts = values.between(low + 1, high + 1)
        if counts.sum() < RARE * inside:
            continue
        peak = _peak_outside(counts, least - low, most - low)
        if peak is not None:
            raise BadScan(
                f"not HU: the peak of {name} is at {peak + low}, not from {least} to {most}: was the rescale applied twice "
                f"or not at all, or are values inverted, multiplied or stretched to a window? {REMEDY}"
            )


def _peak_outside(counts: NDArray[np.int64], least: int, most: int) -> int | None:
    """The most frequent value of a histogram where that is not from `least` to `most`, by a clear margin.

    The histogram is smoothed over 50 HU; None where too few values are in it.
    """
    if np.count_nonzero(counts) < FEWEST_VALUES:
        return None
    smooth = np.convolve(counts.reshape(-1, BIN).sum(axis=1), np.ones(5), "same")
    if smooth.max() <= CLEARLY * smooth[least // BIN : most // BIN + 1].max():
        return None
    return int(smooth.argmax()) * BIN + BIN // 2
