"""How much of the time is training, when ranks are killed? p2w against a plain loop, both under torchrun --max-restarts.

    python bench/goodput.py                      # 8 minutes each, then bench/results/goodput.json
    python bench/goodput.py --minutes 2 --out /tmp/goodput.json
    python bench/goodput.py --replay-only        # the costs as measured before, other epochs and intervals

Goodput is the time that the steps kept would take alone / the time that passed. Both ways train the same network on the same
sub-scans with the same steps, and the same seeded Poisson schedule kills a random rank of either.

A restart does not get shorter when a run is made small, so a day cannot be squeezed into minutes and its goodput read off.
Instead: real runs, whose faults come every --fault-s seconds, give the costs (a step, a stall, a restart, what is lost),
and a replay of a schedule with these costs must give the goodput that the same real run had. Then the replay is asked for
one fault in ten minutes, and for epochs and checkpoint intervals as long as they are with the paper's network.
"""

import json
import os
import platform
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tests"), str(REPO / "tests" / "slurm")]

from faults.run_clock import mark_children  # noqa: E402
from faults.timed_run import Plain, Way, Whole  # noqa: E402
from soak import prepare  # noqa: E402

from p2w.config import TrainConfig  # noqa: E402
from p2w.pretext import build_pretext_and_network  # noqa: E402
from p2w.recipes import named  # noqa: E402
from p2w.resources import usable_cores  # noqa: E402
from p2w.stream.stream import open_set  # noqa: E402
from p2w.train.checkpoint import AsyncCheckpointer, Checkpoints, Snapshot  # noqa: E402

EPOCHS_MIN = (1.0, 5.0, 10.0, 20.0)
SAVES_MIN = {"epoch": 0.0, "10 min": 10.0, "2 min": 2.0, "30 s": 0.5}
FAULT_MIN = 10.0


@dataclass(frozen=True)
class Options:
    """How long, and where."""

    minutes: float = 8.0  # for each way
    fault_s: float = 80.0  # mean time between faults in the real runs
    epoch_steps: int = 200
    save_s: float = 10.0  # p2w's checkpoint interval in the real runs
    batch: int = 8
    seed: int = 0
    replay_only: bool = False
    folder: Path = Path("soak")
    out: Path = REPO / "bench" / "results" / "goodput.json"


@dataclass(frozen=True)
class MeasuredCosts:
    """What a way costs, in seconds but for `every`."""

    step_s: float
    every: float  # steps between saves
    stall_s: float  # for which a save keeps the loop
    lag_s: float  # from a save's step until it is durable, if the loop does not wait for it
    restart_s: float  # from a kill to the beginning of the first new step


def schedule(mean_s: float, until_s: float, seed: int) -> list[float]:
    """When ranks are killed: a Poisson process, in seconds from the start."""
    rng, times = random.Random(seed), list[float]()
    while (at := (times[-1] if times else 0.0) + rng.expovariate(1 / mean_s)) < until_s:
        times.append(at)
    return times


def replay(kills: list[float], until_s: float, costs: MeasuredCosts) -> dict[str, float]:
    """A run with these kills: its goodput, the steps lost a fault, and how many kills met a save in progress."""
    block, begins = costs.every * costs.step_s + costs.stall_s, 0.0
    kept = lost = met = 0.0
    for kill in [*kills, until_s]:
        if kill < begins:  # killed while it starts: it starts again
            begins = kill + costs.restart_s
            continue
        blocks, rest = divmod(kill - begins, block)
        done = min(costs.every, rest / costs.step_s)
        if kill == until_s:
            kept += blocks * costs.every + done
            break
        met += rest > costs.every * costs.step_s
        if blocks and rest < costs.lag_s:  # the last save is not durable yet
            blocks, done = blocks - 1, done + costs.every
        kept, lost, begins = kept + blocks * costs.every, lost + done, kill + costs.restart_s
    return {
        "goodput": round(kept * costs.step_s / until_s, 4),
        "lost_steps_a_fault": round(lost / max(1, len(kills)), 1),
        "kills_within_a_save": met,
    }


def measure(way: Way, options: Options) -> dict:
    """A real run of `minutes` under the schedule."""
    kills, until = schedule(options.fault_s, 60 * options.minutes, options.seed), 60 * options.minutes
    rng = random.Random(options.seed)
    way.begin()
    way.wait_for_a_step(way.starts())
    began, hit, stuck = time.monotonic(), [], 0
    for kill in [*kills, until]:
        while (now := time.monotonic() - began) < kill:
            time.sleep(min(0.05, kill - now))
            stuck += way.look(now)
        if kill < until and (ranks := way.life.ranks()):
            hit.append(time.monotonic() - began)
            os.kill(rng.choice(ranks), 9)
            way.killed(hit[-1])
    way.end()
    step_s = statistics.median(way.durations)
    restart = [seconds - step_s for seconds in way.restarts]
    done = way.reached
    found = {
        "wall_s": round(until, 1),
        "kills": len(hit),
        "steps_kept": done,
        "step_s": round(step_s, 4),
        "goodput": round(done * step_s / until, 4),
        "restart_s": {
            "mean": round(statistics.fmean(restart), 2),
            "median": round(statistics.median(restart), 2),
            "max": round(max(restart), 2),
            "n": len(restart),
        },
        "lost_steps": {"mean": round(statistics.fmean(way.lost), 1), "max": max(way.lost)},
        "stall_s_a_save": round(way.stall_s(), 4),
        "starts_that_stuck": stuck,
    }
    costs = MeasuredCosts(step_s, way.every(step_s), way.stall_s(), way.lag_s, statistics.fmean(restart))
    found["replay_of_this_run"] = replay(hit, until, costs)
    return found


