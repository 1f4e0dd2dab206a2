"""The samples of a target task, read in place from the shards that p2w prepare wrote.

    ncc = open_target("targets/ncc")
    rows = ncc.rows("train")                 # of a set with folds: ncc.rows("train", fold=1)
    voxels, target = ncc.read(rows[:24])     # int16 (24, 1, 32, 64, 64); float32 (24,), 0 or 1
    x = (voxels.float() - lo) / (hi - lo)    # lo, hi = ncc.window

B, C, D, H, W = sample, channel, slice, row, column. Order and batches are the caller's.
"""

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2w.errors import UserError
from p2w.files import type_mismatch
from p2w.shards.manifest import Manifest, read_manifest
from p2w.stream.local import LocalSet
from p2w.tasks.task import SAMPLE_KINDS, SAMPLE_SCHEMA, SPLITS, TASK_META, split_of_fold


@dataclass(frozen=True)
class TargetSet:
    """A data set of a target task; columns have one entry a sample, in the order of (scan, z, y, x).

    `meta` holds task, kind, channels, channel_names, size_zyx, window, spacing_mm, classes, settings, split (rule and
    scans), sources with checksums, tool, axis_order, orientation.
    """

    where: str
    meta: dict[str, Any]
    key: list[str]
    patient: list[str]
    scan_uid: list[str]
    of: list[str]  # what the sample shows: a row of the table of candidates, a nodule, a tile
    split: NDArray[np.str_]  # "train" | "val" | "test"; of a set with folds: where fold 0 is tested on
    fold: NDArray[np.int16]  # -1: no folds
    label: NDArray[np.int8]  # -1: there is a mask instead
    first_voxel: NDArray[np.int32]  # (n, 3) z, y, x of the crop in the canonical scan
    centre_mm: NDArray[np.float64]  # (n, 3) world z, y, x of the voxel at size // 2
    spacing_mm: NDArray[np.float32]  # (n, 3) z, y, x of the crop's voxels
    foreground: NDArray[np.float32]  # share of the voxels in the mask
    targets: NDArray[np.float64]  # (n, classes) of kinds that have them, NaN: unknown; else (n, 0)
    _records: LocalSet = field(repr=False, compare=False)

    def __len__(self) -> int:
        """Samples in all splits."""
        return len(self.key)

    @property
    def kind(self) -> str:
        """The kind of the task: a name in `p2w.tasks.task.SAMPLE_KINDS`."""
        return str(self.meta["kind"])

    @property
    def channels(self) -> int:
        """How many channels the network's input has."""
        return int(self.meta["channels"])

    @property
    def size_zyx(self) -> tuple[int, int, int]:
        """Voxels (z, y, x) of a sample, and so of the network's input."""
        depth, height, width = self.meta["size_zyx"]
        return depth, height, width

    @property
    def window(self) -> tuple[float, float]:
        """Stored values that become 0 and 1."""
        low, high = self.meta["window"]
        return float(low), float(high)

    @property
    def folds(self) -> int:
        """How many folds there are; 0: the set has one split."""
        return int(self.meta["split"]["folds"])

    def splits(self, fold: int | None = None) -> NDArray[np.str_]:
        """The split of every sample. Raises UserError for a fold that the set does not have."""
        if fold is None:
            return self.split
        if not 0 <= fold < self.folds:
            has = f"folds 0 to {self.folds - 1}" if self.folds else "one split and no folds"
            raise UserError(f"{self.where}: no fold {fold}; the set has {has}")
        rule = self.meta["split"]
        fold_of = dict(zip(self.patient, self.fold.tolist(), strict=True))
        split = split_of_fold(fold_of, fold, rule["val_fraction"], rule["seed"])
        return np.array([split[patient] for patient in self.patient], np.str_)

    def rows(self, split: str, fold: int | None = None) -> NDArray[np.int64]:
        """Row numbers of a split, ascending.

        Of a set with folds: test is `fold` (0 unless named), val is carved by patient from the rest, train is what is
        left. The same for the same set, fold and split, anywhere.

        Raises:
            UserError: no such split or fold.
        """
        if split not in SPLITS:
            raise UserError(f"{self.where}: no split {split!r}; one of {', '.join(SPLITS)}")
        return np.flatnonzero(self.splits(fold) == split).astype(np.int64)

    def read(self, rows: Any) -> tuple[Tensor, Tensor]:
        """Voxels int16 (B, C, D, H, W), and masks (B, 1, D, H, W) where the kind has them: uint8, of 0 and 1 or of numbers
        of classes; int16 where each class has a bit. Else targets float32 (B, K) where it has those, NaN for unknown
        ones, else labels float32 (B,).

        On the CPU, memory of their own. Every record's checksum is compared with the manifest's.

        Raises:
            DataError: (a UserError) a shard does not hold what was written.
        """
        chosen = [int(row) for row in rows]
        records = torch.empty((len(chosen), *self._records.shape), dtype=torch.int16)
        for position, row in enumerate(chosen):
            self._records.read_into(row, records[position])
        kind = SAMPLE_KINDS[self.kind]
        if kind.masks:
            masks = records[:, -1:]
            return records[:, :-1].contiguous(), masks.contiguous() if kind.bits else masks.to(torch.uint8)
        if kind.targets:
            return records, torch.from_numpy(self.targets[chosen].astype(np.float32))
        return records, torch.from_numpy(self.label[chosen].astype(np.float32))


