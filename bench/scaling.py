"""How fast at 1 to 1,024 GPUs? A forecast from rates, checked with one and with two processes on this machine.

    python bench/scaling.py              # measures the rates here, checks, prints the forecast: two minutes on two cores
    python bench/scaling.py --rounds 9
    python bench/scaling.py --forecast-only      # computes the forecasts again, and keeps what was measured before

Pieces: a step of one sample and a step of two, so what a sample costs and what a step costs, in one process, and in two
side by side that sum nothing (they share a memory bus, GPUs do not); the all-reduce of the network's gradients alone, over
gloo. Checked: a step of four samples in one process; steps of one, two and four samples in each of two, with the sum.
Said too, and not checked here: how long a start takes (imports, meeting, manifest, checkpoint), from a local disk and from a
shared file system.
The network is the paper's at 32x32x16 voxels, an eighth of its arithmetic, with all its 67 MB of gradients, so that sums
weigh more than they would; one thread a process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from common import RESULTS, Goal, Row, rotate, save, show
from startup import STARTUP_SOURCES, StartupRates, forecast_startup
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from p2w.pretext import build_pretext_and_network
from p2w.recipes import named
from p2w.train.estimate import (
    SUSTAINED,
    MachineRates,
    RunCost,
    ThroughputForecast,
    forecast_throughput,
    known_device,
    run_cost,
    sustained_rates,
)
from p2w.train.optim import build_optimizer, choose_precision
from p2w.world import World

SIZE = (16, 32, 32)
CARD, PER_NODE, A_GPU = "H200", 8, 16  # what the table is of: 16 samples a GPU
SETS = {"LUNA16": (28_144, 888), "ten million": (10_000_000, 300_000)}  # sub-scans, shards
DISKS = {
    "a local NVMe": StartupRates(),
    "a shared file system": StartupRates(
        file_op_s=3e-4, file_ops_per_s=50_000, bytes_per_s=1e9, bytes_per_s_in_all=2e10
    ),
}
SUB_SCAN_BYTES = 2 << 20
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def network() -> nn.Module:
    """The paper's network, in channels-last layout."""
    torch.manual_seed(0)
    config = named("paper")
    config = replace(config, pretext=replace(config.pretext, size=SIZE))
    return build_pretext_and_network(config)[1].to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


def job(out: Path, rounds: int) -> None:
    """One rank."""
    torch.set_num_threads(1)
    world = World.start()
    found = measured(world, rounds)
    if world.is_main:
        out.write_text(json.dumps(found))
    world.close()


