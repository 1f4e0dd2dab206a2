"""README.md of a shard folder: a dataset card, by which `datasets.load_dataset(FOLDER)` finds samples and splits.

Its front matter lists the shards of each split. Without it, Hugging Face's `datasets` takes train.txt for the data.
"""

import json
import os
from typing import Any

from p2w.shards.manifest_schema import compressed, stored_shape, stores_scans

SPLITS = {"train": "train", "val": "validation", "test": "test"}  # list of shards -> split of `datasets`
MARK = "<!-- written by p2w; delete this line to keep your own text -->"

MEMBERS = {
    "tar": """Each shard is a WebDataset tar. A sample has two members of one stem, the `key`:

- `.npy`: the voxels, int16 {shape}, axes {axes}
- `.json`: what and where it is{note}

```python
import webdataset as wds  # shards are named after scans: pass the list, not a brace range

names = open("train.txt").read().split()
samples = wds.WebDataset(names, shardshuffle=False).decode().to_tuple("npy", "json")
```

With Hugging Face: `load_dataset(FOLDER)` gives the samples in the splits above.
""",
    "arrow": """Each shard is an Arrow IPC file with one record batch a sample: `voxels` (a tensor of
int16 {shape}, axes {axes}) and the columns that say what and where it is. The key `p2w` of the schema's metadata says how to
read the voxels.

```python
import pyarrow as pa

file = pa.ipc.open_file(pa.memory_map(open("train.txt").read().split()[0]))
voxels = file.get_batch(0).column("voxels").to_numpy_ndarray()[0]
```

Hugging Face's `datasets` has no type for these tensors: for it, cut the set with `--format tar`.
""",
}


CHUNKS = """
A shard is one scan, and a sample of it is a chunk: `z`, `y`, `x` are its first voxel in the scan, and `real_z`, `real_y`,
`real_x` how many of its voxels are the scan's own; what lies behind them is air. In the manifest, `chunk` is the size of a
chunk, and `shape` that of the sub-scans that p2w cuts from the scans at random places.
"""


def dataset_card(meta: dict[str, Any], lists: dict[str, list[str]]) -> bytes:
    """The card of a set with this metadata; `lists` are the text files beside the manifest, and the shards in them."""
    stems = {name.removesuffix(".txt"): shards for name, shards in lists.items()}
    splits = {split: stems[stem] for stem, split in SPLITS.items() if stems.get(stem)}
    front = ["configs:", "- config_name: default", "  data_files:"]
    for split, shards in splits.items():
        front += [f"  - split: {split}", "    path:"]
        # JSON strings are YAML strings. `datasets` takes a path for a pattern, so what would be one is escaped.
        front += [f"    - {json.dumps(_literal(shard))}" for shard in shards]
    whole_scans = stores_scans(meta)
    axes = "z, y, x" if len(meta["shape"]) == 3 else "channel, z, y, x"
    note = ", and how its voxels are to be read: window, axes, orientation" * ("sample_version" in meta)
    members = MEMBERS[meta["format"]].format(
        shape=" x ".join(map(str, stored_shape(meta))), axes=axes, note=note
    )
    if compressed(meta):
        members += "\nThe buffers of a batch are packed by zstd, which `pyarrow` unpacks by itself.\n"
    counts = "\n".join(f"- `{split}`: {len(shards):,} shards" for split, shards in splits.items())
    what = "Whole scans" if whole_scans else os.path.basename(str(meta.get("task", "Sub-scans")))
    text = f"""# {what} of a p2w data set

{MARK}

{counts}

Values are int16 HU, or what the metadata says, in LPS orientation, clipped to the window. `manifest.parquet` says where each
sample lies, and carries its checksum and all that is known of how it was made. `train.txt`, `val.txt`, …: the shards of each
split.
{CHUNKS if whole_scans else ""}
{members}"""
    return ("---\n" + "\n".join(front if splits else ["configs: []"]) + "\n---\n" + text).encode()


def _literal(name: str) -> str:
    """A file name as a glob pattern that matches it alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def may_write(path: str) -> bool:
    """Whether a README.md may be written at `path`: there is none yet, or it is not the user's own."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return MARK in file.read()
    except FileNotFoundError:
        return True
