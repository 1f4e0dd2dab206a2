"""A data set below a URL without byte ranges, or an s3 URL without botocore: tar shards, streamed through `webdataset`.

Nothing is stored on disk. A stream has no random access, so the order is `sampler.streamed_order` (a shuffle of shards,
then within a buffer), where a local set is shuffled globally. It too depends on seed, epoch and batch alone, not on the
world size, the reader threads or restarts. The manifest is fetched once, checksums are compared as for local sets, and
crops are drawn for the same ids. Validation has the same sub-scans in another fixed order.

Cost: every row of a rank's batch has one connection (a `curl` or `aws` process) and buffers up to BUFFER sub-scans:
B / W * 16 * 2 MiB of memory, 512 MiB for a batch of 16 on one rank. A row that starts inside a shard, after a resume or
where two slots share a shard, streams the beginning of that shard and drops it.
"""

import io
import logging
import shlex
import shutil
import subprocess
import tarfile
import threading
import time
import tokenize
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from typing import IO, Any, cast

import numpy as np
import webdataset as wds
from numpy.lib import format as npy

from p2w import http_client
from p2w.errors import UserError
from p2w.rng import Ids
from p2w.shards import manifest_schema
from p2w.shards.manifest import read_manifest
from p2w.stream import sampler
from p2w.stream.http import HttpSet
from p2w.stream.local import STREAM_BUFFER, DataError, SampleReader, ShardSet

BUFFER = STREAM_BUFFER
_TRIES = 5  # in a row without progress: servers may close a connection while training does not read from it
_PAUSE = 0.5  # seconds before the first new try, doubled for each further one
_LONGEST_PAUSE = 30.0

NPY_HEADER = 4096  # bytes at most before the voxels of a .npy; ours has 128
PIECE = 1 << 20  # bytes read at a time
MOST_MANIFEST = 1 << 30  # bytes; that of all of LUNA16, the largest set known, has 3 million

# NumPy evaluates headers by `ast`, which Python 3.11.7, for one, cannot do in two threads at a time: SystemError, rarely.
_HEADERS = threading.Lock()

_PROGRAMS = {
    "http": ("curl", "apt-get install curl"),
    "https": ("curl", "apt-get install curl"),
    "s3": (
        "aws",
        "pip install botocore, which reads by byte ranges, or install the AWS CLI, https://aws.amazon.com/cli",
    ),
}


def tar_source(url: str) -> str:
    """The argument of `webdataset.gopen` for a URL: http(s) as it is, through curl; s3 through the AWS CLI.

    Raises:
        UserError: another scheme, or the program that fetches it is not installed.
    """
    scheme = url.partition("://")[0]
    if scheme not in _PROGRAMS:
        raise UserError(
            f"{url}: a data set is a folder or an http, https or s3 URL: copy it to a folder here"
        )
    program, remedy = _PROGRAMS[scheme]
    if shutil.which(program) is None:
        raise UserError(f"{url}: needs the program '{program}', which is not on the PATH: {remedy}")
    # `exec` replaces the shell, so that ending the process ends the AWS CLI.
    return f"pipe:exec aws s3 cp --only-show-errors {shlex.quote(url)} -" if scheme == "s3" else url


def _program(url: str) -> str:
    return _PROGRAMS[url.partition("://")[0]][0]


@contextmanager
def open_stream(url: str) -> Iterator[Any]:
    """The byte stream of a URL; its process is ended with the block, however much was read.

    Raises:
        OSError: the process ended with an error; raised instead of the error of reading, since it says more.
    """
    stream = wds.gopen(tar_source(url))
    try:
        # The pipe itself, because `read` of webdataset's wrapper raises as soon as the process has failed: what is left in
        # the pipe would be lost, which may be all of a small shard, at every try.
        yield stream.stream
    except (OSError, tarfile.TarError) as error:
        with suppress(subprocess.TimeoutExpired):  # it still runs if its bytes are not a tar
            code = stream.proc.wait(1.0)
            if code:
                raise OSError(f"{_program(url)} ended with code {code}") from error
        raise
    else:
        if code := stream.proc.poll():
            raise OSError(f"{_program(url)} ended with code {code}")
    finally:
        stream.proc.terminate()
        with suppress(OSError):  # the exit status of a process that we have ended
            stream.close()


