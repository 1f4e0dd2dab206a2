"""A data set below an http(s) URL whose server supports byte ranges: random access, in the order of a local set.

    GET …/shard.tar   Range: bytes=start-end   ->   206, the voxels of one sub-scan

The batches are those of the same set in a folder, bit for bit, for either format of shards; only the bytes that are used
are fetched, and nothing is buffered. Servers without byte ranges, and s3, are streamed (see `tar`).

Each thread keeps its connection. To hide the latency, at least MIN_THREADS threads send requests in parallel if a rank's
batch has as many rows. What is tried again, and for how long: `p2w.http_client` and `data.retry_minutes`.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from p2w import http_client
from p2w.http_client import Attempts, RequestFailed
from p2w.rng import Ids
from p2w.stream.local import DataError, SampleReader, ShardSet

MIN_THREADS = 8
_PAUSE = http_client.PAUSE_S


class HttpSet(ShardSet):
    """A data set below a URL, read by byte ranges. Threads share it."""

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
        url = f"{self.where}/{self.shard(sub_scan)}"
        start, data = int(self.offsets[sub_scan]), b""
        try:
            for attempt in Attempts(url, self.retry_s, self.on_wait, _PAUSE):
                with attempt:
                    data = http_client.read_range(url, start, self.stored_bytes(sub_scan))
                    break
        except RequestFailed as error:
            raise DataError(
                f"{url}: cannot be fetched {error}: check that the shard is there and whole, upload it again, or copy "
                "the set to a local folder"
            ) from error
        self.copy(sub_scan, np.frombuffer(data, np.uint8), out)
