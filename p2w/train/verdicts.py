"""Checks of a machine that came out well, remembered from one start to the next in the user's cache folder.

`$XDG_CACHE_HOME/p2w`, or `~/.cache/p2w`, holds one small JSON file for each set of facts that was found sound: which
device, which versions, what was checked. A wrong verdict is never remembered. A cache that cannot be read or written is
a warning, and the check is made again.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from p2w import __version__
from p2w.files import write_atomic
from p2w.world import World, variable

Facts = dict[str, Any]  # of plain JSON types: all that the verdict depends on
# Variables by which a user changes which instructions oneDNN takes, or whether NVIDIA's libraries use TF32.
STEERING = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "NVIDIA_TF32_OVERRIDE")


def cache_folder() -> Path:
    """Where verdicts are kept. Raises OSError where the user has no home folder."""
    given = Path(variable("XDG_CACHE_HOME"))
    if given.is_absolute():  # a relative one is to be ignored, says the XDG specification
        return given / "p2w"
    try:
        return Path.home() / ".cache" / "p2w"
    except RuntimeError as error:
        raise FileNotFoundError(0, "this user has no home folder", "~/.cache/p2w") from error


def machine_facts(world: World) -> Facts:
    """What decides which kernels torch takes on this rank's device: its name and size, versions, torch's switches."""
    cudnn, device = torch.backends.cudnn, world.device
    facts: Facts = {
        "p2w": __version__,
        "torch": torch.__version__,
        "code": _code(),
        "build": hashlib.sha256(torch.__config__.show().encode()).hexdigest()[
            :16
        ],  # names oneDNN's version and more
        "cudnn": cudnn.version(),
        "triton": "",
        "search": cudnn.benchmark,
        "deterministic": [cudnn.deterministic, torch.are_deterministic_algorithms_enabled()],
        "environment": {name: variable(name) for name in STEERING},
    }
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        facts["triton"] = importlib.metadata.version("triton")
    if device.type == "cuda":
        has = torch.cuda.get_device_properties(device)
        facts["device"] = [has.name, has.major, has.minor, has.multi_processor_count]
    else:
        facts["device"] = [
            world.machine()["device"],
            torch.backends.cpu.get_cpu_capability(),
            torch.get_num_threads(),
        ]
    return facts


def _code() -> str:
    """A hash of the source of all networks and kernels: what was changed is checked again."""
    package = Path(__file__).parents[1]
    files = [*package.glob("model/**/*.py"), *package.glob("kernels/**/*.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:16]


def is_remembered(facts: Facts, warn: Callable[[str], None]) -> bool:
    """Whether these very facts were found sound before; `warn` is told of a broken file."""
    try:
        path = _path(facts)
        text = path.read_bytes()
    except OSError:  # there is none yet; or the folder is of no use, as `remember` will then say
        return False
    try:
        return bool(json.loads(text) == json.loads(_text(facts)))
    except (ValueError, RecursionError) as error:
        warn(f"{path}: is broken ({error}); the check is made again")
        return False


def remember(facts: Facts, warn: Callable[[str], None]) -> None:
    """Note that these facts were found sound. Any number of processes may do so at once; `warn` is told of a failure."""
    path: Path | str = "~/.cache/p2w"
    try:
        path = _path(facts)
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_name(f"{path.name}.{secrets.token_hex(4)}")  # other ranks write the same verdict
        write_atomic(own, _text(facts))
        os.replace(own, path)
    except OSError as error:
        warn(
            f"{path}: cannot be written ({_reason(error)}); the next start repeats a check of some seconds. "
            "Name a folder you may write in XDG_CACHE_HOME"
        )


def _path(facts: Facts) -> Path:
    name = hashlib.sha256(_text(facts).encode()).hexdigest()[:16]
    return cache_folder() / f"selfcheck-{name}.json"


def _text(facts: Facts) -> str:
    return json.dumps({"sound": facts}, sort_keys=True)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
