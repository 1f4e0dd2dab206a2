"""Resampling a scan: values against float64 written out plainly and SimpleITK, geometry in the patient's space."""

import math
import tracemalloc

import numpy as np
import pytest
import SimpleITK as sitk

from p2w.ct import resample as resampling
from p2w.ct.orientation import BadScan, Grid, to_canonical
from p2w.ct.resample import check_spacing, resample, resampled_grid
from p2w.errors import UserError

EYE = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
OBLIQUE = tuple(
    (
        np.array([[math.cos(0.3), -math.sin(0.3), 0], [math.sin(0.3), math.cos(0.3), 0], [0, 0, 1]])
        @ np.array([[1, 0, 0], [0, math.cos(0.2), -math.sin(0.2)], [0, math.sin(0.2), math.cos(0.2)]])
    )
    .ravel()
    .tolist()
)


def _noise(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1001, shape).astype(np.int16)


def _grid(shape: tuple[int, ...], spacing_zyx: tuple[float, ...], direction: tuple[float, ...] = EYE) -> Grid:
    return Grid(shape[::-1], spacing_zyx[::-1], (-120.5, 33.0, 7.25), direction)


def _along_axis(values: np.ndarray, axis: int, old: float, new: float) -> np.ndarray:
    """The reference: one output voxel after the other, its weights from the triangle's definition, in float64."""
    moved = np.moveaxis(values, axis, 0)
    count, step = len(moved), new / old
    if abs(step - 1) < 1e-5:
        return values
    out_count = max(1, math.floor(count / step + 0.5))
    radius, offset = max(1.0, step), (count - out_count * step) / 2
    out = []
    for i in range(out_count):
        centre = min(max(offset + (i + 0.5) * step, 0.5), count - 0.5)
        weights = [max(0.0, 1 - abs(v + 0.5 - centre) / radius) for v in range(count)]
        out.append(sum(w * moved[v] for v, w in enumerate(weights)) / sum(weights))
    return np.moveaxis(np.stack(out), 0, axis)


def _reference(voxels: np.ndarray, old: tuple[float, ...], new: tuple[float, ...]) -> np.ndarray:
    values = voxels.astype(np.float64)
    for axis in range(3):
        values = _along_axis(values, axis, old[axis], new[axis])
    return values


@pytest.mark.parametrize(
    ("shape", "old", "new"),
    [
        ((20, 24, 30), (1.25, 0.7, 0.8), (2.0, 1.0, 1.0)),  # coarser everywhere
        ((7, 20, 22), (5.0, 0.7, 0.7), (1.25, 0.5, 0.6)),  # finer everywhere
        ((9, 25, 21), (5.0, 0.7, 0.7), (2.0, 1.4, 1.5)),  # finer along z, coarser in the plane
        ((41, 12, 13), (0.6, 1.0, 1.0), (3.1, 0.7, 1.0)),  # one axis stays
        ((30, 9, 9), (1.0, 1.0, 1.0), (30.0, 1.0, 1.0)),  # a single slice is left
        ((3, 9, 9), (1.0, 1.0, 1.0), (50.0, 70.0, 1.0)),  # coarser than the whole scan
        ((1, 8, 8), (3.0, 1.0, 1.0), (1.0, 1.0, 1.0)),  # from a single slice
        ((70, 6, 5), (1.0, 1.0, 1.0), (1.1, 1.0, 1.0)),  # several slabs
    ],
)
def test_values_are_those_of_the_triangle_filter_in_float64(
    shape: tuple[int, int, int], old: tuple[float, float, float], new: tuple[float, float, float]
) -> None:
    voxels = _noise(shape)
    out, grid = resample(voxels, _grid(shape, old), new)
    wanted = _reference(voxels, old, new)
    assert out.dtype == np.int16 and out.shape == wanted.shape == grid.size[::-1]
    assert grid.spacing[::-1] == new
    assert np.abs(out - wanted).max() <= 0.5 + 1e-3  # rounded to the nearest


