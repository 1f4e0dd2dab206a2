"""RUN/transfer.json: what the trials of a run have in common. The same command finds it there; another one is refused."""

import hashlib
import json
import os
import shlex
import sys
from typing import Any

from p2w import __version__
from p2w.data.locks import hold
from p2w.errors import UserError
from p2w.log import write_atomic
from p2w.target import recipe as recipes
from p2w.target.transfer import Transfer
from p2w.world import World

NAME = "transfer.json"


def plain(transfer: Transfer) -> dict[str, Any]:
    """What transfer.json says of a run."""
    start = transfer.start()
    origin = {"label": transfer.label, **transfer.origin.plain(), "data": start.pretrained_on}
    return {
        "task": {
            "name": str(transfer.source.meta["task"]),
            "kind": transfer.kind.name,
            "fingerprint": fingerprint(transfer.source.meta),
            "where": str(transfer.source.where),
        },
        "init": origin,
        "network": start.network,
        "width": start.width,
        "feeding": start.encoder.feeding,
        "fraction": transfer.fraction,
        "decoder": "pretrained" if transfer.pretrained_decoder else "scratch",
        "fold": transfer.fold,
        "trials": transfer.trials,
        "recipe": recipes.plain(transfer.recipe),
        "samples": {split: len(rows) for split, rows in transfer.rows.items()},
    }


def fingerprint(meta: dict[str, Any]) -> str:
    """A short name of a target set: a hash of what its manifest says of its samples and their splits."""
    told = {key: meta.get(key) for key in ("task", "kind", "shape", "window", "settings", "split", "shards")}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def agrees(transfer: Transfer) -> dict[str, Any]:
    """What transfer.json will say. Raises UserError when the folder holds another run's."""
    now = plain(transfer)
    path = transfer.folder / NAME
    if not path.exists():
        return now
    try:
        before = json.loads(path.read_text())
        same = [_fixed(tree) for tree in (before, now)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); name another folder with --run-dir") from error
    differing = [name for name in same[1] if same[0].get(name) != same[1][name]]
    if differing:
        said = "; ".join(f"{name} was {same[0].get(name)}, now {same[1][name]}" for name in differing[:3])
        raise UserError(
            f"{path}: {said}. A run keeps its settings: repeat its own command, or name another folder with --run-dir"
        )
    return now


def _fixed(tree: dict[str, Any]) -> dict[str, Any]:
    """The settings that a run keeps, flat."""
    flat = {f"recipe.{k}": v for k, v in tree["recipe"].items() if k not in recipes.MAY_CHANGE}
    flat |= {name: tree[name] for name in ("network", "width", "fraction", "decoder", "fold")}
    flat["task"] = tree["task"]["fingerprint"]
    return flat | {"init": tree["init"]["source"], "label": tree["init"]["label"]}


def announce(transfer: Transfer, tree: dict[str, Any], world: World) -> None:
    """Rank 0 makes the folder and writes transfer.json, unless it is there. Raises UserError where it cannot.

    Under a lock: the tasks of a job array all begin at once.
    """
    path = transfer.folder / NAME
    command = {"command": shlex.join(sys.argv), "cwd": os.getcwd(), "p2w": __version__, **world.machine()}
    try:
        transfer.folder.mkdir(parents=True, exist_ok=True)
        with hold(str(transfer.folder / ".lock"), "transfer"):
            before = json.loads(path.read_text()) if path.exists() else {"trials": 0}
            if before["trials"] < transfer.trials:
                write_atomic(path, json.dumps(tree | {"started": command}, indent=2))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a folder you may write with --run-dir") from error
