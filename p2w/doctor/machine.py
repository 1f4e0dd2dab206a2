"""Checks of cores, memory, disks, limits and the clock against the needs of the run."""

import ctypes
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from p2w.doctor import GIB, CheckContext, CheckResult, note, ok, problem, refused, size
from p2w.errors import UserError
from p2w.resources import free_memory, usable_cores
from p2w.shards.manifest_schema import MANIFEST_NAME
from p2w.stream.prefetch import RING
from p2w.train.optim import choose_precision

PROCESS_BYTES = GIB // 2  # Python, torch and the libraries of one rank on a CPU (0.45 GiB seen)
SUB_SCAN_BYTES = 2**21
SHM_BYTES = GIB  # NCCL's buffers between the GPUs of a machine; containers often give 64 MiB
PROBE_BYTES = 16 * 2**20
OPEN_FILES = 1024  # pipes, sockets, TensorBoard; shards are mapped and need none
# 16,384 mapped shards, see stream/local.py; the rest belong to Python, torch and their libraries
MAPS = 20_480
CLOCK_ERROR = 5  # adjtimex(2): TIME_ERROR, the clock is not synchronised
SLACK_S = 60.0  # a file server's clock may be ahead by this much


def cores(case: CheckContext) -> Iterator[CheckResult]:
    """Cores that this process may use (a container or Slurm may allow fewer than there are), and the precision on them."""
    mine, all_of_them = usable_cores(), os.cpu_count() or 1
    needed = case.ranks * (1 + case.config.data.reader_threads)
    precision = choose_precision("auto", torch.device("cpu"))
    work = f"{case.ranks} rank(s) with {case.config.data.reader_threads} reader(s)"
    found = f"{mine} of {all_of_them} cores for {work}; {precision.reason}"
    if mine < case.ranks or (mine < needed and case.cuda):
        yield note(
            "CPU",
            f"{found}: threads will wait for each other",
            "sbatch --cpus-per-task=N, docker --cpus=N, or --data.reader-threads 1",
        )
    else:
        yield ok("CPU", found)