def fetch_manifest(url: str, retry_s: float = 0.0) -> bytes:
    """All bytes of the manifest at a URL.

    Raises:
        UserError: it cannot be fetched.
    """
    if http_client.reaches(url):
        return http_client.fetch(url, MOST_MANIFEST, retry_s, pause_s=_PAUSE)
    stream = wds.gopen(tar_source(url))
    try:
        with closing(stream):
            data: bytes = stream.read(MOST_MANIFEST)
            if len(data) == MOST_MANIFEST:
                stream.proc.terminate()
                raise UserError(
                    f"{url}: has {MOST_MANIFEST:,} bytes or more, which no manifest has: check the address"
                )
            return data
    except OSError as error:
        code = stream.proc.wait()
        raise UserError(
            f"{url}: cannot be fetched ({_program(url)} ended with code {code}): check the address, and that "
            "it is readable from this machine"
        ) from error


def open_url(where: str, verify: bool = True, retry_s: float = 0.0) -> ShardSet:
    """Open the set at a URL: read by byte ranges if the server supports them, else streamed.

    A server that fails is asked again for `retry_s` seconds; it never counts as one without byte ranges.

    Raises:
        UserError: there is no manifest; the server does not answer; or the set must be streamed, and its shards are not tar.
    """
    where = where.rstrip("/")
    if not (where.startswith("s3:") and http_client.reaches(where)):
        tar_source(where)  # refuses other schemes, and says which program is missing
    manifest_url = f"{where}/{manifest_schema.MANIFEST_NAME}"
    found = read_manifest(fetch_manifest(manifest_url, retry_s))
    if http_client.reaches(where) and http_client.supports_ranges(manifest_url, retry_s, pause_s=_PAUSE):
        if not manifest_schema.stores_scans(found.meta):
            return HttpSet(found, where, verify)
        from p2w.stream.random_crops import open_scan_store  # noqa: PLC0415 - SimpleITK: for such sets only

        return open_scan_store(found, lambda manifest, verify: HttpSet(manifest, where, verify), verify)
    if manifest_schema.stores_scans(found.meta):
        raise UserError(
            f"{where}: stores whole scans, which are read by byte ranges, and none are to be had there: use a server that "
            "gives them, copy the set to a local folder, or cut it with --store subscans"
        )
    shards = TarSet(found, where, verify)
    other = [name for name in shards.shard_names if not name.endswith(".tar")]
    if other:
        raise UserError(
            f"{where}: {other[0]} is not a tar shard, and the server has no byte ranges, so that only tar can be "
            "streamed: cut the set with --format tar, or copy it to a local folder"
        )
    return shards


class BoundedStream:
    """A stream that ends after the number of bytes in the manifest, whatever a server sends or a tar header claims."""

    def __init__(self, stream: Any, nbytes: int) -> None:
        self.stream, self.left = stream, nbytes

    def read(self, count: int) -> bytes:
        """Read at most `count` bytes."""
        data: bytes = self.stream.read(min(count, self.left))
        self.left -= len(data)
        return data


class TarSet(ShardSet):
    """A data set below a URL, streamed."""

    order = "streamed"

    def reader(
        self, ids: Ids, shuffle: tuple[int, int] | None = None
    ) -> AbstractContextManager[SampleReader]:
        """A reader that streams the shards of these ids one after the other."""
        return closing(_ShardReader(self, ids, shuffle))


