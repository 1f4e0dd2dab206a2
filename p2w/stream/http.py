"""A data set below an http(s) URL whose server gives byte ranges: read anywhere, in a local set's own order.

    GET …/shard.tar   Range: bytes=start-end   ->   206, the voxels of one sub-scan

So the batches are those of the same set in a folder, bit for bit, whatever the shards' format; nothing is fetched that is
not used, and nothing waits in memory but what is being copied. A server without ranges, and s3, are streamed: `remote`.

Each thread keeps its connection. To hide the way there and back, AT_ONCE threads ask side by side where a rank's batch
has so many rows. `requests` follows redirects and reads proxies, certificates and .netrc from where they are on a machine.
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

AT_ONCE = 8
_TRIES = 5
_PAUSE = 0.5  # seconds before the first new try, doubled for each further one
_TIMEOUT = (30.0, 60.0)  # seconds to connect, and without a byte
_PASSES = frozenset({408, 429})  # of the answers below 500, those that a later try may change


def gives_ranges(url: str) -> bool:
    """Whether the server answers a request for the first byte of `url` with that byte alone."""
    try:
        with requests.get(url, headers=_asking(0, 1), stream=True, timeout=_TIMEOUT) as answer:
            return _refusal(answer, 0, 1) is None
    except requests.RequestException:
        return False


def _asking(start: int, nbytes: int) -> dict[str, str]:
    """Request headers; a packed answer would have other bytes at these places."""
    return {"Range": f"bytes={start}-{start + nbytes - 1}", "Accept-Encoding": "identity"}


def _refusal(answer: requests.Response, start: int, nbytes: int) -> str | None:
    """Why an answer does not hold the bytes asked for; None when it does."""
    if answer.status_code != 206:
        return f"the server answers {answer.status_code} {answer.reason}"
    place = answer.headers.get("Content-Range", "")
    if place.partition("/")[0] != f"bytes {start}-{start + nbytes - 1}":
        return f"the server gives '{place}' for bytes {start}-{start + nbytes - 1}"
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        return f"the server packs what it gives ({answer.headers['Content-Encoding']})"
    return None


class HttpSet(ShardSet):
    """A data set below a URL, read by byte ranges; threads share it."""

    at_once = AT_ONCE
    _own = threading.local()  # of each thread: the connections it keeps

    def reader(
        self, ids: Ids, shuffle: tuple[int, int] | None = None
    ) -> AbstractContextManager[SampleReader]:
        """The set itself."""
        return nullcontext(self)

    def read_into(self, sub_scan: int, out: Any) -> None:
        """Fetch the voxels of one sub-scan into `out`, int16 (D, H, W), and check them.

        Raises:
            DataError: the server does not give them, after several tries where another may help; or their checksum differs.
        """
        url = f"{self.where}/{self.shard(sub_scan)}"
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(_PAUSE * 2 ** (attempt - 1))
            try:
                data, reason, final = self._fetch(url, int(self.offsets[sub_scan]))
            except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
                data, reason, final = b"", _first(error), False
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
        """The bytes; or why they did not come, and whether that is the server's last word."""
        asking = _asking(start, self.nbytes)
        with self._session().get(url, headers=asking, stream=True, timeout=_TIMEOUT) as answer:
            if reason := _refusal(answer, start, self.nbytes):
                return b"", reason, answer.status_code < 500 and answer.status_code not in _PASSES
            data: bytes = answer.raw.read(self.nbytes, decode_content=False)
            if len(data) < self.nbytes:
                return b"", f"{len(data):,} bytes of {self.nbytes:,} came", False
            answer.raw.read(1)  # the end of the answer, which frees its connection for the next
            return data, "", False

    def _session(self) -> requests.Session:
        if not hasattr(self._own, "session"):
            self._own.session = requests.Session()
        session: requests.Session = self._own.session
        return session


def _first(error: BaseException) -> str:
    """The innermost reason: the wrappers around it repeat address and objects."""
    while error.args and isinstance(error.args[-1], BaseException):
        error = error.args[-1]
    reason = getattr(error, "reason", None)
    if isinstance(reason, BaseException):
        return _first(reason)
    return (str(error).splitlines() or [type(error).__name__])[0]
