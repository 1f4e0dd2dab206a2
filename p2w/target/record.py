"""What a data set of a target task is made of: its records, its manifest's columns and metadata. No torch.

A record is one int16 array [c,z,y,x]: the channels of the crop and, for segmentation, its mask (0 or 1) as the last.
Shards, manifest and folder are those of pretraining (`p2w.data.shard`, `p2w.data.manifest`), so a set opens with
stock webdataset and pyarrow, and every record is read in place and carries its checksum.
"""

import pyarrow as pa

from p2w.data.manifest import Form

CLASSIFICATION, SEGMENTATION = "classification", "segmentation"
SPLITS = ("train", "val", "test")
WINDOW_HU = (-1000, 1000)

SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # UID/00012: the scan, the sample's number in it
        (
            "split",
            pa.string(),
        ),  # train | val | test; of a set with folds: the split where fold 0 is tested on
        ("fold", pa.int16()),  # in which fold the sample is tested on; -1: the set has no folds
        ("patient", pa.string()),
        ("label", pa.int8()),  # 0 or 1; -1 for segmentation
        ("shard", pa.string()),
        ("offset", pa.int64()),  # byte of the shard at which the record starts
        ("nbytes", pa.int64()),
        ("crc32c", pa.uint32()),
        ("scan_uid", pa.string()),
        ("of", pa.string()),  # what the sample is of: a row of the table of candidates, a nodule, a tile
        (
            "z",
            pa.int32(),
        ),  # the crop's first voxel, in voxels of the canonical (LPS) scan, rounded; may be negative
        ("y", pa.int32()),
        ("x", pa.int32()),
        ("centre_z", pa.float64()),  # world mm (LPS) of the voxel at size // 2
        ("centre_y", pa.float64()),
        ("centre_x", pa.float64()),
        ("spacing_z", pa.float32()),  # mm of the crop's voxels
        ("spacing_y", pa.float32()),
        ("spacing_x", pa.float32()),
        ("foreground", pa.float32()),  # share of the voxels in the mask; 0 for classification
    ]
)
FILE = {"role": str, "file": str, "nbytes": int, "checksum": str}
SOURCE = {"uid": str, "patient": str, "files": [FILE], "samples": int, "left_out": [str]}
META = {
    "task": str,
    "kind": str,
    "channels": int,
    "channel_names": [str],
    "size_zyx": [int],
    "window": [float],
    "classes": [str],
    "axis_order": str,
    "orientation": str,
    "dtype": str,
    "tool": str,
    "settings": {},
    "tables": {},
    "split": {"rule": str, "folds": int, "seed": int, "val_fraction": float, "scans": {}},
    "sources": [SOURCE],
    "bad_scans": [{"where": str, "why": str}],
}
FORM = Form(
    SCHEMA,
    4,
    META,
    "preprocess/prepare_target.py",
    "make the set: python preprocess/prepare_target.py TASK --source FOLDER --out DIR",
)
