"""Tilted and unevenly spaced slices come out where they lie in the patient."""

import struct

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import body, write_series

from p2w.ct.discover import ScanSource, SearchOptions, find_scans
from p2w.ct.orientation import BadScan
from p2w.ct.scan import read_grid, read_image, read_scan, stored_grid, straightened

pytest.importorskip("pydicom", reason="pip install 'parts2whole[test]' brings pydicom")


def resampled(folder):
    (source,) = find_scans([str(folder)], "", options=SearchOptions(resample=True)).sources
    scan = read_scan(source)
    assert read_grid(source)[0] == scan.grid and scan.voxels.shape == scan.grid.size[::-1]
    assert stored_grid(source).canonical()[0] == scan.grid
    return source, scan


def world(grid, zyx):
    axes = np.array(grid.direction).reshape(3, 3) * grid.spacing
    return np.array(grid.origin) + axes @ np.array(zyx[::-1])


@pytest.mark.parametrize("degrees", [18.5, -10.0])
def test_a_marker_in_tilted_slices_lies_where_it_is(tmp_path, degrees):
    t, hu = np.radians(degrees), body(40, 48, 40)
    iop = (1, 0, 0, 0, np.cos(t), -np.sin(t))
    hu[24:27, 19:22, 17:20] = 1500  # centre z 25, y 20, x 18
    write_series(tmp_path, hu, iop=iop, place=lambda i: (-10, -20, 2.5 * i))
    source, scan = resampled(tmp_path)
    assert source.resampled.startswith("gantry tilt or drift")
    truth = np.array([-10, -20, 62.5]) + 18 * 0.7 * np.array(iop[:3]) + 20 * 0.8 * np.array(iop[3:])
    where = np.argwhere(scan.voxels > 1000)
    assert len(where) > 8
    assert np.linalg.norm(world(scan.grid, where.mean(axis=0)) - truth) < 0.6
    assert scan.voxels.min() == -1000


def test_uneven_steps_become_equal_ones(tmp_path):
    heights = [2.5 * i for i in range(10)] + [22.5 + 5 * (i + 1) for i in range(5)]
    hu = np.broadcast_to(np.array(heights)[:, None, None], (15, 24, 28)).astype(np.int16).copy()
    hu[:, :, :4] = -1000
    hu[:, :, 20:] = 40
    write_series(tmp_path, hu, heights)
    source, scan = resampled(tmp_path)
    assert source.resampled.startswith("uneven steps")
    assert scan.grid.spacing[2] == 2.5 and len(scan.voxels) == 20
    np.testing.assert_allclose(
        scan.voxels[:, 5, 10], [2.5 * z for z in range(20)], atol=1
    )  # linear in height


def test_straight_series_are_not_touched(tmp_path):
    write_series(tmp_path, body())
    source, scan = resampled(tmp_path)
    assert source.resampled == "" and (scan.voxels == body()).all()


@pytest.mark.parametrize("modality", ["MR", "PT"])
def test_other_modalities_are_straightened_too(tmp_path, modality):
    """They are no HU: what no slice covers is as dark as the darkest voxel."""
    t = np.radians(15)
    slices = body(30, 40, 40)
    slices[14:17, 19:22, 17:20] = 1500
    iop = (1, 0, 0, 0, np.cos(t), -np.sin(t))
    tags = {
        "iop": iop,
        "place": lambda i: (-10, -20, 2.5 * i),
        "signed": 1,
        "intercept": 0,
        "Modality": modality,
    }
    write_series(tmp_path / "ct", slices, iop=iop, place=tags["place"])
    write_series(tmp_path / "other", (slices + 1024) // 2, **tags)
    _, scan = resampled(tmp_path / "ct")
    options = SearchOptions(resample=True, modality=modality)
    (source,) = find_scans([str(tmp_path / "other")], "", options=options).sources
    image = read_image(source)
    assert image.grid == scan.grid == read_grid(source)[0]
    assert np.abs(image.values - (scan.voxels + 1024.0) / 2).max() < 1.1


@pytest.mark.parametrize("ending", ["nii", "mha", "nrrd"])
@pytest.mark.parametrize("flipped", [False, True])
def test_image_files_whose_third_axis_leans(tmp_path, ending, flipped):
    """As a converter writes a gantry tilt. A marker lies where the file's own matrix puts it."""
    t, hu = np.radians(14), body(40, 48, 40)
    hu[24:27, 19:22, 17:20] = 1500
    third = np.array([0, np.sin(t), np.cos(t)]) * (-1 if flipped else 1)
    direction = np.stack([[1, 0, 0], [0, 1, 0], third], axis=1)
    path = tmp_path / f"a.{ending}"
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing((0.7, 0.8, 2.5))
    image.SetOrigin((-10, -20, 30))
    if ending != "nii":
        image.SetDirection(direction.ravel().tolist())
    sitk.WriteImage(image, str(path))
    if ending == "nii":  # of which SimpleITK writes no shear: the sform [x,y,z in RAS], and no qform
        affine = np.diag([-1, -1, 1]) @ np.column_stack([direction * [0.7, 0.8, 2.5], [-10, -20, 30]])
        data = bytearray(path.read_bytes())
        struct.pack_into("<2h", data, 252, 0, 1)
        struct.pack_into("<12f", data, 280, *affine.ravel())
        path.write_bytes(bytes(data))
    source = ScanSource("a", path.name, (str(path),))
    with pytest.raises(BadScan, match="sheared axes"):
        read_grid(source)
    source = straightened(source)
    assert source.resampled.startswith("sheared axes: y and z are 14.0 degrees off a right angle")
    scan = read_scan(source)
    assert read_grid(source)[0] == scan.grid and scan.voxels.shape == scan.grid.size[::-1]
    assert scan.grid.spacing == pytest.approx((0.7, 0.8, 2.5 * np.cos(t)), abs=1e-4)
    truth = np.array([-10, -20, 30]) + direction @ [18 * 0.7, 20 * 0.8, 25 * 2.5]
    where = np.argwhere(scan.voxels > 1000)
    assert len(where) > 8 and np.linalg.norm(world(scan.grid, where.mean(axis=0)) - truth) < 0.6


def test_only_the_third_axis_may_lean(tmp_path):
    image = sitk.GetImageFromArray(body(20))
    image.SetDirection((1, 0.3, 0, 0, 0.9539, 0, 0, 0, 1))
    sitk.WriteImage(image, str(tmp_path / "a.mha"))
    source = straightened(ScanSource("a", "a.mha", (str(tmp_path / "a.mha"),)))
    assert not source.positions
    with pytest.raises(BadScan, match="sheared axes: x and y"):
        read_scan(source)
