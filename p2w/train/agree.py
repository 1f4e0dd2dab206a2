"""Before anything is trained: every rank runs the same program on the same data, or all of them are refused."""

import json
from typing import Any

import torch

from p2w import __version__
from p2w.errors import SharedError
from p2w.train.optim import Precision
from p2w.world import World


def agree(world: World, given: dict[str, Any], precision: Precision, data: str, amp: str) -> None:
    """Raise SharedError, on all ranks, when ranks differ: it names what, and where.

    `given` are settings by what the user calls them, plain values; `data` is the fingerprint of the set that this rank has
    opened, `amp` the option that chooses the precision.
    """
    if world.store is None:
        return
    mine = {"host": world.host, "p2w": __version__, "torch": torch.__version__}
    mine |= {"data set": data, "precision": precision.name}
    mine |= given
    world.store.set(f"facts/{world.rank}", json.dumps(mine))
    if world.is_main:
        everyone = [json.loads(world.store.get(f"facts/{rank}")) for rank in range(world.size)]
        world.store.set("verdict", _verdict(everyone, amp))
    verdict = world.store.get("verdict").decode()
    world.barrier()  # without torchrun the store ends with rank 0: not before all have read it
    if verdict:
        raise SharedError(verdict)


def _verdict(everyone: list[dict[str, Any]], amp: str) -> str:
    """What differs from rank 0, one line; empty when all agree."""
    first = everyone[0]
    for rank, other in enumerate(everyone):
        differing = [name for name in first if name != "host" and other.get(name) != first[name]]
        if differing:
            theirs = ", ".join(f"{name} {other.get(name)}" for name in differing[:3])
            ours = ", ".join(f"{name} {first[name]}" for name in differing[:3])
            return (
                f"rank {rank} on {other['host']} has {theirs}; rank 0 on {first['host']} has {ours}. All ranks need the "
                f"same versions, settings and data: start every node with the same command, and pass {amp} where their "
                "devices differ"
            )
    return ""
