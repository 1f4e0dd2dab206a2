"""Read shards with stock webdataset, without p2w.

    python examples/load_shards_webdataset.py shards        prints how many samples each split has, and the first of them

A shard is named after its scan, and train.txt and val.txt list the shards of the splits: pass webdataset that list.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds


def samples(folder: Path, split: str) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Voxels in [0, 1], float32 [z, y, x], and the metadata of each sample of a split, `train` or `val`."""
    names = [str(folder / name) for name in (folder / f"{split}.txt").read_text().split()]
    # An explicit seed and splitters where several processes read: webdataset's defaults differ between versions.
    data = wds.WebDataset(names, shardshuffle=False, nodesplitter=wds.split_by_node, empty_check=False)
    for voxels, about in data.decode().to_tuple("npy", "json"):
        low, high = about["window_hu"]
        yield np.float32((np.clip(voxels, low, high) - low) / (high - low)), about


def main(folder: Path) -> None:
    """Print the number of samples of each split, and the first of each."""
    for split in ("train", "val"):
        found = list(samples(folder, split))
        first = f": {found[0][1]['key']} {found[0][0].shape}" if found else ""
        print(f"{split}: {len(found)} samples{first}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
