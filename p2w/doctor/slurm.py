"""Slurm: whether its commands are here and its controller answers, and, inside a job, which nodes this is."""

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator

from p2w.doctor.row import Case, Row, note, ok, problem
from p2w.world import variable

COMMANDS = ("sbatch", "srun", "scontrol", "sinfo")
ANSWER_S = 8
USABLE = ("idle", "mixed", "allocated", "completing")


def cluster(case: Case) -> Iterator[Row]:
    """Nodes by state, and the time a job gets to save when it is stopped."""
    there = [name for name in COMMANDS if shutil.which(name)]
    if not there:
        yield ok("Slurm", "not here; only slurm/*.sbatch need it")
        return
    if missing := sorted(set(COMMANDS) - set(there)):
        yield problem(
            "Slurm",
            f"{', '.join(missing)} not on the PATH, {', '.join(there)} is",
            "apt-get install slurm-client",
        )
        return
    code, said = ask("sinfo", "--noheader", "--Node", "--format=%N %T")
    if code and "configuration source" in said:
        yield note(
            "Slurm",
            "its commands are here, a configuration is not: no node of a cluster",
            "export SLURM_CONF=FILE",
        )
        return
    if code:
        yield problem(
            "Slurm", f"sinfo does not answer: {said}", "scontrol ping; systemctl status slurmctld munge"
        )
        return
    states = {
        node: state
        for node, state in (line.split()[:2] for line in said.splitlines() if len(line.split()) > 1)
    }
    found = (
        ", ".join(f"{count} node(s) {state}" for state, count in Counter(states.values()).items())
        or "no nodes"
    )
    wait = re.search(r"KillWait\s*=\s*(\d+)", ask("scontrol", "show", "config")[1])
    if wait:
        found += f"; a job told to stop has {wait[1]} s to save (KillWait)"
    bad = sorted(node for node, state in states.items() if state.strip("*~#!%$@^-") not in USABLE)
    if states and len(bad) == len(states):
        yield problem("Slurm", found, f"sinfo -R; scontrol update nodename={','.join(bad[:4])} state=resume")
    elif bad:
        yield note("Slurm", found, f"sinfo -R; scontrol update nodename={','.join(bad[:4])} state=resume")
    else:
        yield ok("Slurm", found)


def job(case: Case) -> Iterator[Row]:
    """Inside a job: number, nodes, restarts so far."""
    number = variable("SLURM_JOB_ID")
    if not number:
        return
    nodes = variable("SLURM_JOB_NODELIST")
    code, said = ask("scontrol", "show", "hostnames", nodes)
    names = ", ".join(said.split()) if not code else nodes
    cpus, gpus = variable("SLURM_CPUS_ON_NODE") or "?", variable("SLURM_GPUS_ON_NODE") or "0"
    found = f"{number} on {names}; this is {variable('SLURMD_NODENAME') or 'none of them'}: {cpus} CPU(s), {gpus} GPU(s)"
    yield ok("Slurm job", f"{found}; restarts {variable('SLURM_RESTART_COUNT') or 0}")


def ask(*command: str) -> tuple[int, str]:
    """Exit code and what a command printed; on an error, its last line on stderr. One that hangs is ended."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=False)
    except subprocess.TimeoutExpired:
        return 1, f"nothing in {ANSWER_S} s"
    except OSError as error:
        return 1, str(error)
    if done.returncode:
        return done.returncode, (done.stderr.strip().splitlines() or ["exit code " + str(done.returncode)])[
            -1
        ]
    return 0, done.stdout
