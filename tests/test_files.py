"""CRC-32C by the library that is installed, and what to do about an error of writing."""

import errno
import importlib.util
import os

import numpy as np
import pytest
from crc32c import crc32c as package

from p2w.files import LIBRARY, crc32c, write_remedy


def test_known_answer():
    assert crc32c(b"123456789", 0) == 0xE3069283  # RFC 3720, and every catalogue of CRCs
    assert crc32c(b"6789", crc32c(b"12345", 0)) == 0xE3069283


def test_blocks_of_an_array_add_up():
    data = np.random.default_rng(0).integers(0, 256, 300_001, dtype=np.uint8)
    found = 0
    for start in range(0, len(data), 65_536):
        found = crc32c(data[start : start + 65_536].data, found)
    assert found == package(data)


@pytest.mark.skipif(
    importlib.util.find_spec("awscrt") is None, reason="needs awscrt (pip install parts2whole[fast])"
)
def test_the_faster_library_is_taken():
    assert LIBRARY == "awscrt"


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "make room"), (errno.EDQUOT, "make room"),
        (errno.EACCES, "change its permissions, or name another folder"),
        (errno.EIO, "check the disk or its server"), (errno.ESTALE, "check the disk or its server"),
        (errno.ENOENT, "mend what the message names"),
    ],
)  # fmt: skip
def test_room_is_asked_for_where_room_is_missing(number, remedy):
    assert write_remedy(OSError(number, os.strerror(number))) == remedy
    if remedy == "make room":  # torch and pyarrow raise errors of their own
        assert write_remedy(RuntimeError(f"{os.strerror(number)} (os error {number})")) == remedy
