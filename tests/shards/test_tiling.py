"""The grid of sub-scans: how many there are, where they lie, and which voxels they hold."""

import csv
from pathlib import Path

import numpy as np
import pytest
from ct_files import ct

from p2w.ct.orientation import BadScan, Grid
from p2w.ct.scan import Scan
from p2w.errors import UserError
from p2w.shards.tiling import SUB_SCAN_SHAPE, Tiling, cut_sub_scans, shows_body

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


@pytest.mark.parametrize("stride", [(2, 8, 8), (4, 3, 8), (9, 9, 9)])
def test_a_stride_moves_the_grid(stride):
    voxels = ct((29, 21, 17), seed=3)
    tiling = Tiling((4, 8, 8), 1, 0.0, stride)
    found = [(sub.z, sub.y, sub.x) for sub in cut_sub_scans(scan(voxels), tiling)]
    expected = [
        (z, y, x)
        for z in range(1, 29, stride[0])
        for y in range(0, 21, stride[1])
        for x in range(0, 17, stride[2])
        if z + 4 <= 28 and y + 8 <= 21 and x + 8 <= 17
    ]
    assert found == expected and len(found) == tiling.count(voxels.shape)


@pytest.mark.parametrize(
    ("shape", "margin"), [((30, 40, 50), 0), ((30, 40, 50), 5), ((70, 5, 50), 3), ((2, 3, 4), 0)]
)
def test_a_short_scan_is_filled_up_with_air_behind_what_is_real(shape, margin):
    tiling = Tiling((32, 16, 24), margin, 0.0, short="pad")
    voxels = ct(shape, seed=1) * 2
    found = list(cut_sub_scans(scan(voxels), tiling))
    assert len(found) == tiling.count(shape) > 0
    room = (shape[0] - 2 * margin, *shape[1:])
    for sub in found:
        assert sub.real == tuple(min(edge, there) for edge, there in zip(tiling.shape, room, strict=True))
        first = (sub.z, sub.y, sub.x)
        own = voxels[tuple(slice(a, a + n) for a, n in zip(first, sub.real, strict=True))].clip(-1000, 1000)
        np.testing.assert_array_equal(sub.own(), own)
        rest = np.ones(tiling.shape, bool)
        rest[tuple(slice(n) for n in sub.real)] = False
        assert (sub.voxels[rest] == -1000).all()
        assert sub.voxels.shape == tiling.shape and sub.voxels.flags.c_contiguous
        values = own.astype(np.float64)
        np.testing.assert_allclose((sub.mean_hu, sub.std_hu), (values.mean(), values.std()), rtol=1e-9)


def test_margins_that_leave_nothing_are_bad_with_padding_too():
    for slices in (10, 9):
        with pytest.raises(BadScan, match="less 5 slices at each end"):
            list(cut_sub_scans(scan(ct((slices, 40, 40))), Tiling((8, 8, 8), 5, short="pad")))


def test_padding_changes_nothing_for_a_scan_that_is_large_enough():
    voxels = ct((29, 21, 17), seed=3)
    plain, padding = (
        list(cut_sub_scans(scan(voxels), Tiling((4, 8, 8), short=short))) for short in ("skip", "pad")
    )
    for one, other in zip(plain, padding, strict=True):
        np.testing.assert_array_equal(one.voxels, other.voxels)
        assert (one.z, one.std_hu, one.real) == (other.z, other.std_hu, (4, 8, 8))


def test_little_body_is_a_tenth_above_900_hu_below_zero():
    voxels = np.full((10, 10, 10), -900, np.int16)
    voxels[0, :, :] = -899
    assert shows_body(voxels)
    voxels[0, 0, 0] = -900
    assert not shows_body(voxels)
    # Padding does not count: a scan of one slice of tissue is all body.
    (sub,) = cut_sub_scans(
        scan(np.full((1, 16, 16), 40, np.int16)), Tiling((64, 16, 16), min_std_hu=0, short="pad")
    )
    assert sub.kept(Tiling((64, 16, 16), min_std_hu=0, short="pad", body_only=True))
    assert not sub.kept(Tiling((64, 16, 16), min_std_hu=1, short="pad"))


def test_the_wanted_spacing_is_that_of_the_scan_as_it_is_cut():
    one = scan(ct((20, 24, 28), seed=2))
    tiling = Tiling((8, 8, 8), spacing=(2.0, 1.5, 1.0))
    resampled = tiling.resampled(one)
    assert resampled.voxels.shape == (10, 16, 28) and resampled.grid.spacing == (1.0, 1.5, 2.0)
    assert resampled.grid == tiling.resampled_grid(one.grid)
    assert Tiling((8, 8, 8)).resampled(one) is one


def test_a_manifest_says_what_is_not_as_by_default():
    assert Tiling().to_meta() == {"tile": list(SUB_SCAN_SHAPE), "z_margin": 0, "min_std_hu": 50.0}
    for tiling in (
        Tiling(),
        Tiling((32, 64, 64), 3, 0.0, (16, 32, 32), "pad", True, (2.0, 1.0, 0.5)),
        Tiling((32, 64, 64), spacing=(5.0, 1.0, 1.0)),
    ):
        assert Tiling.from_meta(tiling.to_meta()) == tiling


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": (0, 8, 8)}, "--tile 0 8 8: voxels z y x, each 1 or more"),
        ({"shape": (4096, 1024, 128)}, "--tile 4096 1024 128: .* at most 268,435,456 together"),
        ({"stride": (8, 0, 8)}, "--stride 8 0 8: voxels z y x, each 1 or more"),
        ({"spacing": (1.0, 0.0, 1.0)}, "--spacing 1 0 1: mm along z y x"),
    ],
)
def test_impossible_tilings_are_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        Tiling(**settings)
