"""Checks of Python, torch, CUDA and the libraries that p2w uses."""

import importlib.util
import math
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from p2w import __version__, rng
from p2w.config import OptimConfig
from p2w.doctor import CheckContext, CheckResult, note, ok, problem, refused, size
from p2w.errors import UserError, first_line
from p2w.geometry import part_and_whole, sample_boxes
from p2w.model.encoder import set_memory_format
from p2w.rng import SampleKeys
from p2w.train.optim import build_optimizer, choose_precision

OLDEST_TORCH = (2, 11)
CUDA_TORCH = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126"
SHOWN = ("SimpleITK", "webdataset", "pyarrow")
LIBRARIES = (*SHOWN, "safetensors", "crc32c", "tensorboard", "matplotlib", "sklearn")
SMALL_ZYX = (8, 16, 16)  # voxels
TRIALS = 10  # a faulty bf16 on a CPU showed in one of three trials at width 8
TRIALS_S = 3.0
AGREE = 0.3  # bf16 has 8 bits: with correct arithmetic, norms differed by up to 10 %


def python(case: CheckContext) -> Iterator[CheckResult]:
    """Version and path of the interpreter and of p2w."""
    package = Path(__file__).parents[1]
    yield ok("python", f"{platform.python_version()} at {sys.executable}; p2w {__version__} at {package}")


def torch_build(case: CheckContext, devices: str = "/dev") -> Iterator[CheckResult]:
    """Whether torch is new enough, and can use the NVIDIA devices of this machine (files in `devices`)."""
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    found = f"{torch.__version__}, {built}"
    numbers = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    cards = sorted(Path(devices).glob("nvidia[0-9]*"))
    if numbers < OLDEST_TORCH:
        yield problem("torch", f"{found}: needs 2.11 or newer", "pip install --upgrade 'torch>=2.11'")
    elif cards and not torch.version.cuda:
        yield problem("torch", f"{found}, but {len(cards)} NVIDIA device(s) are here", CUDA_TORCH)
    elif cards and not torch.cuda.is_available():
        try:
            torch.cuda.init()
            why = "no device is visible (CUDA_VISIBLE_DEVICES?)"
        except (RuntimeError, AssertionError) as error:
            why = str(error).splitlines()[0]
        yield problem(
            "torch",
            f"{found}, but it cannot use the GPU: {why}",
            "nvidia-smi   # is the driver up, and new enough?",
        )
    else:
        yield ok("torch", found)


def devices(case: CheckContext) -> Iterator[CheckResult]:
    """CUDA devices, equal ones on one line; this torch must have code for each, and its results must be right."""
    if not case.cuda:
        yield ok("GPU", "none in use: runs use the CPU")
        return
    kinds: Counter[str] = Counter()
    bf16 = choose_precision("auto", torch.device("cuda")).reason
    for index in range(torch.cuda.device_count()):
        has = torch.cuda.get_device_properties(index)
        kinds[f"{has.name}, {size(has.total_memory)}, compute capability {has.major}.{has.minor}"] += 1
        if wrong := _computes_wrongly(index):
            yield problem(
                "GPU", f"device {index} ({has.name}): {wrong}", f"{CUDA_TORCH}   # or leave the device out"
            )
    for kind, count in kinds.items():
        yield ok("GPU", f"{count} x {kind}; {bf16}; driver {_driver()}")


