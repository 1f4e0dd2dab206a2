"""Every kind of fault: the promise that it tests, and how it is injected into a run.

`live` faults hit a run that trains; `down` faults hit its folder or data while no process is there. A fault returns what it
promises: "killed" (at most one checkpoint interval is lost, and the steps beside a checkpoint that was still being written),
"told" (nothing is lost) or "goes on" (no restart at all).
"""

import contextlib
import os
import random
import re
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from faults.data import damage_shard, other_set, shard_gone
from faults.launched_run import Forked, send
from faults.runs import LIFE_S, STEPS, Run, Wrong, bounded, happens, hold, wait_for

Inject = Callable[[Run, random.Random], str]


@dataclass(frozen=True)
class Kind:
    """A kind of fault in the table KINDS."""

    inject: Inject
    promise: int
    needs: str = ""  # of Run.traits, such as "torchrun" or "forked": the start that it needs
    phase: str = "live"
    least: int = 1  # ranks
    room: int = 0  # steps that must be left of the run


def kill_rank(run: Run, rng: random.Random) -> str:
    """SIGKILL of one rank."""
    send(signal.SIGKILL, [rng.choice(run.life.ranks())])
    return "killed"


def crash_rank(run: Run, rng: random.Random) -> str:
    """The signal of a bad pointer, a bus error or an abort."""
    send(rng.choice((signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT)), [rng.choice(run.life.ranks())])
    return "killed"


def kill_all(run: Run, rng: random.Random) -> str:
    """SIGKILL of all processes, as in a power cut."""
    run.life.kill()
    return "killed"


def kill_agent(run: Run, rng: random.Random) -> str:
    """SIGKILL of torchrun: its ranks notice, save and leave."""
    run.life.ranks()
    send(signal.SIGKILL, [run.life.agent])
    return "told"


def kill_in_save(run: Run, rng: random.Random) -> str:
    """SIGKILL of all while a checkpoint is being written."""
    ranks, beside = run.life.ranks(), run.run / "checkpoints"
    wait_for(
        lambda: any(beside.glob(".step-*")) or not run.life.running(),
        "a checkpoint being written",
        60,
        0.0005,
    )
    time.sleep(rng.uniform(0, 0.01))
    send(signal.SIGKILL, ranks)
    return "killed"


def kill_at_start(run: Run, rng: random.Random) -> str:
    """SIGKILL of all at some moment before the first step."""
    life = run.start(rng, by_torchrun=rng.random() < 0.25)
    time.sleep(rng.uniform(0, 2 if life.agent is None else 8))
    life.kill()
    return "killed"


def rank_raises(run: Run, rng: random.Random) -> str:
    """An exception in one rank, in the middle of training."""
    (run.folder / f"raise-{rng.randrange(run.life.count)}").touch()
    return "killed"


def hung_rank(run: Run, rng: random.Random) -> str:
    """SIGSTOP of one rank for ever: the others must name it and exit. Without torchrun, rank 0 holds the store."""
    ranks, before = run.life.ranks(), len(run.said())
    odd = rng.randrange(len(ranks))
    names = (f"hangs: rank {odd} on ", *(["hangs: no answer from the rendezvous store"] if odd == 0 else []))
    send(signal.SIGSTOP, [ranks[odd]])
    wait_for(
        lambda: any(name in run.said()[before:] for name in names), f"the name of rank {odd}, which hangs"
    )
    return "killed"


def told(number: signal.Signals, whom: str) -> Inject:
    """A stop signal to one rank, to torchrun, or as by scancel: to all, and again when torchrun forwards it."""

    def inject(run: Run, rng: random.Random) -> str:
        ranks = run.life.ranks()
        agent = [run.life.agent] if run.life.agent else []
        send(
            number,
            {"rank": [rng.choice(ranks)], "agent": agent, "all": [*agent, *ranks, *agent, *ranks]}[whom],
        )
        return "told"

    return inject


def pause(run: Run, rng: random.Random) -> str:
    """A rank that is slow for a moment: the others wait for it."""
    rank = [rng.choice(run.life.ranks())]
    send(signal.SIGSTOP, rank)
    time.sleep(rng.uniform(0.2, 2))
    send(signal.SIGCONT, rank)
    return "goes on"


