"""Can one rendezvous store serve a thousand ranks? Simulated ranks against a real TCPStore in a process of its own.

    python bench/store_load.py                        # 64, 256, 1,024 and 4,096 ranks; then bench/results/store_load.json
    python bench/store_load.py --ranks 1024 --seconds 20

Every rank takes its steps of `p2w.meeting.agree_on_prefix`, and then the watchdog's own exchange of beats at the pace that
it has at this number of ranks, one rank after the other in this process. What counts is the processor time of the store's
process. The ranks share SHARED connections: TCPStore's only thread asks DNS for the name of every host that connects, one
after the other (torch 2.13), which took 0.1 s each here, and is most of the time in which ranks meet.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import tyro

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO)]

from p2w.meeting import Guest, Host, Met, allow_open_files  # noqa: E402
from p2w.resources import usable_cores  # noqa: E402
from p2w.train.watchdog import Watchdog  # noqa: E402
from p2w.world import World  # noqa: E402

SERVER = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
from p2w.meeting import allow_open_files
allow_open_files(int(sys.argv[1]))
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=600))
print(store.port, flush=True)
sys.stdin.read()
"""


SHARED = 256  # connections
MOST_BEATS = 1024  # ranks; every watchdog here knows every rank, which for more of them takes more memory than this process


@dataclass(frozen=True)
class Options:
    """How many ranks, for how long."""

    ranks: tuple[int, ...] = (64, 256, 1024, 4096)
    seconds: float = 15.0
    """Of beats, at each number of ranks."""
    out: Path = REPO / "bench" / "results" / "store_load.json"


class Server:
    """The store's process."""

    def __init__(self, ranks: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(ranks)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(REPO)},
        )  # fmt: skip
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def connect(self) -> dist.Store:
        """A connection, as one rank has it."""
        return dist.TCPStore("127.0.0.1", self.port, is_master=False, timeout=timedelta(seconds=600))

    def seconds(self) -> float:
        """Processor time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


def meet(stores: list[dist.Store], server: Server) -> dict[str, float]:
    """All ranks meet, each doing its step in turn; seconds of the clock and of the store's processor, and the turns."""
    size, before, began = len(stores), server.seconds(), time.monotonic()
    parts = {rank: Guest(stores[rank], rank, rank % 8 == 0) for rank in range(1, size)}
    met: dict[int, Met] = {}
    host, turns = Host(stores[0], size), 0
    while len(met) < size:
        turns += 1
        met |= {rank: found for rank, part in parts.items() if rank not in met and (found := part.step())}
        if 0 not in met and (found := host.step()):
            met[0] = found
    assert len({one.prefix for one in met.values()}) == 1
    used = server.seconds() - before
    return {"wall_s": round(time.monotonic() - began, 2), "store_cpu_s": round(used, 2), "turns": turns}


def beat(stores: list[dist.Store], server: Server, seconds: float) -> dict[str, float]:
    """The watchdogs of all ranks exchange beats at their own pace; the store's processor time a second."""
    size, dogs = len(stores), []
    for rank, store in enumerate(stores):
        world = World(rank, size, rank % 8, 8, f"node{rank // 8}", torch.device("cpu"), "", store=store)
        dogs.append(Watchdog(world))
        dogs[-1]._store = store
    pace = dogs[0].beat_s
    for dog in dogs:  # first signs of life, which are asked for one by one
        dog._exchange_beats()
    dogs[0]._exchange_beats()
    before, began, rounds = server.seconds(), time.monotonic(), 0
    while time.monotonic() - began < max(seconds, 3 * pace):
        start = time.monotonic()
        for dog in dogs:
            dog.at(rounds, "computing")
            dog._exchange_beats()
            assert not dog._store_error, dog._store_error
        rounds += 1
        time.sleep(max(0.0, pace - (time.monotonic() - start)))
    took, used = time.monotonic() - began, server.seconds() - before
    assert all(peer.tick > 1 for peer in dogs[0].peers), "rank 0 has not heard of all"
    # The time that these rounds stand for: this process may be slower than its ranks would be
    asked = pace * rounds
    return {
        "beat_every_s": round(pace, 2),
        "store_share_of_a_core": round(used / max(asked, 1e-9), 4),
        "wall_s": round(took, 1),
    }


def write(rows: list[dict], out: Path) -> None:
    """Write the table, with the machine."""
    machine = {
        "cpu": platform.processor() or platform.machine(), "cores": usable_cores(), "torch": torch.__version__,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        json.dumps({"command": "python bench/store_load.py", "machine": machine, "rows": rows}, indent=1)
        + "\n"
    )


def main() -> int:
    """Measure, print, write; 1 when 1,024 ranks take 5 % of a core or more."""
    options = tyro.cli(Options, description=__doc__)
    rows = []
    for ranks in options.ranks:
        if line := allow_open_files(ranks):
            sys.exit(f"error: {line}")
        server = Server(ranks)
        try:
            with ThreadPoolExecutor(64) as pool:
                shared = list(pool.map(lambda _, server=server: server.connect(), range(min(ranks, SHARED))))
            stores = [shared[rank % SHARED] for rank in range(ranks)]
            rows.append(
                {
                    "ranks": ranks,
                    "meeting": meet(stores, server),
                    "beats": beat(stores, server, options.seconds) if ranks <= MOST_BEATS else None,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
        finally:
            server.close()
        del stores
        write(rows, options.out)  # what a later, larger number interrupts is not lost
    return int(
        any(
            row["beats"] and row["ranks"] == 1024 and row["beats"]["store_share_of_a_core"] >= 0.05
            for row in rows
        )
    )


if __name__ == "__main__":
    sys.exit(main())
