"""The grid of sub-scans: how many there are, where they lie, and which voxels they hold."""

import csv
from pathlib import Path

import numpy as np
import pytest
from ct_files import ct

from p2w.ct.orientation import BadScan, Grid
from p2w.ct.scan import Scan
from p2w.shards.tiling import Tiling, cut_sub_scans

LUNA16 = Path(__file__).with_name(
    "luna16_scans.csv"
)  # subset, slices, how many scans have them; 512 x 512 in plane


def scan(voxels):
    identity = (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0)
    return Scan("a", voxels, Grid(voxels.shape[::-1], (1, 1, 1), (0, 0, 0), identity), 0, 0)


@pytest.mark.parametrize(("z_margin", "expected"), [(25, 28_144), (0, 35_840)])
def test_luna16_subsets_0_to_6_give_the_papers_number(z_margin, expected):
    rows = [{key: int(value) for key, value in row.items()} for row in csv.DictReader(LUNA16.open())]
    assert sum(row["scans"] for row in rows) == 888
    tiling = Tiling(z_margin=z_margin)
    chosen = [row for row in rows if row["subset"] <= 6]
    assert sum(row["scans"] for row in chosen) == 623
    assert sum(row["scans"] * tiling.count((row["slices"], 512, 512)) for row in chosen) == expected


@pytest.mark.parametrize("z_margin", [0, 1, 5])
def test_sub_scans_against_plain_slicing(z_margin):
    voxels = ct((29, 21, 17), seed=3) * 2  # beyond the window too
    tiling = Tiling((4, 8, 8), z_margin, 0.0)
    found = list(cut_sub_scans(scan(voxels), tiling))
    expected = [
        (z, y, x)
        for z in range(z_margin, 29, 4)
        for y in range(0, 21, 8)
        for x in range(0, 17, 8)
        if z + 4 <= 29 - z_margin and y + 8 <= 21 and x + 8 <= 17
    ]
    assert [(sub.z, sub.y, sub.x) for sub in found] == expected
    assert len(found) == tiling.count(voxels.shape)
    for sub in found:
        part = (
            voxels[sub.z : sub.z + 4, sub.y : sub.y + 8, sub.x : sub.x + 8]
            .astype(np.float64)
            .clip(-1000, 1000)
        )
        np.testing.assert_array_equal(sub.voxels, part)
        assert sub.voxels.dtype == np.dtype("<i2") and sub.voxels.flags.c_contiguous
        np.testing.assert_allclose((sub.mean_hu, sub.std_hu), (part.mean(), part.std()), rtol=1e-9, atol=1e-6)


def test_sub_scans_of_a_flipped_view_are_the_same():
    voxels = ct((16, 16, 16))
    plain = list(cut_sub_scans(scan(voxels[::-1, :, ::-1].copy()), Tiling((8, 8, 8))))
    viewed = list(cut_sub_scans(scan(voxels[::-1, :, ::-1]), Tiling((8, 8, 8))))
    for a, b in zip(plain, viewed, strict=True):
        np.testing.assert_array_equal(a.voxels, b.voxels)
        assert (a.mean_hu, a.std_hu) == (b.mean_hu, b.std_hu)


def test_constant_sub_scans_have_no_deviation():
    (sub,) = cut_sub_scans(scan(np.full((8, 8, 8), -3024, np.int16)), Tiling((8, 8, 8)))
    assert (sub.mean_hu, sub.std_hu) == (-1000.0, 0.0)


@pytest.mark.parametrize(
    ("shape", "z_margin"), [((63, 512, 512), 0), ((100, 512, 512), 25), ((70, 127, 512), 0)]
)
def test_scans_smaller_than_a_sub_scan_are_bad(shape, z_margin):
    tiling = Tiling(z_margin=z_margin)
    assert tiling.count(shape) == 0
    with pytest.raises(BadScan, match=r"smaller than a sub-scan: .*, a sub-scan takes 64 x 128 x 128"):
        tiling.check_size(shape)