def open_target(path: str | os.PathLike[str]) -> TargetSet:
    """Open the set in a folder.

    Raises:
        UserError: no finished set of a target task there, a shard is missing or of another size, or its manifest is
            damaged or makes no sense.
    """
    manifest = read_manifest(path, SAMPLE_SCHEMA)
    _check(manifest)
    table = manifest.table

    def triple(name: str) -> NDArray[Any]:
        return np.stack([table[f"{name}{axis}"].to_numpy() for axis in "zyx"], 1)

    return TargetSet(
        where=manifest.root,
        meta=manifest.meta,
        key=manifest.keys.to_pylist(),
        patient=table["patient"].to_pylist(),
        scan_uid=table["scan_uid"].to_pylist(),
        of=table["of"].to_pylist(),
        split=np.array(table["split"].to_pylist(), np.str_),
        fold=table["fold"].to_numpy(),
        label=table["label"].to_numpy(),
        first_voxel=triple(""),
        centre_mm=triple("centre_"),
        spacing_mm=triple("spacing_"),
        foreground=table["foreground"].to_numpy(),
        targets=_targets(manifest),
        _records=LocalSet(manifest),
    )


def _targets(manifest: Manifest) -> NDArray[np.float64]:
    """The column of that name as (n, classes), (n, 0) where there is none. Raises UserError for rows of other lengths."""
    if "targets" not in manifest.table.column_names:
        return np.zeros((len(manifest.table), 0))
    meta = manifest.meta
    kind, rows = SAMPLE_KINDS[meta["kind"]], manifest.table["targets"].to_pylist()
    width = len(meta["classes"]) - (kind.masks and not kind.bits)
    if any(len(row) != width for row in rows):
        raise UserError(
            f"{manifest.root}: its manifest makes no sense (targets are not {width} a sample): prepare the set again"
        )
    values = [[np.nan if value is None else value for value in row] for row in rows]
    return np.array(values, np.float64).reshape(len(rows), width)


def _check(manifest: Manifest) -> None:
    """Raise UserError unless metadata and columns fit one another."""
    meta, table = manifest.meta, manifest.table
    if said := type_mismatch(meta, TASK_META, "its metadata"):
        raise UserError(f"{manifest.root}: its manifest makes no sense ({said}): prepare the set again")
    if meta["kind"] not in SAMPLE_KINDS:
        raise UserError(
            f"{manifest.root}: its manifest makes no sense (its kind is {meta['kind']!r}): prepare the set again"
        )
    kind = SAMPLE_KINDS[meta["kind"]]
    shape = [meta["channels"] + kind.masks, *meta["size_zyx"]]
    labels = set(kind.labels_of(len(meta["classes"])))
    wrong = None
    if meta["shape"] != shape:
        wrong = f"its records are {meta['shape']}, its channels and size make {shape}"
    elif len(meta["window"]) != 2 or not meta["window"][0] < meta["window"][1]:
        wrong = f"its window is {meta['window']}"
    elif not set(table["split"].to_pylist()) <= set(SPLITS):
        wrong = f"it has splits other than {', '.join(SPLITS)}"
    elif not set(table["label"].to_pylist()) <= labels:
        wrong = f"it has labels other than {sorted(labels)}"
    elif kind.targets != ("targets" in table.column_names):
        wrong = f"of the kind {kind.name} it has to have {'' if kind.targets else 'no '}column targets"
    elif not isinstance(meta.get("target", {}), dict):
        wrong = "its target is no object"
    elif not set(table["fold"].to_pylist()) <= set(range(meta["split"]["folds"]) or [-1]):
        wrong = f"it has folds beyond its {meta['split']['folds']}"
    if wrong:
        raise UserError(f"{manifest.root}: its manifest makes no sense ({wrong}): prepare the set again")