def clock_jumps(run: Run, rng: random.Random) -> str:
    """The wall clock of one rank goes back an hour."""
    (run.folder / f"clock-{rng.randrange(run.life.count)}").touch()
    return "goes on"


def disk_full(run: Run, rng: random.Random) -> str:
    """A full disk for some seconds."""
    ballast = run.disk / "ballast"
    room = rng.choice((0, 4096, 65536, 500_000))
    with contextlib.suppress(OSError):  # the run writes too, and may have taken the last of it
        ballast.write_bytes(bytes(max(0, shutil.disk_usage(run.disk).free - room)))
    before = run.said().count("not saved")
    happens(lambda: run.said().count("not saved") > before or not run.life.running(), rng.uniform(1, 5))
    ballast.unlink()
    run.gaps = True
    return "goes on"


def newest(run: Run) -> Path:
    """The folder of the newest complete checkpoint."""
    return max(path.parent for path in (run.run / "checkpoints").glob("step-*/meta.json"))


def some_file(run: Run, rng: random.Random) -> Path:
    """A file of the newest checkpoint."""
    return rng.choice(sorted(path for path in newest(run).iterdir() if path.stat().st_size))


def checkpoint_cut(run: Run, rng: random.Random) -> str:
    """Truncate the newest checkpoint."""
    path = some_file(run, rng)
    os.truncate(path, rng.randrange(path.stat().st_size))
    return "damaged"


def flip(path: Path, at: int) -> None:
    """Change one bit."""
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << at % 8]))


def checkpoint_flipped(run: Run, rng: random.Random) -> str:
    """Flip one bit of the newest checkpoint."""
    path = some_file(run, rng)
    flip(path, rng.randrange(path.stat().st_size))
    return "damaged"


def checkpoint_half(run: Run, rng: random.Random) -> str:
    """Delete some or all files of the newest checkpoint."""
    for path in sorted(newest(run).iterdir())[rng.randrange(3) :]:
        path.unlink()
    return "damaged"


def metrics_torn(run: Run, rng: random.Random) -> str:
    """End metrics.jsonl within a line, or with bytes that are no text."""
    half = f'{{"step": {run.step() + 1}, "time": 1795'.encode()
    with open(run.run / "metrics.jsonl", "ab") as file:
        file.write(rng.choice((half[: rng.randrange(1, len(half))], rng.randbytes(7))))
    return "killed"


def other_ranks(run: Run, rng: random.Random) -> str:
    """Continue the run with another number of ranks."""
    run.plan.ranks = rng.choice([ranks for ranks in (1, 2, 4) if ranks != run.plan.ranks])
    return "killed"


def link_down(run: Run, rng: random.Random) -> str:
    """A host is unplugged, for some seconds or until the others have named it and left."""
    host, hosts, before = rng.randrange(2), run.services.hosts, len(run.said())
    seconds = rng.uniform(0.5, 2.5) if rng.random() < 0.6 else None
    hosts.link(host, up=False)
    try:
        if seconds is None:
            wait_for(lambda: not run.life.running(), "the end of all ranks, of which half were cut off,", 90)
        else:
            happens(lambda: not run.life.running(), seconds)
    finally:
        hosts.link(host, up=True)
    if seconds is not None:
        hold(run.life.running(), f"a link was down for {seconds:.1f} s, and the run has ended")
        return "goes on"
    hold("hangs: " in run.said()[before:], f"nobody has named the host that was away:\n{run.said()[-2000:]}")
    return "killed"


def server_down(run: Run, rng: random.Random) -> str:
    """The web server of the set is gone, fails or is silent for some seconds."""
    how, server, before = rng.choice(("refuses", "fails", "silent")), run.services.server, len(run.said())
    server.down(how)
    try:
        time.sleep(rng.uniform(1, 8))
        if how != "silent":
            wait_for(lambda: "trying again" in run.said()[before:], "another try of a request", 20)
    finally:
        server.back(how)
    return "goes on"


