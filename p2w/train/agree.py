"""Before anything is trained: every rank runs the same program on the same data, or all of them are refused."""

import json
from typing import Any

import torch

from p2w import __version__
from p2w import config as settings
from p2w.config import Config
from p2w.errors import SharedError
from p2w.train.optim import Precision
from p2w.world import World


def agree(world: World, config: Config, precision: Precision, data: str) -> None:
    """Raise SharedError, on all ranks, when ranks differ: it names what, and where.

    `data` is the fingerprint of the set that this rank has opened.
    """
    if world.store is None:
        return
    mine = {"host": world.host, "p2w": __version__, "torch": torch.__version__}
    mine |= {"data set": data, "precision": precision.name}
    mine |= {f"--{name.replace('_', '-')}": value for name, value in settings.flatten(config).items()}
    world.store.set(f"facts/{world.rank}", json.dumps(mine))
    if world.is_main:
        everyone = [json.loads(world.store.get(f"facts/{rank}")) for rank in range(world.size)]
        world.store.set("verdict", _verdict(everyone))
    verdict = world.store.get("verdict").decode()
    world.barrier()  # without torchrun the store ends with rank 0: not before all have read it
    if verdict:
        raise SharedError(verdict)


def _verdict(everyone: list[dict[str, Any]]) -> str:
    """What differs from rank 0, one line; empty when all agree."""
    first = everyone[0]
    for rank, other in enumerate(everyone):
        differing = [name for name in first if name != "host" and other.get(name) != first[name]]
        if differing:
            theirs = ", ".join(f"{name} {other.get(name)}" for name in differing[:3])
            ours = ", ".join(f"{name} {first[name]}" for name in differing[:3])
            return (
                f"rank {rank} on {other['host']} has {theirs}; rank 0 on {first['host']} has {ours}. All ranks need the "
                "same versions, settings and shards: start every node with the same command, and pass --train.amp where "
                "their devices differ"
            )
    return ""
