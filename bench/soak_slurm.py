"""Does a pretraining on two Slurm nodes survive the loss of a node, of a link, and of the way between the nodes?

    python bench/soak_slurm.py                       # make soak-slurm: ten minutes, then bench/results/soak_slurm.json
    python bench/soak_slurm.py --only "dead node"

A real Slurm of two nodes, each a host with an address of its own (network namespaces; needs root, iproute2 and Slurm), whose
own name is a loopback address there. Every fault hits a job of slurm/pretrain.sbatch that trains; nobody helps it. In the
end it must have completed, and each loss and the last weights must be those of a job that nothing disturbed: bit for bit at
the same number of nodes, to 1e-3 where a job may go on with fewer (--train.elastic).
"""

import json
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tests"), str(REPO / "tests" / "slurm")]

from faults.run_clock import mark_children  # noqa: E402
from faults.runs import bounded, wait_for  # noqa: E402
from network_hosts import Hosts, ip  # noqa: E402
from pretrain_runs import SMALL, STEPS, losses  # noqa: E402
from slurm_cluster import FINAL, PREFIX, Cluster, start, stop  # noqa: E402
from soak import prepare  # noqa: E402

NODE2 = 1  # its number among the hosts
DOWN_S = 45.0  # more than the 30 s after which this Slurm takes a node for dead
APART_S = 75.0  # more than the 60 s after which a rank without a sign of life is named


@dataclass(frozen=True)
class Options:
    """Which faults, and where."""

    only: tuple[str, ...] = ()
    """Faults to inject; default: all."""
    folder: Path = Path("soak")
    """Of the set, as bench/soak.py makes it, and of the runs."""
    out: Path = REPO / "bench" / "results" / "soak_slurm.json"


def kill_node(cluster: Cluster, hosts: Hosts) -> None:
    """Unplug node2 and kill all that runs on it, its Slurm too."""
    hosts.link(NODE2, up=False)
    for pid in ip("netns", "pids", hosts.names[NODE2]).split():
        os.kill(int(pid), signal.SIGKILL)


def start_node(cluster: Cluster, hosts: Hosts) -> None:
    """Node2 has booted."""
    hosts.link(NODE2, up=True)
    cluster.run(*hosts.inside(NODE2), "slurmd", "-N", "node2")


def dead_node(cluster: Cluster, hosts: Hosts) -> None:
    """A node goes without a word, and is back after a while."""
    kill_node(cluster, hosts)
    time.sleep(DOWN_S)
    start_node(cluster, hosts)


def lost_node(cluster: Cluster, hosts: Hosts) -> None:
    """A node goes for good, as far as the job can tell."""
    kill_node(cluster, hosts)


def link_down(cluster: Cluster, hosts: Hosts) -> None:
    """A node is unplugged, longer than Slurm waits for it."""
    hosts.link(NODE2, up=False)
    time.sleep(DOWN_S)
    hosts.link(NODE2, up=True)


def short_link_down(cluster: Cluster, hosts: Hosts) -> None:
    """A node is unplugged, not as long as Slurm or the run wait for it: nothing is started again."""
    hosts.link(NODE2, up=False)
    time.sleep(10)
    hosts.link(NODE2, up=True)


def partition(cluster: Cluster, hosts: Hosts) -> None:
    """The nodes do not reach each other; Slurm reaches both."""
    hosts.part(0, 1, apart=True)
    time.sleep(APART_S)
    hosts.part(0, 1, apart=False)


@dataclass(frozen=True)
class Fault:
    """What happens, and how the job is submitted."""

    inject: Callable[[Cluster, Hosts], None]
    nodes: str = "2"
    more: tuple[str, ...] = ()
    restarts: bool = True  # whether the job may be started again


FAULTS = {
    "link down for 10 s": Fault(short_link_down, restarts=False),
    "link down for 45 s": Fault(link_down),
    "partition for 75 s": Fault(partition),
    "dead node, back after 45 s": Fault(dead_node),
    "dead node, the job may have fewer": Fault(lost_node, "1-2", ("--train.elastic",)),
}


def submit(cluster: Cluster, folder: Path, run: Path, nodes: str = "2", more: tuple[str, ...] = ()) -> str:
    """A job of the small run; its number."""
    shutil.rmtree(run, ignore_errors=True)
    where = [f"--shards={folder / 'set' / 'tar'}", "--run", str(run)]
    words = ["slurm/pretrain.sbatch", *SMALL, "--train.precision=fp32", *where, *more]
    return cluster.sbatch(f"--nodes={nodes}", *words, P2W_END_SECONDS="15", P2W_PAUSE_SECONDS="2")


