"""`p2w doctor`: every check against a real fault, and the whole command as a process."""

import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import torch
from ct_files import ct, write
from ct_sets import write_structured_set
from cut_here import cut_here

from p2w import config as settings
from p2w import resources
from p2w.doctor import CheckContext, CheckResult, command, machine, network, ok, refused, software
from p2w.doctor.command import CHECKS, run_check
from p2w.errors import UserError
from p2w.recipes import named
from p2w.shards.scan_shards import ShardingSettings
from p2w.shards.tiling import Tiling
from p2w.train.run_dir import RunDir

REPO = Path(__file__).parents[2]


@pytest.fixture
def case(tmp_path, tiny_set) -> CheckContext:
    return CheckContext("demo", named("demo"), str(tiny_set), tmp_path / "run", 1, False)


def only(rows) -> CheckResult:
    (row,) = rows
    return row


@pytest.mark.slow
def test_the_whole_command_prints_a_screen_and_as_json_the_same(tmp_path, tiny_set):
    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "p2w", "doctor", "demo", "--shards", str(tiny_set), "--ranks", "2"]
        command += ["--run-dir", str(tmp_path / "run"), "--train.precision", "fp32", *more]
        env = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "P2W_DEVICE": "cpu"}
        return processes.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)

    told = run("--json")
    page = json.loads(told.stdout)
    rows = {row["name"]: row for row in page["rows"]}
    assert {
        "torch",
        "apex",
        "triton",
        "memory",
        "clock",
        "shards",
        "ports",
        "host name",
        "all-reduce",
        "Slurm",
    } <= set(rows)
    assert rows["all-reduce"]["status"] == rows["checksums"]["status"] == "ok", rows
    assert "batch 16 = 2 rank(s) x 8" in rows["batch"]["found"]
    problems = [row for row in page["rows"] if row["status"] == "problem"]
    assert told.returncode == (1 if problems else 0) and page["problems"] == len(problems)
    assert all(row["remedy"] for row in problems) and "Traceback" not in told.stderr
    assert os.listdir(tmp_path) == []  # it changes nothing


@pytest.mark.slow
def test_a_broken_set_is_a_problem_and_exit_code_1(tmp_path, tiny_set):
    broken = shutil.copytree(tiny_set, tmp_path / "set")
    next(broken.glob("*.tar")).unlink()
    code = "import sys; from p2w.doctor import command; command.CHECKS = (command.shards,); "
    code += "sys.exit(command.main(sys.argv[1:]))"
    done = processes.run(
        [sys.executable, "-c", code, "demo", "--shards", str(broken)],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPO), "P2W_DEVICE": "cpu"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1 and "is missing" in done.stdout and "-> " in done.stdout
    assert "1 problem(s), 0 note(s)" in done.stdout and "Traceback" not in done.stderr


def test_shards_that_are_damaged_missing_or_do_not_fit(case, tmp_path):
    assert [row.status for row in command.shards(case)] == ["ok"] * 4
    folder = write_structured_set(tmp_path / "set", train=2, val=1, per=2)
    case = replace(
        case, shards=str(folder), config=replace(case.config, data=replace(case.config.data, batch=4))
    )
    for shard in folder.glob("*.tar"):
        voxels = bytearray(shard.read_bytes())
        for at in range(600, len(voxels), 1024):  # in every sub-scan
            voxels[at] ^= 1
        shard.write_bytes(voxels)
    rows = {row.name: row for row in command.shards(case)}
    assert rows["checksums"].status == "problem" and "key 1.2.826." in rows["checksums"].found
    assert f"p2w verify {folder}" in rows["checksums"].remedy
    rows = {row.name: row for row in command.shards(replace(case, ranks=3))}
    assert rows["batch"].status == "problem" and "3 ranks" in rows["batch"].found
    nowhere = only(command.shards(replace(case, shards=str(tmp_path / "nowhere"))))
    assert nowhere.status == "problem" and "no such folder" in nowhere.found and "p2w shard" in nowhere.remedy


def test_a_set_of_whole_scans_is_sampled_as_any_other(case, tmp_path):
    for number in range(2):
        write(tmp_path / "scans" / f"s{number}.mhd", ct((40, 70, 75), number))
    settings = ShardingSettings(Tiling((16, 32, 32)), store="scans")
    found = cut_here(tmp_path / "scans", tmp_path / "set", settings).root
    small = replace(case.config, data=replace(case.config.data, batch=4))
    rows = {row.name: row for row in command.shards(replace(case, shards=found, config=small))}
    assert "in 2 shards, all there, cut from whole scans" in rows["shards"].found
    assert "16 sub-scans drawn from 16, all intact" in rows["checksums"].found


