"""Checks of host name, ports, a real all-reduce, and Slurm: what torchrun, gloo, NCCL and jobs need."""

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from p2w.doctor import CheckContext, CheckResult, note, ok, problem
from p2w.world import World, variable, variables

TORCHRUN_PORT = 29500
JOB_PORTS = range(15_000, 30_000)  # slurm/pretrain.sbatch selects one by the job's number
MEET_S = 30.0
MOST_TIMES = 10  # MEET_S is not counted while the machine is busy, up to so many times it
LOOK_S = 0.05
SLOW_NAME_S = 1.0
PROBE_NUMBERS = 1 << 23  # float32, 32 MiB: half of the paper's gradients
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def host_name(case: CheckContext, name: str = "") -> Iterator[CheckResult]:
    """Whether this host's name resolves to this host: gloo and torchrun look it up and connect to its address."""
    name = name or socket.gethostname()
    began = time.perf_counter()
    try:
        address = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
    except (OSError, UnicodeError) as error:
        yield problem(
            "host name",
            f"{name} does not resolve ({error})",
            f"echo '127.0.1.1 {name}' >> /etc/hosts   # on every node its own address",
        )
        return
    seconds = time.perf_counter() - began
    try:
        connect(str(address))
    except OSError as error:
        yield problem(
            "host name", f"{name} resolves to {address}, which does not lead back here ({error.strerror or error})",
            f"correct {name} in /etc/hosts, or export GLOO_SOCKET_IFNAME=INTERFACE (ip -brief address)",
        )  # fmt: skip
        return
    found = f"{name} is {address}, which answers; so does loopback"
    try:
        connect("127.0.0.1")
    except OSError as error:
        yield problem(
            "loopback", f"127.0.0.1 does not answer ({error.strerror or error})", "ip link set lo up"
        )
        return
    if seconds > SLOW_NAME_S:
        yield note("host name", f"{found}, after {seconds:.1f} s", f"echo '{address} {name}' >> /etc/hosts")
    elif str(address).startswith("127."):
        yield ok("host name", f"{found} (several nodes without Slurm: torchrun --local-addr ADDRESS)")
    else:
        yield ok("host name", found)


def connect(address: str) -> None:
    """Listen at `address` and connect to it. Raises OSError when either does not work."""
    with socket.socket() as server:
        server.bind((address, 0))
        server.listen(1)
        with socket.create_connection(server.getsockname(), timeout=5):
            server.accept()[0].close()


def interfaces(case: CheckContext) -> Iterator[CheckResult]:
    """Whether the interfaces that the environment sets for gloo and NCCL exist; with an unknown one, every start fails."""
    here = [name for _, name in socket.if_nameindex()]
    for name in INTERFACES:
        asked = variable(name).lstrip("^=")
        unknown = [
            part for part in asked.split(",") if part and not any(one.startswith(part) for one in here)
        ]
        if unknown:
            yield problem(
                "interfaces", f"{name}={variable(name)}, but this host has {', '.join(here)}", f"unset {name}"
            )


def ports(
    case: CheckContext,
    wanted: int = TORCHRUN_PORT,
    low: Path = Path("/proc/sys/net/ipv4/ip_local_port_range"),
) -> Iterator[CheckResult]:
    """The port of torchrun's rendezvous, and the ports that Slurm jobs select by their number."""
    if not free(wanted):
        yield problem(
            "ports",
            f"{wanted}, torchrun's, is taken",
            f"torchrun --standalone ..., or --master-port {wanted + 1} (who: ss -ltnp)",
        )
        return
    taken = [port for port in JOB_PORTS if not free(port)]
    found = f"{wanted} (torchrun) is free, of {JOB_PORTS[0]}-{JOB_PORTS[-1]} (Slurm jobs) {len(taken)} taken"
    try:
        first = int(low.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        first = JOB_PORTS[-1] + 1
    if first <= JOB_PORTS[-1]:
        yield note(
            "ports",
            f"{found}; outgoing connections take ports from {first} on",
            "sysctl -w net.ipv4.ip_local_port_range='32768 60999'",
        )
    else:
        yield ok("ports", found)


def free(port: int) -> bool:
    """Whether a server can listen on this port of all addresses."""
    with socket.socket() as s:
        # As torchrun does: closed connections do not count
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("", port))
            return True
        except OSError:
            return False


