"""Cache of passed numerics checks, in the user's cache folder, so that the next start need not repeat them.

`$XDG_CACHE_HOME/p2w`, or `~/.cache/p2w`, holds one small JSON file for each check that passed; its content says which
device, which versions and what was checked. A failed check is never cached. When the cache cannot be read or written,
there is a warning and the check is made again.
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

CheckKey = dict[str, Any]  # plain JSON values: everything that the result of a check depends on
# Environment variables that change which instructions oneDNN uses, or whether NVIDIA's libraries use TF32.
KERNEL_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "NVIDIA_TF32_OVERRIDE")


def cache_folder() -> Path:
    """The folder of the cache. Raises OSError when the user has no home folder."""
    chosen = Path(variable("XDG_CACHE_HOME"))
    if chosen.is_absolute():  # the XDG specification says to ignore a relative path
        return chosen / "p2w"
    try:
        return Path.home() / ".cache" / "p2w"
    except RuntimeError as error:
        raise FileNotFoundError(0, "this user has no home folder", "~/.cache/p2w") from error


def machine_key(world: World) -> CheckKey:
    """What decides which kernels torch uses on this rank's device: device, versions, torch's switches."""
    cudnn, device = torch.backends.cudnn, world.device
    key: CheckKey = {
        "p2w": __version__,
        "torch": torch.__version__,
        "code": _source_hash(),
        # The text names oneDNN's version and more.
        "build": hashlib.sha256(torch.__config__.show().encode()).hexdigest()[:16],
        "cudnn": cudnn.version(),
        "triton": "",
        "search": cudnn.benchmark,
        "deterministic": [cudnn.deterministic, torch.are_deterministic_algorithms_enabled()],
        "environment": {name: variable(name) for name in KERNEL_VARIABLES},
    }
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        key["triton"] = importlib.metadata.version("triton")
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        key["device"] = [gpu.name, gpu.major, gpu.minor, gpu.multi_processor_count]
    else:
        key["device"] = [
            world.machine()["device"],
            torch.backends.cpu.get_cpu_capability(),
            torch.get_num_threads(),
        ]
    return key


def _source_hash() -> str:
    """Hash of the source of all networks and kernels, so that changed code is checked again."""
    package = Path(__file__).parents[1]
    files = [*package.glob("model/**/*.py"), *package.glob("kernels/**/*.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:16]


def passed_before(key: CheckKey, warn: Callable[[str], None]) -> bool:
    """Whether the check with this key passed before. A broken cache file goes to `warn`."""
    try:
        path = _path(key)
        text = path.read_bytes()
    except OSError:  # no file yet, or a folder that cannot be used: `record_pass` will warn of that
        return False
    try:
        return bool(json.loads(text) == json.loads(_text(key)))
    except (ValueError, RecursionError) as error:
        warn(f"{path}: is broken ({error}); the check is made again")
        return False


def record_pass(key: CheckKey, warn: Callable[[str], None]) -> None:
    """Store that the check with this key passed. Processes may do so at the same time. Failures go to `warn`."""
    path: Path | str = "~/.cache/p2w"
    try:
        path = _path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}")  # other ranks write the same file
        write_atomic(temporary, _text(key))
        os.replace(temporary, path)
    except OSError as error:
        warn(
            f"{path}: cannot be written ({_reason(error)}); the next start repeats a check of some seconds. "
            "Set XDG_CACHE_HOME to a folder that you may write"
        )


def _path(key: CheckKey) -> Path:
    name = hashlib.sha256(_text(key).encode()).hexdigest()[:16]
    return cache_folder() / f"selfcheck-{name}.json"


def _text(key: CheckKey) -> str:
    return json.dumps({"sound": key}, sort_keys=True)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