def test_a_run_folder_of_other_settings(case):
    RunDir(case.run).open(case.config, "x", "shards", {})
    rows = {row.name: row for row in command.shards(case)}
    assert rows["run folder"].status == "problem" and "--shards" in rows["run folder"].remedy
    other = replace(
        case, config=settings.check_config(replace(case.config, train=replace(case.config.train, seed=5)))
    )
    rows = {row.name: row for row in command.shards(other)}
    assert "train.seed was 0, now 5" in rows["run folder"].found


@pytest.mark.slow
def test_a_full_disk_and_one_that_cannot_be_written(case, tmp_path):
    assert only(machine.disk(case)).status == "ok"
    wide = replace(case, config=replace(case.config, model=replace(case.config.model, width=4096)))
    full = only(machine.disk(wide))  # terabytes of checkpoints
    assert full.status == "problem" and "--train.keep 1" in full.remedy
    proc = only(machine.disk(replace(case, run=Path("/proc/none/run"))))
    assert proc.status == "problem"


def test_memory_against_need_and_control_groups(case, tmp_path):
    assert only(machine.memory(case)).status == "ok"
    wide = replace(case, config=replace(case.config, model=replace(case.config.model, width=2048)))
    assert "--optim.accumulate" in only(machine.memory(wide)).remedy
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    (proc / "self/cgroup").write_text("0::/job/step\n")
    (groups / "job/step").mkdir(parents=True)
    assert resources.free_memory(proc, groups) == 8000 * 1024
    (groups / "job/memory.max").write_text("5000000\n")
    (groups / "job/memory.current").write_text("1000000\n")
    (groups / "job/step/memory.max").write_text("max\n")
    assert resources.free_memory(proc, groups) == 4_000_000


