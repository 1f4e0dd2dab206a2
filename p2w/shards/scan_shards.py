"""Shards of sub-scans, cut from scans: settings, forecast from headers, records, and the content of the manifest."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tyro

from p2w.ct.discover import ScanListing, ScanSource
from p2w.ct.orientation import BadScan, reason_of
from p2w.ct.scan import PERCENTILES, Modality, Scan, read_grid, read_scaled, read_scan, source_files
from p2w.errors import UserError
from p2w.files import canonical_json, parse_json
from p2w.progress import duration, say
from p2w.shards.build import BuildOptions, build_data_set, single
from p2w.shards.build_folder import (
    BuildFolder,
    BuildForecast,
    CutSource,
    DataSetContent,
    SourceListing,
    StoredRows,
)
from p2w.shards.grouping import (
    RULE,
    UNGROUPED_RULE,
    GroupingOptions,
    Level,
    group_of,
    identity_in_set,
    set_salt,
    split_groups,
)
from p2w.shards.manifest_schema import (
    GEOMETRY_META,
    MANIFEST_VERSION,
    PADDED_SCHEMA,
    REAL_COLUMNS,
    STORES_SCANS,
    SUB_SCAN_COLUMNS,
    SUB_SCAN_SCHEMA,
    sub_scan_key,
)
from p2w.shards.scan_store import ChunkGrid, check_stride, chunk_shape, cut_chunks, tiles_left_out
from p2w.shards.tiling import SUB_SCAN_SHAPE, WINDOW_HU, SubScan, Tiling, cut_sub_scans
from p2w.shards.writer import NOTE, SAMPLE_NOTE, SAMPLE_VERSION

# Voxels per second and worker, for the estimate of a dry run: measured by bench/shard.py on one 2-core machine, with
# LUNA16's compressed scans on a local disk. A network disk may be slower.
VOXELS_PER_SECOND = 40e6
# Of a chest CT a fifth of the sub-scans is nearly constant and left out, hardly ever two fifths.
LEAST_KEPT = 0.6

ROW = {
    "key": str, "scan_uid": str, "subset": int, "z": int, "y": int, "x": int, "mean_hu": float, "std_hu": float,
    "spacing_x": float, "spacing_y": float, "spacing_z": float, "offset": int, "nbytes": int, "crc32c": int,
}  # fmt: skip
NAMED = {"uid": str, "name": str, "subset": int}
FINISHED = {
    "nbytes": int, "checksum": str, "left_out": int, "rows": [ROW], "shard": (None, {"nbytes": int, "crc32c": int}),
}  # fmt: skip
STORED = {"sub_scans": int, "tiles_left_out": [int]}  # further entries where whole scans are stored


@dataclass(frozen=True)
class ShardingSettings:
    """All options that decide what the finished folder contains; `preprocess/shard_*.py` read them from the command line."""

    tiling: Annotated[Tiling, tyro.conf.arg(name="")] = Tiling()  # noqa: RUF009 (frozen)
    format: Literal["tar", "arrow"] = "tar"
    """tar opens with webdataset, arrow with pyarrow; training reads both alike."""
    store: Literal["subscans", "scans"] = "subscans"
    """subscans: sub-scans at fixed places, as in the paper. scans: whole scans in chunks, of which training cuts as many
    sub-scans an epoch, each time at other random places."""
    compress: Literal["none", "zstd"] = "none"
    """zstd packs the voxels of arrow shards without loss to a half or a third, for disks and networks that are slower than
    unpacking (0.7 GB/s a reader thread). pyarrow reads them all the same."""
    val_fraction: float = 0.1
    """Share of the scans set aside for validation, at least one of two. Never parts of a scan, or of a --group."""
    split_seed: int = 0
    """Another seed sets other scans aside."""
    grouping: Annotated[GroupingOptions, tyro.conf.arg(name="")] = GroupingOptions()  # noqa: RUF009 (frozen)
    # Options of p2w shard alone.
    allow_gaps: Annotated[bool, tyro.conf.Suppress] = False
    resample_tilt: Annotated[bool, tyro.conf.Suppress] = False
    assume_hu: Annotated[bool, tyro.conf.Suppress] = False
    modality: Annotated[Modality, tyro.conf.Suppress] = "ct"
    sample_version: Annotated[int, tyro.conf.Suppress] = SAMPLE_VERSION  # of a tar's JSON; no option

    def __post_init__(self) -> None:
        """Raise UserError for a fraction outside its range."""
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"--val-fraction {self.val_fraction:g}: a share of the scans, from 0 to below 1")
        if self.compress != "none" and (self.format != "arrow" or self.store != "subscans"):
            kind = "--store scans" if self.store == "scans" else "--format tar"
            raise UserError(
                f"--compress {self.compress}: packs sub-scans in arrow shards, not {kind}: pass --format arrow and "
                "--store subscans, or leave it out"
            )
        if self.store == "scans":
            check_stride(self.tiling)
        if self.modality != "ct" and self.tiling.body_only:
            raise UserError(
                f"--body-only: is a rule in HU, which --modality {self.modality} has not; leave it out"
            )

    def plain(self) -> dict[str, Any]:
        """The settings as settings.json holds them."""
        left_out = {"grouping"} | ({"modality"} if self.modality == "ct" else set())
        # Folders of earlier versions lack these.
        left_out |= {name for name in ("resample_tilt", "assume_hu") if not getattr(self, name)}
        left_out |= {"compress"} if self.compress == "none" else set()
        left_out |= {"store"} if self.store == "subscans" else set()
        left_out |= {"sample_version"} if self.format != "tar" or self.sample_version == 1 else set()
        settings = asdict(self) | {"tiling": self.tiling.to_meta()}
        settings = {
            name: value for name, value in settings.items() if name not in left_out
        } | self.grouping.plain()
        return json.loads(canonical_json({"schema": MANIFEST_VERSION, "window_hu": WINDOW_HU, **settings}))


def build_shards(
    found: ScanListing,
    out: str,
    settings: ShardingSettings,
    options: BuildOptions = BuildOptions(),  # noqa: B008
) -> int:
    """Cut the scans of a listing into the folder `out`; the exit code, as of `build_data_set`."""
    say(settings.grouping.apply(found))
    report = {
        "files_that_are_no_images": found.not_images,
        "files_seen": found.files,
        "files_passed_over": dict(found.passed_over),
    }
    try:
        return build_data_set(ScanFolder(out, settings), found, options, report)
    finally:
        if found.files:  # LUNA16's folders are not searched, so there is nothing to account for
            for line in found.table():
                say(line)


@dataclass(frozen=True)
class ShardingForecast:
    """Totals over scans, read from their headers alone."""

    sub_scans: int
    voxels: int
    source_bytes: int
    bad: list[tuple[str, str]]  # name of the scan, what is wrong
    sound: int  # number of scans
    chunks: int  # of the scans, where they are stored whole

    def out_bytes(self, settings: ShardingSettings) -> int:
        """Upper bound of the shards' size in bytes."""
        if settings.store == "scans":
            return self.chunks * (2 * math.prod(chunk_shape(settings.tiling.shape)) + 4096)
        return self.sub_scans * (2 * int(np.prod(settings.tiling.shape)) + 4096)


