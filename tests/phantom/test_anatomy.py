"""Organs told by place: same HU, other places, in every patient; written in nnU-Net's layout."""

import json

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from p2w.phantom.anatomy import Region
from p2w.phantom.body import LUNGS, Label
from p2w.phantom.chest import PhantomScan, make_scan
from p2w.phantom.target_tasks import write_targets

pytestmark = pytest.mark.slow  # seconds of computing

SOFT = (Region.LIVER, Region.SPLEEN, Region.HEART, Region.AORTA)
LOBES = [region for region in Region if region.name.endswith("LOBE")]
SPINE = [region for region in Region if region.name.startswith("VERTEBRAE")]


@pytest.fixture(scope="module")
def scans() -> list[PhantomScan]:
    return [make_scan(seed, (64, 128, 128), equal_hu=48.0, regions=True) for seed in (3, 4)]


def middle(scan: PhantomScan, region: Region) -> np.ndarray:
    return np.argwhere(scan.regions == region).mean(0)


def test_organs_have_one_hu_inside(scans: list[PhantomScan]) -> None:
    for scan in scans:
        inside = [ndimage.binary_erosion(scan.regions == region, iterations=1) for region in SOFT]
        means = [float(scan.voxels[mask].mean()) for mask in inside if mask.sum() > 200]
        assert len(means) == len(SOFT) and np.ptp(means) < 4 and abs(np.mean(means) - 48) < 4


def test_regions_follow_from_labels_and_places(scans: list[PhantomScan]) -> None:
    for scan in scans:
        assert np.array_equal(np.isin(scan.regions, LOBES), np.isin(scan.labels, LUNGS))
        assert np.array_equal(np.isin(scan.regions, SPINE), scan.labels == Label.SPINE)
        assert np.array_equal(scan.regions == Region.AORTA, scan.labels == Label.AORTA)
        assert all((scan.regions == region).any() for region in Region)
        z, _, x = middle(scan, Region.RIGHT_UPPER_LOBE)
        assert z > middle(scan, Region.RIGHT_LOWER_LOBE)[0] and x < middle(scan, Region.LEFT_UPPER_LOBE)[2]
        assert middle(scan, Region.LIVER)[2] < middle(scan, Region.SPLEEN)[2]
        heights = [middle(scan, region)[0] for region in SPINE]
        assert heights == sorted(heights, reverse=True)


def test_without_asking_scans_are_what_they_were(scans: list[PhantomScan]) -> None:
    plain = make_scan(3, (32, 64, 64))
    assert plain.regions is None
    again = make_scan(3, (32, 64, 64), regions=True)
    assert plain.voxels.tobytes() == again.voxels.tobytes()


def test_patients_are_written_as_nnunet_reads_them(tmp_path) -> None:
    names = list(write_targets(tmp_path, ["organs"], 2, 1000, (32, 64, 64)))
    assert len(names) == 2
    root = tmp_path / "Organs"
    table = json.loads((root / "dataset.json").read_text())
    assert table["numTraining"] == 2 and table["labels"]["background"] == 0 and table["labels"]["liver"] == 1
    for number in range(2):
        image = sitk.ReadImage(str(root / "imagesTr" / f"organs_{number:04d}_0000.nii.gz"))
        labels = sitk.ReadImage(str(root / "labelsTr" / f"organs_{number:04d}.nii.gz"))
        assert image.GetSize() == labels.GetSize() and image.GetOrigin() == labels.GetOrigin()
        found = set(np.unique(sitk.GetArrayFromImage(labels)).tolist())
        assert found <= set(table["labels"].values()) and len(found) > 8
