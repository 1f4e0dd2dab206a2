"""Emboli of the ecc phantom: an image of the coarsest kind that is made still shows them."""

import numpy as np
import pytest

from p2w.phantom import ct_targets
from p2w.phantom.chest import make_scan

pytestmark = pytest.mark.slow  # seconds of computing


def test_an_embolus_darkens_more_than_single_voxels() -> None:
    scan = make_scan(3, (64, 128, 128), (3.5156, 1.4531, 1.7578), contrast=250.0)
    hu, marks = ct_targets._candidates(scan, np.random.default_rng(3))
    step, origin = np.array(scan.spacing_mm), np.array(scan.origin_mm)
    places = [np.rint((mm - origin) / step).astype(int) for mm, label in marks if label]
    assert len(places) == ct_targets.EMBOLI
    for place in places:
        box = tuple(slice(max(0, at - 3), at + 4) for at in place)
        assert np.count_nonzero(scan.voxels[box] - hu[box].astype(int) > 80) >= 8  # 2 x 2 x 2
