"""Tilted and unevenly spaced slices come out where they lie in the patient."""

import numpy as np
import pytest
from dicom_files import body, write_series

from p2w.ct.discover import SearchOptions, find_scans
from p2w.ct.scan import read_grid, read_scan, stored_grid

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
