"""Several data sets as one: how a mixture is written, and how it is identified.

    --shards a:0.7 b:0.3          on the command line of launch/train.py; without weights, each set counts by its size
    "a:0.7 + b:0.3"               as one text: in run.json, cards and messages, and for commands that take one --shards

A path that ends in `:NUMBER` is taken for a path and a weight, unless there is something of that name.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from p2w.errors import UserError

BETWEEN = " + "


@dataclass(frozen=True)
class MixturePart:
    """One set of a mixture: a folder or URL, and its weight; None where none is given."""

    where: str
    weight: float | None

    def __str__(self) -> str:
        return self.where if self.weight is None else f"{self.where}:{self.weight:g}"


def is_mixture(where: str) -> bool:
    """Whether a text names several sets."""
    return BETWEEN in where


def parse_mixture(where: str) -> list[MixturePart]:
    """The parts of a mixture. Raises UserError for weights that some have and others lack, or that are not positive."""
    parts = [_part(text.strip()) for text in where.split(BETWEEN)]
    without = [part.where for part in parts if part.weight is None]
    if without and len(without) < len(parts):
        raise UserError(
            f"--shards {where}: {without[0]} has no weight and others have: write e.g. a:0.7 b:0.3"
        )
    for part in parts:
        if part.weight is not None and not 0 < part.weight < math.inf:
            raise UserError(f"--shards {where}: the weight of {part.where} must be above 0 and finite")
    named = [os.path.normpath(part.where) if "://" not in part.where else part.where for part in parts]
    if len(set(named)) < len(named):
        raise UserError(f"--shards {where}: names a set twice: give it once, with the sum of the weights")
    return parts


def _part(text: str) -> MixturePart:
    path, colon, number = text.rpartition(":")
    if not colon or not path or os.path.exists(text):
        return MixturePart(text, None)
    try:
        return MixturePart(path, float(number))
    except ValueError:
        return MixturePart(text, None)


def relocated(where: str, place: Callable[[str], str]) -> str:
    """The same set or mixture with every path replaced by `place(path)`."""
    if not is_mixture(where):
        return place(where)
    return BETWEEN.join(str(MixturePart(place(part.where), part.weight)) for part in parse_mixture(where))


def mixture_fingerprint(parts: Sequence[dict[str, Any]]) -> str:
    """16 hexadecimal digits that identify a mixture: a hash of its parts' `data` (fingerprints) and `weight`, in order."""
    identity = [[part["data"], part["weight"]] for part in parts]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
