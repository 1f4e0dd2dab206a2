"""How a valid file is changed: by bytes, and by structure where it is text, a header or JSON."""

import contextlib
import json
from pathlib import Path

import numpy as np

LIMITS = [0, 1, -1, 127, 255, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, -(2**63), 10**30]
WORDS = [
    "", "0", "-1", "nan", "inf", "1e999", "..", "/", "../../x", "[]", "{}", "null", "true", "9" * 40, "NaN",
    "%d", "LIST",
]  # fmt: skip


def mutate(rng: np.random.Generator, folder: Path, kind: str) -> set[str]:
    """Change one or two files in place; names of those changed."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if kind == "settings":
        files = [path for path in files if path.suffix == ".json"]
    changed = set()
    for _ in range(1 + int(rng.random() < 0.2)):
        path = files[rng.integers(len(files))]
        data = path.read_bytes()
        new = _structure(rng, data) if rng.random() < 0.5 else _bytes(rng, data)
        if new != data:
            path.write_bytes(new)
            changed.add(str(path.relative_to(folder)))
    return changed


def _bytes(rng: np.random.Generator, data: bytes) -> bytes:
    """A change that knows nothing of what the bytes mean."""
    out = bytearray(data)
    early = rng.random() < 0.6  # headers stand at the beginning, footers at the end
    for _ in range(int(rng.integers(1, 5))):
        near = min(len(out), 400) if early else len(out)
        at = int(rng.integers(max(1, near)))
        if not early and rng.random() < 0.3:
            at = max(0, len(out) - 1 - int(rng.integers(1, 400)))
        way, count = int(rng.integers(6)), int(2 ** rng.uniform(0, 9))
        if way == 0 and out:
            out[min(at, len(out) - 1)] ^= 1 << int(rng.integers(8))
        elif way == 1:
            del out[at:]
        elif way == 2:
            out[at : at + count] = bytes([int(rng.integers(256))]) * count
        elif way == 3:
            out[at:at] = rng.bytes(count)
        elif way == 4:
            del out[at : at + count]
        else:
            number = LIMITS[rng.integers(len(LIMITS))] % 2**64
            size = int(rng.choice([2, 4, 8]))
            out[at : at + size] = number.to_bytes(8, "little")[:size][:: int(rng.choice([1, -1]))]
    return bytes(out)


def _structure(rng: np.random.Generator, data: bytes) -> bytes:
    """Another value in the place of a JSON value, of a number in a text header, or of a word."""
    with contextlib.suppress(ValueError):
        tree = json.loads(data)
        places = list(_places(tree))
        holder, key = places[rng.integers(len(places))]
        values = [*LIMITS, *WORDS, [], {}, None, True, 1.5, [[1]], {"a": 1}, "x" * 1000]
        holder[key] = values[rng.integers(len(values))]
        return json.dumps(tree).encode()
    import re  # noqa: PLC0415

    spots = list(re.finditer(rb"-?\d+(\.\d+)?|[A-Za-z]{3,}", data[:4096]))
    if not spots:
        return _bytes(rng, data)
    spot = spots[rng.integers(len(spots))]
    words = [str(number) for number in LIMITS] + WORDS
    return data[: spot.start()] + words[rng.integers(len(words))].encode() + data[spot.end() :]


def _places(tree: object):
    """Every (container, key) of a JSON tree."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        yield tree, key
        yield from _places(value)
