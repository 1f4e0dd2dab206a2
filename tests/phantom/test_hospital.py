"""A phantom of what a hospital has: DICOM series and masks, of which `p2w prepare general` makes samples."""

import numpy as np

from p2w.ct.scan import read_scan
from p2w.phantom.target_tasks import TASKS, write_targets
from p2w.tasks.custom import Custom
from p2w.tasks.source_files import read_mask


def test_each_series_has_its_mask(tmp_path):
    root = tmp_path / "T"
    assert list(write_targets(root, ("dicom",), 2, 7, (32, 64, 64))) == ["dicom 0", "dicom 1"]
    task = Custom(images="dicom", masks="*_liver.nii.gz")
    found = task.find(str(root / TASKS["dicom"].folder), "")
    assert found.bad == [] and [case.name for case in found.cases] == sorted(
        case.name for case in found.cases
    )
    assert len({case.patient for case in found.cases}) == 2
    for case in found.cases:
        scan = read_scan(case.source("image"))
        mask, _ = read_mask(case.source("mask"), scan.grid, scan.voxels.shape, (), resample=False)
        liver = scan.voxels[mask > 0]
        assert 500 < len(liver) < mask.size / 5 and 0 < np.median(liver) < 150


def test_another_seed_gives_other_patients(tmp_path):
    """Scans to pretrain on and a study to fine-tune on: the leak check would refuse one patient in both."""
    uids = set()
    for seed in (7, 8):
        list(write_targets(tmp_path / str(seed), ("dicom",), 1, seed, (32, 64, 64)))
        found = Custom(images="dicom", masks="*_liver.nii.gz").find(str(tmp_path / str(seed) / "DICOM"), "")
        uids |= {case.uid for case in found.cases}
    assert len(uids) == 2
