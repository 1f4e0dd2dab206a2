"""Cores, memory and disk that this process may use: what the machine has, or less by CPU affinity and control groups.

Slurm, Docker and Kubernetes set limits by control groups (cgroup v1 or v2), which os.cpu_count() and /proc/meminfo ignore.
"""

import contextlib
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def usable_cores(proc: Path | None = None, cgroups: Path | None = None) -> int:
    """Number of cores that this process may use: the lower of CPU affinity and control group quotas; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group, old in _groups("cpu", proc, cgroups):
        with contextlib.suppress(OSError, ValueError):  # no such file, or the word `max`
            if old:
                quota, period = (
                    int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period")
                )
            else:
                quota, period = map(int, (group / "cpu.max").read_text().split())
            if quota > 0 and period > 0:  # -1: no limit
                cores = min(cores, math.ceil(quota / period))
    return max(1, cores)


def total_memory(proc: Path | None = None, cgroups: Path | None = None) -> int:
    """Memory in bytes: the machine's, or the lowest limit of a control group."""
    limits = (limit for limit, _ in _memory_groups(proc, cgroups))
    return min(_meminfo(proc, "MemTotal"), *limits, 1 << 62)


def free_memory(proc: Path | None = None, cgroups: Path | None = None) -> int:
    """Bytes that this process can still allocate: what Linux calls available, or less where a control group limits it.

    The page cache of a group does not count as used, since the kernel drops it when memory is needed.
    """
    left = (limit - used for limit, used in _memory_groups(proc, cgroups))
    return max(0, min(_meminfo(proc, "MemAvailable"), *left, 1 << 62))


def free_disk(path: str | os.PathLike[str]) -> int:
    """Bytes free on the disk on which `path` lies, or would lie once it is made."""
    path = os.path.abspath(path)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free


def _meminfo(proc: Path | None, name: str) -> int:
    """An entry of /proc/meminfo in bytes; 2**62 on a system without that file."""
    with contextlib.suppress(OSError, ValueError):
        for line in ((proc or PROC) / "meminfo").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return 1024 * int(line.split()[1])
    return 1 << 62


def _memory_groups(proc: Path | None, cgroups: Path | None) -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes, without the page cache, of each control group around this process that has a limit."""
    for group, old in _groups("memory", proc, cgroups):
        names = ("limit_in_bytes", "usage_in_bytes") if old else ("max", "current")
        with contextlib.suppress(OSError, ValueError):  # no such file, or the word `max`
            limit, used = (int((group / f"memory.{name}").read_text()) for name in names)
            yield limit, max(0, used - _page_cache(group, old))


def _page_cache(group: Path, old: bool) -> int:
    """Size in bytes of a group's page cache, which the kernel may drop; 0 if it is not known."""
    wanted = {f"{'total_' if old else ''}{state}_file" for state in ("active", "inactive")}
    with contextlib.suppress(OSError, ValueError):
        fields = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        return sum(int(value) for name, value in fields if name in wanted)
    return 0


def _groups(controller: str, proc: Path | None, cgroups: Path | None) -> Iterator[tuple[Path, bool]]:
    """Folders of the control groups around this process, innermost first, and whether they are of version 1.

    A container may see its own group as the root, while /proc gives its path outside: so the root is always included.
    """
    proc, cgroups = proc or PROC, cgroups or CGROUPS
    try:
        entries = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for entry in entries:
        _, kinds, path = entry.split(":", 2)
        if kinds and controller not in kinds.split(","):
            continue
        root = cgroups / kinds if not kinds or (cgroups / kinds).is_dir() else cgroups / controller
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents[: len(folder.relative_to(root).parts)]):
            yield group, bool(kinds)
