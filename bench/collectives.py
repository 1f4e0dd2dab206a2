"""What do the collectives beside the gradients take, from 2 to 64 ranks, and what would they at 1,024?

    python bench/collectives.py                 # 2, 8, 32 and 64 gloo processes; then bench/results/collectives.json

Processes that do nothing but collectives: the poll of a run (an all-reduce of three numbers), `World.gather` of one number,
a barrier, and the agreement on an error (an all-reduce and a gather). With more processes than cores the clock shows how the
machine shares its cores out, so that the processor time of a rank is what counts; it grows with the messages that a rank
sends: 2 log2 N of an all-reduce or a barrier, N - 1 of a gather, which gloo passes round in a ring. The forecast at 1,024
ranks is that count, times the processor time of a message here, and times `POLL_HOP_S`, of a message between two free cores.
"""

import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import tyro

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO)]

from p2w.resources import usable_cores  # noqa: E402
from p2w.train.estimate import POLL_HOP_S  # noqa: E402
from p2w.world import World  # noqa: E402

MANY = 1024


@dataclass(frozen=True)
class Options:
    """How many processes, and how often."""

    ranks: tuple[int, ...] = (2, 8, 32, 64)
    rounds: int = 100
    """Of each collective, in turns."""
    out: Path = REPO / "bench" / "results" / "collectives.json"


def messages(name: str, ranks: int) -> int:
    """How many messages a rank sends one after the other."""
    tree, ring = 2 * math.ceil(math.log2(ranks)), ranks - 1
    return {"poll": tree, "barrier": tree, "gather": ring, "agreement": tree + ring}[name]


def rank_of(rank: int, ranks: int, folder: Path, rounds: int) -> None:
    """One rank: its processor time and the clock's, a collective."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    world = World(rank, ranks, rank, ranks, "here", torch.device("cpu"), "")
    ways: dict[str, Callable[[], object]] = {
        "poll": lambda: world.sum(torch.zeros(3, dtype=torch.int64)).tolist(),
        "gather": lambda: world.gather(torch.zeros(1, dtype=torch.int64)),
        "barrier": world.barrier,
        "agreement": lambda: (world.any(False), world.gather(torch.zeros(1))),
    }
    found = dict.fromkeys(ways, 0.0)
    clock = dict.fromkeys(ways, 0.0)
    for turn in range(rounds + 3):
        for name, way in ways.items():
            began, used = time.perf_counter(), time.process_time()
            way()
            if turn >= 3:  # the first ones connect
                found[name] += time.process_time() - used
                clock[name] += time.perf_counter() - began
    world.barrier()
    result = {name: [found[name] / rounds, clock[name] / rounds] for name in ways}
    (folder / f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def measured(ranks: int, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of a collective: of a rank's processor on average, and of the clock on rank 0."""
    with tempfile.TemporaryDirectory() as name:
        folder, pids = Path(name), []
        for rank in range(ranks):
            if (pid := os.fork()) == 0:
                code = 1
                try:
                    rank_of(rank, ranks, folder, rounds)
                    code = 0
                finally:
                    os._exit(code)
            pids.append(pid)
        if any([os.waitpid(pid, 0)[1] for pid in pids]):
            raise RuntimeError(f"{ranks} ranks: one has failed")
        found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    return {
        name: {
            "processor_ms": round(1e3 * sum(one[name][0] for one in found) / ranks, 4),
            "clock_ms": round(1e3 * found[0][name][1], 3),
            "messages": messages(name, ranks),
        }
        for name in found[0]
    }


def main() -> None:
    """Measure, forecast, write."""
    options = tyro.cli(Options, description=__doc__)
    rows = {}
    for ranks in options.ranks:
        rows[ranks] = measured(ranks, options.rounds)
        print(ranks, json.dumps(rows[ranks]), flush=True)
    most = rows[max(rows)]
    forecast = {
        name: {
            "messages": messages(name, MANY),
            "processor_ms_a_rank": round(
                most[name]["processor_ms"] / most[name]["messages"] * messages(name, MANY), 2
            ),
            "ms_at_poll_hop_s": round(1e3 * POLL_HOP_S * messages(name, MANY), 2),
        }
        for name in most
    }
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "torch": torch.__version__,
    }
    machine |= {"load_average": [round(load, 1) for load in os.getloadavg()]}
    result = {
        "command": "python bench/collectives.py",
        "machine": machine,
        "ranks": rows,
        f"forecast_{MANY}": forecast,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
