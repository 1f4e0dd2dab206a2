"""Copies of data sets on a node's own disk, made before training, which then reads them, not a shared disk or a server.

    DIR/p2w-FINGERPRINT/     one set; the name is that of its content, so that jobs with the same set share the copy
      manifest.parquet       written last: with it the copy is whole
      UID.tar | UID.arrow    written under another name, compared with the manifest's checksum, then renamed
      .lock .in-use          held by who copies, and by who reads; a copy that is read is not removed

A copy that was interrupted goes on where it ended. Ids and order are those of the set that was copied.
"""

import contextlib
import fcntl
import io
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from p2w import http_client
from p2w.errors import UserError
from p2w.files import FileLock, crc32c, write_atomic, write_remedy
from p2w.shards.manifest import data_fingerprint, open_manifest, parse_mixture, read_manifest
from p2w.shards.manifest_schema import MANIFEST_NAME, shard_columns, stores_scans
from p2w.stream.local import DataError, LocalSet, ShardSet
from p2w.stream.mixed import MixedSet

THREADS = 4  # shards copied at a time: a server, or a shared disk, answers each of them after a while
PIECE = 1 << 20  # bytes read at a time
MARGIN = 64 << 20  # bytes that are left free


class StagedCopy:
    """The copies of a set, or of the sets of a mixture, below a folder of this node."""

    def __init__(self, shards: ShardSet, folder: Path) -> None:
        """`shards` is the set as it was opened where it is."""
        self.shards, self.folder = shards, folder
        self._sets = shards.sets if isinstance(shards, MixedSet) else [shards]
        self._readers: list[int] = []  # open files whose locks say that the copies are read

    def folders(self) -> list[Path]:
        """The folders of the copies."""
        return [self.folder / f"p2w-{data_fingerprint(one.meta)}" for one in self._sets]

    def copy(self, on_progress: Callable[[int, int, int], None] = lambda *_: None) -> None:
        """Copy what is not there yet; every shard is compared with its checksum.

        `on_progress` is called at every piece, by several threads, with the bytes that are copied, those to be copied and
        those that were there; and now and then while another process copies. Raises UserError, as for too little room.
        """
        try:
            with contextlib.ExitStack() as locks:
                for target in self.folders():
                    locks.enter_context(_locked(target, on_progress))
                missing = list(self._missing())
                there = sum(sum(shard_columns(one.meta)[1]) for one in self._sets)
                total = sum(nbytes for *_, nbytes, _ in missing)
                free = shutil.disk_usage(self.folder).free
                if total + MARGIN * bool(total) > free:
                    raise UserError(
                        f"{self.folder}: {free / 2**30:.2f} GiB free, and what is left to copy of {self.shards.where} takes "
                        f"{total / 2**30:.2f}: make room, name another folder with --stage-to, or train without it"
                    )
                self._copy_all(missing, Count(total, there - total, on_progress))
                for one, target in zip(self._sets, self.folders(), strict=True):
                    self._copy_manifest(one, target)
                    self._readers.append(_in_use(target))
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot be written ({error.strerror or error}): {write_remedy(error)}, or name another "
                "folder with --stage-to"
            ) from error

    def _missing(self) -> Iterator[tuple[ShardSet, Path, str, int, int]]:
        """(set, folder of its copy, name, bytes, checksum) of the shards that are not there."""
        for one, target in zip(self._sets, self.folders(), strict=True):
            for name, nbytes, checksum in zip(*shard_columns(one.meta), strict=True):
                path = target / name
                if not path.is_file() or path.stat().st_size != nbytes:
                    yield one, target, name, nbytes, checksum

    def _copy_all(self, missing: list[tuple[ShardSet, Path, str, int, int]], count: "Count") -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            tasks = [pool.submit(_copy_shard, *shard, count) for shard in missing]
            try:
                for task in tasks:
                    task.result()
            except BaseException:
                count.ended = True
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _copy_manifest(self, one: ShardSet, target: Path) -> None:
        path, source = target / MANIFEST_NAME, f"{one.where}/{MANIFEST_NAME}"
        if path.exists():
            return
        if "://" in one.where:
            from p2w.stream.tar import fetch_manifest  # noqa: PLC0415 - webdataset: for remote sets only

            data = fetch_manifest(source, one.retry_s)
        else:
            data = Path(source).read_bytes()
        if data_fingerprint(open_manifest(data).meta) != data_fingerprint(one.meta):
            raise UserError(f"{source}: has changed since the set was opened: repeat the command")
        write_atomic(path, data)

    def open(self, check_shards: bool = True) -> ShardSet:
        """The set, read from its copies, in the order that the original has."""
        sets = [
            self._open_one(one, target, check_shards)
            for one, target in zip(self._sets, self.folders(), strict=True)
        ]
        found = sets[0]
        if isinstance(self.shards, MixedSet):
            found = MixedSet(sets, parse_mixture(self.shards.where))
            found.weights, found.meta = self.shards.weights, self.shards.meta
        found.on_bad, found.order = self.shards.on_bad, self.shards.order
        found.order_version = self.shards.order_version
        return found

    @staticmethod
    def _open_one(one: ShardSet, target: Path, check_shards: bool) -> ShardSet:
        manifest = read_manifest(target, check_shards=check_shards)
        found: ShardSet
        if stores_scans(manifest.meta):
            from p2w.stream.random_crops import open_scan_store  # noqa: PLC0415 - SimpleITK: for such sets only

            found = open_scan_store(manifest, LocalSet, one.verify)
        else:
            found = LocalSet(manifest, one.verify)
        found.copy_of = one.where
        return found

    def remove(self) -> bool:
        """Delete the copies, unless another process reads them. Returns whether they are gone."""
        gone = True
        for reader, target in zip(self._readers, self.folders(), strict=True):
            lock = FileLock(target / ".lock", without="remove no copy that another job makes")
            try:
                if not lock.acquire():
                    raise BlockingIOError("another process copies")
                fcntl.flock(reader, fcntl.LOCK_EX | fcntl.LOCK_NB)
                (target / MANIFEST_NAME).unlink(missing_ok=True)  # first: what is left is no whole set
                shutil.rmtree(target)
            except OSError:
                gone = False
            finally:
                lock.release()
                os.close(reader)
        self._readers = []
        return gone