@pytest.mark.slow
def test_limits_and_clock(case, tmp_path):
    low = tmp_path / "max_map_count"
    low.write_text("4096\n")
    assert "vm.max_map_count" in only(machine.limits(case, low)).remedy
    code = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 4096)); from p2w.doctor import machine; "
    done = processes.run(
        [sys.executable, "-c", code + "print(*machine.limits(None))"],
        env=os.environ | {"PYTHONPATH": str(REPO)}, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert "256 open files" in done.stdout and "ulimit -n 1024" in done.stdout
    case.run.mkdir()
    (case.run / "status.json").touch()
    assert only(machine.clock(case)).status != "problem"
    tomorrow = time.time() + 86_400
    os.utime(case.run / "status.json", (tomorrow, tomorrow))
    behind = only(machine.clock(case))
    assert behind.status == "problem" and "status.json" in behind.found and "86,400 s" in behind.found


def test_a_busy_port_a_wrong_host_name_and_an_unknown_interface(case, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        busy = only(network.ports(case, port))
        assert busy.status == "problem" and f"--master-port {port + 1}" in busy.remedy
    assert "free" in only(network.ports(case, port)).found
    assert "does not resolve" in only(network.host_name(case, "no-such-host.invalid")).found
    elsewhere = only(network.host_name(case, "192.0.2.1"))  # of documentation, on no machine
    assert elsewhere.status == "problem" and "GLOO_SOCKET_IFNAME" in elsewhere.remedy
    assert only(network.host_name(case, "localhost")).status == "ok"
    assert list(network.interfaces(case)) == []
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib7")
    assert only(network.interfaces(case)).remedy == "unset NCCL_SOCKET_IFNAME"


@pytest.mark.slow
def test_an_all_reduce_that_fails_or_hangs(case, monkeypatch):
    with monkeypatch.context() as idle:
        idle.setattr(network, "queued_s", lambda pid: 0.0)  # as on an idle machine
        late = only(network.all_reduce(case, 0.2))
    assert late.status == "problem" and "no answer" in late.found
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none7")
    failed = only(network.all_reduce(case))
    assert failed.status == "problem" and "none7" in failed.found


class Sleeper:
    """A process that never ends."""

    pid, returncode = 1, None

    def poll(self):
        return None


@pytest.mark.parametrize(
    ("share", "status", "least_s"),
    [(0.0, "problem", 2), (0.3, "problem", 5), (0.4, "problem", 10), (1.0, "note", 20)],
)
def test_waiting_for_a_busy_machine_is_no_hang(monkeypatch, share, status, least_s):
    """`share` of the time each of two ranks waits for a processor, on a clock of the test's own."""
    clock = [100.0]
    monkeypatch.setattr(network.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(network.time, "sleep", lambda s: clock.__setitem__(0, clock[0] + s))
    monkeypatch.setattr(network, "queued_s", lambda pid: share * (clock[0] - 100))
    found = network._wait_for([Sleeper(), Sleeper()], 2.0)
    assert found.status == status and clock[0] - 100 >= least_s
    assert (found.remedy == "p2w doctor   # again, when less runs here (uptime)") == (status == "note")


def test_time_without_a_processor_is_read_of_all_threads(tmp_path):
    for thread, waited in ((7, "5000000000 1500000000 3"), (8, "1 500000000 3"), (9, "")):
        (tmp_path / f"7/task/{thread}").mkdir(parents=True)
        (tmp_path / f"7/task/{thread}/schedstat").write_text(waited)
    assert network.queued_s(7, tmp_path) == 2.0 and network.queued_s(8, tmp_path) == 0.0


@pytest.mark.parametrize("nvidia", [False, True])
def test_apex_of_nvidia_of_pypi_and_none(case, tmp_path, monkeypatch, nvidia):
    """As in tests/train/test_optim.py: PyPI's is a Pyramid toolkit without `optimizers`."""
    assert (only(software.apex(case)).status, "not installed" in only(software.apex(case)).found) == (
        "ok",
        True,
    )
    (tmp_path / "apex" / ("optimizers" if nvidia else "scripts")).mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    row = only(software.apex(case))
    assert row.status == ("ok" if nvidia else "note")
    assert ("web toolkit" in row.found) is not nvidia
    asked = replace(case, config=replace(case.config, optim=replace(case.config.optim, fused="apex")))
    assert only(software.apex(asked)).status == "problem"
    sys.modules.pop("apex", None)


def test_a_kernel_that_does_not_compile_costs_speed(case, monkeypatch):
    monkeypatch.setattr(software.rng, "backend", lambda device: ("torch", "no C compiler was found"))
    row = only(software.triton(replace(case, cuda=True)))
    assert row.status == "note" and "parts are cut by torch, slower: no C compiler was found" in row.found
    assert "gcc" in row.remedy


def test_cards_that_torch_cannot_use(case, tmp_path):
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    row = only(software.torch_build(case, str(tmp_path)))
    assert (row.status == "problem") is not torch.cuda.is_available()


def test_gradients_that_are_wrong_are_found(case, monkeypatch):
    def wrong(self, *args, **kwargs):  # a kernel that loses everything below 1/2
        return conv(self, *args, **kwargs).mul(2).trunc()

    fp32 = replace(case, config=replace(case.config, train=replace(case.config.train, precision="fp32")))
    assert only(software.arithmetic(fp32)).status == "ok"
    conv = torch.nn.Conv3d.forward
    monkeypatch.setattr(torch.nn.Conv3d, "forward", wrong)
    assert only(software.arithmetic(fp32)).status == "problem"


def test_slurm_missing_incomplete_or_silent(case, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "not here" in only(network.cluster(case)).found
    for name in network.COMMANDS:
        half = only(network.cluster(case)).status
        assert half == ("ok" if name == "sbatch" else "problem")
        (tmp_path / name).write_text("#!/bin/sh\necho cannot reach the controller >&2; exit 1\n")
        (tmp_path / name).chmod(0o755)
    silent = only(network.cluster(case))
    assert silent.status == "problem" and "cannot reach the controller" in silent.found


def test_a_check_that_fails_or_hangs_is_a_problem(case):
    def failing(case):
        yield ok("one", "before")
        raise KeyError("odd")

    def hanging(case):
        yield from iter(lambda: time.sleep(30), 1)

    rows = run_check(failing, case)
    assert [row.status for row in rows] == ["ok", "problem"] and "KeyError: 'odd'" in rows[1].found
    assert "no answer in 0 s" in only(run_check(hanging, case, 0.2)).found


def test_a_user_error_is_split_into_fault_and_remedy():
    row = refused("x", UserError("a: b: wrong; do this"))
    assert (row.found, row.remedy) == ("a: b: wrong", "do this")
    row = refused("x", UserError("a: not b: do that"))
    assert (row.found, row.remedy) == ("a: not b", "do that")


def test_every_check_has_a_name_of_its_own():
    assert len({check.__name__ for check in CHECKS}) == len(CHECKS)
