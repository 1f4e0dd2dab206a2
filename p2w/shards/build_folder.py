"""The folder of a data set while it is being built: its settings, finished sources and locks.

DIR/
      settings.json    how it is cut; a run with other settings is refused
      scans/UID.json   the record of one finished source (scan or case): its rows, shard and files, or why it is bad
      .run/            locks and unfinished files; removed once the set is complete

A shard is written in `.run`, flushed to the disk and renamed; then its record `scans/UID.json` is. So a source is finished
when its record exists and the shard has the size that the record names, and a process may be killed at any moment.
"""

import contextlib
import errno
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from p2w.errors import UserError
from p2w.files import canonical_json, hold_lock, is_held, parse_json, write_published
from p2w.resources import free_disk
from p2w.shards.manifest_schema import MANIFEST_NAME, ManifestSchema


class DataSetSettings(Protocol):
    """Settings of a data set: of sub-scans for pretraining, or of samples of a target task."""

    @property
    def format(self) -> str:
        """Format of the shards: tar or arrow."""

    def plain(self) -> dict[str, Any]:
        """The settings as settings.json holds them; a run with others is refused."""


class ShardSource(Protocol):
    """What one shard is cut from: a scan, or a case of a target task."""

    @property
    def uid(self) -> str:
        """Identifier that names the shard and the record."""

    @property
    def name(self) -> str:
        """Name in messages to the user."""


S = TypeVar("S", bound=DataSetSettings)
Source = TypeVar("Source", bound=ShardSource)


class SourceListing(Protocol[Source]):
    """What was found in the user's folders. `bad` and `left_out` are (name, why)."""

    @property
    def sources(self) -> list[Source]:
        """The scans or cases to cut, in the order of their shares."""

    @property
    def bad(self) -> list[tuple[str, str]]:
        """Those that cannot be used."""

    @property
    def left_out(self) -> list[tuple[str, str]]:
        """What is sound but is not for this set."""


@dataclass(frozen=True)
class CutSource:
    """A source that was read. `parts` cuts it; it may update `record`, which is written once all parts were taken."""

    record: dict[str, Any]  # entries of the source's record beside uid, name, rows and shard
    # Row of the manifest, voxels int16 [z,y,x] or [c,z,y,x]
    parts: Iterator[tuple[dict[str, Any], np.ndarray]]


@dataclass(frozen=True)
class BuildForecast:
    """What is known of a set before it is cut."""

    text: str  # number of parts and bytes
    lines: list[str]  # the same at length, for a dry run
    least_bytes: float  # of the shards
    bad: list[tuple[str, str]] = field(default_factory=list)  # sources that cannot be used: name, why


class StoredRows(Sequence[dict[str, Any]]):
    """The rows of one record, in a table that has those of many."""

    def __init__(self, table: pa.Table, start: int, length: int) -> None:
        self.table, self.start, self._length = table, start, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        return self.table.slice(self.start, self._length).to_pylist()[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.table.slice(self.start, self._length).to_pylist())


@dataclass(frozen=True)
class DataSetContent:
    """The parts of the manifest, and of the lists beside it, that differ between kinds of data sets."""

    rows: list[dict[str, Any]] | pa.Table  # each with its split
    meta: dict[str, Any]
    lists: dict[str, list[str]]  # name of a text file -> names of the shards that it lists
    left_out: list[tuple[str, str]] = field(default_factory=list)  # name, why, for report.json


