"""A data set below an http(s) URL whose server supports byte ranges: random access, in the order of a local set.

    GET …/shard.tar   Range: bytes=start-end   ->   206, the voxels of one sub-scan

The batches are those of the same set in a folder, bit for bit, for either format of shards; only the bytes that are used
are fetched, and nothing is buffered. Servers without byte ranges, and s3, are streamed (see `tar`).

Each thread keeps its connection. To hide the latency, at least MIN_THREADS threads send requests in parallel if a rank's
batch has as many rows. `requests` follows redirects and uses the machine's proxies, certificates and .netrc.
"""

import logging
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import requests
import urllib3

from p2w.rng import Ids
from p2w.stream.local import DataError, SampleReader, ShardSet

MIN_THREADS = 8
_TRIES = 5
_PAUSE = 0.5  # seconds before the first new try, doubled for each further one
_TIMEOUT = (30.0, 60.0)  # seconds to connect, and without a byte
_RETRY_STATUS = frozenset({408, 429})  # the statuses below 500 after which another try may succeed


def supports_ranges(url: str) -> bool:
    """Whether the server supports byte ranges: it answers a request for the first byte of `url` with that byte alone."""
    try:
        with requests.get(url, headers=_range_headers(0, 1), stream=True, timeout=_TIMEOUT) as answer:
            return _problem(answer, 0, 1) is None
    except requests.RequestException:
        return False


def _range_headers(start: int, nbytes: int) -> dict[str, str]:
    """Request headers for a range of bytes of the file, uncompressed."""
    return {"Range": f"bytes={start}-{start + nbytes - 1}", "Accept-Encoding": "identity"}


def _problem(answer: requests.Response, start: int, nbytes: int) -> str | None:
    """Why an answer does not have the requested bytes; None when it does."""
    if answer.status_code != 206:
        return f"the server answers {answer.status_code} {answer.reason}"
    content_range = answer.headers.get("Content-Range", "")
    if content_range.partition("/")[0] != f"bytes {start}-{start + nbytes - 1}":
        return f"the server gives '{content_range}' for bytes {start}-{start + nbytes - 1}"
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        return f"the server compresses its answers ({answer.headers['Content-Encoding']})"
    return None


class HttpSet(ShardSet):
    """A data set below a URL, read by byte ranges. Threads share it."""

    min_threads = MIN_THREADS
    _own = threading.local()  # each thread keeps its own connections

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
        url = f"{self.where}/{self.shard(sub_scan)}"
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(_PAUSE * 2 ** (attempt - 1))
            try:
                data, reason, final = self._fetch(url, int(self.offsets[sub_scan]))
            except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
                data, reason, final = b"", _innermost_reason(error), False
            if not reason:
                self.copy(sub_scan, np.frombuffer(data, np.uint8), out)
                return
            if final:
                break
            logging.getLogger(__name__).warning("%s: %s; trying again", url, reason)
        raise DataError(
            f"{url}: cannot be fetched ({reason}), tried {attempt + 1} times: check that the shard is there and "
            "whole, upload it again, or copy the set to a local folder"
        )

    def _fetch(self, url: str, start: int) -> tuple[bytes, str, bool]:
        """(bytes, "", False), or (b"", reason, final): why there are none, and whether another try is useless."""
        headers = _range_headers(start, self.nbytes)
        with self._session().get(url, headers=headers, stream=True, timeout=_TIMEOUT) as answer:
            if reason := _problem(answer, start, self.nbytes):
                return b"", reason, answer.status_code < 500 and answer.status_code not in _RETRY_STATUS
            data: bytes = answer.raw.read(self.nbytes, decode_content=False)
            if len(data) < self.nbytes:
                return b"", f"{len(data):,} bytes of {self.nbytes:,} arrived", False
            answer.raw.read(1)  # reads the end of the answer, so that the connection can be used again
            return data, "", False

    def _session(self) -> requests.Session:
        if not hasattr(self._own, "session"):
            self._own.session = requests.Session()
        session: requests.Session = self._own.session
        return session


def _innermost_reason(error: BaseException) -> str:
    """The message of the innermost error; the errors around it repeat the address and print objects."""
    while error.args and isinstance(error.args[-1], BaseException):
        error = error.args[-1]
    reason = getattr(error, "reason", None)
    if isinstance(reason, BaseException):
        return _innermost_reason(reason)
    return (str(error).splitlines() or [type(error).__name__])[0]
