"""Describes the machine and what it lacks: the first stage of the GPU day.

Rows: card, driver, versions, processors, memory; packages that the project needs and that are not there. It also writes
the small data set that later stages train on.
"""

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess

import torch
from rows import CUDA, REPO, failures, say, stages

from p2w.resources import usable_cores

import common  # isort: skip  (bench/common.py, which rows puts on the path)

NEEDED = ("numpy", "scipy", "sklearn", "pyarrow", "safetensors", "SimpleITK", "crc32c", "tyro", "rich", "requests",
          "matplotlib", "tensorboard", "pytest")  # fmt: skip
USEFUL = ("triton", "pytest_timeout", "hypothesis", "psutil", "webdataset")
QUERY = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"


def card() -> None:
    """The GPU, as its driver and as torch describe it."""
    smi = ""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        smi = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    name, l2 = "CPU", 0
    if CUDA:
        name = torch.cuda.get_device_name()
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
    say(
        "machine", card=name, driver_says=smi, l2_bytes=l2, cuda=torch.version.cuda, torch=torch.__version__,
        cudnn=torch.backends.cudnn.version(), python=platform.python_version(), triton=_version("triton"),
        numpy=_version("numpy"), bf16=CUDA and torch.cuda.is_bf16_supported(including_emulation=False),
        nccl=".".join(map(str, torch.cuda.nccl.version())) if CUDA else None,
        compiler=shutil.which("cc") or shutil.which("gcc"), cores=usable_cores(), commit=_commit(),
        machine=common.machine(),
    )  # fmt: skip


def packages() -> None:
    """List what is missing; the stages that need it report it again."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    without = [name for name in USEFUL if importlib.util.find_spec(name) is None]
    say("packages", missing=missing, without=without)
    failures.extend(missing)


def data() -> None:
    """Write the small data set for later stages."""
    from harness import structured_set  # noqa: PLC0415  (needs packages that may be missing: a part of its own)

    shards = structured_set()
    say("data set", where=shards.where, train=len(shards.ids("train")), val=len(shards.ids("val")))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """The commit of the checkout; empty without a git history."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


if __name__ == "__main__":
    stages({"card": card, "packages": packages, "data": data})