def memory(case: CheckContext) -> Iterator[CheckResult]:
    """Free memory against weights, optimizer, activations and batches; with GPUs, that of each device too."""
    try:
        cost = case.cost
    except UserError as error:
        yield refused("memory", error)
        return
    rows = max(1, case.config.data.batch // case.ranks)
    network, batches = cost.state_bytes + cost.activation_bytes, RING * rows * SUB_SCAN_BYTES
    remedy = "--optim.accumulate 2 (or 4, 8): fewer samples at a time; or fewer ranks on this machine"
    if case.cuda:
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            if free < network:
                found = (
                    f"GPU {index}: {size(free)} of {size(total)} free, {case.recipe} needs {size(network)}"
                )
                yield problem("memory", found, f"{remedy}; nvidia-smi shows who holds it")
    here = case.ranks * (PROCESS_BYTES + batches + (0 if case.cuda else network))
    free = free_memory()
    found = f"{size(free)} free; {case.recipe} on {case.ranks} rank(s) here needs about {size(here)}"
    found += f", and {size(network)} on each GPU" if case.cuda else ""
    yield ok("memory", found) if here < free else problem("memory", found, remedy)


def speed(case: CheckContext) -> Iterator[CheckResult]:
    """Forecast of the recipe's speed on these GPUs, from data sheets; nothing for an unknown GPU."""
    from p2w.train.estimate import describe_scaling, known_device  # noqa: PLC0415

    card = torch.cuda.get_device_name() if case.cuda else ""
    if known_device(card):
        config, ranks = case.config, case.ranks
        said = describe_scaling(
            case.cost, card, ranks=ranks, per_node=ranks, batch=config.data.batch, steps=config.train.steps
        )
        yield ok("speed", "; ".join(said))


def shared_memory(case: CheckContext, where: str = "/dev/shm") -> Iterator[CheckResult]:
    """Shared memory, which NCCL needs between GPUs; p2w reads data in threads and needs none."""
    free = shutil.disk_usage(where).free if os.path.isdir(where) else 0
    several = case.cuda and case.ranks > 1
    found = f"{size(free)} free; {'NCCL between the GPUs needs 1 GiB' if several else 'only NCCL between GPUs uses it'}"
    if several and free < SHM_BYTES:
        yield problem(where, found, "docker run --shm-size=2g, or  mount -o remount,size=2g /dev/shm")
    else:
        yield ok(where, found)


def disk(case: CheckContext) -> Iterator[CheckResult]:
    """Disk space for the run folder's checkpoints, and how fast they are written."""
    absolute = case.run.absolute()
    existing = next(path for path in (absolute, *absolute.parents) if path.exists())
    try:
        each = case.cost.checkpoint_bytes
    except UserError:  # reported by `memory`
        each = 0
    kept = sum(file.stat().st_size for file in existing.rglob("step-*/*")) if existing == absolute else 0
    # The newest ones, the best, and the one being written
    need = max(0, (case.config.train.keep + 2) * each - kept)
    free = shutil.disk_usage(existing).free
    found = f"{case.run}: {size(free)} free, checkpoints need {size(need)} more"
    elsewhere = "--run-dir on another disk, --train.keep 1, or delete what is not needed (df -h)"
    if free < need + PROBE_BYTES:
        yield problem("run disk", found, elsewhere)
        return
    try:
        rate = write_speed(existing)
    except OSError as error:
        yield problem(
            "run disk",
            f"{existing}: cannot be written to ({error.strerror})",
            "name a folder you may write with --run-dir",
        )
        return
    yield ok("run disk", f"{found}; written at {size(rate)}/s, one in {each / rate:,.1f} s")


def write_speed(folder: Path) -> float:
    """Write speed of the disk of `folder` in bytes per second, measured with a flushed temporary file."""
    block = os.urandom(2**20)
    began = time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(PROBE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return PROBE_BYTES / (time.perf_counter() - began)


def limits(case: CheckContext, maps: Path = Path("/proc/sys/vm/max_map_count")) -> Iterator[CheckResult]:
    """Limits of open files and of memory maps of a process. Every shard in use is one map."""
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < OPEN_FILES:
        yield problem(
            "limits",
            f"{files} open files a process, {OPEN_FILES} are needed",
            f"ulimit -n {OPEN_FILES}   # the hard limit is {hard}",
        )
        return
    try:
        most = int(maps.read_text())
    except (OSError, ValueError):
        most = 65_530  # Linux's default
    if most < MAPS:
        yield problem(
            "limits",
            f"{most:,} memory maps a process, up to {MAPS:,} are used",
            "sysctl -w vm.max_map_count=65530",
        )
    else:
        yield ok("limits", f"{files:,} open files, {most:,} memory maps a process")


def clock(case: CheckContext) -> Iterator[CheckResult]:
    """Whether the clock is behind the date of a file, and whether NTP sets it."""
    ours, manifest = Path(__file__).parents[1].rglob("*.py"), Path(case.shards or "shards", MANIFEST_NAME)
    behind = clock_behind([*ours, manifest, *case.run.glob("*")])
    if behind:
        yield problem(
            "clock", f"{time.ctime()}: {behind}", "timedatectl set-ntp true   # or  ntpdate -u pool.ntp.org"
        )
        return
    found = f"{time.ctime()}; p2w compares no two nodes' clocks"
    if synchronised():
        yield ok("clock", f"{found}; NTP keeps it")
    else:
        munge = "Slurm's munge refuses a node that is 5 minutes off"
        yield note("clock", f"{found}; not synchronised by NTP ({munge})", "timedatectl set-ntp true")


def clock_behind(files: list[Path]) -> str:
    """By how much the clock is behind the newest date of these files, in words; empty when it is not."""
    dates = [(file.stat().st_mtime, file) for file in files if file.exists()]
    date, file = max(dates, default=(0.0, Path()))
    ahead = date - time.time()
    return f"{ahead:,.0f} s before the date of {file}" if ahead > SLACK_S else ""


def synchronised() -> bool:
    """Whether the kernel's clock is synchronised, by adjtimex(2) in a call that changes nothing."""
    timex = ctypes.create_string_buffer(512)  # struct timex is 208 bytes; all zero asks only
    state = ctypes.CDLL(None, use_errno=True).adjtimex(timex)
    return 0 <= state < CLOCK_ERROR
