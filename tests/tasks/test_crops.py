"""Places and crops against SimpleITK, on grids that are flipped, permuted and oblique."""

import numpy as np
import pytest
import SimpleITK as sitk

from p2w.ct import orientation
from p2w.ct.discover import ScanSource
from p2w.ct.scan import read_image
from p2w.tasks import crops, source_files
from p2w.tasks.crops import CropBox

TURNS = {
    "plain": np.eye(3),
    "flipped": np.diag([-1.0, -1.0, 1.0]),
    "permuted": np.array([[0, 0, 1.0], [1, 0, 0], [0, -1, 0]]),
    "oblique": np.array([[0.98, -0.199, 0], [0.199, 0.98, 0], [0, 0, 1.0]]),
}


def write(path, values, turn, spacing=(0.8, 0.9, 2.5)):
    image = sitk.GetImageFromArray(values)
    image.SetSpacing(spacing)
    image.SetOrigin((-30.0, 12.0, 100.0))
    image.SetDirection(np.linalg.qr(turn)[0].ravel() if turn is TURNS["oblique"] else turn.ravel())
    sitk.WriteImage(image, str(path))
    return image


@pytest.mark.parametrize("turn", TURNS)
def test_a_world_place_is_the_voxel_that_simpleitk_finds(tmp_path, turn):
    values = np.arange(11 * 13 * 17, dtype=np.int16).reshape(11, 13, 17)
    image = write(tmp_path / "a.nii.gz", values, TURNS[turn])
    image = sitk.ReadImage(str(tmp_path / "a.nii.gz"))
    read = read_image(ScanSource("a", "a", (str(tmp_path / "a.nii.gz"),)))
    for index in ((3, 4, 5), (16, 0, 10), (0, 12, 0)):
        world = np.array(image.TransformIndexToPhysicalPoint(index))
        voxel = crops.to_voxel(read.grid, world[::-1])
        at = tuple(np.rint(voxel).astype(int))
        assert np.allclose(voxel, at, atol=1e-3) and read.values[at] == image[index]
        assert np.allclose(crops.to_world(read.grid, voxel), world[::-1], atol=1e-3)
        place = CropBox.around(voxel, (4, 6, 6), read.grid, None)
        assert place.cut(read.values, -1)[2, 3, 3] == image[index]


def test_resampling_is_linear_and_a_ramp_stays_a_ramp():
    z, y, x = np.meshgrid(np.arange(40.0), np.arange(50.0), np.arange(60.0), indexing="ij")
    ramp = 3 * z - 2 * y + x
    for step in (np.array([0.4, 0.7, 1.0]), np.array([1.5625, 2.0, 3.3])):
        place = CropBox(np.array([5.3, 4.1, 6.7]), step, (8, 9, 10))
        at = [place.first[a] + np.arange(place.size[a]) * step[a] for a in range(3)]
        expected = 3 * at[0][:, None, None] - 2 * at[1][None, :, None] + at[2][None, None, :]
        assert np.allclose(place.cut(ramp, 0), expected, atol=1e-3)


def test_beyond_the_image_is_outside():
    image = np.full((6, 6, 6), 7, np.int16)
    whole = CropBox(np.array([-2.0, 0, 4]), np.ones(3), (4, 4, 4)).cut(image, -1000)
    assert (whole[:2] == -1000).all() and (whole[2:, :, :2] == 7).all() and (whole[:, :, 2:] == -1000).all()
    fine = CropBox(np.array([-2.0, 0, 0]), np.full(3, 0.5), (8, 8, 8)).cut(image, -1000)
    assert (fine[:3] == -1000).all() and (fine[4:] == 7).all()
    assert (CropBox(np.array([50.0, 0, 0]), np.full(3, 0.5), (4, 4, 4)).cut(image, -1000) == -1000).all()


def test_tiles_cover_the_box_once():
    seen = np.zeros((40, 60, 50), int)
    for centre in crops.tile_centres((5, 7, 9), (29, 41, 33), (8, 16, 16), np.ones(3), 1.0):
        first = np.rint(centre).astype(int) - np.array([4, 8, 8])
        seen[tuple(slice(f, f + n) for f, n in zip(first, (8, 16, 16), strict=True))] += 1
    assert (seen[5:29, 7:41, 9:33] == 1).all() and seen.max() == 1


def test_a_mask_elsewhere_is_refused_or_resampled_as_simpleitk_does(tmp_path):
    rng = np.random.default_rng(0)
    image = write(
        tmp_path / "image.nii.gz", rng.integers(0, 9, (12, 14, 16)).astype(np.int16), TURNS["plain"]
    )
    mask = write(
        tmp_path / "mask.nii.gz",
        (rng.random((20, 22, 18)) < 0.4).astype(np.uint8),
        TURNS["flipped"],
        (1, 1, 2),
    )
    mask.SetOrigin((-14.0, 28.0, 96.0))
    sitk.WriteImage(mask, str(tmp_path / "mask.nii.gz"))
    read = read_image(ScanSource("i", "i", (str(tmp_path / "image.nii.gz"),)))
    source = ScanSource("m", "mask.nii.gz", (str(tmp_path / "mask.nii.gz"),))
    with pytest.raises(orientation.BadScan, match=r"18 x 22 x 20 voxels .* --resample-masks"):
        source_files.read_mask(source, read.grid, read.values.shape, (), False)
    laid, _ = source_files.read_mask(source, read.grid, read.values.shape, (), True)
    expected = sitk.GetArrayFromImage(
        sitk.Resample(mask, image, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    )
    assert (laid != expected).mean() < 0.01 and expected.any()  # ties at half a voxel


def test_a_coarse_mask_reaches_to_the_edges_of_its_voxels():
    axes = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    fine = orientation.Grid((20, 20, 20), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), axes)
    coarse = orientation.Grid((3, 4, 4), (5.0, 5.0, 5.0), (2.0, 2.0, 2.0), axes)  # ends at x = 14.5
    values = np.arange(1, 49, dtype=np.int16).reshape(4, 4, 3)
    laid = source_files.on_grid(values, coarse, ScanSource("m", "m", ()), fine, (20, 20, 20), True)
    np.testing.assert_array_equal(laid[:, :, :15], values.repeat(5, 0).repeat(5, 1).repeat(5, 2))
    assert not laid[:, :, 15:].any()


def test_an_image_in_place_of_a_mask_is_refused(tmp_path):
    values = np.random.default_rng(0).integers(-1000, 400, (6, 7, 8)).astype(np.int16)
    write(tmp_path / "a.nii.gz", values, TURNS["plain"])
    source = ScanSource("a", "a.nii.gz", (str(tmp_path / "a.nii.gz"),))
    read = read_image(source)
    with pytest.raises(orientation.BadScan, match=r"mask a.nii.gz: holds values from -\d+: is it an image"):
        source_files.read_mask(source, read.grid, values.shape, (), False)
    mask, _ = source_files.read_mask(source, read.grid, values.shape, (-5, 7), False)
    np.testing.assert_array_equal(mask, np.isin(read.values, (-5, 7)))
