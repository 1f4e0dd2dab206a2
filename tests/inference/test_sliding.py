"""Sliding windows against a sum over whole volumes in float64; there and back between grids."""

import tracemalloc

import numpy as np
import pytest
import torch

from p2w.inference.sliding import ScaledSlices, Windows, on_scan, slices, weight
from p2w.tasks import crops
from p2w.tasks.crops import CropBox

CASES = [((9, 20, 17), (4, 8, 8)), ((3, 20, 5), (4, 8, 8)), ((4, 8, 8), (4, 8, 8)), ((2, 3, 4), (4, 8, 8))]


def own(place: CropBox) -> np.ndarray:
    """A window's answer, different for every window."""
    rng = np.random.default_rng(abs(hash(tuple(place.first))) % 2**32)
    return rng.random(place.size).astype(np.float32)


def naive(windows: Windows) -> np.ndarray:
    """Volumes of sums and of weights, voxel by voxel."""
    total, weights = np.zeros(windows.extent), np.zeros(windows.extent)
    axes = [weight(size).astype(float) for size in windows.size]
    for z in windows.starts(0):
        for y in windows.starts(1):
            for x in windows.starts(2):
                answer = own(windows.crop_box((z, y, x)))
                for at in np.ndindex(*windows.size):
                    voxel = (z + at[0], y + at[1], x + at[2])
                    if all(0 <= v < n for v, n in zip(voxel, windows.extent, strict=True)):
                        w = axes[0][at[0]] * axes[1][at[1]] * axes[2][at[2]]
                        total[voxel] += w * answer[at]
                        weights[voxel] += w
    return total / weights


@pytest.mark.parametrize(("shape", "size"), CASES)
@pytest.mark.parametrize("overlap", [0, 0.5, 0.7])
def test_slices_are_the_weighted_mean_of_all_windows(shape, size, overlap):
    windows = Windows(shape, size, (1.0, 1.0, 1.0), overlap)
    found = np.stack(list(slices(windows, lambda places: np.stack([own(p) for p in places]), 3)))
    assert found.shape == shape
    np.testing.assert_allclose(found, naive(windows), rtol=2e-5)
    assert len(windows) == np.prod([len(windows.starts(axis)) for axis in range(3)])


def test_every_voxel_is_seen_and_steps_are_even():
    windows = Windows((100, 65, 64), (32, 64, 64), (1.0, 1.0, 1.0), 0.5)
    assert (
        windows.starts(0) == [0, 14, 27, 41, 54, 68]
        and windows.starts(1) == [0, 1]
        and windows.starts(2) == [0]
    )


@pytest.mark.parametrize("step", [(2.0, 1.0, 1.0), (0.5, 1.7, 0.8), (1.0, 1.0, 1.0)])
def test_a_smooth_volume_survives_the_way_to_another_grid_and_back(step):
    shape = (24, 30, 28)
    z, y, x = np.meshgrid(*[np.linspace(0, 1, n) for n in shape], indexing="ij")
    volume = (1000 * (z + 2 * y * x)).astype(np.float32)
    windows = Windows(shape, (8, 16, 16), step, 0.5)
    seen = slices(windows, lambda places: np.stack([place.cut(volume, 0) for place in places]), 4)
    back = np.stack(list(on_scan(seen, windows)))
    assert back.shape == shape
    inside = (slice(3, -3),) * 3
    tolerance = 0.5 if step == (1.0, 1.0, 1.0) else 15
    assert np.abs(back - volume)[inside].max() < tolerance


@pytest.mark.parametrize(("shape", "size"), CASES)
@pytest.mark.parametrize("step", [(1.0, 1.0, 1.0), (1.7, 0.6, 1.2)])
def test_several_classes_are_each_as_one_alone(shape, size, step):
    windows = Windows(shape, size, step, 0.5)

    def predict(places, classes):
        found = np.stack([own(place) for place in places])
        return np.stack([found**k for k in classes], 1) if len(classes) > 1 else found ** classes[0]

    together = np.stack(list(on_scan(slices(windows, lambda p: predict(p, (1, 2, 3)), 3), windows)), 1)
    assert together.shape == (3, *shape)
    for k in (1, 2, 3):
        alone = np.stack(list(on_scan(slices(windows, lambda p, k=k: predict(p, (k,)), 3), windows)))
        assert (together[k - 1] == alone).all()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_slices():
    def peak(depth):
        windows = Windows((depth, 64, 64), (8, 32, 32), (1.0, 1.0, 1.0), 0.5)
        tracemalloc.start()
        for _ in slices(windows, lambda places: np.zeros((len(places), 8, 32, 32), np.float32), 4):
            pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(8)  # what is imported and cached once
    assert peak(400) < 2 * peak(40)


@pytest.mark.parametrize("shape", [(19, 40, 37), (3, 40, 9), (8, 16, 16), (9, 17, 5)])
@pytest.mark.parametrize("overlap", [0, 0.5, 0.8])
def test_windows_are_cut_from_slices_scaled_once(shape, overlap):
    """Of two channels, and where the scan is smaller than a window: bit for bit what is cut window by window."""
    images = [np.random.default_rng(seed).integers(-3000, 3000, shape).astype(np.int16) for seed in (0, 1)]
    cuts = tuple(lambda crop_box, image=image: crops.crop_hu(image, crop_box) for image in images)
    windows = Windows(shape, (8, 16, 16), (1.0, 1.0, 1.0), overlap)

    def scale(values):
        return values.sub_(-1000).div_(2000).clamp_(0, 1)

    scaled = ScaledSlices(cuts, windows, scale, torch.device("cpu"))

    def check(boxes):
        batch = np.stack([[cut(box) for cut in cuts] for box in boxes])
        assert torch.equal(scaled.batch(boxes), scale(torch.from_numpy(batch).float()))
        return np.zeros((len(boxes), *windows.size), np.float32)

    assert len(list(slices(windows, check, 3))) == shape[0]
    assert scaled.slices.shape[1] == windows.size[0]
