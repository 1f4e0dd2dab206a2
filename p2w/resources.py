"""Cores and memory that this process may use: the machine's, or less where its affinity or a control group allows less.

Slurm, Docker and Kubernetes limit by control groups (cgroup v1 or v2), which neither os.cpu_count() nor /proc/meminfo shows.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def usable_cores(proc: Path | None = None, cgroups: Path | None = None) -> int:
    """Cores that this process may keep busy: its CPU affinity, or the quota of its control group; at least 1."""
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
    """Bytes of memory: the machine's, or the lowest limit of a control group."""
    limits = (limit for limit, _ in _memory_groups(proc, cgroups))
    return min(_meminfo(proc, "MemTotal"), *limits, 1 << 62)


def free_memory(proc: Path | None = None, cgroups: Path | None = None) -> int:
    """Bytes that this process could still take: what Linux calls available, or less where a control group limits it.

    Files that a group has in the page cache are no hindrance: they are dropped when memory is asked for.
    """
    left = (limit - used for limit, used in _memory_groups(proc, cgroups))
    return max(0, min(_meminfo(proc, "MemAvailable"), *left, 1 << 62))


def _meminfo(proc: Path | None, name: str) -> int:
    """A line of /proc/meminfo in bytes; without bound where the system has none."""
    with contextlib.suppress(OSError, ValueError):
        for line in ((proc or PROC) / "meminfo").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return 1024 * int(line.split()[1])
    return 1 << 62


def _memory_groups(proc: Path | None, cgroups: Path | None) -> Iterator[tuple[int, int]]:
    """Limit and use in bytes, page cache left out, of each control group around this process that has a limit."""
    for group, old in _groups("memory", proc, cgroups):
        names = ("limit_in_bytes", "usage_in_bytes") if old else ("max", "current")
        with contextlib.suppress(OSError, ValueError):  # no such file, or the word `max`
            limit, used = (int((group / f"memory.{name}").read_text()) for name in names)
            yield limit, max(0, used - _page_cache(group, old))


def _page_cache(group: Path, old: bool) -> int:
    """Bytes of files that the kernel may drop from a group; 0 where it does not say."""
    wanted = {f"{'total_' if old else ''}{state}_file" for state in ("active", "inactive")}
    with contextlib.suppress(OSError, ValueError):
        fields = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        return sum(int(value) for name, value in fields if name in wanted)
    return 0


def _groups(controller: str, proc: Path | None, cgroups: Path | None) -> Iterator[tuple[Path, bool]]:
    """Folders of the control groups around this process, innermost first, and whether they are of version 1.

    A container may see its own group as the root while /proc names it from outside: the root is looked at in any case.
    """
    proc, cgroups = proc or PROC, cgroups or CGROUPS
    try:
        entries = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for entry in entries:
        _, kinds, place = entry.split(":", 2)
        if kinds and controller not in kinds.split(","):
            continue
        root = cgroups / kinds if not kinds or (cgroups / kinds).is_dir() else cgroups / controller
        folder = root / place.lstrip("/")
        for group in (folder, *folder.parents[: len(folder.relative_to(root).parts)]):
            yield group, bool(kinds)
