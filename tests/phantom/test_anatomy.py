"""Organs told by place: same HU, other places, in every patient; written in nnU-Net's layout."""

import json

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from p2w.errors import UserError
from p2w.phantom.body import LUNGS, Body, Label
from p2w.phantom.chest import PhantomScan, Scanner, _detail, make_scan
from p2w.phantom.image_files import write_luna
from p2w.phantom.organs import Region
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


def test_without_asking_scans_are_what_they_were() -> None:
    plain = make_scan(3, (16, 32, 32))
    assert plain.regions is None
    again = make_scan(3, (16, 32, 32), regions=True)
    assert plain.voxels.tobytes() == again.voxels.tobytes()


@pytest.mark.parametrize("task", ["organs", "anatomy"])
def test_patients_are_written_as_nnunet_reads_them(tmp_path, task: str) -> None:
    names = list(write_targets(tmp_path, [task], 2, 1000, (32, 64, 64)))
    assert len(names) == 2
    root = tmp_path / task.title()
    table = json.loads((root / "dataset.json").read_text())
    assert table["numTraining"] == 2 and table["labels"]["background"] == 0 and table["labels"]["liver"] == 1
    for number in range(2):
        image = sitk.ReadImage(str(root / "imagesTr" / f"organs_{number:04d}_0000.nii.gz"))
        labels = sitk.ReadImage(str(root / "labelsTr" / f"organs_{number:04d}.nii.gz"))
        assert image.GetSize() == labels.GetSize() and image.GetOrigin() == labels.GetOrigin()
        found = set(np.unique(sitk.GetArrayFromImage(labels)).tolist())
        assert found <= set(table["labels"].values()) and len(found) > 8


def traits(scan: PhantomScan) -> np.ndarray:
    """(2, 3): mean HU of fat, spine and lung in the lower and the upper half of a scan."""
    half = scan.voxels.shape[0] // 2
    parts = slice(2, half - 3), slice(half + 3, -2)
    tissues = Label.FAT, Label.SPINE, Label.LUNG
    return np.array(
        [[scan.voxels[part][scan.labels[part] == one].mean() for one in tissues] for part in parts]
    )


def test_varied_patients_differ_more_and_in_traits_that_show_all_over_the_scan() -> None:
    """So that whose chest a part is of can be learned: one half of a scan tells much of the other."""
    plain, varied = (
        np.stack([traits(make_scan(seed, (24, 40, 40), varied=how)) for seed in range(5)])
        for how in (False, True)
    )
    assert (varied.mean(1).std(0) > 2 * plain.mean(1).std(0)).all()
    assert all(np.corrcoef(varied[:, 0, k], varied[:, 1, k])[0, 1] > 0.8 for k in range(3))


def test_phases_of_contrast_agent_kernels_and_doses_are_drawn() -> None:
    rngs = [np.random.default_rng(seed) for seed in range(60)]
    bodies = [Body.varied(rng) for rng in rngs]
    assert {body.contrast > body.aorta_contrast for body in bodies if body.contrast} == {True, False}
    assert any(body.contrast == body.aorta_contrast == 0 for body in bodies)
    assert sum(body.consolidation is not None for body in bodies) and sum(
        body.fibrosis > 0 for body in bodies
    )
    scanners = [Scanner.varied(rng) for rng in rngs]
    assert {int(np.sign(one.sharpen)) for one in scanners} == {-1, 0, 1}
    noise = sorted(one.noise_hu for one in scanners)
    assert noise[-1] > 5 * noise[0]


def test_a_sharp_kernel_adds_what_a_voxel_has_more_than_its_neighbours() -> None:
    slices = np.zeros((2, 5, 6), np.float32)
    slices[1, 2, 3], slices[0, 0, 0] = 8.0, 8.0  # the second at the border, where nothing is added
    found = _detail(slices)
    assert found[1, 2, 3] == 8 and found[1, 1, 3] == found[1, 2, 4] == -2 and found[0, 0, 0] == 0
    assert np.abs(found[0]).sum() == 0 and found.sum() == 0


def test_a_folder_is_of_varied_patients_or_not(tmp_path) -> None:
    uids = write_luna(tmp_path / "V", 1, 0, shape=(16, 32, 32), varied=True)
    assert uids != write_luna(tmp_path / "P", 1, 0, shape=(16, 32, 32))
    assert uids == write_luna(tmp_path / "V", 1, 0, shape=(16, 32, 32), varied=True)
    for folder, varied in (("V", False), ("P", True)):
        with pytest.raises(UserError, match="holds another phantom"):
            write_luna(tmp_path / folder, 1, 0, shape=(16, 32, 32), varied=varied)