def second_run(run: Run, rng: random.Random) -> str:
    """The same command is typed a second time while the run trains: it must be refused, and name the first one."""
    beside = run.folder / "second"
    beside.mkdir(exist_ok=True)
    ranks = run.life.ranks()
    locks = getattr(run.life, "locks", 0)
    life = Forked(run.services.second_forge, beside, run.argv(), 1, run.plan.poison, locks=locks)
    wait_for(lambda: not life.running(), "the refusal of a second run", 60)
    said = (beside / "err.txt").read_text()
    (beside / "err.txt").unlink()
    if not run.life.running():  # the first has come to its end meanwhile
        return "goes on"
    hold(life.codes() == [2], f"a second run in the folder ended with {life.codes()}\n{said}")
    hold(any(f"pid {pid})" in said for pid in ranks) and "another process trains in it" in said, said)
    return "goes on"


def folder_moved(run: Run, rng: random.Random) -> str:
    """The run's folder is renamed while it trains: the run says so, and saves in a new one at the same path."""
    moved, before = run.disk / "moved", len(run.said())
    os.rename(run.run, moved)
    run.gaps = True
    wait_for(
        lambda: f"was moved to {moved}" in run.said()[before:] or not run.life.running(), "the warning", 30
    )
    hold(run.life.running(), f"ended when its folder was moved: {run.life.codes()}\n{run.said()[-2000:]}")
    shutil.rmtree(moved)
    saved = run.run / "checkpoints"
    wait_for(
        lambda: any(saved.glob("step-*/meta.json")) or not run.life.running(),
        "a checkpoint in the new folder",
    )
    return "goes on"


def trained(run: Run, life: Forked, steps: int, what: str) -> None:
    """Wait until a start has trained so many steps; it must not end before."""
    aim = run.step() + steps
    wait_for(lambda: run.step() >= aim or not life.running(), what, every=0.02)
    hold(
        run.step() >= aim,
        f"{what}: ended with {life.codes() if not life.running() else ''}\n{run.said()[-2000:]}",
    )