def measured(world: World, rounds: int) -> dict[str, float]:
    """Medians of seconds, of steps of 1, 2 and 4 samples and of the sum alone."""
    model = network()
    wrapped = DistributedDataParallel(model) if world.size > 1 else model
    optimizer, _ = build_optimizer(named("paper").optim, model)
    dtype = choose_precision("auto", world.device).dtype
    samples = torch.rand(4, 1, *SIZE)
    # DDP's buckets
    gradients = [torch.rand(25 << 18) for _ in range(2)] + [torch.rand(14_000_000 // 4 + 250_000)]

    def step(count: int, summed: bool = True) -> float:
        world.barrier()
        began = time.perf_counter()
        if not summed:
            with wrapped.no_sync():
                return step_of(count, began)
        return step_of(count, began)

    def step_of(count: int, began: float) -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            output = wrapped(samples[:count])
        mse_loss(output.float(), samples[:count]).backward()
        optimizer.step()
        return time.perf_counter() - began

    def reduce() -> float:
        world.barrier()
        began = time.perf_counter()
        for bucket in gradients:
            dist.all_reduce(bucket)
        nbytes = 4 * sum(len(bucket) for bucket in gradients)
        return (time.perf_counter() - began) * 4 * sum(p.numel() for p in model.parameters()) / nbytes

    ways = {f"step {count}": (lambda count=count: step(count)) for count in (1, 2, 4)}
    if world.size > 1:
        ways["all-reduce"] = reduce
        ways |= {f"step {count}, no sum": (lambda count=count: step(count, False)) for count in (1, 2)}
    return {name: median(values) for name, values in rotate(ways, rounds).items()}


def run(ranks: int, rounds: int) -> dict[str, float]:
    """Median seconds of each way, measured by `ranks` processes of this file that train together."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        line = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
            __file__,
        ]
        env = os.environ | {"OMP_NUM_THREADS": "1", "P2W_DEVICE": "cpu"}
        subprocess.run([*line, "--job", str(out), "--rounds", str(rounds)], check=True, env=env)
        return json.loads(out.read_text())


def table(flops: int, parameters: int) -> list[tuple[ThroughputForecast, ThroughputForecast]]:
    """The forecast at the low and the high end for each number of GPUs, at the recipe's size."""
    card = known_device(CARD)
    assert card
    sizes = {
        "flops_per_sample": flops,
        "gradient_bytes": 4 * parameters,
        "sample_bytes": 2 << 20,
        "per_node": PER_NODE,
    }
    low, high = sustained_rates(card[1])
    return [
        tuple(forecast_throughput(p, ranks=n, batch=A_GPU * n, **sizes) for p in (low, high)) for n in GPUS
    ]  # type: ignore


def startup_rows(checkpoint_bytes: float) -> list[Row]:
    """Forecast of starts, as starts an hour: a higher value is better, as of every row."""
    rows = []
    for place, rates in DISKS.items():
        for name, (count, shards) in SETS.items():
            for ranks in (8, 64, 512, 1024):
                said = forecast_startup(
                    rates, ranks=ranks, per_node=PER_NODE, cores_per_node=64, rows=count, shards=shards,
                    checkpoint_bytes=checkpoint_bytes,
                )  # fmt: skip
                group = f"forecast of a start, {name} from {place}, {PER_NODE} ranks and 64 cores a node; {STARTUP_SOURCES}"
                nodes = -(-ranks // PER_NODE)
                staging = count * SUB_SCAN_BYTES / min(rates.bytes_per_s, rates.bytes_per_s_in_all / nodes)
                note = f"{said.line()}; --stage-to copies the shards once in {staging:,.0f}" * (
                    rates != StartupRates()
                )
                rows.append(
                    Row(
                        group,
                        f"{ranks:5} ranks",
                        3600 / said.total_s,
                        "starts/h",
                        "bound",
                        note=note or said.line(),
                    )
                )
    return rows


def main() -> None:
    """Measure the rates of this machine, check the forecast and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling.json")
    parser.add_argument("--forecast-only", action="store_true", help="keep the measurements in --out")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job(args.job, args.rounds)
        return
    config = named("paper")
    facts = run_cost(config, lambda: build_pretext_and_network(config), 1, 2)
    if args.forecast_only:
        kept = json.loads(args.out.read_text())
        measured_rows = [row for row in kept["rows"] if not row["group"].startswith("forecast")]
        kept["rows"] = measured_rows + [asdict(row) for row in forecast_rows(facts)]
        args.out.write_text(json.dumps(kept, indent=1) + "\n")
        show(kept)
        return
    small = replace(config, pretext=replace(config.pretext, size=SIZE))
    flops = run_cost(small, lambda: build_pretext_and_network(small), 1, 2).flops_per_sample
    one, two = run(1, args.rounds), run(2, args.rounds)
    speed = 4 * facts.parameters / two["all-reduce"]  # of a ring of two: each byte once

    def pieces_of(first: float, second: float) -> MachineRates:
        sample_s = second - first
        return MachineRates(
            flops / sample_s, speed, speed, 0.0, first - sample_s, hidden=0.0, sources="measured here"
        )

    alone = {
        1: pieces_of(one["step 1"], one["step 2"]),
        2: pieces_of(two["step 1, no sum"], two["step 2, no sum"]),
    }
    rows, goals = [], []
    for ranks, own, seconds in (
        (1, 4, one["step 4"]),
        (2, 1, two["step 1"]),
        (2, 2, two["step 2"]),
        (2, 4, two["step 4"]),
    ):
        said = forecast_throughput(alone[ranks], ranks=ranks, per_node=2, batch=ranks * own, flops_per_sample=flops,
                        gradient_bytes=4 * facts.parameters, sample_bytes=2 << 20)  # fmt: skip
        group = f"{ranks} process(es) of one thread, {own} sample(s) each, this machine"
        rows += [Row(group, "measured", ranks * own / seconds, "samples/s", "ours"),
                 Row(group, "forecast", said.samples_per_s, "samples/s", "bound")]  # fmt: skip
        off = abs(said.samples_per_s * seconds / (ranks * own) - 1)
        goals.append(
            Goal(f"forecast is off by, {ranks} process(es), {own} sample(s) each", off, 0.15, at_least=False)
        )
    rows += forecast_rows(facts)
    more = {
        "one_process": one,
        "two_processes": two,
        "pieces": {ranks: vars(rates) for ranks, rates in alone.items()},
    }
    question = "samples/s at any number of ranks: forecast against measurement"
    show(save(args.out, question, f"python bench/scaling.py --rounds {args.rounds}", rows, goals, **more))


def forecast_rows(facts: RunCost) -> list[Row]:
    """Steps and starts at any number of GPUs."""
    rows = []
    for slow, fast in table(facts.flops_per_sample, facts.parameters):
        parts = [fast.step_s, fast.all_reduce_s, fast.exposed_s]
        note = "step {:.1f} ms, all-reduce {:.2f}, not hidden {:.2f}".format(*(1e3 * part for part in parts))
        group = (
            f"forecast at 64x64x32, {A_GPU} samples a GPU, {PER_NODE} GPUs a node (data sheets; no GPU here)"
        )
        name = f"{fast.ranks:5} x {CARD}, at {SUSTAINED[1]:.0%} of its peak"
        note = f"at {SUSTAINED[0]:.0%}: {slow.samples_per_s:,.0f}; {note}; limit {fast.limit}"
        rows.append(Row(group, name, fast.samples_per_s, "samples/s", "bound", note=note))
    return rows + startup_rows(facts.checkpoint_bytes)


if __name__ == "__main__":
    main()