@dataclass(frozen=True)
class JobShare:
    """The share of the sources that this process cuts: number `index` (from 0) of `count`."""

    index: int = 0
    count: int = 1

    @staticmethod
    def parse(text: str) -> "JobShare":
        """The share that `--shard-of i/n` names. Raises UserError for anything else."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match or not int(match[1]) < int(match[2]):
            raise UserError(f"--shard-of {text!r}: write i/n with i from 0 to n - 1, such as 0/4 … 3/4")
        return JobShare(int(match[1]), int(match[2]))

    @property
    def name(self) -> str:
        """Name of the share in messages, locks and unfinished files."""
        return f"{self.index}-of-{self.count}"

    def of(self, sources: list[Any]) -> list[Any]:
        """Every `count`-th source, beginning with number `index`: each share gets some of every subset."""
        return sources[self.index :: self.count]


class BuildFolder(ABC, Generic[S, Source]):
    """Paths, records and locks of one data set folder that is being built. A subclass says what is cut, and how.

    Workers get it as a pickle, so it holds settings and no list of sources.
    """

    source_noun: ClassVar[str]  # what one shard is cut from: "scan"
    part_noun: str  # what a shard holds: "sub-scan"
    form: Any  # type of a record, as `files.type_mismatch` checks it
    columns: pa.Schema  # of its rows
    schema: ManifestSchema
    note: dict[str, Any]  # metadata of an Arrow shard
    compress = "none"  # how the voxels in Arrow shards are packed: "none" or "zstd"
    sample_note: dict[str, Any] | None = None  # what the JSON of a sample in a tar says beside its columns

    def __init__(self, root: str, settings: S) -> None:
        """Name the folder; nothing is read or written before `prepare`."""
        self.root = root
        self.settings = settings
        self.running = os.path.join(root, ".run")

    @abstractmethod
    def nbytes(self, source: Source) -> int:
        """Total size in bytes of the files that a shard is cut from."""

    @abstractmethod
    def cut(self, source: Source) -> CutSource:
        """Read a source; its parts come one by one. Raises BadScan for one that cannot be used."""

    @abstractmethod
    def forecast(self, listing: SourceListing[Source], sources: list[Source], workers: int) -> BuildForecast:
        """What cutting `sources`, of all that are listed, will give, as far as that is known before."""

    @abstractmethod
    def content(self, listing: SourceListing[Source], good: list[dict[str, Any]]) -> DataSetContent:
        """What the manifest says of a set with these records of sound sources."""

    @abstractmethod
    def summary(self, meta: dict[str, Any]) -> list[str]:
        """Lines that tell the user what the finished set holds; `meta` is the manifest's metadata."""

    def head(self, source: Source) -> dict[str, Any]:
        """Entries with which the record of a source begins, sound or bad."""
        return {"uid": source.uid, "name": source.name}

    def remark(self, record: dict[str, Any]) -> str | None:
        """A line for the user about a sound source that was cut, or None."""
        del record
        return None

    def adopt_version(self, theirs: bytes) -> None:
        """Settings to continue a folder that an earlier version of p2w began; `theirs` is its settings.json."""

    def sidecar(self, uid: str) -> str:
        """Path of the record of a source."""
        return os.path.join(self.root, "scans", f"{uid}.json")

    def shard(self, uid: str) -> str:
        """Path of the shard of a source."""
        return os.path.join(self.root, f"{uid}.{self.settings.format}")

    def temporary_path(self, name: str, share: str) -> str:
        """Path to write a file or folder at before it is renamed; `share_lock` removes what a killed process leaves."""
        return os.path.join(self.running, f"{name}.{os.getpid()}.{share}.part")

    def prepare(self, share: JobShare) -> None:
        """Make the folder, or check that it was cut with the same settings. The caller holds the share's lock.

        Raises UserError for other settings, foreign files, or a folder that cannot be written.
        """
        with hold_lock(self.running, "settings"):
            self._prepare(share)

    def _prepare(self, share: JobShare) -> None:
        path = os.path.join(self.root, "settings.json")
        mine = canonical_json(self.settings.plain(), indent=1)
        try:
            os.makedirs(os.path.join(self.root, "scans"), exist_ok=True)
            if not os.path.exists(path):
                foreign = sorted(set(os.listdir(self.root)) - {"scans", ".run"})
                if foreign:
                    raise UserError(
                        f"{self.root} holds other files ({foreign[0]}, …) and no settings.json: shards get "
                        "a folder of their own, name a new one with --out DIR"
                    )
                write_published(path, mine, self.temporary_path("settings.json", share.name))
            with open(path, "rb") as file:
                theirs = file.read()
        except OSError as error:
            raise self._unwritable(error) from error
        if theirs != mine:
            self.adopt_version(theirs)
            mine = canonical_json(self.settings.plain(), indent=1)
        if theirs != mine and (others := self._other_shares(share)):
            raise UserError(
                f"{self.root}: share {others[0]} cuts it with {_setting_differences(theirs, mine)}: give every share of "
                f"the array the same options, or name another --out; where no other process runs, delete {self.running}"
            )
        if theirs != mine and not self._holds_shards():
            self.remove_manifest()  # nothing was cut with those settings: start again with these
            shutil.rmtree(os.path.join(self.root, "scans"))
            os.makedirs(os.path.join(self.root, "scans"))
            write_published(path, mine, self.temporary_path("settings.json", share.name))
        elif theirs != mine:
            raise UserError(
                f"{self.root} was cut with {_setting_differences(theirs, mine)}: name another --out, or delete it"
            )

    def _other_shares(self, share: JobShare) -> list[str]:
        """Names of the shares that other processes cut now; without locks in the file system, those with a lock file."""
        locks = [name for name in sorted(os.listdir(self.running)) if name.endswith(".lock")]
        names = {lock.removesuffix(".lock") for lock in locks if is_held(os.path.join(self.running, lock))}
        return sorted(names - {share.name, "settings", "merge"})

    def _holds_shards(self) -> bool:
        return any(name.endswith((".tar", ".arrow")) for name in os.listdir(self.root))

    def finished(self, source: Source) -> dict[str, Any] | None:
        """The record of a source whose shard and files have the recorded sizes; None when it must be cut (again)."""
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

    def recorded_uids(self) -> set[str]:
        """The uids of all records in the folder, whatever they hold."""
        with contextlib.suppress(FileNotFoundError):
            return {os.path.splitext(name)[0] for name in os.listdir(os.path.join(self.root, "scans"))}
        return set()

    def record(self, uid: str) -> dict[str, Any] | None:
        """The record of a source, sound or bad; None when there is none, or it cannot be used."""
        try:
            with open(self.sidecar(uid), "rb") as file:
                record: dict[str, Any] = parse_json(file.read(), self.form)
            pa.RecordBatch.from_pylist(record.get("rows", []), schema=self.columns)
            return record if record["uid"] == uid else None
        except (FileNotFoundError, ValueError, OverflowError, pa.ArrowException):
            return None  # ValueError: damaged in a crash, or written by another program

    def refuse_other_sources(self, sources: Sequence[Source], bad: list[tuple[str, str]]) -> None:
        """Raise UserError when the folder has a source that is not among those asked for.

        A source that is bad now and was sound once loses its shard and record.
        """
        known = {source.uid for source in sources}
        for name in sorted(os.listdir(os.path.join(self.root, "scans"))):
            uid = name.removesuffix(".json")
            record = self.record(uid) if name.endswith(".json") and uid not in known else None
            if record is None:
                continue
            if record["name"] in {where for where, _ in bad}:
                for path in (self.shard(uid), self.sidecar(uid)):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)
            else:
                raise UserError(
                    f"{self.root} holds the {self.source_noun} {record['name']}, which is not among the {len(known)} asked "
                    f"for: name another --out, or ask for all its {self.source_noun}s again"
                )

    def remove_manifest(self) -> None:
        """Remove the manifest before shards change: a folder without one is not read as a data set."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.root, MANIFEST_NAME))

    @contextlib.contextmanager
    def share_lock(self, share: JobShare) -> Iterator[None]:
        """Keep other processes out of this share. Unfinished files are removed at the start and at the end.

        Raises UserError while another process has the share.
        """
        with hold_lock(self.running, share.name, self._busy()):
            self._remove_unfinished(share.name)
            try:
                yield
            finally:
                self._remove_unfinished(share.name)

    @contextlib.contextmanager
    def merge_lock(self) -> Iterator[None]:
        """Wait for the lock under which one process at a time checks whether the set is complete, and merges it."""
        with hold_lock(self.running, "merge"):
            self._remove_unfinished("merge")
            yield

    def remove_run_folder(self) -> None:
        """Remove what is left in `.run` of a complete set, but for shares that another process still cuts."""
        for name in os.listdir(self.running):
            share, ending = os.path.splitext(name)
            if ending == ".lock" and share != "merge" and not is_held(os.path.join(self.running, name)):
                self._remove_unfinished(share)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(self.running, name))

    def _remove_unfinished(self, share: str) -> None:
        """Remove the temporary files and folders of a share."""
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.running):
                if name.endswith(f".{share}.part"):
                    path = os.path.join(self.running, name)
                    if os.path.isdir(path):
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        os.unlink(path)

    def _busy(self) -> str:
        return f"{self.root}: another process cuts the same {self.source_noun}s into it; wait for it, or name another --out"

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"{self.root} cannot be written ({error.strerror}): name another with --out DIR")

    def unwritable_shard(self, error: OSError) -> UserError:
        """The error to raise where a shard or record could not be written: why, and what to do."""
        kept = f"finished {self.source_noun}s are kept"
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            why = error.strerror or error
            return UserError(f"{self.root}: cannot be written ({why}); {kept}: give the same command again")
        free = 0
        with contextlib.suppress(OSError):
            free = free_disk(self.root)
        return UserError(
            f"{self.root}: the disk is full ({free / 2**30:.1f} GiB free); {kept}: make room and give the same command again"
        )


def _setting_differences(theirs: bytes, mine: bytes) -> str:
    """The settings that differ, in words such as "z_margin 0 and not 25"."""
    try:
        old, new = (_flatten(parse_json(text, {"tiling": {}})) for text in (theirs, mine))
    except ValueError:
        return "settings that cannot be read"
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return ", ".join(f"{name} {old.get(name)} and not {new.get(name)}" for name in names)


def _flatten(value: dict[str, Any]) -> dict[str, Any]:
    tiling = value.get("tiling", {})
    return {name: item for name, item in {**value, **tiling}.items() if name != "tiling"}
