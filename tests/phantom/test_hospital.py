"""A phantom of what a hospital has: DICOM series and masks, of which `p2w prepare general` makes samples."""

from pathlib import Path

import numpy as np
import pytest

from p2w.ct.scan import read_scan
from p2w.phantom.target_tasks import TASKS, write_targets
from p2w.tasks.custom import Custom
from p2w.tasks.source_files import read_mask

SHAPE = (32, 64, 64)


@pytest.fixture(scope="module")
def hospital(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hospital") / "T"
    assert list(write_targets(root, ("dicom",), 2, 7, SHAPE)) == ["dicom 0", "dicom 1"]
    return root / TASKS["dicom"].folder


def cases_of(folder: Path):
    return Custom(images="dicom", masks="*_liver.nii.gz").find(str(folder), "")


def test_each_series_has_its_mask(hospital):
    found = cases_of(hospital)
    assert found.bad == [] and [case.name for case in found.cases] == sorted(
        case.name for case in found.cases
    )
    assert len({case.patient for case in found.cases}) == 2
    for case in found.cases:
        scan = read_scan(case.source("image"))
        mask, _ = read_mask(case.source("mask"), scan.grid, scan.voxels.shape, (), resample=False)
        liver = scan.voxels[mask > 0]
        assert 500 < len(liver) < mask.size / 5 and 0 < np.median(liver) < 150


def test_another_seed_gives_other_patients(hospital, tmp_path):
    """Scans to pretrain on and a study to fine-tune on: the leak check would refuse one patient in both."""
    list(write_targets(tmp_path / "8", ("dicom",), 1, 8, SHAPE))
    uids = [case.uid for folder in (hospital, tmp_path / "8" / "DICOM") for case in cases_of(folder).cases]
    assert len(uids) == len(set(uids)) == 3
