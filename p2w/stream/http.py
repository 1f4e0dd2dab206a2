"""A data set below an http(s) or s3 URL whose server supports byte ranges: random access, in the order of a local set.

    GET …/shard.tar   Range: bytes=start-end   ->   206, the voxels of one sub-scan

The batches are those of the same set in a folder, bit for bit, for either format of shards. Only the bytes that are used are
fetched; they are received where they belong, and each block is checked before the next one comes. Servers without byte
ranges, and s3 without botocore, are streamed (see `tar`).

Each thread keeps its connections open, one to each server. To hide the latency, at least MIN_THREADS threads send requests
in parallel if a rank's batch has as many rows. `p2w.http_client` says which requests are tried again, `data.retry_minutes`
for how long.
"""

import functools
import http.client
import io
import os
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np
import requests
from numpy.typing import NDArray

from p2w import http_client
from p2w.files import crc32c
from p2w.http_client import Refused, RequestFailed, retried
from p2w.rng import Ids
from p2w.stream.local import DataError, SampleReader, ShardSet

MIN_THREADS = 8
HEAD = 16 << 10  # most bytes that the head of an answer may have
BLOCK = 512 << 10  # bytes received at a time, and checked while they are still in a core's cache
_PAUSE = http_client.PAUSE_S
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_own = threading.local()  # each thread keeps its own connections


class HttpSet(ShardSet):
    """A data set below a URL, read by byte ranges. Reader threads share one object."""

    min_threads = MIN_THREADS

    def reader(
        self, ids: Ids, shuffle: tuple[int, int] | None = None
    ) -> AbstractContextManager[SampleReader]:
        """The set itself: any number of threads can read any sub-scan of it."""
        return nullcontext(self)

    def read_into(self, sub_scan: int, out: Any) -> None:
        """Fetch the voxels of one sub-scan into `out`, int16 (D, H, W), and check them.

        Raises:
            DataError: the server does not send them, after several tries where that may help; or the checksum differs.
        """
        url, start = f"{self.where}/{self.shard(sub_scan)}", int(self.offsets[sub_scan])
        packed = self.packed_sizes is not None
        target = np.empty(self.stored_bytes(sub_scan), np.uint8) if packed else self.bytes_of(out)
        try:
            found = retried(
                lambda: self._receive(url, start, target), url, self.retry_s, self.on_wait, _PAUSE
            )
        except RequestFailed as error:
            raise DataError(
                f"{url}: cannot be fetched {error}: check that the shard is there and whole, upload it again, or copy "
                "the set to a local folder"
            ) from error
        if packed:
            self.copy(sub_scan, target, out)
        elif self.verify:
            self.check(sub_scan, found)

    def _receive(self, url: str, start: int, target: NDArray[np.uint8]) -> int:
        """Ask once for the bytes of a file from `start` on, and receive them in `target`; returns their CRC-32C."""
        found = done = 0
        for end in receive_range(url, start, target.data):
            if self.verify and self.packed_sizes is None:
                found = crc32c(target[done:end].data, found)
            done = end
        return found


def receive_range(url: str, start: int, out: memoryview) -> Generator[int, None, None]:
    """Ask once for `len(out)` bytes of a file from `start` on, and receive them in `out`.

    Yields after each block how many bytes have arrived; the rest of `out` is not valid yet. A server behind a proxy, and one
    that redirects, is asked through `requests`. Raises Refused, or an error of the connection.
    """
    address = http_client.address(url)
    parts = urlsplit(address)
    servers: dict[tuple[str, str], Connection | None] = _own.__dict__.setdefault("servers", {})
    origin = (parts.scheme, parts.netloc)
    if origin not in servers:
        servers[origin] = Connection.to(address)
    connection = servers[origin]
    if connection is not None:
        try:
            yield from connection.receive(address, start, out)
            return
        except Redirected:
            servers[origin] = None
    out[:] = http_client.read_range(url, start, len(out))
    yield len(out)


class Redirected(Exception):
    """The server redirects the request to another address."""