class Count:
    """Bytes copied so far, by all threads."""

    def __init__(self, total: int, there: int, on_progress: Callable[[int, int, int], None]) -> None:
        self.total, self.there, self.on_progress = total, there, on_progress
        self.done, self.ended = 0, False

    def add(self, nbytes: int) -> None:
        """Count a piece. Raises InterruptedError once another thread has failed."""
        if self.ended:
            raise InterruptedError("another shard could not be copied")
        self.done += nbytes
        self.on_progress(self.done, self.total, self.there)


def _copy_shard(one: ShardSet, target: Path, name: str, nbytes: int, checksum: int, count: Count) -> None:
    """Copy a shard and compare it with the manifest. Raises DataError, or OSError of writing."""
    source, temporary = f"{one.where}/{name}", target / f".{name}.part"
    if http_client.reaches(source):
        try:
            found = http_client.retried(
                lambda: _write(temporary, http_client.read_pieces(source), nbytes, count),
                source, one.retry_s, lambda: count.add(0),
            )  # fmt: skip
        except http_client.RequestFailed as error:
            raise DataError(f"{source}: cannot be fetched {error}: upload the shard again") from error
    elif "://" in source:
        from p2w.stream.tar import open_stream  # noqa: PLC0415 - webdataset: for remote sets only

        with open_stream(source) as stream:
            found = _write(temporary, iter(lambda: stream.read(PIECE), b""), nbytes, count)
    else:
        with _opened(source) as file:
            found = _write(temporary, iter(lambda: file.read(PIECE), b""), nbytes, count)
    if found != (nbytes, checksum):
        temporary.unlink(missing_ok=True)
        raise DataError(
            f"{source}: {found[0]:,} bytes with crc32c {found[1]:08x} were read, the manifest says {nbytes:,} with "
            f"{checksum:08x}: p2w verify {one.where if '://' not in one.where else 'URL'}"
        )
    os.replace(temporary, target / name)


@contextlib.contextmanager
def _opened(source: str) -> Iterator[io.FileIO]:
    """A shard of a folder, to be read. Raises DataError."""
    try:
        with open(source, "rb", buffering=0) as file:
            yield file
    except FileNotFoundError as error:
        raise DataError(f"{source}: is gone: copy the shard there again") from error


def _write(path: Path, pieces: Iterable[bytes], most: int, count: Count) -> tuple[int, int]:
    """Write what comes, at most a piece more than `most` bytes, and bring it to the disk: its bytes and their CRC-32C."""
    done, found = 0, 0
    with open(path, "wb") as file:
        for piece in pieces:
            file.write(piece)
            found, done = crc32c(piece, found), done + len(piece)
            count.add(len(piece))
            if done > most:
                break
        file.flush()
        os.fsync(file.fileno())
    return done, found


@contextlib.contextmanager
def _locked(target: Path, on_progress: Callable[[int, int, int], None]) -> Iterator[None]:
    """The lock of who copies; waited for while another process of this node copies the same set."""
    path = target / ".lock"
    lock = FileLock(path, without="let one job of a node copy at a time")
    while True:
        target.mkdir(parents=True, exist_ok=True)
        if not lock.acquire():
            on_progress(0, 0, 0)
            time.sleep(0.5)
        elif path.exists() and os.stat(path).st_ino == os.fstat(lock.fileno()).st_ino:
            break
        else:  # the copy was removed after the file was opened
            lock.release()
    try:
        yield
    finally:
        lock.release()


def _in_use(target: Path) -> int:
    """An open file whose shared lock says that this process reads the copy."""
    file = os.open(target / ".in-use", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_SH)
    return file
