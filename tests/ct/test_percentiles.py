"""Scans of other modalities are scaled by their own percentiles: in pretraining, in target tasks and in prediction alike."""

import numpy as np
import pytest
from ct_files import write

from p2w.ct.discover import ScanSource
from p2w.ct.orientation import BadScan
from p2w.ct.scan import percentile_range, read_scaled
from p2w.tasks.bms import TOP
from p2w.tasks.case_samples import read_channels
from p2w.tasks.crops import CropBox
from p2w.tasks.custom import Custom
from p2w.tasks.task import Case


def mr(shape=(12, 20, 24), seed=0):
    """Values of an MR image, float32 [z,y,x]: mostly small, some large, a few very large."""
    return (np.random.default_rng(seed).gamma(2.0, 300.0, shape) + 7.25).astype(np.float32)


def test_the_percentiles_become_the_ends_of_the_window(tmp_path):
    values = mr()
    path = write(tmp_path / "a.nii.gz", values)
    scan, (low, high) = read_scaled(ScanSource("a", "a", (str(path),)), (-1000, 1000))
    ordered = np.sort(values.astype(np.float64).ravel())
    at = np.array([0.005, 0.995]) * (len(ordered) - 1)  # linear between the two nearest
    below = np.floor(at).astype(int)
    expected = ordered[below] + (at - below) * (ordered[below + 1] - ordered[below])
    np.testing.assert_allclose((low, high), expected, rtol=1e-6)
    wanted = np.clip((values.astype(np.float64) - low) / (high - low), 0, 1) * 2000 - 1000
    assert scan.voxels.dtype == np.int16 and np.abs(scan.voxels - wanted).max() <= 0.5 + 1e-6
    assert scan.voxels.min() == -1000 and scan.voxels.max() == 1000


def test_a_scan_times_ten_is_the_same_scan(tmp_path):
    values = mr()
    one, ten = (write(tmp_path / f"{k}.nii.gz", k * values + 3 * k) for k in (1, 10))
    a, b = (read_scaled(ScanSource("a", "a", (str(path),)), (-1000, 1000))[0] for path in (one, ten))
    assert np.abs(a.voxels.astype(int) - b.voxels).max() <= 1


def test_an_image_of_one_value_is_refused():
    with pytest.raises(BadScan, match="have one value, 3: nothing to scale by percentiles"):
        percentile_range(np.full((4, 5, 6), 3))


def test_a_target_task_is_scaled_as_pretraining_is(tmp_path):
    path = write(tmp_path / "a.nii.gz", mr(seed=1))
    source = ScanSource("a", "a", (str(path),))
    scan, _ = read_scaled(source, (-1000, 1000))
    task = Custom(values="percentiles")
    channels, _, shape, _ = read_channels(
        Case("a", "a", "a", (("image", source),)), "percentiles", assume_hu=False
    )
    (crop,) = channels(CropBox(np.zeros(3), np.ones(3), shape))
    low, high = task.window
    assert (low, high) == (0, TOP)
    np.testing.assert_allclose((crop - low) / (high - low), (scan.voxels + 1000) / 2000, atol=1 / 2000)
