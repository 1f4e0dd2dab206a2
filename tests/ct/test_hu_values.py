"""What is HU passes, what was rescaled twice, not at all, inverted, multiplied or stretched does not."""

import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from p2w.ct.discover import SearchOptions, find_scans
from p2w.ct.hu_values import check_hu
from p2w.ct.orientation import BadScan
from p2w.ct.scan import read_scan
from p2w.phantom.chest import make_scan

REAL = os.environ.get("P2W_REAL_DATA")
WRONG = {
    "rescaled twice": lambda hu: np.maximum(hu, -1024) - 1024,
    "rescaled twice, another intercept": lambda hu: np.maximum(hu, -1024) - 1000,
    "rescaled twice, not clipped": lambda hu: hu - 1024,
    "not rescaled": lambda hu: hu + 1024,
    "inverted": lambda hu: -1 - np.maximum(hu, -1024),
    "times ten": lambda hu: hu * 10.0,
    "a tenth": lambda hu: hu * 0.1,
    "half": lambda hu: hu * 0.5,
    "double": lambda hu: hu * 2.0,
    "a window of 8 bits": lambda hu: (np.clip(hu, -1000, 400) + 1000) / 1400 * 255,
    "a window of 16 bits": lambda hu: (np.clip(hu, -1000, 400) + 1000) / 1400 * 65535 - 32768,
    "a window stretched": lambda hu: (np.clip(hu, -1000, 400) + 1000) / 1400 * 2000 - 1000,
    "scaled to [0, 1]": lambda hu: (np.clip(hu, -1000, 1000) + 1000) / 2000,
}
RIGHT = {
    "as it is": lambda hu: hu,
    "clipped to a window": lambda hu: np.clip(hu, -1000, 600),
    "padded": lambda hu: np.where(np.arange(hu.shape[2]) < hu.shape[2] // 5, -3024, hu),
    "half a volume": lambda hu: hu[: len(hu) // 2],
    "metal at the scanner's limit": lambda hu: np.where(np.arange(hu.shape[2]) < 3, 3071, hu),
}


def as_int16(values):
    return np.clip(np.rint(values), -32768, 32767).astype(np.int16)


@pytest.fixture(scope="module")
def chest():
    return make_scan(3, (32, 96, 96)).voxels.astype(float)


@pytest.mark.parametrize("how", RIGHT)
def test_a_chest_passes(chest, how):
    check_hu(as_int16(RIGHT[how](chest)))


@pytest.mark.parametrize(
    "change", [lambda hu: hu + 1024, lambda hu: hu - 600, lambda hu: -1 - np.maximum(hu, -1024)]
)
@pytest.mark.parametrize("slices", [slice(5, 6), slice(20, None)])
def test_slices_with_a_rescale_of_their_own_that_is_wrong(chest, change, slices):
    wrong = chest.copy()
    wrong[slices] = change(wrong[slices])
    with pytest.raises(BadScan, match=r"not HU: "):
        check_hu(as_int16(wrong))


def test_empty_slices_pass(chest):
    for empty in (-1000, -3024, -1024):
        padded = chest.copy()
        padded[[0, 1, -1]] = empty
        check_hu(as_int16(padded))


@pytest.mark.parametrize("how", WRONG)
def test_other_values_do_not(chest, how):
    with pytest.raises(BadScan, match=r"not (CT values|HU): ") as error:
        check_hu(as_int16(WRONG[how](chest)))
    assert "\n" not in str(error.value)


def real_scans():
    if not REAL:
        return []
    return sorted(Path(REAL).glob("chest/*.nii.gz")) + sorted(Path(REAL).glob("sarcoma/*_ct.nii.gz"))


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="P2W_REAL_DATA names no folder of real scans")
def test_real_scans():
    assert len(real_scans()) > 10
    for path in real_scans():
        hu = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[::2, ::2, ::2].astype(float)
        check_hu(as_int16(hu))
        for how, change in WRONG.items():
            with pytest.raises(BadScan):
                check_hu(as_int16(change(hu)))
                pytest.fail(f"{path.name}: {how} passes")


def test_a_brain_without_air_is_taken_where_it_is_said_to_be_hu(tmp_path):
    rng = np.random.default_rng(0)
    brain = np.where(np.hypot(*np.mgrid[-1:1:20j, -1:1:20j]) < 0.8, rng.normal(35, 10, (10, 20, 20)), 0)
    sitk.WriteImage(sitk.GetImageFromArray(as_int16(brain)), str(tmp_path / "brain.nii.gz"))
    (source,) = find_scans([str(tmp_path)], "").sources
    with pytest.raises(BadScan, match="--assume-hu takes the values as they are"):
        read_scan(source)
    (source,) = find_scans([str(tmp_path)], "", options=SearchOptions(assume_hu=True)).sources
    np.testing.assert_array_equal(read_scan(source).voxels, as_int16(brain))
