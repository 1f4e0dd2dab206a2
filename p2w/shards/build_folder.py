"""The folder of a data set while it is being built: its settings, finished scans and locks.

DIR/
      settings.json    how it is cut; another run with other settings is refused
      scans/UID.json   one finished scan: its rows, its shard, its source, or why it is bad
      .run/            locks and unfinished files; gone once the set is whole

A shard is written in `.run`, flushed to the disk and renamed; then its `scans/UID.json` is. So a scan is
finished when that file stands and the shard has the size it names, and a process may be killed at any moment.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, Protocol, TypeVar

import pyarrow as pa

from p2w.ct.scan import source_files
from p2w.errors import UserError
from p2w.files import canonical_json, hold_lock, is_held, parse_json, write_published
from p2w.shards import manifest_schema
from p2w.shards.manifest_schema import MANIFEST_NAME, MANIFEST_VERSION, SUB_SCAN_COLUMNS
from p2w.shards.tiling import WINDOW_HU, Tiling


class DataSetSettings(Protocol):
    """Settings of any kind of data set."""

    @property
    def format(self) -> str:
        """Of the shards: tar or arrow."""

    def plain(self) -> dict[str, Any]:
        """As JSON writes them; another run must have the same."""


class ShardSource(Protocol):
    """What one shard is cut from: a scan, or a case of a target task."""

    @property
    def uid(self) -> str:
        """Names the shard."""

    @property
    def name(self) -> str:
        """What the user sees."""


ROW = {
    "key": str, "scan_uid": str, "subset": int, "z": int, "y": int, "x": int, "mean_hu": float, "std_hu": float,
    "spacing_x": float, "spacing_y": float, "spacing_z": float, "offset": int, "nbytes": int, "crc32c": int,
}  # fmt: skip
COLUMNS = pa.schema([SUB_SCAN_COLUMNS.field(name) for name in ROW])
NAMED = {"uid": str, "name": str, "subset": int}
FINISHED = {
    "nbytes": int, "checksum": str, "left_out": int, "rows": [ROW], "shard": (None, {"nbytes": int, "crc32c": int}),
}  # fmt: skip
RECORD = (NAMED | {"bad": str}, NAMED | manifest_schema.GEOMETRY_META | FINISHED)  # scans/UID.json


@dataclass(frozen=True)
class ShardingSettings:
    """All that decides what the finished folder holds, besides the scans themselves."""

    tiling: Tiling = Tiling()  # noqa: RUF009 (frozen)
    format: str = "tar"
    val_fraction: float = 0.1
    split_seed: int = 0
    allow_gaps: bool = False

    def __post_init__(self) -> None:
        """Refuse values that make no data set."""
        if self.tiling.z_margin < 0:
            raise UserError(f"--z-margin {self.tiling.z_margin}: slices to leave out at each end, 0 or more")
        if not 0 <= self.tiling.min_std_hu < WINDOW_HU[1]:
            raise UserError(
                f"--min-std {self.tiling.min_std_hu:g}: HU, from 0 (keep every tile) to below 1000"
            )
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"--val-fraction {self.val_fraction:g}: a share of the scans, from 0 to below 1")

    def plain(self) -> dict[str, Any]:
        """As JSON writes it."""
        return json.loads(
            canonical_json({"schema": MANIFEST_VERSION, "window_hu": WINDOW_HU, **asdict(self)})
        )


@dataclass(frozen=True)
class JobShare:
    """Which part of the scans this process cuts: number `index` of `count`, from 0."""

    index: int = 0
    count: int = 1

    @property
    def name(self) -> str:
        """For locks and unfinished files."""
        return f"{self.index}-of-{self.count}"

    def of(self, sources: list[Any]) -> list[Any]:
        """Every count-th scan, so that large and small subsets are mixed."""
        return sources[self.index :: self.count]


S = TypeVar("S", bound=DataSetSettings)


class BuildFolder(Generic[S]):
    """Paths and small files of one data set folder."""

    form: Any = RECORD
    columns = COLUMNS

    def __init__(self, root: str, settings: S) -> None:
        """Nothing is touched before `prepare`."""
        self.root = root
        self.settings = settings
        self.running = os.path.join(root, ".run")

    def sidecar(self, uid: str) -> str:
        """Path of what is known of a finished scan."""
        return os.path.join(self.root, "scans", f"{uid}.json")

    def shard(self, uid: str) -> str:
        """Path of a scan's shard."""
        return os.path.join(self.root, f"{uid}.{self.settings.format}")

    def aside(self, name: str, share: str) -> str:
        """Where something is written before it is renamed into place; swept with the share's leftovers."""
        return os.path.join(self.running, f"{name}.{os.getpid()}.{share}.part")

    def prepare(self, share: JobShare) -> None:
        """Make the folder, or check that it was cut with the same settings. Under the share's lock.

        Shares that start at once meet here one after the other.
        """
        with hold_lock(self.running, "settings"):
            self._prepare(share)

    def _prepare(self, share: JobShare) -> None:
        path = os.path.join(self.root, "settings.json")
        mine = canonical_json(self.settings.plain(), indent=1)
        try:
            os.makedirs(os.path.join(self.root, "scans"), exist_ok=True)
            if not os.path.exists(path):
                strangers = sorted(set(os.listdir(self.root)) - {"scans", ".run"})
                if strangers:
                    raise UserError(
                        f"{self.root} holds other files ({strangers[0]}, …) and no settings.json: shards get "
                        "a folder of their own, name a new one with --out DIR"
                    )
                write_published(path, mine, self.aside("settings.json", share.name))
            with open(path, "rb") as file:
                theirs = file.read()
        except OSError as error:
            raise self._unwritable(error) from error
        if theirs != mine and (others := self._other_shares(share)):
            raise UserError(
                f"{self.root}: share {others[0]} cuts it with {_setting_differences(theirs, mine)}: give every share of "
                f"the array the same options, or name another --out; where no other process runs, delete {self.running}"
            )
        if theirs != mine and not self._holds_shards():
            self.withdraw()  # nothing was cut with those settings: start anew with these
            shutil.rmtree(os.path.join(self.root, "scans"))
            os.makedirs(os.path.join(self.root, "scans"))
            write_published(path, mine, self.aside("settings.json", share.name))
        elif theirs != mine:
            raise UserError(
                f"{self.root} was cut with {_setting_differences(theirs, mine)}: name another --out, or delete it"
            )

    def _other_shares(self, share: JobShare) -> list[str]:
        """Shares that another process cuts now; where the file system has no locks, those whose lock file is there."""
        locks = [name for name in sorted(os.listdir(self.running)) if name.endswith(".lock")]
        names = {lock.removesuffix(".lock") for lock in locks if is_held(os.path.join(self.running, lock))}
        return sorted(names - {share.name, "settings", "merge"})

    def _holds_shards(self) -> bool:
        return any(name.endswith((".tar", ".arrow")) for name in os.listdir(self.root))

    def nbytes(self, source: Any) -> int:
        """Of all files that a shard is cut from."""
        return sum(os.path.getsize(path) for path in source_files(source))

    def finished(self, source: ShardSource) -> dict[str, Any] | None:
        """What is known of a scan cut by a run like this one; None when it must be cut (again)."""
        record = self.record(source.uid)
        if record is None or "bad" in record or record["name"] != source.name:
            return None
        try:
            if record["nbytes"] != self.nbytes(source):
                return None
            shard = record["shard"]
            if shard is not None and os.path.getsize(self.shard(source.uid)) != shard["nbytes"]:
                return None
        except (OSError, UserError):
            return None
        return record

    def record(self, uid: str) -> dict[str, Any] | None:
        """The sidecar of a scan, finished or bad."""
        try:
            with open(self.sidecar(uid), "rb") as file:
                record: dict[str, Any] = parse_json(file.read(), self.form)
            pa.RecordBatch.from_pylist(record.get("rows", []), schema=self.columns)
            return record if record["uid"] == uid else None
        except (
            FileNotFoundError,
            ValueError,
            OverflowError,
            pa.ArrowException,
        ):  # ValueError: the disk lost it in a crash, or it is not ours
            return None

    def check_strangers(self, sources: Sequence[ShardSource], bad: list[tuple[str, str]]) -> None:
        """Refuse scans of another run: the folder is to hold the scans asked for and no others."""
        known = {source.uid for source in sources}
        for name in sorted(os.listdir(os.path.join(self.root, "scans"))):
            uid = name.removesuffix(".json")
            record = self.record(uid) if name.endswith(".json") and uid not in known else None
            if record is None:
                continue
            if record["name"] in {where for where, _ in bad}:  # it was sound once
                for path in (self.shard(uid), self.sidecar(uid)):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)
            else:
                raise UserError(
                    f"{self.root} holds the scan {record['name']}, which is not among the {len(known)} asked "
                    "for: name another --out, or ask for all its scans again"
                )

    def withdraw(self) -> None:
        """Take the manifest away: shards are about to change; until they are whole this is no data set."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.root, MANIFEST_NAME))

    @contextlib.contextmanager
    def share_lock(self, share: JobShare) -> Iterator[None]:
        """One process per share. Leftovers of a killed one are removed first, our own at the end."""
        with hold_lock(self.running, share.name, self._busy()):
            self._sweep(share.name)
            try:
                yield
            finally:
                self._sweep(share.name)

    @contextlib.contextmanager
    def merge_lock(self) -> Iterator[None]:
        """One process at a time decides whether the set is whole, and merges it."""
        with hold_lock(self.running, "merge"):
            self._sweep("merge")
            yield

    def tidy(self) -> None:
        """Remove `.run` of a whole set, unless another process is in it still."""
        for name in os.listdir(self.running):
            share, ending = os.path.splitext(name)
            if ending == ".lock" and share != "merge" and not is_held(os.path.join(self.running, name)):
                self._sweep(share)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(self.running, name))

    def _sweep(self, share: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.running):
                if name.endswith(f".{share}.part"):
                    path = os.path.join(self.running, name)
                    if os.path.isdir(path):
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        os.unlink(path)

    def _busy(self) -> str:
        return f"{self.root}: another process cuts the same scans into it; wait for it, or name another --out"

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"{self.root} cannot be written ({error.strerror}): name another with --out DIR")


def _setting_differences(theirs: bytes, mine: bytes) -> str:
    """The settings that differ, as "z_margin 0 and not 25"."""
    try:
        old, new = (_flat(parse_json(text, {"tiling": {}})) for text in (theirs, mine))
    except ValueError:
        return "settings that cannot be read"
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return ", ".join(f"{name} {old.get(name)} and not {new.get(name)}" for name in names)


def _flat(value: dict[str, Any]) -> dict[str, Any]:
    tiling = value.get("tiling", {})
    return {name: item for name, item in {**value, **tiling}.items() if name != "tiling"}