def clock_skew(run: Run, rng: random.Random) -> str:
    """The command runs on two hosts, the clock of one of which is a minute or an hour off: said, and nothing changes."""
    seconds = rng.choice((-1, 1)) * rng.choice((60, 3600))
    ranks, before = run.plan.ranks, len(run.said())
    life = run.life = run.fork(
        hosts=run.services.hosts, skew={str(rank): seconds for rank in range(ranks // 2, ranks)}
    )
    trained(run, life, 2, "a start with clocks that differ")
    way, (first, second) = "ahead of" if seconds > 0 else "behind", run.services.hosts.names
    wanted = rf"the clock of {second} is {abs(seconds)}\.\d s {way} that of {first}"
    hold(re.search(wanted, run.said()[before:]) is not None, f"not said: {wanted}\n{run.said()[before:]}")
    life.kill()
    return "killed"


def loopback_names(run: Run, rng: random.Random) -> str:
    """The command runs on two hosts whose own names are loopback addresses: it finds the interface between them."""
    out = run.folder / "out.txt"
    before = out.stat().st_size if out.exists() else 0
    life = run.life = run.fork(hosts=run.services.hosts)
    trained(run, life, 2, "a start on two hosts")
    said = out.read_text()[before:] + run.said()
    hold(f"interface {run.services.hosts.links[0]}" in said, f"the interface is not named\n{said[-2000:]}")
    life.kill()
    return "killed"


ARRAY = """#!/bin/bash
runs=({runs})
exec bash slurm/pretrain.sbatch {recipe} --shards {shards} --run "${{runs[$SLURM_ARRAY_TASK_ID]}}" {rest}
"""


def array_warning(run: Run, rng: random.Random) -> str:
    """The run is the last task of a Slurm array, and warned of its time limit: it alone is requeued, not the array."""
    cluster, beside, run.remote = run.services.cluster, run.folder / "array", False
    ever = float("inf")  # to the cluster: `bounded` keeps the time
    shutil.rmtree(beside, ignore_errors=True)
    recipe, *words = run.argv(steps=100 * STEPS)  # both are ended before
    at = words.index("--shards")
    shards, rest = words[at + 1], words[:at] + words[at + 4 :]
    script = run.folder / "array.sbatch"
    runs = shlex.join([str(beside), str(run.run)])
    script.write_text(ARRAY.format(runs=runs, recipe=recipe, shards=shards, rest=shlex.join(rest)))
    aim = run.step() + 2
    job = cluster.sbatch(
        "--array=0-1", "--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--requeue", "--open-mode=append",
        "--signal=B:USR1@120", script, P2W_PROCS_PER_NODE=str(run.plan.ranks), P2W_DEVICE="cpu",
    )  # fmt: skip
    first, last = f"{job}_0", f"{job}_1"
    try:
        trains = bounded(
            lambda: run.step() >= aim and (beside / "metrics.jsonl").exists(),
            "steps of both tasks",
            LIFE_S,
            run.step,
        )
        cluster.wait(last, "steps", trains, ever)
        cluster.run("scancel", "--batch", "--signal=USR1", last)
        cluster.wait(
            last, "requeue", bounded(lambda: cluster.log(last).count(": requeued") == 1, "the requeue"), ever
        )
        wait_for(lambda: cluster.job(last).get("Restarts") == "1", "the requeue of the last task")
        found = cluster.job(first)
        hold((found["JobState"], found["Restarts"]) == ("RUNNING", "0"), f"the first task: {found}")
    except AssertionError as error:
        raise Wrong(str(error)) from error
    finally:
        cluster.run("scancel", job)
        wait_for(lambda: not cluster.run("squeue", "--noheader", f"--jobs={job}"), "the end of the array")
    hold(run.status()["state"] == "told to stop", f"warned, but {run.status()}")
    shutil.rmtree(beside)
    return "told"


KINDS = {
    "rank killed": Kind(kill_rank, 2),
    "all killed": Kind(kill_all, 2),
    "torchrun killed": Kind(kill_agent, 2, "torchrun"),
    "killed while a checkpoint is written": Kind(kill_in_save, 2),
    "killed before the first step": Kind(kill_at_start, 2, phase="down"),
    "rank crashes (SIGSEGV, SIGBUS, SIGABRT)": Kind(crash_rank, 2),
    "rank raises": Kind(rank_raises, 2, "forked"),
    "rank hangs (SIGSTOP)": Kind(hung_rank, 2, "forked", least=2),
    "SIGTERM to torchrun": Kind(told(signal.SIGTERM, "agent"), 3, "torchrun"),
    "SIGINT to torchrun": Kind(told(signal.SIGINT, "agent"), 3, "torchrun"),
    "SIGTERM to a rank": Kind(told(signal.SIGTERM, "rank"), 3),
    "SIGINT to a rank": Kind(told(signal.SIGINT, "rank"), 3),
    "SIGHUP to torchrun": Kind(told(signal.SIGHUP, "agent"), 3, "torchrun"),
    "SIGHUP to a rank": Kind(told(signal.SIGHUP, "rank"), 3),
    "SIGUSR1 to a rank": Kind(told(signal.SIGUSR1, "rank"), 3),
    "SIGTERM to all, repeatedly": Kind(told(signal.SIGTERM, "all"), 3),
    "newest checkpoint cut short": Kind(checkpoint_cut, 4, phase="down"),
    "newest checkpoint with a flipped bit": Kind(checkpoint_flipped, 4, phase="down"),
    "newest checkpoint half there": Kind(checkpoint_half, 4, phase="down"),
    "disk full for a while": Kind(disk_full, 4, "disk"),
    "shard with a flipped bit": Kind(damage_shard, 5, phase="down"),
    "shard missing or cut short at a start": Kind(shard_gone, 5, phase="down"),
    "rank paused": Kind(pause, 7, least=2),
    "clock of a rank jumps": Kind(clock_jumps, 7, "forked"),
    "a rank with another data set": Kind(other_set, 7, phase="down", least=2),
    "continued by another number of ranks": Kind(other_ranks, 1, phase="down"),
    "metrics.jsonl torn": Kind(metrics_torn, 1, phase="down"),
    "link down": Kind(link_down, 7, "hosts"),
    "web server down": Kind(server_down, 7, "remote"),
    "two runs in one folder": Kind(second_run, 7),
    "folder moved": Kind(folder_moved, 7, "forked", room=40),
    "clocks of two hosts differ": Kind(clock_skew, 7, "two hosts", phase="down", least=2, room=10),
    "host names are loopback": Kind(loopback_names, 7, "two hosts", phase="down", least=2, room=10),
    "warning to a task of an array": Kind(array_warning, 3, "slurm", phase="down", room=70),
}
NOT_FINITE = "gradient not finite"  # decided when a run begins, see soak.py: the calm run must have it too
PROMISES = {name: kind.promise for name, kind in KINDS.items()} | {NOT_FINITE: 6}
