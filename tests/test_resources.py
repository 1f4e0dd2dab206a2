"""Cores and memory as control groups of either version limit them: folders as the kernel lays them out."""

import os
import subprocess
import sys

import pytest
import torch
from processes import REPO

from p2w.resources import free_memory, total_memory, usable_cores
from p2w.shards import build
from p2w.stream.prefetch import free_bytes

GIB, CPU = 1 << 30, torch.device("cpu")


@pytest.fixture
def machine(tmp_path):
    """/proc and /sys/fs/cgroup of a machine with 256 GiB, 200 of them free; a function that lays a file into either."""

    def lay(path, text):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    lay("proc/meminfo", f"MemTotal: {256 << 20} kB\nMemAvailable: {200 << 20} kB")
    lay("proc/self/cgroup", "0::/")
    return lay, (tmp_path / "proc", tmp_path / "cgroup")


def test_without_a_limit_it_is_the_machine(machine):
    lay, places = machine
    assert (total_memory(*places), free_memory(*places)) == (256 * GIB, 200 * GIB)
    lay("cgroup/memory.max", "max")
    lay("cgroup/memory.current", 5 * GIB)
    lay("cgroup/cpu.max", "max 100000")
    assert (total_memory(*places), free_memory(*places)) == (256 * GIB, 200 * GIB)
    assert usable_cores(*places) == len(os.sched_getaffinity(0))


def test_a_container_of_version_2(machine):
    """docker run --memory 8g --cpus 1: the group is the root; its page cache can be dropped, and does not count."""
    lay, places = machine
    lay("cgroup/memory.max", 8 * GIB)
    lay("cgroup/memory.current", 7 * GIB)
    lay("cgroup/memory.stat", f"anon {GIB}\nfile {6 * GIB}\nactive_file {2 * GIB}\ninactive_file {4 * GIB}")
    lay("cgroup/cpu.max", "100000 100000")
    assert (total_memory(*places), free_memory(*places), usable_cores(*places)) == (8 * GIB, 7 * GIB, 1)


def test_a_slurm_step_of_version_1(machine):
    """The job has the limit and the step none; controllers lie in folders of their own, cpu with cpuacct."""
    lay, places = machine
    lay("proc/self/cgroup", "9:cpuset:/x\n4:memory:/slurm/job_7/step_0\n2:cpu,cpuacct:/slurm/job_7/step_0")
    job, step = "cgroup/memory/slurm/job_7", "cgroup/memory/slurm/job_7/step_0"
    lay(f"{job}/memory.limit_in_bytes", 16 * GIB)
    lay(f"{job}/memory.usage_in_bytes", 3 * GIB)
    lay(f"{job}/memory.stat", f"inactive_file 0\ntotal_inactive_file {GIB}\ntotal_active_file 0")
    lay(f"{step}/memory.limit_in_bytes", 9223372036854771712)
    lay(f"{step}/memory.usage_in_bytes", 3 * GIB)
    lay("cgroup/cpu,cpuacct/slurm/job_7/cpu.cfs_quota_us", 50_000)
    lay("cgroup/cpu,cpuacct/slurm/job_7/cpu.cfs_period_us", 100_000)
    assert (total_memory(*places), free_memory(*places), usable_cores(*places)) == (16 * GIB, 14 * GIB, 1)


def test_workers_follow_the_containers_memory(machine, monkeypatch):
    """8 GiB on 64 cores: four workers of 2 GiB, where there were up to 64."""
    lay, places = machine
    lay("cgroup/memory.max", 8 * GIB)
    lay("cgroup/memory.current", 0)
    monkeypatch.setattr("p2w.resources.PROC", places[0])
    monkeypatch.setattr("p2w.resources.CGROUPS", places[1])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    assert build.default_workers() == 4 and free_bytes(CPU) == 8 * GIB


@pytest.mark.slow
def test_affinity_is_what_taskset_leaves():
    code = "from p2w.resources import usable_cores; from p2w.world import World; "
    code += "print(usable_cores(), World.from_env().machine()['cores'])"
    core = str(min(os.sched_getaffinity(0)))
    done = subprocess.run(
        ["taskset", "-c", core, sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["1", "1"]


def test_only_resources_reads_cores_and_memory():
    """Only resources reads them; voxel_files needs an upper bound, and doctor shows the cores of the machine."""
    words = ("cpu_count", "MemAvailable", "SC_PHYS_PAGES", "sched_getaffinity")
    found = {
        str(path.relative_to(REPO))
        for top in ("p2w", "launch", "preprocess", "bench")
        for path in (REPO / top).rglob("*.py")
        if any(word in path.read_text() for word in words)
    }
    assert found == {"p2w/resources.py", "p2w/ct/voxel_files.py", "p2w/doctor/machine.py"}