class Connection:
    """A connection to a server that one thread keeps open; the body of an answer is received where it belongs.

    `requests` copies a body in pieces of 16 kB, and takes longer for a head than a whole answer takes here: for 2 MiB three
    times the processor time. The usual answer, a body of the length asked for, is parsed here; any other one is parsed by
    the standard library.
    """

    def __init__(self, connection: http.client.HTTPConnection, headers: dict[str, str]) -> None:
        """Prepare; the first request connects. Every request is sent with `headers`."""
        self.connection = connection
        self.headers = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("latin-1")
        self.arrived = bytearray(HEAD)

    @classmethod
    def to(cls, url: str) -> "Connection | None":
        """A connection to the server of a URL; None if it needs a proxy, a client certificate or a password in the URL."""
        parts = urlsplit(url)
        found = _settings(parts.scheme, parts.netloc)
        if found is None:
            return None
        headers, verify = found
        host = urlsplit(f"//{headers['Host']}")
        server = host.hostname or "", host.port
        if parts.scheme == "http":
            return cls(http.client.HTTPConnection(*server, timeout=http_client.CONNECT_S), headers)
        context = _tls_context(verify)
        return cls(
            http.client.HTTPSConnection(*server, timeout=http_client.CONNECT_S, context=context), headers
        )

    def __del__(self) -> None:
        """Close the connection when the thread that keeps it ends."""
        self.connection.close()

    def receive(self, url: str, start: int, out: memoryview) -> Generator[int, None, None]:
        """Receive a range of bytes as `receive_range` does; also raises Redirected."""
        reusable, nbytes = False, len(out)
        try:
            count, body = self._ask(url, start, nbytes)
            if _is_usual(bytes(self.arrived[: body - 4]), start, nbytes):
                first = min(count - body, nbytes)
                out[:first] = memoryview(self.arrived)[body : body + first]
                for done in _receive_body(self.connection.sock, out, first):
                    reusable = done == nbytes == max(done, count - body)
                    yield done
                return
            answer = _Answer(bytes(self.arrived[:count]), self.connection.sock)
            response = http.client.HTTPResponse(cast(socket.socket, answer), method="GET")
            response.begin()
            if response.status in _REDIRECTS:
                raise Redirected
            http_client.check_range(response.status, response.reason, response.headers, start, nbytes)
            for done in _receive_body(response, out, 0):
                reusable = done == nbytes and not response.read(1) and not response.will_close
                yield done
        finally:
            if not reusable:  # the rest of this answer must not be read as the next one
                self.connection.close()

    def _ask(self, url: str, start: int, nbytes: int) -> tuple[int, int]:
        """Send a request for a range, and receive the head of the answer in `arrived`.

        Returns how many bytes have arrived, and the position of the body among them.
        """
        connection = self.connection
        if connection.sock is not None and _readable(connection.sock):
            connection.close()  # the server has closed it
        if connection.sock is None:
            connection.connect()
            assert connection.sock is not None
            # The system's time-out allows one call for a whole block; with Python's, each arrival would need a call.
            limit = struct.pack("ll", int(http_client.READ_S), int(http_client.READ_S % 1 * 1e6))
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        connection.sock.settimeout(http_client.READ_S)
        end = start + nbytes - 1
        words = (_target(url), self.headers, start, end)
        connection.sock.sendall(b"GET %b HTTP/1.1\r\n%bRange: bytes=%d-%d\r\n\r\n" % words)
        count, room = 0, memoryview(self.arrived)
        while got := connection.sock.recv_into(room[count : count + 4096]):
            count += got
            found = self.arrived.find(b"\r\n\r\n", 0, count)
            if found >= 0:
                return count, found + 4
        if count == 0:
            raise http.client.RemoteDisconnected("the server closes the connection without response")
        raise Refused("the head of the answer has no end", final=False)


