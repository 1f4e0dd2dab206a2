"""Read tar shards with Hugging Face's datasets, without p2w: `pip install datasets`.

    python examples/load_shards_datasets.py shards          prints how many samples each split has, and the first of them

The folder's README.md names the shards of the splits `train` and `validation`. Streaming reads them where they lie; without
`streaming=True`, datasets first copies all samples into its cache. A set that was cut with --format arrow cannot be read so:
datasets has no type for Arrow's tensors.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import load_dataset


def samples(folder: Path, split: str) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Voxels in [0, 1], float32 [z, y, x], and the metadata of each sample of a split, `train` or `validation`."""
    for sample in load_dataset(str(folder), split=split, streaming=True):
        about = sample["json"]
        low, high = about["window_hu"]
        voxels = np.asarray(sample["npy"], np.float32)
        yield (np.clip(voxels, low, high) - low) / (high - low), about


def main(folder: Path) -> None:
    """Print the number of samples of each split, and the first of each."""
    for split in ("train", "validation"):
        found = list(samples(folder, split))
        first = f": {found[0][1]['key']} {found[0][0].shape}" if found else ""
        print(f"{split}: {len(found)} samples{first}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