def forecast_shards(sources: Sequence[ScanSource], settings: ShardingSettings) -> ShardingForecast:
    """Totals over these scans; only their headers are read."""
    sub_scans = voxels = nbytes = sound = chunks = 0
    bad, chunk = [], chunk_shape(settings.tiling.shape)
    for source in sources:
        try:
            grid, size = read_grid(source)
            shape = settings.tiling.resampled_grid(grid).size[::-1]
            settings.tiling.check_size(shape)
        except (BadScan, OSError, ValueError) as error:
            bad.append((source.name, reason_of(error)))
            continue
        sub_scans += settings.tiling.count(shape)
        chunks += ChunkGrid.of(settings.tiling, chunk, shape).count
        voxels += int(np.prod(grid.size))
        nbytes += size
        sound += 1
    return ShardingForecast(sub_scans, voxels, nbytes, bad, sound, chunks)


class ScanFolder(BuildFolder[ShardingSettings, ScanSource]):
    """The folder of sub-scans that are cut from scans."""

    source_noun, part_noun = "scan", "sub-scan"
    form = (NAMED | {"bad": str}, NAMED | GEOMETRY_META | FINISHED)  # scans/UID.json
    columns = pa.schema([SUB_SCAN_COLUMNS.field(name) for name in ROW])
    note = NOTE

    def __init__(self, root: str, settings: ShardingSettings) -> None:
        """Name the folder; nothing is read or written before `prepare`."""
        super().__init__(root, settings)
        self.compress = settings.compress
        self.schema = PADDED_SCHEMA if settings.tiling.pads or self._whole_scans else SUB_SCAN_SCHEMA
        if self._whole_scans:
            self.part_noun, self.note = "chunk", NOTE | {"store": STORES_SCANS}
            self.form = (NAMED | {"bad": str}, NAMED | GEOMETRY_META | FINISHED | STORED)

    @property
    def _whole_scans(self) -> bool:
        """Whether shards hold whole scans in chunks."""
        return self.settings.store == "scans"

    @property
    def sample_note(self) -> dict[str, Any] | None:  # type: ignore[override]
        """What the JSON of each sample says of its voxels; None in a set of version 1."""
        if self.settings.sample_version == 1:
            return None
        return SAMPLE_NOTE | self._intensity() | ({"store": STORES_SCANS} if self._whole_scans else {})

    def _intensity(self) -> dict[str, Any]:
        """How the values of another modality than CT were scaled; empty for CT."""
        if self.settings.modality == "ct":
            return {}
        scale = {"percentiles": list(PERCENTILES), "become": list(WINDOW_HU)}
        return {"modality": self.settings.modality, "intensity": scale}

    def adopt_version(self, theirs: bytes) -> None:
        """Keep version 1 in a folder that was begun with it: the settings of such a folder name no version."""
        with suppress(ValueError):
            if "sample_version" not in parse_json(theirs, {}):
                self.settings = replace(self.settings, sample_version=1)

    def nbytes(self, source: ScanSource) -> int:
        """Total size in bytes of the files of a scan."""
        return sum(os.path.getsize(path) for path in source_files(source))

    def head(self, source: ScanSource) -> dict[str, Any]:
        """Entries with which the record of a scan begins."""
        resampled = {"resampled": source.resampled} if source.resampled else {}
        return super().head(source) | {"subset": source.subset} | resampled

    def cut(self, source: ScanSource) -> CutSource:
        """Read a scan; its sub-scans come one by one. Raises BadScan for one that cannot be used."""
        if self.settings.modality == "ct":
            stored, intensity = read_scan(source), {}
        else:
            stored, scale = read_scaled(source, WINDOW_HU)
            intensity = {"intensity_range": list(scale)}
        scan = self.settings.tiling.resampled(stored)
        record = {
            "nbytes": scan.nbytes,
            "checksum": f"crc32c:{scan.checksum:08x}",
            "shape": list(scan.voxels.shape),
            "spacing_mm": list(scan.grid.spacing[::-1]),
            "origin_xyz_mm": list(scan.grid.origin),
            "direction_xyz": list(scan.grid.direction),
            "left_out": 0,
            **intensity,
        }
        if self.settings.tiling.spacing is not None:
            spacing = list(stored.grid.spacing[::-1])
            record["stored"] = {"shape": list(stored.voxels.shape), "spacing_mm": spacing}
        parts = self._chunks if self._whole_scans else self._sub_scans
        return CutSource(record, parts(scan, source.subset, record))

    def _sub_scans(
        self, scan: Scan, subset: int, record: dict[str, Any]
    ) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """Row and voxels of each sub-scan that is kept; the others are counted in the record."""
        x, y, z = map(single, scan.grid.spacing)
        spacing = {"spacing_x": x, "spacing_y": y, "spacing_z": z}
        tiling = self.settings.tiling
        for sub in cut_sub_scans(scan, tiling):
            if not sub.kept(tiling):
                record["left_out"] += 1
            else:
                real = dict(zip(REAL_COLUMNS, sub.real, strict=True)) if tiling.pads else {}
                yield _row(scan.uid, subset, sub) | spacing | real, sub.voxels

    def _chunks(
        self, scan: Scan, subset: int, record: dict[str, Any]
    ) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """Row and voxels of each chunk; none of a scan of which no sub-scan is kept. The record says which are kept."""
        x, y, z = map(single, scan.grid.spacing)
        spacing = {"spacing_x": x, "spacing_y": y, "spacing_z": z}
        count, left_out = tiles_left_out(scan, self.settings.tiling)
        kept = count - len(left_out)
        record |= {"left_out": len(left_out), "sub_scans": kept, "tiles_left_out": left_out}
        for chunk in cut_chunks(scan, self.settings.tiling) if kept else ():
            real = dict(zip(REAL_COLUMNS, chunk.real, strict=True))
            yield _row(scan.uid, subset, chunk) | spacing | real, chunk.voxels

    def forecast(
        self, listing: SourceListing[ScanSource], sources: list[ScanSource], workers: int
    ) -> BuildForecast:
        """Sub-scans, bytes and time, from the headers of the scans."""
        totals, tiling = forecast_shards(sources, self.settings), self.settings.tiling
        most = totals.out_bytes(self.settings)
        text = f"{totals.sub_scans:,} sub-scans, {most / 2**30:.1f} GiB"
        bad = len(listing.bad) + len(totals.bad)
        usual = tiling.shape == SUB_SCAN_SHAPE and not tiling.body_only
        often = " (chest CT: 1 in 5)" if usual else ""
        seconds = totals.voxels / VOXELS_PER_SECOND / workers
        lines = [
            f"scans          {totals.sound:,}, besides {bad} bad ones; {totals.source_bytes / 2**30:.2f} GiB to read",
            f"sub-scans      {totals.sub_scans:,} of {' x '.join(map(str, tiling.shape))} voxels (z, y, x), "
            f"z margin {tiling.z_margin}",
            f"               before leaving out those of a {tiling.rule()}{often}",
            f"to write       at most {most / 2**30:.2f} GiB into {self.root}",
            f"time           about {duration(seconds)} with {workers} workers, at {VOXELS_PER_SECOND / 1e6:.0f} "
            "million voxels a second each (measured on another machine with a local disk; yours may differ by a "
            "factor of 3)",
        ]
        if tiling.spacing is not None:
            spaced = " x ".join(f"{mm:g}" for mm in tiling.spacing)
            lines[1] += f", of scans resampled to {spaced} mm"
        if self._whole_scans:
            lines[1] += ", cut at random places in each epoch"
            size = " x ".join(map(str, chunk_shape(tiling.shape)))
            lines[3] += f", whole scans in {totals.chunks:,} chunks of {size} voxels"
        if not (tiling.min_std_hu or tiling.body_only):
            return BuildForecast(text, lines[:2] + lines[3:], most, totals.bad)
        return BuildForecast(text, lines, LEAST_KEPT * most if usual else 0.0, totals.bad)

    def content(self, listing: SourceListing[ScanSource], good: list[dict[str, Any]]) -> DataSetContent:
        """Rows with their split, and the metadata: tiling, split and scans."""
        grouping, seed = self.settings.grouping, self.settings.split_seed
        full = {record["uid"] for record in good if record["rows"]}
        level = grouping.level(listing.sources)
        groups = group_of([source for source in listing.sources if source.uid in full], level)
        val = split_groups(groups, self.settings.val_fraction, seed)
        identities, salted = self._identities(listing, good, level)
        parts = {"train": sorted(set(full) - val), "val": sorted(val)}
        source_keys = ("uid", "subset", "nbytes", "checksum", *GEOMETRY_META)
        in_version_1 = self.settings.format != "tar" or self.settings.sample_version == 1
        version = {} if in_version_1 else {"sample_version": self.settings.sample_version}
        meta = {
            "shape": list(self.settings.tiling.shape),
            "window_hu": list(WINDOW_HU),
            "axis_order": "zyx",
            "tiling": self.settings.tiling.to_meta()
            | {"left_out": sum(record["left_out"] for record in good)},
            "split": {
                "rule": UNGROUPED_RULE if level == "scan" else RULE.format(level),
                "val_fraction": self.settings.val_fraction,
                "seed": seed,
                "train_scans": parts["train"],
                "val_scans": parts["val"],
                **salted,
            },
            "sources": [
                {
                    key: record[key]
                    for key in (*source_keys, "stored", "intensity_range", "resampled", *STORED)
                    if key in record
                }
                | {"file": record["name"], "left_out": record["left_out"]}
                | {"sub_scans": record.get("sub_scans", len(record["rows"]))}
                | identities.get(record["uid"], {})
                for record in good
            ],
        }
        rows = _rows_with_split(good, val)
        lists = {
            f"{name}.txt": [f"{uid}.{self.settings.format}" for uid in uids] for name, uids in parts.items()
        }
        stored = {"store": STORES_SCANS, "chunk": list(chunk_shape(self.settings.tiling.shape))}
        whole = stored if self._whole_scans else {}
        if self.compress != "none":
            whole = {"compression": self.compress}
        return DataSetContent(rows, meta | version | self._intensity() | whole, lists)

    def _identities(
        self, listing: SourceListing[ScanSource], good: list[dict[str, Any]], level: Level
    ) -> tuple[dict[str, dict[str, str]], dict[str, Any]]:
        """Uid -> what the manifest says of a scan's patient and study, and what its split says of how these are hashed."""
        infos = {source.uid: source.info for source in listing.sources}
        uids = [record["uid"] for record in good]
        salt = set_salt(uids)
        names = ("patient", "study") if level == "study" else ("patient",)
        identities = {
            uid: {
                name: identity_in_set(hashed, salt) for name in names if (hashed := getattr(infos[uid], name))
            }
            for uid in uids
        }
        if not any(identities.values()):
            return {}, {}
        return identities, {"group": level, "salt": salt, "secret": bool(self.settings.grouping.salt)}

    def summary(self, meta: dict[str, Any]) -> list[str]:
        """Lines on sub-scans, split and size of the finished set."""
        kept = sum(source["sub_scans"] for source in meta["sources"])
        tiling, parts = meta["tiling"], meta["split"]
        lines = [
            f"{kept + tiling['left_out']:,} sub-scans, {tiling['left_out']:,} left out "
            f"({self.settings.tiling.rule()}), {kept:,} sub-scans kept"
        ]
        train, val = len(parts["train_scans"]), len(parts["val_scans"])
        if not val:
            alone = f"all scans are of one {parts['group']}" if "group" in parts else "there is only one scan"
            why = "--val-fraction 0" if not self.settings.val_fraction else alone
            lines.append(f"no validation scans: {why}")
        size = sum(shard["nbytes"] for shard in meta["shards"]) / 2**30
        lines.append(f"{self.root}: {size:.2f} GiB; scans for training {train}, for validation {val}")
        return lines


def _rows_with_split(good: list[dict[str, Any]], val: set[str]) -> list[dict[str, Any]] | pa.Table:
    """The rows of all records with their split: a table where the records have theirs in tables."""
    stored = [record["rows"] for record in good if isinstance(record["rows"], StoredRows)]
    if stored and len(stored) == len(good):
        parts = {id(rows.table): rows.table for rows in stored}
        table = pa.concat_tables(parts.values())
        is_val = pc.is_in(table["scan_uid"], value_set=pa.array(sorted(val), pa.string()))
        return table.append_column("split", pc.if_else(is_val, "val", "train"))
    return [
        row | {"split": "val" if record["uid"] in val else "train"}
        for record in good
        for row in record["rows"]
    ]


def _row(uid: str, subset: int, sub: SubScan) -> dict[str, Any]:
    return {
        "key": sub_scan_key(uid, sub.z, sub.y, sub.x),
        "scan_uid": uid,
        "subset": subset,
        "z": sub.z,
        "y": sub.y,
        "x": sub.x,
        "mean_hu": single(sub.mean_hu),
        "std_hu": single(sub.std_hu),
    }
