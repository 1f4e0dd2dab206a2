"""Read Arrow shards with stock pyarrow, without p2w.

    p2w shard --scans FOLDER --format arrow --out shards
    python examples/load_shards_pyarrow.py shards           prints how many samples each split has, and the first of them

The file is mapped into memory: voxels are views of it, and only what is looked at is read.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa


def samples(folder: Path, split: str) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Voxels in [0, 1], float32 [z, y, x], and the metadata of each sample of a split, `train` or `val`."""
    for name in (folder / f"{split}.txt").read_text().split():
        file = pa.ipc.open_file(pa.memory_map(str(folder / name)))
        note = json.loads(file.schema.metadata[b"p2w"])
        low, high = note["window_hu"]
        for number in range(file.num_record_batches):
            batch = file.get_batch(number)
            voxels = batch.column("voxels").to_numpy_ndarray()[0]
            about = {key: batch.column(key)[0].as_py() for key in batch.schema.names if key != "voxels"}
            yield np.float32((np.clip(voxels, low, high) - low) / (high - low)), about | note


def main(folder: Path) -> None:
    """Print the number of samples of each split, and the first of each."""
    for split in ("train", "val"):
        found = list(samples(folder, split))
        first = f": {found[0][1]['key']} {found[0][0].shape}" if found else ""
        print(f"{split}: {len(found)} samples{first}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