class _Answer(io.RawIOBase):
    """An answer as a file object: first the bytes that have arrived, then what the connection gives."""

    def __init__(self, arrived: bytes, connection: socket.socket) -> None:
        self.arrived, self.connection = arrived, connection

    def readable(self) -> bool:
        """Always True."""
        return True

    def readinto(self, out: Any) -> int:
        """Fill `out`, and return how many bytes were put there; 0 at the end."""
        if not self.arrived:
            return self.connection.recv_into(out)
        count = min(len(out), len(self.arrived))
        out[:count], self.arrived = self.arrived[:count], self.arrived[count:]
        return count

    def makefile(self, mode: str) -> io.BufferedReader:
        """The file object that http.client asks a socket for."""
        return io.BufferedReader(self)


def _is_usual(head: bytes, start: int, nbytes: int) -> bool:
    """Whether the head of an answer, without its empty last line, announces exactly the bytes asked for, not encoded.

    An answer for which this is False may still be right: then the standard library parses it.
    """
    status, *lines = head.lower().split(b"\r\n")
    found: dict[bytes, bytes] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or name in found or name != name.strip():
            return False
        found[name] = value.strip()
    return (
        status.startswith(b"http/1.1 206")
        and found.get(b"content-range", b"").startswith(b"bytes %d-%d/" % (start, start + nbytes - 1))
        and found.get(b"content-length") == b"%d" % nbytes
        and found.get(b"connection", b"keep-alive") == b"keep-alive"
        and not found.keys() & {b"transfer-encoding", b"content-encoding"}
    )


def _receive_body(
    source: "socket.socket | http.client.HTTPResponse", out: memoryview, done: int
) -> Generator[int, None, None]:
    """Receive the bytes of `out` from byte `done` on; yields after each block how many have arrived.

    Without TLS one call receives a whole block, and Python's other threads run meanwhile.
    """
    nbytes, began = len(out), time.monotonic()
    receive: Callable[[memoryview], int]
    if type(source) is socket.socket:
        source.settimeout(None)
        receive = functools.partial(source.recv_into, nbytes=0, flags=socket.MSG_WAITALL)
    else:
        receive = source.readinto if isinstance(source, http.client.HTTPResponse) else source.recv_into
    while True:
        end = min(nbytes, (done // BLOCK + 1) * BLOCK)
        while done < end:
            try:
                count = receive(out[done:end])
            except BlockingIOError as error:  # the system's time-out
                raise TimeoutError("timed out") from error
            done += count
            if not count:
                raise Refused(f"{done:,} bytes of {nbytes:,} arrived", final=False)
            if done < end and time.monotonic() - began > http_client.READ_S + done / http_client.SLOWEST:
                raise Refused(f"{done:,} bytes in {time.monotonic() - began:.0f} s", final=False)
        yield done
        if done == nbytes:
            return


def _readable(connection: socket.socket) -> bool:
    """Whether a connection on which no answer is awaited can be read: the server has closed it."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))


@functools.lru_cache(4096)
def _target(url: str) -> bytes:
    """Path and query of a URL, quoted, as the first line of a request has them."""
    return str(requests.Request("GET", url).prepare().path_url).encode("ascii")


@functools.lru_cache(64)
def _settings(scheme: str, netloc: str) -> tuple[dict[str, str], bool | str] | None:
    """Headers for a server, and the setting `verify` of `requests` for it; None if `requests` must ask this server itself.

    Cached for the process, since every validation starts new threads.
    """
    url = f"{scheme}://{netloc}/"
    session = http_client.fixed_session(url)
    if requests.utils.select_proxy(url, session.proxies) or session.cert or "@" in netloc:
        return None
    request = session.prepare_request(requests.Request("GET", url))
    headers = {name: str(value) for name, value in request.headers.items()}
    headers |= {"Host": urlsplit(str(request.url)).netloc, "Accept-Encoding": "identity"}
    return headers, session.verify


@functools.lru_cache(16)
def _tls_context(verify: bool | str) -> ssl.SSLContext:
    """TLS with the certificates that `requests` would use: certifi's for `verify=True`, else those of a file or folder."""
    where = requests.certs.where() if verify is True else str(verify)
    folder = os.path.isdir(where)
    context = ssl.create_default_context(cafile=None if folder else where, capath=where if folder else None)
    context.set_alpn_protocols(["http/1.1"])
    return context