def weights(run: Path) -> bytes:
    """The bytes of the last weights."""
    return (run / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors").read_bytes()


def difference(run: Path, calm: Path, exact: bool) -> str:
    """What of a run is not as in the calm one; "" when nothing is."""
    found, wanted = losses(run), losses(calm)
    if [step for step, _ in found] != [step for step, _ in wanted]:
        return f"steps {[step for step, _ in found]}"
    apart = max(abs(one - other) / abs(other) for (_, one), (_, other) in zip(found, wanted, strict=True))
    if apart > (0 if exact else 1e-3):
        return f"losses differ by {apart:.1e} of their size"
    return "the last weights differ" if exact and weights(run) != weights(calm) else ""


def ended(cluster: Cluster, job: str, run: Path) -> dict[str, str]:
    """The job's record once it has come to its end; Wrong after six minutes without a new step, by RunClock."""
    final = lambda: cluster.job(job)["JobState"] in FINAL  # noqa: E731
    wait_for(final, "a step or the end of the job", 360, 0.5, lambda: losses(run)[-1:])
    return cluster.job(job)


def tried(cluster: Cluster, hosts: Hosts, folder: Path, name: str, calm: Path) -> dict[str, object]:
    """One job with a fault: how it ended, and `wrong` if that is not as promised."""
    fault, run = FAULTS[name], folder / "slurm" / re.sub(r"\W+", "-", name)
    while cluster.run("sinfo", "--noheader", "--states=idle", "--format=%D") != "2":
        time.sleep(0.5)
    job = submit(cluster, folder, run, fault.nodes, fault.more)
    begins = bounded(lambda: len(losses(run)) >= 3, "the first steps", 180)
    cluster.wait(job, "first steps", begins, float("inf"))  # `bounded` keeps the time
    began, wrong = time.monotonic(), ""
    fault.inject(cluster, hosts)
    try:
        end = ended(cluster, job, run)
        wrong = "" if end["JobState"] == "COMPLETED" else f"ended as {end['JobState']}"
        wrong = wrong or difference(run, calm, exact=not fault.more)
        if not fault.restarts and end["Restarts"] != "0":
            wrong = wrong or f"{end['Restarts']} restarts"
    except AssertionError as error:
        wrong, end = str(error)[:3000], cluster.job(job)
        cluster.run("scancel", job)
    starts = json.loads((run / "run.json").read_text())["starts"]
    if fault.more and [start["world_size"] for start in starts][:2] != [2, 1]:
        wrong = wrong or "it did not begin with two nodes and go on with one"
    return {
        "fault": name, "wrong": wrong, "seconds_to_the_end": round(time.monotonic() - began), "starts": len(starts),
        "restarts_by_slurm": int(end.get("Restarts", 0)), "ranks": [start["world_size"] for start in starts],
        "steps_done_twice": sum(start.get("redone", 0) for start in starts),
        **({"log": cluster.log(job)[-3000:]} if wrong else {}),
    }  # fmt: skip


def main() -> int:
    """One fault after another; 1 when a promise was not kept."""
    options = tyro.cli(Options, description=__doc__)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # leaves no process behind
    folder = options.folder.resolve()
    prepare(folder)
    mark_children()
    hosts, scratch = Hosts(gateway=True), Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
    scratch.chmod(0o755)
    found = []
    try:
        cluster, calm = start(scratch, hosts), folder / "slurm" / "calm"
        job = submit(cluster, folder, calm)
        end = ended(cluster, job, calm)
        if end["JobState"] != "COMPLETED" or end["Restarts"] != "0":
            raise RuntimeError(f"the job that nothing disturbs: {end}\n{cluster.log(job)}")
        for name in options.only or tuple(FAULTS):
            found.append(tried(cluster, hosts, folder, name, calm))
            print(json.dumps(found[-1]), flush=True)
            if FAULTS[name].inject is lost_node:
                start_node(cluster, hosts)
    finally:
        stop(scratch)
        hosts.close()
    machine = {
        "system": platform.platform(),
        "torch": torch.__version__,
        "slurm": "two nodes, SlurmdTimeout 30",
    }
    wrong = sum(bool(one["wrong"]) for one in found)
    text = json.dumps({"machine": machine, "interventions": wrong, "faults": found}, indent=1)
    options.out.write_text(text + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