def _driver() -> str:
    """Version of NVIDIA's kernel module."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "unknown"
    found = re.search(r"Module.*?(\d+\.\d[\d.]*)", text)
    return found[1] if found else "unknown"


def _computes_wrongly(index: int) -> str:
    """What is wrong with a 3D convolution on this device; small integers, so that every precision gives the same."""
    draw = torch.Generator().manual_seed(0)
    x, w = (
        torch.randint(-2, 3, shape, generator=draw).float() for shape in ((1, 4, 8, 8, 8), (4, 4, 3, 3, 3))
    )
    right = nn.functional.conv3d(x, w)
    try:
        here = nn.functional.conv3d(x.cuda(index), w.cuda(index)).cpu()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    off = float((here - right).abs().max())
    return "" if off < 0.1 else f"a convolution is off by {off:.3g}"


def nccl(case: CheckContext) -> Iterator[CheckResult]:
    """Whether torch has NCCL, through which several GPUs communicate."""
    if torch.distributed.is_available() and torch.distributed.is_nccl_available() and torch.version.cuda:
        yield ok("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    elif case.cuda:
        yield problem("NCCL", "this torch has none, so several GPUs cannot train together", CUDA_TORCH)
    else:
        yield ok("NCCL", "this torch has none; on CPUs gloo is used")


def triton(case: CheckContext) -> Iterator[CheckResult]:
    """Whether the crop-resize kernel compiles, and gives the same on the GPU as torch on the CPU."""
    if importlib.util.find_spec("triton") is None:
        if case.cuda:
            yield note("triton", "not installed: parts are cut by torch, slower", "pip install triton")
        else:
            yield ok("triton", "not installed; only GPUs use it")
        return
    version = importlib.metadata.version("triton")
    if not case.cuda:
        yield ok("triton", f"{version}; no GPU to try it on")
        return
    compilers = "apt-get install gcc python3-dev   # triton compiles with them"
    name, why = rng.backend("cuda")
    if name != "triton":
        yield note("triton", f"{version}: parts are cut by {name}, slower: {why}", compilers)
        return
    wholes = torch.randint(-1300, 1301, (4, 16, 32, 32), generator=torch.Generator().manual_seed(0)).short()
    boxes = sample_boxes(SampleKeys(0, 0, torch.arange(4)), 0, wholes.shape[1:])
    try:
        began = time.perf_counter()
        there = part_and_whole(wholes.cuda(), boxes.cuda(), (8, 16, 16))
        off = max(
            float((a.cpu() - b).abs().max())
            for a, b in zip(there, part_and_whole(wholes, boxes, (8, 16, 16)), strict=True)
        )
    except Exception as error:
        yield problem("triton", f"{version}: the kernel does not run: {first_line(error)}", compilers)
        return
    if not off < 1e-4:
        yield problem(
            "triton",
            f"{version}: the kernel is off by {off:.3g} from torch",
            "pip uninstall triton   # torch then cuts the parts",
        )
    else:
        yield ok(
            "triton",
            f"{version}: the kernel agrees with torch (compiled and run in {time.perf_counter() - began:.1f} s)",
        )


def apex(case: CheckContext) -> Iterator[CheckResult]:
    """Whether apex is NVIDIA's, the web toolkit of that name on PyPI, or not installed; `build_optimizer` checks it."""
    wanted = case.config.optim.fused == "apex"
    try:
        _, whose = build_optimizer(
            OptimConfig(fused="apex"), nn.Linear(1, 1, device="cuda" if case.cuda else "cpu")
        )
    except (UserError, ImportError) as error:
        text = str(error).removeprefix("optim.fused=apex: ")
        found, _, remedy = text.partition("; ")
        if wanted:
            yield problem("apex", found, remedy or "--optim.fused torch")
        elif "PyPI" in found:
            yield note("apex", f"{found}; nothing here uses it", "pip uninstall apex")
        else:
            yield ok("apex", f"{found}; not needed (optim.fused={case.config.optim.fused})")
        return
    yield ok("apex", whose)


def libraries(case: CheckContext) -> Iterator[CheckResult]:
    """Versions of the other libraries that a run or preprocessing imports."""
    versions = {}
    for name in LIBRARIES:
        try:
            module = importlib.import_module(name)
            versions[name] = str(getattr(module, "__version__", "")) or importlib.metadata.version(name)
        except Exception as error:
            yield problem(
                "libraries", f"{name}: {first_line(error)}", "make install   # or  pip install --editable ."
            )
    found = ", ".join(f"{name} {versions[name]}" for name in SHOWN if name in versions)
    if len(versions) == len(LIBRARIES):
        yield ok("libraries", f"{found}; {len(LIBRARIES) - len(SHOWN)} others import")


def arithmetic(case: CheckContext) -> Iterator[CheckResult]:
    """Gradients of the recipe's network on a small input, in the precision that a run would choose, against float32."""
    from p2w.pretext import build_pretext_and_network  # noqa: PLC0415  (draws in a good part of p2w, for this check and the costs)

    device = torch.device("cuda" if case.cuda else "cpu")
    try:
        precision = choose_precision(case.config.train.precision, device)
        torch.manual_seed(0)
        network = build_pretext_and_network(
            replace(case.config, pretext=replace(case.config.pretext, size=SMALL_ZYX))
        )[1].to(device)
    except UserError as error:
        yield refused("arithmetic", error)
        return
    set_memory_format(network, case.config.train.channels_last)
    off, began = 0.0, time.perf_counter()
    for trial in range(TRIALS if precision.dtype else 1):
        if time.perf_counter() - began > TRIALS_S:
            break
        torch.manual_seed(trial)
        wholes, parts = torch.rand(2, 4, 1, *SMALL_ZYX, device=device)
        norms = []
        for dtype in (None, precision.dtype):
            network.zero_grad()
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                loss = (network(parts).float() - wholes).square().mean()
            loss.backward()
            norms.append(
                float(nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None]))
            )
        right = all(map(math.isfinite, norms)) and norms[0] > 0
        off = max(off, abs(norms[1] / norms[0] - 1) if right else math.inf)
    if not off < AGREE:
        how = f"differ from fp32's by {off:.0%}" if math.isfinite(off) else "are not finite, fp32's are"
        yield problem(
            "arithmetic",
            f"{precision.name} gradients of {case.recipe} {how}",
            "--train.precision fp32   # and update torch",
        )
    else:
        yield ok("arithmetic", f"{precision.name} gradients of {case.recipe} agree with fp32's to {off:.1%}")