def all_reduce(case: CheckContext, within_s: float = MEET_S) -> Iterator[CheckResult]:
    """Two processes join a group as ranks do and all-reduce: over gloo, and over NCCL where there are two GPUs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {} if case.cuda and torch.cuda.device_count() > 1 else {"P2W_DEVICE": "cpu"}
    where = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "p2w.doctor.network", str(MOST_TIMES * within_s)],
            env=variables(**where, **own, RANK=str(rank), LOCAL_RANK=str(rank), TORCHELASTIC_USE_AGENT_STORE="False"),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        late = _wait_for(ranks, within_s)
    finally:
        for one in ranks:
            one.kill()
        said = [one.communicate() for one in ranks]
    failed = [
        err for one, (_, err) in zip(ranks, said, strict=True) if one.returncode not in (0, -signal.SIGKILL)
    ]
    if late and not failed:
        yield late
        return
    if failed or any(one.returncode for one in ranks):
        complaint = ("".join(failed).strip().splitlines() or ["no message"])[-1]
        yield problem(
            "all-reduce",
            f"two processes: {complaint}",
            "GLOO_SOCKET_IFNAME=lo p2w doctor   # works? Then mend `host name`",
        )
        return
    for backend, (seconds, nbytes) in json.loads(said[0][0]).items():
        yield ok(
            "all-reduce",
            f"two processes over {backend}: {nbytes >> 20} MiB in {1000 * seconds:.0f} ms, the sum is right",
        )


def _wait_for(ranks: Sequence["subprocess.Popen[str]"], within_s: float) -> CheckResult | None:
    """Wait until all ranks have ended, or one has failed; what to say of ranks that do not answer.

    Time in which ranks were ready to run, but other processes had the processors, does not count: on a busy machine
    importing torch alone may take longer than `within_s`.
    """
    began, queued = time.monotonic(), [0.0] * len(ranks)
    while any(one.poll() is None for one in ranks) and not any(one.returncode for one in ranks):
        queued = [max(before, queued_s(one.pid)) for before, one in zip(queued, ranks, strict=True)]
        passed = time.monotonic() - began
        if passed > MOST_TIMES * within_s and sum(queued) > passed / 2:
            return note(
                "all-reduce",
                f"two processes: no answer in {passed:.0f} s, in which they waited {sum(queued):.0f} s for a processor: "
                "this machine is too busy to tell",
                "p2w doctor   # again, when less runs here (uptime)",
            )
        if passed - sum(queued) > within_s or passed > MOST_TIMES * within_s:
            return problem(
                "all-reduce",
                f"two processes: no answer in {passed:.0f} s",
                "GLOO_SOCKET_IFNAME=lo p2w doctor   # works? Then mend `host name`",
            )
        time.sleep(LOOK_S)
    return None


def queued_s(pid: int, proc: Path = Path("/proc")) -> float:
    """Seconds that the threads of a process were ready to run without a processor; 0 where the kernel does not tell."""
    total = 0
    for file in (proc / str(pid) / "task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            total += int(file.read_text().split()[1])
    return total / 1e9


def probe_rank(timeout_s: float) -> None:
    """One of the two ranks that `all_reduce` starts; rank 0 prints (seconds, bytes) of every backend as JSON.

    Sums over gloo on the CPU and, if this rank has a GPU, over NCCL.
    """
    world = World.start(timeout_s)
    took = {}
    for backend, device in {"gloo": "cpu", "NCCL": "cuda"}.items():
        if device not in ("cpu", world.device.type):
            continue
        for _ in range(2):  # the first one opens the connections
            values = torch.full(
                (PROBE_NUMBERS,), world.rank + 1.0, device=world.device if device == "cuda" else device
            )
            began = time.perf_counter()
            world.sum(values)
            right = bool((values == 3).all())  # also waits for a GPU
            seconds = time.perf_counter() - began
        if not right:
            sys.exit(f"rank {world.rank}: the sum over {backend} is wrong")
        took[backend] = (seconds, values.nbytes)
    world.close()
    if world.is_main:
        print(json.dumps(took))


COMMANDS = ("sbatch", "srun", "scontrol", "sinfo")
ANSWER_S = 8
USABLE = ("idle", "mixed", "allocated", "completing")


def cluster(case: CheckContext) -> Iterator[CheckResult]:
    """Nodes of the Slurm cluster by state, and the time that a stopped job has to save."""
    found_commands = [name for name in COMMANDS if shutil.which(name)]
    if not found_commands:
        yield ok("Slurm", "not here; only slurm/*.sbatch need it")
        return
    if missing := sorted(set(COMMANDS) - set(found_commands)):
        yield problem(
            "Slurm",
            f"{', '.join(missing)} not on the PATH, {', '.join(found_commands)} is",
            "apt-get install slurm-client",
        )
        return
    code, said = run_command("sinfo", "--noheader", "--Node", "--format=%N %T")
    if code and "configuration source" in said:
        yield note(
            "Slurm",
            "its commands are here, but no configuration: not a node of a cluster",
            "export SLURM_CONF=FILE",
        )
        return
    if code:
        yield problem(
            "Slurm", f"sinfo does not answer: {said}", "scontrol ping; systemctl status slurmctld munge"
        )
        return
    states = dict(line.split()[:2] for line in said.splitlines() if len(line.split()) > 1)
    counts = Counter(states.values())
    found = ", ".join(f"{count} node(s) {state}" for state, count in counts.items()) or "no nodes"
    wait = re.search(r"KillWait\s*=\s*(\d+)", run_command("scontrol", "show", "config")[1])
    if wait:
        found += f"; a stopped job has {wait[1]} s to save (KillWait)"
    bad = sorted(node for node, state in states.items() if state.strip("*~#!%$@^-") not in USABLE)
    if states and len(bad) == len(states):
        yield problem("Slurm", found, f"sinfo -R; scontrol update nodename={','.join(bad[:4])} state=resume")
    elif bad:
        yield note("Slurm", found, f"sinfo -R; scontrol update nodename={','.join(bad[:4])} state=resume")
    else:
        yield ok("Slurm", found)


def job(case: CheckContext) -> Iterator[CheckResult]:
    """Inside a Slurm job: its number, nodes and restarts so far."""
    number = variable("SLURM_JOB_ID")
    if not number:
        return
    nodes = variable("SLURM_JOB_NODELIST")
    code, said = run_command("scontrol", "show", "hostnames", nodes)
    names = ", ".join(said.split()) if not code else nodes
    cpus, gpus = variable("SLURM_CPUS_ON_NODE") or "?", variable("SLURM_GPUS_ON_NODE") or "0"
    found = f"{number} on {names}; this is {variable('SLURMD_NODENAME') or 'none of them'}: {cpus} CPU(s), {gpus} GPU(s)"
    yield ok("Slurm job", f"{found}; restarts {variable('SLURM_RESTART_COUNT') or 0}")


def run_command(*command: str) -> tuple[int, str]:
    """Exit code and output of a command; after an error, its last line on stderr. It is killed after ANSWER_S seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=False)
    except subprocess.TimeoutExpired:
        return 1, f"nothing in {ANSWER_S} s"
    except OSError as error:
        return 1, str(error)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return done.returncode, lines[-1]
    return 0, done.stdout


if __name__ == "__main__":
    probe_rank(float(sys.argv[1]))
