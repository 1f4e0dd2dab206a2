"""Read tar shards with NVIDIA DALI, without p2w: `pip install nvidia-dali-cuda120`.

    python examples/load_shards_dali.py shards              prints how many samples each split has, and the first of them

Works on the CPU too. DALI reads the raw members; that of the voxels is a .npy file, of which the first 128 bytes are the
header and the rest is int16 in C order (z, y, x).
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types

HEADER = 128  # bytes of the .npy header


def samples(folder: Path, split: str) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Voxels in [0, 1], float32 [z, y, x], and the metadata of each sample of a split, `train` or `val`."""
    shards = [str(folder / name) for name in (folder / f"{split}.txt").read_text().split()]
    if not shards:
        return

    @pipeline_def(batch_size=1, num_threads=2, device_id=None)
    def pipeline(shape: tuple[int, ...]) -> Any:
        raw, about = fn.readers.webdataset(
            paths=shards, ext=["npy", "json"], name="reader", missing_component_behavior="error"
        )
        voxels = fn.reinterpret(raw[HEADER:], dtype=types.INT16, shape=shape)
        return fn.cast(voxels, dtype=types.FLOAT), about

    pipe = pipeline(_shape(shards[0]))
    pipe.build()
    for _ in range(pipe.epoch_size("reader")):
        voxels, about = (np.asarray(output[0]) for output in pipe.run())
        told = json.loads(about.tobytes())
        low, high = told["window_hu"]
        yield (np.clip(voxels, low, high) - low) / (high - low), told


def _shape(shard: str) -> tuple[int, ...]:
    """Shape (z, y, x) of all samples, from the header of the first, which follows the tar's block of 512 bytes."""
    with open(shard, "rb") as file:
        file.seek(512)
        np.lib.format.read_magic(file)
        return np.lib.format.read_array_header_1_0(file)[0]


def main(folder: Path) -> None:
    """Print the number of samples of each split, and the first of each."""
    for split in ("train", "val"):
        found = list(samples(folder, split))
        first = f": {found[0][1]['key']} {found[0][0].shape}" if found else ""
        print(f"{split}: {len(found)} samples{first}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
