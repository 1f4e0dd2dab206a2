"""The card as it leaves the machine, in an export: without absolute paths, and with hashes of what pretraining trained on.

`training.data.shards` is the set's path below the run's working directory, or its last part; of a path in the command, the
settings and the facts on the data set the last part alone stays. So that the leak check of target tasks works without the
set, `training.data.seen` holds hashes of the scans that it trains on, where they are few (`p2w.shards.training_scans`).
"""

import copy
import os
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from p2w.errors import UserError
from p2w.files import last_part
from p2w.shards.mixture import relocated
from p2w.shards.training_scans import SEEN, hashed_training_scans
from p2w.stream.trained_sets import open_trained_sets
from p2w.weights.card import last_start
from p2w.weights.hub import is_hub_name


def exported_card(card: dict[str, Any], run: Path) -> tuple[dict[str, Any], str]:
    """The card of a run's weights, as `model_card` gives it, for an export; and, where it has no hashes, why in words.

    Raises UserError for a run that does not name its data set.
    """
    card, start = copy.deepcopy(card), last_start(run)
    training = card["training"]
    if isinstance(training.get("command"), str):
        training["command"] = command_without_paths(training["command"])
    training["data_set"] = last_part(training.get("data_set"))
    training["config"] = _without_paths(training["config"])
    data, cwd = training["data"], str(start.get("cwd") or "")
    data["shards"] = portable_shards(str(start["shards"]), cwd)
    try:
        sets = open_trained_sets(run, start, start["data"], str(run))
        data[SEEN] = hashed_training_scans([meta for meta, _ in sets])
    except UserError as error:
        return card, str(error)
    return card, ""


def portable_shards(where: str, cwd: str) -> str:
    """A set, or a mixture, as an export names it: the path below `cwd`, else its last part; a URL without user and query."""
    taken: dict[str, int] = {}

    def name(path: str) -> str:
        found = _portable(path, cwd)
        taken[found] = taken.get(found, 0) + 1
        # The parts of a mixture have to differ, and two folders may have one name.
        return found if taken[found] == 1 else f"{found} ({taken[found]})"

    return relocated(where, name)


def _portable(path: str, cwd: str) -> str:
    if "://" in path and not path.startswith("file:"):
        try:
            url = urlsplit(path)
        except ValueError:  # no URL that anything could be read from
            return str(last_part(path))
        return urlunsplit((url.scheme, url.netloc.rpartition("@")[2], url.path, "", ""))
    if "://" in path:
        path = urlsplit(path).path
    below = os.path.relpath(path, cwd) if cwd and os.path.isabs(path) else os.path.normpath(path)
    if os.path.isabs(below) or below.split("/")[0] in ("..", "~"):
        return os.path.basename(os.path.normpath(path))
    return below


def command_without_paths(command: str) -> str:
    """A command line of which every path and URL is cut to its last part; names of the Hub stay."""
    try:
        words = shlex.split(command)
    except ValueError:  # a quote that does not end
        words = command.split()
    return shlex.join(map(_word_without_path, words))


def _word_without_path(word: str) -> str:
    option, equals, value = word.partition("=")
    if equals and "/" not in option:
        return f"{option}={_without_paths(value)}"
    return str(_without_paths(word))


def _without_paths(value: Any) -> Any:
    """A JSON value with every path and URL in it cut to its last part; names of the Hub stay, they name no machine."""
    if isinstance(value, str) and is_hub_name(value):
        return value
    if isinstance(value, dict):
        return {name: _without_paths(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(one) for one in value]
    return last_part(value)