def paper_size(folder: Path, rounds: int = 5) -> dict[str, float]:
    """Seconds that a checkpoint of the paper's network with Adam keeps the loop, and that a restart needs to load it."""
    _, network = build_pretext_and_network(named("paper"))
    optimizer = torch.optim.Adam(network.parameters(), 1e-3, fused=True)
    for parameter in network.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    checkpoints = Checkpoints(folder / "paper-size", keep=1)
    checkpointer, times = AsyncCheckpointer(checkpoints, TrainConfig(), print), dict[str, list[float]]()

    def clock(name: str, work: Callable[[], object]) -> None:
        began = time.monotonic()
        work()
        times.setdefault(name, []).append(time.monotonic() - began)

    for step in range(1, rounds + 1):
        state = {"optimizer": optimizer.state_dict(), "owed": False}
        snapshot, plain = Snapshot(step, network.state_dict(), state, None), folder / "snapshot.pt"
        clock("p2w stands still", lambda snapshot=snapshot: checkpointer.save(snapshot))
        clock("p2w writes beside", checkpointer.wait)
        both = {"model": network.state_dict(), "optimizer": optimizer.state_dict()}
        clock("plain stands still", lambda both=both, plain=plain: torch.save(both, plain))
        clock("p2w loads", checkpoints.load_latest)
        clock("plain loads", lambda plain=plain: torch.load(plain))
    shutil.rmtree(folder / "paper-size")
    plain.unlink()
    return {name: round(statistics.median(values[1:]), 3) for name, values in times.items()}


def table(found: dict) -> list[dict]:
    """Goodput at one fault in ten minutes over four weeks, for epochs and checkpoint intervals of several lengths.

    Saves keep the loop, and loading adds to a restart, as with the paper's network. A restart of the plain loop is taken to
    be as short as p2w's, whose imports are the same; those that hang for torch's reasons are counted in the real run only.
    """
    weeks, step_s, size = (
        28 * 86400.0,
        0.1,
        found["paper_size_s"],
    )  # of step_s only the ratio to the intervals matters
    kills, rows = schedule(60 * FAULT_MIN, weeks, 1), []

    def run(way: str, minutes: float) -> dict[str, float]:
        restart = found["p2w"]["restart_s"]["mean"] + size[f"{way} loads"]
        lag = size["p2w writes beside"] if way == "p2w" else 0.0
        costs = MeasuredCosts(step_s, 60 * minutes / step_s, size[f"{way} stands still"], lag, restart)
        return replay(kills, weeks, costs)

    for epoch in EPOCHS_MIN:
        plain = run("plain", epoch)
        row = {
            "epoch_min": epoch,
            "plain": plain["goodput"],
            "plain: snapshots destroyed": plain["kills_within_a_save"],
        }
        for name, minutes in SAVES_MIN.items():
            ours = run("p2w", minutes or epoch)
            row[f"p2w, saving every {name}"] = ours["goodput"]
            row[f"ratio, saving every {name}"] = round(ours["goodput"] / plain["goodput"], 3)
        rows.append({"faults": len(kills), **row})
    return rows


def main() -> None:
    """Run both ways under faults, replay longer schedules, and write the result."""
    options = tyro.cli(Options, description=__doc__)
    if options.replay_only:
        found = json.loads(options.out.read_text())
    else:
        folder = options.folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder)
        mark_children()
        shards = open_set(str(folder / "set" / "tar"))
        ids = shards.ids("train")
        wholes = np.empty((len(ids), *shards.shape), np.int16)
        with shards.reader(ids) as reader:
            for place, sub_scan in zip(wholes, ids, strict=True):
                reader.read_into(int(sub_scan), place)
        np.save(folder / "wholes.npy", wholes)
        machine = {"system": platform.platform(), "torch": torch.__version__, "cores": usable_cores()}
        found = {"machine": machine, "load_before": os.getloadavg(), "fault_s": options.fault_s}
        for way in (
            Whole(folder, options.batch, options.save_s),
            Plain(folder, options.batch, options.epoch_steps),
        ):
            found[way.name] = measure(way, options)
            print(json.dumps({way.name: found[way.name]}, indent=1), flush=True)
        found["paper_size_s"] = paper_size(folder)
        found["load_after"] = os.getloadavg()
    found["one_fault_in_ten_minutes"] = table(found)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
