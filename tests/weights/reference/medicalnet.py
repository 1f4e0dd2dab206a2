"""Writes tests/weights/recorded/medicalnet.npz: what MedicalNet's own data set makes of the intensities of a volume.

    git clone https://github.com/Tencent/MedicalNet; pip install nibabel scipy
    python tests/weights/reference/medicalnet.py MedicalNet

Its code fills voxels that are 0 with noise, so these are left out: they are nan in the file.
"""

import sys
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parents[2]
SIZE = (6, 7, 8)


def main() -> None:
    """Normalise a volume whose background is 0, write it."""
    sys.path[:0] = [sys.argv[1], str(TESTS)]
    from datasets.brains18 import BrainS18Dataset
    from formula_weights import formula_volume

    volume = np.maximum(formula_volume(SIZE) - np.float32(0.3), 0)
    dataset = BrainS18Dataset.__new__(BrainS18Dataset)
    made = dataset.__itensity_normalize_one_volume__(volume)
    out = TESTS / "weights" / "recorded" / "medicalnet.npz"
    np.savez_compressed(out, volume=volume, normalised=np.where(volume == 0, np.nan, made).astype(np.float32))
    print(out, int((volume == 0).sum()), "voxels at 0 of", volume.size)


if __name__ == "__main__":
    main()
