"""Real scans, voxel by voxel and corner by corner, against readers that share no code with ours."""

import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from p2w.ct.discover import find_scans
from p2w.ct.scan import read_grid, read_scan
from p2w.tasks import crops

REAL = os.environ.get("P2W_REAL_DATA")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not REAL, reason="P2W_REAL_DATA names no folder of real scans"),
]


def check(source, hu, image):
    """HU [z,y,x] of another reader in LPS order, and an image of SimpleITK with its geometry in LPS order."""
    scan = read_scan(source)
    np.testing.assert_array_equal(scan.voxels, hu)
    assert scan.grid.size == image.GetSize() and read_grid(source)[0] == scan.grid
    for x, y, z in np.ndindex(2, 2, 2):
        corner = [int(n * (size - 1)) for n, size in zip((x, y, z), image.GetSize(), strict=True)]
        ours = crops.to_world(scan.grid, np.array(corner[::-1]))[::-1]
        np.testing.assert_allclose(ours, image.TransformIndexToPhysicalPoint(corner), atol=0.01)


def test_dicom():
    pydicom = pytest.importorskip("pydicom")
    found = find_scans([str(Path(REAL) / "dicom")], "")
    assert found.sources and not found.bad
    for source in found.sources:
        slices = [pydicom.dcmread(path) for path in source.files]
        slices.sort(key=lambda one: float(one.ImagePositionPatient[2]))
        hu = np.stack(
            [one.pixel_array * float(one.RescaleSlope) + float(one.RescaleIntercept) for one in slices]
        )
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames([one.filename for one in slices])
        check(source, hu, sitk.DICOMOrient(reader.Execute(), "LPS"))
        assert source.info.modality == "CT" and source.info.patient == found.sources[0].info.patient


@pytest.mark.parametrize("folder", ["nifti", "chest", "luna16/subset0"])
def test_files(folder):
    found = find_scans([str(Path(REAL) / folder)], "")
    assert found.sources and not found.bad
    for source in found.sources[:4]:
        image = sitk.DICOMOrient(sitk.ReadImage(source.files[0]), "LPS")
        check(source, np.rint(sitk.GetArrayFromImage(image)).clip(-32768, 32767), image)