@pytest.mark.parametrize("direction", [EYE, OBLIQUE, (-1.0, 0, 0, 0, 1.0, 0, 0, 0, -1.0)])
def test_refining_is_simpleitk_s_linear_interpolation_in_the_patient_s_space(
    direction: tuple[float, ...],
) -> None:
    shape, old, new = (9, 12, 14), (5.0, 1.5, 1.2), (1.7, 1.1, 0.7)
    voxels, grid = _noise(shape, 1), _grid(shape, old, direction)
    out, made = resample(voxels, grid, new)
    image = sitk.GetImageFromArray(voxels.astype(np.float64))
    image.SetSpacing(grid.spacing)
    image.SetOrigin(grid.origin)
    image.SetDirection(grid.direction)
    there = sitk.Resample(
        image, made.size, sitk.Transform(), sitk.sitkLinear, made.origin, made.spacing, made.direction, -1e9
    )
    values = sitk.GetArrayFromImage(there)
    inside = values > -1e8  # ITK gives the border's half voxel or the default value, which rounding decides
    assert inside[1:-1, 1:-1, 1:-1].all()
    assert np.abs(out - values)[inside].max() <= 0.5 + 1e-3


@pytest.mark.parametrize("new", [(2.0, 1.0, 1.0), (1.3, 0.31, 2.9)])
def test_the_extent_stays_and_its_centre_too(new: tuple[float, float, float]) -> None:
    shape, old = (31, 40, 37), (1.25, 0.7, 0.8)
    grid = _grid(shape, old, OBLIQUE)
    made = resampled_grid(grid, new)

    def middle(one: Grid) -> np.ndarray:
        half = (np.array(one.size) - 1) / 2 * np.array(one.spacing)
        return np.array(one.origin) + np.array(one.direction).reshape(3, 3) @ half

    np.testing.assert_allclose(middle(made), middle(grid), atol=1e-9)
    before, after = (np.array(one.size) * np.array(one.spacing) for one in (grid, made))
    assert (np.abs(before - after) <= np.array(new[::-1]) / 2 + 1e-9).all()
    assert made.direction == grid.direction


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_flipping_and_resampling_commute(axis: int) -> None:
    """So a scan stored from the feet up and one from the head down give the same voxels, at the same places."""
    shape, old, new = (21, 17, 19), (1.25, 0.7, 0.8), (2.0, 1.0, 0.5)
    voxels = _noise(shape, 2)
    matrix = np.eye(3)
    matrix[2 - axis, 2 - axis] = -1
    stored = _grid(shape, old, tuple(matrix.ravel().tolist()))
    canonical, order, flips = stored.canonical()
    one, grid_of_one = resample(to_canonical(voxels, order, flips), canonical, new)
    other, grid_of_other = resample(voxels, stored, new)
    expected, order, flips = grid_of_other.canonical()
    assert (one == to_canonical(other, order, flips)).all()
    np.testing.assert_allclose(grid_of_one.origin, expected.origin, atol=1e-9)
    assert grid_of_one.size == expected.size and grid_of_one.direction == expected.direction


def test_a_scan_of_the_wanted_spacing_is_left_alone() -> None:
    voxels = _noise((6, 8, 9))
    grid = _grid(voxels.shape, (2.0, 0.703125, 0.7031250001))
    out, made = resample(voxels, grid, (2.0, 0.703125, 0.703125))
    assert out is voxels and made == grid
    out, made = resample(voxels, grid, (2.0, 0.703125, 0.703125), (-500, 500))
    assert (out == voxels.clip(-500, 500)).all() and made == grid


