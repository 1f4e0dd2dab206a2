"""MONAI's `LoadImage` reads the masks that `p2w predict` writes where they were written, with each of its readers.

The readers need nibabel, itk and pynrrd; those that are not installed are skipped.
"""

import importlib.util
import math

import numpy as np
import pytest
import SimpleITK as sitk

from p2w.ct.orientation import Grid
from p2w.inference.mask_files import write_mask

READERS = {"NibabelReader": ("nibabel", (".nii.gz", ".nii")), "ITKReader": ("itk", (".nii.gz", ".mha", ".nrrd")),
           "NrrdReader": ("nrrd", (".nrrd",))}  # fmt: skip
CASES = [(reader, ending) for reader, (_, endings) in READERS.items() for ending in endings]
TURN = math.radians(20)
DIRECTIONS = {
    "lps": (1, 0, 0, 0, 1, 0, 0, 0, 1),
    "ras": (-1, 0, 0, 0, -1, 0, 0, 0, 1),
    "sagittal": (0, 0, 1, 1, 0, 0, 0, -1, 0),
    "oblique": (math.cos(TURN), -math.sin(TURN), 0, math.sin(TURN), math.cos(TURN), 0, 0, 0, 1),
}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("reader", "ending"), CASES)
def test_every_reader_finds_every_voxel_at_its_place(reader, ending, direction, tmp_path):
    """Value and world position of marked voxels, by MONAI's affine (RAS) against SimpleITK's own (LPS)."""
    transforms = pytest.importorskip("monai.transforms", reason="pip install 'parts2whole[examples]'")
    if importlib.util.find_spec(READERS[reader][0]) is None:
        pytest.skip(f"needs {READERS[reader][0]}")
    size, spacing, origin = (7, 6, 5), (0.7, 0.8, 1.5), (-30.5, 12.25, -100.0)  # x, y, z
    mask = np.random.default_rng(0).integers(0, 9, size[::-1]).astype(np.uint8)
    path = tmp_path / f"mask{ending}"
    write_mask(path, mask, Grid(size, spacing, origin, DIRECTIONS[direction]))
    image = transforms.LoadImage(reader=reader, image_only=True)(path)
    assert tuple(image.shape) == size
    np.testing.assert_array_equal(np.asarray(image), mask.transpose(2, 1, 0))
    written = sitk.ReadImage(path)
    for index in ((0, 0, 0), (6, 0, 0), (0, 5, 0), (0, 0, 4), (6, 5, 4)):
        x, y, z = written.TransformIndexToPhysicalPoint(index)
        found = image.affine.numpy() @ (*index, 1)
        np.testing.assert_allclose(found[:3], (-x, -y, z), atol=1e-4)
