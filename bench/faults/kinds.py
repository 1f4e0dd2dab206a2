"""Every kind of fault: the promise that it tests, and how it is injected into a run.

`live` faults hit a run that trains; `down` faults hit its folder or data while no process is there. A fault returns what it
promises: "killed" (at most one checkpoint interval is lost, and the steps beside a checkpoint that was still being written),
"told" (nothing is lost) or "goes on" (no restart at all).
"""

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from faults.data import damage_shard, other_set, shard_gone
from faults.launched_run import send
from faults.runs import Run, Wrong, wait_for

Inject = Callable[[Run, random.Random], str]


@dataclass(frozen=True)
class Kind:
    """A kind of fault in the table KINDS."""

    inject: Inject
    promise: int
    only: str = ""  # "torchrun" or "forked": the start that it needs; "disk": a run on a small disk
    phase: str = "live"
    least: int = 1  # ranks


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
    with contextlib.suppress(Wrong):
        wait_for(
            lambda: run.said().count("not saved") > before or not run.life.running(), "", rng.uniform(1, 5)
        )
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
}
NOT_FINITE = "gradient not finite"  # decided when a run begins, see soak.py: the calm run must have it too
PROMISES = {name: kind.promise for name, kind in KINDS.items()} | {NOT_FINITE: 6}