def test_values_stay_in_the_range_of_their_neighbours_and_air_stays_air() -> None:
    voxels = np.full((24, 30, 30), -1000, np.int16)
    voxels[8:16, 10:20, 10:20] = 3071  # metal in air: whatever rings, rings here
    for new in [(2.0, 1.1, 1.3), (0.4, 0.3, 0.7), (3.0, 0.5, 2.0)]:
        out, _ = resample(voxels, _grid(voxels.shape, (1.0, 0.7, 0.7)), new)
        assert out.min() == -1000 and out.max() == 3071
        flat, _ = resample(np.full((24, 30, 30), -1000, np.int16), _grid((24, 30, 30), (1.0, 0.7, 0.7)), new)
        assert (flat == -1000).all()
    for value in (32767, -32768):  # nothing wraps round
        extreme = np.full((5, 6, 7), value, np.int16)
        assert (resample(extreme, _grid(extreme.shape, (1.0, 1.0, 1.0)), (0.3, 0.7, 1.9))[0] == value).all()


def test_padding_and_metal_do_not_reach_their_neighbours() -> None:
    voxels = np.full((12, 12, 12), 40, np.int16)
    voxels[:, :, 6:] = -3024
    out, _ = resample(voxels, _grid(voxels.shape, (1.0, 1.0, 1.0)), (1.0, 1.0, 0.25), (-1000, 1000))
    clipped, _ = resample(voxels.clip(-1000, 1000), _grid(voxels.shape, (1.0, 1.0, 1.0)), (1.0, 1.0, 0.25))
    assert (out == clipped).all() and out.min() == -1000


def test_fine_detail_does_not_alias() -> None:
    """Slices that alternate every voxel are grey at a step of three, not black or white."""
    voxels = np.zeros((60, 4, 4), np.int16)
    voxels[::2] = 900
    out, _ = resample(voxels, _grid(voxels.shape, (1.0, 1.0, 1.0)), (3.0, 1.0, 1.0))
    assert (np.abs(out[1:-1] - 450) <= 100).all()


def test_views_of_any_strides_give_the_same() -> None:
    voxels = _noise((18, 20, 22), 3)
    grid = _grid(voxels.shape, (1.0, 1.0, 1.0))
    stored = np.asfortranarray(voxels)[::1]
    reversed_store = np.ascontiguousarray(voxels[::-1, :, ::-1])[::-1, :, ::-1]
    wanted = resample(voxels, grid, (1.7, 0.6, 1.3))[0]
    for view in (stored, reversed_store):
        assert (resample(view, grid, (1.7, 0.6, 1.3))[0] == wanted).all()


def test_memory_beside_input_and_output_is_some_slices() -> None:
    voxels = np.zeros((300, 128, 128), np.int16)
    grid = _grid(voxels.shape, (1.0, 0.7, 0.7))
    for new in [(2.0, 1.0, 1.0), (0.5, 0.7, 0.7), (10.0, 0.7, 0.7)]:
        tracemalloc.start()
        out, _ = resample(voxels, grid, new, (-1000, 1000))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        slices = (peak - out.nbytes) / (4 * 128 * 128)
        assert slices < 100, f"{slices:.0f} slices in float32 at {new}"


def test_what_cannot_be_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in [(0.0, 1.0, 1.0), (1.0, -1.0, 1.0), (1.0, 1.0, math.nan), (1.0, 1.0), (1.0, 1.0, 101.0)]:
        with pytest.raises(UserError, match=r"--spacing .*: mm along z y x, three numbers from 0\.01 to 100"):
            check_spacing(bad)
    check_spacing((2.0, 1.0, 1.0))
    with pytest.raises(
        BadScan, match=r"would have 6000 x 3584 x 3584 voxels .* at 0.1 x 0.1 x 0.1 mm, at most"
    ):
        resampled_grid(_grid((600, 512, 512), (1.0, 0.7, 0.7)), (0.1, 0.1, 0.1))
    monkeypatch.setattr(resampling, "MOST_VOXELS", 10)
    with pytest.raises(BadScan):
        resample(_noise((4, 4, 4)), _grid((4, 4, 4), (1.0, 1.0, 1.0)), (0.5, 1.0, 1.0))
