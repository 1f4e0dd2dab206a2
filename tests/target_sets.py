"""Small sets of target tasks with a known answer, written with the package's own writers."""

from pathlib import Path

import numpy as np

from p2w.shards.manifest import manifest_bytes
from p2w.shards.manifest_schema import MANIFEST_NAME, MANIFEST_VERSION
from p2w.shards.writer import open_shard
from p2w.tasks.task import SAMPLE_COLUMNS, SAMPLE_KINDS, SAMPLE_SCHEMA, TARGET_COLUMNS, TARGET_SCHEMA

SIZE = (8, 16, 16)


def ball(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Noise about -800 HU with a ball of 100 HU somewhere; its mask."""
    z, y, x = np.ogrid[: SIZE[0], : SIZE[1], : SIZE[2]]
    centre = [rng.uniform(0.3, 0.7) * edge for edge in SIZE]
    mask = (z - centre[0]) ** 2 * 4 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2 < rng.uniform(3, 6) ** 2
    voxels = rng.normal(-800, 40, SIZE)
    voxels[mask] += 900
    return voxels.astype(np.int16), mask


CLASSES = {
    "multi-class segmentation": ["background", "air", "ball"],
    "multi-label segmentation": ["ball", "half"],
    "multi-class classification": ["faint", "bright"],
    "multi-label classification": ["bright", "odd"],
    "regression": ["brightness"],
}


def record(kind: str, rng: np.random.Generator, label: int) -> np.ndarray:
    """int16 [c,z,y,x]; of class 0 the ball is faint."""
    voxels, mask = ball(rng)
    if kind == "multi-class segmentation":
        left = np.arange(SIZE[2]) < SIZE[2] // 2
        return np.stack([voxels, np.where(mask, 2, np.broadcast_to(left, SIZE)).astype(np.int16)])
    if kind == "multi-label segmentation":
        left = np.broadcast_to(np.arange(SIZE[2]) < SIZE[2] // 2, SIZE)
        return np.stack([voxels, (mask + 2 * (mask & left)).astype(np.int16)])
    if kind == "segmentation":
        return np.stack([voxels, mask.astype(np.int16)])
    if not label:
        voxels[mask] -= 850
    return voxels[None]


def targets_of(kind: str, voxels: np.ndarray, label: int, sample: int) -> list[float | None]:
    """What the column of that name holds."""
    mask = voxels[-1]
    return {
        "multi-class segmentation": [float((mask == k).mean()) for k in (1, 2)],
        "multi-label segmentation": [float((mask >> k & 1).mean()) for k in (0, 1)],
        "multi-label classification": [float(label), float(sample % 2) if sample else None],
        "regression": [100.0 + 50 * label],
    }[kind]


def write_target_set(
    folder: Path, kind: str = "segmentation", counts: tuple[int, int, int] = (8, 4, 4), each: int = 3,
    folds: int = 0, task: str = "toy", spacing_mm: tuple | None = None, uid: str = "scan",
) -> Path:  # fmt: skip
    """`counts` patients to train, validate and test, one scan each with `each` samples."""
    folder.mkdir(parents=True)
    splits = [
        name for name, count in zip(("train", "val", "test"), counts, strict=True) for _ in range(count)
    ]
    rows, shards, sources, scans = [], [], [], {}
    masks, targets = kind.endswith("segmentation"), SAMPLE_KINDS.get(kind) and SAMPLE_KINDS[kind].targets
    columns = TARGET_COLUMNS if targets else SAMPLE_COLUMNS
    for number, split in enumerate(splits):
        rng = np.random.default_rng(number)
        name = f"{uid}{number:03d}"
        shard = open_shard(str(folder / f"{name}.tar"), (1 + masks, *SIZE), columns, {})
        for sample in range(each):
            label = (number + sample) % 2
            voxels = record(kind, rng, label)
            row = {
                "key": f"{name}/{sample:05d}", "scan_uid": name, "patient": f"patient{number}", "of": "toy",
                "label": -1 if masks or targets else label, "foreground": float(voxels[-1].mean()) if masks else 0.0,
            }  # fmt: skip
            if targets:
                row["targets"] = targets_of(kind, voxels, label, sample)
            spacing = spacing_mm or (1.0, 1.0, 1.0)
            for axis, mm in zip("zyx", spacing, strict=True):
                row |= {axis: sample, f"centre_{axis}": 0.0, f"spacing_{axis}": float(np.float32(mm))}
            rows.append(shard.add(row, np.ascontiguousarray(voxels, "<i2")))
            rows[-1] |= {"split": split, "fold": number % folds if folds else -1, "shard": f"{name}.tar"}
        done = shard.close()
        shards.append({"name": f"{name}.tar", "nbytes": done.nbytes, "crc32c": done.crc32c})
        file = {"role": "image", "file": f"{name}.nii", "nbytes": 1, "checksum": "00000000"}
        sources.append(
            {"uid": name, "patient": f"patient{number}", "files": [file], "samples": each, "left_out": []}
        )
        scans.setdefault(str(number % folds) if folds else split, []).append(name)
    meta = {
        "schema": MANIFEST_VERSION, "tool": "test", "task": task, "kind": kind, "format": "tar", "dtype": "int16",
        "shape": [1 + masks, *SIZE], "channels": 1, "channel_names": ["ct"], "size_zyx": list(SIZE),
        "spacing_mm": [[mm, mm] for mm in spacing], "window": [-1000, 1000], "classes": CLASSES.get(kind, ["ball"]),
        "axis_order": "czyx", "orientation": "LPS", "settings": {"spacing_mm": spacing_mm}, "tables": {},
        "split": {"rule": "test", "seed": 0, "folds": folds, "val_fraction": 0.25, "samples": {}, "scans": scans},
        "sources": sources, "shards": shards, "bad_scans": [],
    }  # fmt: skip
    (folder / MANIFEST_NAME).write_bytes(
        manifest_bytes(rows, meta, TARGET_SCHEMA if targets else SAMPLE_SCHEMA)
    )
    return folder
