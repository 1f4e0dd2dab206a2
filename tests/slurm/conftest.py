"""A real Slurm of two nodes on this machine, for the tests of ``slurm/``; starts as root or as a plain user.

Everything lives in one scratch folder with its own ports, its own munge socket and key, and is stopped by pid
files, so that it disturbs neither a Slurm that is installed here nor a second one of a parallel test worker.
"""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

DAEMONS = ("munged", "slurmctld", "slurmd")
PREFIX = "p2w-slurm-"

SLURM_CONF = """\
ClusterName=p2wtest
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its credential has expired, 120 s by default.
AuthInfo=socket={dir}/munge.sock,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=5,batch_sched_delay=0
# The nodes claim two cores and two graphics cards each, whatever this machine has.
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
JobRequeue=1
KillWait=10
SlurmdTimeout=30
SlurmctldPort={ports[0]}
StateSaveLocation={dir}/ctld
SlurmdSpoolDir={dir}/d-%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd-%n.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd-%n.log
NodeName=node1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
NodeName=node2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
"""
GRES_CONF = "NodeName=node[1-2] Name=gpu File=/dev/null,/dev/zero Flags=nvidia_gpu_env\n"


class Cluster:
    """Two running nodes. Commands run with this cluster's configuration and without another job's variables."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "P2W_"))}
        self.env["SLURM_CONF"] = str(folder / "slurm.conf")
        # The jobs run the interpreter of the tests, and leave what torchrun leaves in the scratch folder.
        self.env["PATH"] = f"{Path(sys.executable).parent}:{self.env['PATH']}:/usr/sbin:/sbin"
        self.env["TMPDIR"] = str(folder / "tmp")

    def run(self, *command: str | Path, cwd: Path | None = None, **env: str) -> str:
        """Output of a Slurm command; a failing one raises with what it said."""
        done = subprocess.run(
            ["timeout", "-k", "5", "30", *map(str, command)],
            env=self.env | env, cwd=cwd, text=True, capture_output=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr or done.stdout}")
        return done.stdout.strip()

    def sbatch(self, *args: str | Path, cwd: Path, **env: str) -> str:
        """Submit from ``cwd``; the job's number. Its log is ``cwd/JOB.log`` or, of an array, ``cwd/JOB_TASK.log``."""
        log = "%A_%a.log" if any(str(a).startswith("--array") for a in args) else "%j.log"
        return self.run("sbatch", "--parsable", f"--output={log}", *args, cwd=cwd, **env)

    def job(self, job: str) -> dict[str, str]:
        """What ``scontrol`` knows about one job."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, what: str, true: Callable[[], bool], seconds: float = 60) -> None:
        """Until ``true()``; fails naming ``what``."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"not within {seconds} s: {what}\n{self.run('squeue', '--long')}"
            time.sleep(0.1)

    def ended(self, job: str, seconds: float = 60) -> dict[str, str]:
        """The job's record once it has come to its end (a requeued one has not)."""
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait(f"end of job {job}", lambda: self.job(job)["JobState"] in final, seconds)
        return self.job(job)


def pids(folder: Path) -> list[int]:
    """Of the daemons that were started in ``folder`` and still run; a dead one nobody has waited for does not."""
    found = []
    for file in folder.glob("*.pid"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
            pid = int(file.read_text())
            if Path(Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0]).name in DAEMONS:
                found.append(pid)
    return found


def stop(folder: Path) -> None:
    """Kill the jobs, then the daemons: first politely, after 10 s for good; remove the folder."""
    env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    if (folder / "slurmctld.pid").exists():
        cancel = ["timeout", "-k", "1", "5", "scancel", "--full", "--signal=KILL", "--state=RUNNING"]
        subprocess.run([*cancel, "--partition=main"], env=env, capture_output=True, check=False)
    for sign in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids(folder):
            os.kill(pid, sign)
        end = time.monotonic() + 10
        while pids(folder) and time.monotonic() < end:
            time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


def free_ports(n: int) -> list[int]:
    """Below the range of outgoing connections, so that no client of ours takes one meanwhile."""
    sockets, port = [], 6800 + os.getpid() % 3000
    while len(sockets) < n:
        port += 1
        s = socket.socket()
        try:
            s.bind(("127.0.0.1", port))
            sockets.append(s)
        except OSError:
            s.close()
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def start(folder: Path) -> Cluster:
    """munged, one controller, two nodes; returns when both nodes are idle."""
    for name in ("ctld", "d-node1", "d-node2", "tmp"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(
        SLURM_CONF.format(user=getpass.getuser(), dir=folder, ports=free_ports(3))
    )
    (folder / "gres.conf").write_text(GRES_CONF)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    cluster = Cluster(folder)
    names = {f"--{k}-file": f"munge.{k}" for k in ("key", "pid", "log", "seed")} | {"--socket": "munge.sock"}
    cluster.run("munged", "--force", *(f"{k}={folder / v}" for k, v in names.items()))
    cluster.run("slurmctld")
    for node in ("node1", "node2"):
        cluster.run("slurmd", "-N", node)
    idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
    cluster.wait("two idle nodes", lambda: cluster.run(*idle) == "2", 30)
    return cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes, or a skip that says what is missing."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if missing := [d for d in (*DAEMONS, "sbatch", "srun") if not shutil.which(d, path=path)]:
        pytest.skip(f"no {', '.join(missing)} here: apt-get install slurmctld slurmd slurm-client munge")
    for old in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):  # of a session that was killed
        owner = old.name.split("-")[2]
        if os.access(old, os.W_OK) and not Path(f"/proc/{owner}").exists():
            stop(old)
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
    folder.chmod(0o755)
    try:
        yield start(folder)
    finally:
        if os.environ.get("P2W_KEEP_SLURM_LOGS"):
            shutil.copytree(folder, f"{folder}.kept".replace(PREFIX, "kept-"), ignore=shutil.ignore_patterns("*.sock"))
        stop(folder)
