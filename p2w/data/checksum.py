"""CRC-32C of what is read, by the fastest library here; all give the same number.

awscrt folds with AVX-512 (51 GB/s a core on bytes in cache), the crc32c package has the processor's instruction (26).
Beside the copy that is 5 to 10 % of the time of reading, or 15 to 30 (bench/NOTES.md). awscrt is an extra: `p2w[fast]`.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import crc32c as package


def _fastest() -> tuple[Callable[[Any, int], int], str]:
    if importlib.util.find_spec("awscrt") is None:
        return package.crc32c, "crc32c"
    from awscrt import checksums  # noqa: PLC0415  (an extra)

    return checksums.crc32c, "awscrt"


crc32c, LIBRARY = (
    _fastest()
)  # (contiguous bytes, the checksum of what came before or 0) -> checksum; and whose it is
