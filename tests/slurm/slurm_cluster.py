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
import time
from collections.abc import Callable
from pathlib import Path

from network_hosts import Hosts
from processes import EXEMPT, ForkGate

ROOT = Path(__file__).parents[2]
SITE = Path(__file__).parent / "site"
DAEMONS = ("munged", "slurmctld", "slurmd")
PREFIX = "p2w-slurm-"

SLURM_CONF = """\
ClusterName=p2wtest
SlurmctldHost=localhost({controller})
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its credential has expired: 120 s by default, 5 at least.
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
KillWait={kill_wait}
SlurmdTimeout=30
SlurmctldPort={ports[0]}
StateSaveLocation={dir}/ctld
SlurmdSpoolDir={dir}/d-%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd-%n.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd-%n.log
NodeName=DEFAULT CPUs=2 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
NodeName=node1 NodeHostname=localhost NodeAddr={addresses[0]} Port={ports[1]}
NodeName=node2 NodeHostname=localhost NodeAddr={addresses[1]} Port={ports[2]}
PartitionName=main Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
"""
GRES_CONF = "NodeName=node[1-2] Name=gpu File=/dev/null,/dev/zero Flags=nvidia_gpu_env\n"
CUT = ["--subsets", "0-1", "--workers", "1"]
# What jobs run as forks. Of those that srun starts, a stand-in in the tree of slurmstepd passes Slurm's signals on.
FORKED = frozenset({("-m", "p2w"), ("-m", "p2w.commands.train")})
TORCHRUN = ("-m", "torch.distributed.run")
# The step of a job's first start is then not forked: Slurm's own signals reach torchrun and its ranks.
FIRST_UNFORKED = {EXEMPT: "-0-0"}  # the end of --rdzv-id: number of the requeue, and of the try in it
STEP_SLEEP_S = 0.5  # of pretraining, as in site/sitecustomize.py
EPOCH_SLEEP_S = (
    0.65  # of fine-tuning, beside some 0.1 that an epoch computes: a job lasts long enough to be disturbed
)
KILL_WAIT = 10  # seconds from SIGTERM to SIGKILL
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


class Cluster:
    """Two running nodes. Commands see this cluster's configuration and no variables of a job around them."""

    gate: ForkGate  # of the commands that its jobs run as forks

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "P2W_"))}
        # Jobs run the interpreter of the tests, or forks of it, and leave what torchrun leaves in the scratch folder.
        self.env |= {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
            "P2W_PYTHON": str(folder / "bin" / "python"),
            "PYTHONPATH": f"{SITE}:{ROOT}",
            "TMPDIR": str(folder / "tmp"),
        }

    def run(self, *command: str | Path, **env: str) -> str:
        """Output of a Slurm command, typed in the project's folder; a failing one raises with what it said."""
        done = subprocess.run(
            ["timeout", "-k", "5", "30", *map(str, command)],
            env=self.env | env, cwd=ROOT, text=True, capture_output=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr or done.stdout}")
        return done.stdout.strip()

    def sbatch(self, *args: str | Path, **env: str) -> str:
        """Submit; the job's number. Its output goes to `log`."""
        array = any(str(arg).startswith("--array") for arg in args)
        name = "%A_%a.log" if array else "%j.log"
        return self.run("sbatch", "--parsable", f"--output={self.folder / name}", *args, **env)

    def log(self, job: str) -> str:
        """What job or task `job` has written."""
        path = self.folder / f"{job}.log"
        return path.read_text() if path.exists() else ""

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows about a job or task."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, what: str, true: Callable[[], bool], seconds: float = 180) -> None:
        """Until ``true()``; fails when time is up or the job ends before, with the job's log.

        A job that was cancelled is final to Slurm at once, while its processes have KillWait to end in. Slurm is asked once
        a second: each time takes two processes and the controller's time.
        """
        end, asked = time.monotonic() + seconds, time.monotonic()
        final: float | None = None
        while not true():
            if final is None and time.monotonic() - asked > 1:
                asked = time.monotonic()
                final = asked if self.job(job)["JobState"] in FINAL else None
            over = final is not None and time.monotonic() - final > KILL_WAIT + 1 and not true()
            if over or time.monotonic() > end:
                raise AssertionError(f"job {job}: no {what}\n{self.job(job)}\n{self.log(job)[-6000:]}")
            time.sleep(0.1)

    def ended(self, job: str, seconds: float = 180) -> dict[str, str]:
        """The job's record once it has come to its end (a requeued one has not)."""
        end = time.monotonic() + seconds
        while (found := self.job(job))["JobState"] not in FINAL:
            if time.monotonic() > end:
                raise AssertionError(f"job {job}: no end\n{found}\n{self.log(job)[-6000:]}")
            time.sleep(0.3)
        return found


def processes(folder: Path) -> list[int]:
    """Daemons and jobs that were started in ``folder`` and still run: all carry its configuration with them."""
    mark, found = f"SLURM_CONF={folder}/slurm.conf".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(entry.name) != os.getpid() and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def stop(folder: Path) -> None:
    """End the jobs, then the daemons by their pid files, then whatever is left after 5 s; remove the folder."""
    if processes(folder):
        with contextlib.suppress(RuntimeError):
            Cluster(folder).run("scancel", "--full", "--signal=KILL", f"--user={getpass.getuser()}")
            Cluster(folder).run("scancel", f"--user={getpass.getuser()}")
    for file in folder.glob("*.pid"):
        with contextlib.suppress(OSError, ValueError):
            pid = int(file.read_text())
            if pid in processes(folder):
                os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + 5
    while left := processes(folder):
        if time.monotonic() > end:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Below the range of outgoing connections, so that no client takes one meanwhile."""
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        port = (
            6800 + os.getpid() * 8 % 3000
        )  # workers, whose process ids follow one another, start theirs at once
        while len(ports) < count:
            port += 1
            s = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                s.bind(("127.0.0.1", port))
                ports.append(port)
        return ports


def start(folder: Path, hosts: Hosts | None = None, forked: frozenset[tuple[str, str]] = FORKED) -> Cluster:
    """munged, one controller, two nodes, on hosts of their own if they are given; returns when both nodes are idle.

    `forked` are the first two words of the commands of jobs that are run as forks.
    """
    for name in ("ctld", "d-node1", "d-node2", "tmp"):
        (folder / name).mkdir()
    text = SLURM_CONF.format(
        user=getpass.getuser(), dir=folder, ports=free_ports(3),
        controller=hosts.gateway if hosts else "127.0.0.1",
        addresses=hosts.addresses if hosts else ["127.0.0.1"] * 2,
        kill_wait=KILL_WAIT,
    )  # fmt: skip
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text(GRES_CONF)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    cluster = Cluster(folder)
    spies = (
        ("draw_nothing",),
        ("recalibrate_on_few",),
        ("lag", 0, STEP_SLEEP_S),
        ("lag_epochs", EPOCH_SLEEP_S),
    )
    cluster.gate = ForkGate(folder / "bin", forked, spies=spies)
    own = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
    cluster.run("munged", "--force", f"--socket={folder}/munge.sock", *own)
    cluster.run("slurmctld")
    for number, node in enumerate(("node1", "node2")):
        cluster.run(*(hosts.inside(number) if hosts else ()), "slurmd", "-N", node)
    end = time.monotonic() + 30
    while cluster.run("sinfo", "--noheader", "--states=idle", "--format=%D") != "2":
        logs = "\n".join(path.read_text()[-1000:] for path in folder.glob("*.log"))
        assert time.monotonic() < end, f"the two nodes did not come up\n{logs}"
        time.sleep(0.05)
    return cluster