class _ShardReader:
    """Read the shards of one slot: stream until the requested sub-scan arrives, and buffer those that arrive before."""

    def __init__(self, shards: TarSet, ids: Ids, shuffle: tuple[int, int] | None) -> None:
        """Prepare; nothing is fetched before the first `read_into`."""
        self.shards = shards
        self.remaining = Counter(ids.tolist())  # requests left; padding requests an id twice
        self.buffered: dict[int, bytes | DataError] = {}
        numbers = np.unique(shards.shard_numbers[ids]).astype(np.int64)
        self.arrivals = self._arrivals(
            ids, sampler.epoch_permutation(numbers, *shuffle) if shuffle else numbers
        )

    def read_into(self, sub_scan: int, out: Any) -> None:
        """Copy the voxels of the next sub-scan into `out`, int16 (D, H, W), and check them.

        Raises:
            DataError: its shard cannot be streamed or lacks it, or its checksum differs.
        """
        while sub_scan not in self.buffered:
            arrived, data = next(self.arrivals)
            self.buffered[arrived] = data
        self.remaining[sub_scan] -= 1
        data = self.buffered[sub_scan] if self.remaining[sub_scan] else self.buffered.pop(sub_scan)
        if isinstance(data, DataError):
            raise data
        voxels = np.frombuffer(data, np.uint8)[-self.shards.nbytes :]  # after the header of the .npy
        self.shards.copy(sub_scan, voxels, out)

    def _arrivals(self, ids: Ids, shards: Ids) -> Generator[tuple[int, bytes | DataError], None, None]:
        """Yield every id once with the bytes of its .npy file, or with the error that prevents that, shard by shard."""
        for number in shards.tolist():
            wanted = {self.shards.key(i): i for i in ids[self.shards.shard_numbers[ids] == number].tolist()}
            try:
                yield from self._shard(number, wanted)
            except DataError as error:
                for sub_scan in wanted.values():
                    yield sub_scan, error

    def _shard(
        self, number: int, wanted: dict[str, int]
    ) -> Generator[tuple[int, bytes | DataError], None, None]:
        """Yield the wanted sub-scans of one shard; after a broken stream, try again for those that are missing."""
        url = f"{self.shards.where}/{self.shards.shard_names[number]}"
        failures, since = 0, time.monotonic()
        while wanted:
            before = len(wanted)
            try:
                yield from self._stream(url, wanted)
                reason = f"it ends without {min(wanted)}" if wanted else ""
            except (OSError, tarfile.TarError) as error:
                reason = str(error.args[0])
            if not wanted:
                return
            if len(wanted) < before:
                failures, since = 0, time.monotonic()
            failures += 1
            patient = time.monotonic() - since < self.shards.retry_s
            if failures >= _TRIES and not (patient and not http_client.refuses(url)):
                raise DataError(
                    f"{url}: cannot be streamed ({reason}), tried {failures} times: check that the shard is "
                    "there and whole, upload it again, or copy the set to a local folder"
                )
            logging.getLogger(__name__).warning("%s: %s; trying again", url, reason)
            self.shards.on_wait()
            time.sleep(min(_LONGEST_PAUSE, _PAUSE * 2 ** (failures - 1)))

    def _stream(
        self, url: str, wanted: dict[str, int]
    ) -> Generator[tuple[int, bytes | DataError], None, None]:
        """Stream the shard once; yield the wanted sub-scans and remove them from `wanted`."""
        number = self.shards.shard_numbers[next(iter(wanted.values()))]
        with open_stream(url) as stream:
            bounded = BoundedStream(stream, self.shards.shard_sizes[number])
            with tarfile.open(fileobj=cast(IO[bytes], bounded), mode="r|", bufsize=PIECE) as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # it would keep all headers in memory
                    key = member.name.removesuffix(".npy")
                    if member.name == key or key not in wanted:
                        continue
                    data = self._checked(tar, member, wanted[key])
                    yield wanted.pop(key), data
                    if not wanted:
                        return

    def _checked(self, tar: tarfile.TarFile, member: tarfile.TarInfo, sub_scan: int) -> bytes | DataError:
        """The bytes of a sub-scan's .npy, or the error that its header or size does not fit; the size is checked first."""
        shards = self.shards
        header = member.size - shards.nbytes
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or not 0 < header <= NPY_HEADER:
            return shards.damaged(
                sub_scan, f"its tar member is not a file of {shards.nbytes:,} bytes and a header"
            )
        file = tar.extractfile(member)
        data = file.read() if file else b""
        try:
            found, end = _read_npy_header(data)
        except (ValueError, EOFError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError) as error:
            return shards.damaged(sub_scan, f"its .npy header cannot be read ({type(error).__name__})")
        if found != (shards.shape, False, np.dtype("<i2")) or end != header:
            return shards.damaged(sub_scan, f"its .npy holds {found[2]} {found[0]}, not int16 {shards.shape}")
        return data

    def close(self) -> None:
        """End the stream and its process."""
        self.arrivals.close()
        self.buffered.clear()


def _read_npy_header(data: bytes) -> tuple[tuple[tuple[int, ...], bool, np.dtype], int]:
    """((shape, whether in Fortran order, type), bytes of the header) of a .npy. Raises what NumPy raises."""
    start = io.BytesIO(data)
    npy.read_magic(start)
    with _HEADERS:
        return npy.read_array_header_1_0(start), start.tell()
