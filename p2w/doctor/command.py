"""The command `p2w doctor`: the list of checks, the time limit of each, and the table of results.

The checks of the data set, of the batch size and of the run folder are here too.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from p2w import config as settings
from p2w.config import Config
from p2w.doctor import CheckContext, CheckResult, machine, network, note, ok, problem, refused, size, software
from p2w.errors import UserError, first_line
from p2w.recipes import named
from p2w.run_owner import run_state
from p2w.shards.manifest import data_fingerprint
from p2w.stream.local import RANDOM_CROPS, DataError, LocalSet, ShardSet
from p2w.stream.sampler import Sampler
from p2w.stream.stream import open_set
from p2w.train.run_dir import RunDir
from p2w.world import World

USAGE = """Check this machine for anything that would stop a run, and print the remedy of each problem.

    p2w doctor                                                        this machine, for recipe paper
    p2w doctor demo --shards demo/shards --run-dir demo/run --ranks 2
    p2w doctor large --data.batch 32 --json
    srun --nodes=2 --ntasks-per-node=1 p2w doctor paper --shards /data/shards    every node of a Slurm job

It changes nothing. Exit code 0, or 1 when there is a problem. `p2w verify DIR` checks every byte of a set.
"""


SAMPLE = 24
LONGEST_S = 3.0  # for reading the sample
CUT = "p2w shard-luna   # or p2w shard --scans FOLDER --out shards"


def shards(case: CheckContext) -> Iterator[CheckResult]:
    """Check that the set is complete, that a random sample of it is intact, and that batch size and run folder fit it."""
    if case.shards is None and not Path("shards").exists():
        yield note(
            "shards", "no folder shards here, and none named", f"p2w doctor --shards DIR; to cut scans: {CUT}"
        )
        return
    where = case.shards or "shards"
    try:
        found = open_set(where)
    except UserError as error:
        yield refused("shards", error)
        return
    count = len(found.shard_names)
    split = f"{len(found.ids('train')):,} sub-scans to train, {len(found.ids('val')):,} to validate"
    yield ok(
        "shards",
        f"{where}: {split}, in {count:,} shards{', all there' if in_folder(found) else ''}"
        f"{RANDOM_CROPS * found.random_crops}",
    )
    yield from sample(found)
    yield from batch_size(case, found)
    yield from run_folder(case, found)


def in_folder(found: ShardSet) -> bool:
    """Whether the set lies in a folder, so that all its shards have been found and can be read at once."""
    return isinstance(getattr(found, "chunks", found), LocalSet)


def sample(found: ShardSet) -> Iterator[CheckResult]:
    """Compare the checksums of a random sample of sub-scans, a different one each time."""
    full = f"p2w verify {found.where}"
    if not in_folder(found):
        yield ok("checksums", f"not sampled, the set is remote; training checks each sub-scan. All: {full}")
        return
    out = torch.empty(found.shape, dtype=torch.int16)
    drawn = np.random.default_rng().permutation(len(found))[:SAMPLE]
    began, done = time.perf_counter(), 0
    for sub_scan in drawn:
        try:
            found.read_into(int(sub_scan), out)
        except DataError as error:
            bad = refused("checksums", error)
            yield problem("checksums", bad.found, f"{bad.remedy}. To check every one: {full}")
            return
        done += 1
        if time.perf_counter() - began > LONGEST_S:
            break
    rate = done * found.nbytes / (time.perf_counter() - began)
    yield ok(
        "checksums",
        f"{done} sub-scans drawn from {len(found):,}, all intact, {size(rate)}/s. To check every one: {full}",
    )


def batch_size(case: CheckContext, found: ShardSet) -> Iterator[CheckResult]:
    """Whether the recipe's batch can be divided among the ranks of this machine, and the set fills it."""
    data, accumulate = case.config.data, case.config.optim.accumulate
    try:
        rows = Sampler(found, "train", data.batch, data.seed, 0, case.ranks, training=True).rows
    except UserError as error:
        yield refused("batch", error)
        return
    share = f"batch {data.batch} = {case.ranks} rank(s) x {rows}"
    if rows % accumulate:
        yield problem(
            "batch", f"{share}, not a multiple of optim.accumulate={accumulate}", "--optim.accumulate 1"
        )
    else:
        yield ok("batch", f"{share}; {len(found.ids('train')) // data.batch:,} steps an epoch")


def run_folder(case: CheckContext, found: ShardSet) -> Iterator[CheckResult]:
    """Whether the command can start in the run folder, or continue the run in it."""
    try:
        RunDir(case.run).check_may_continue(case.config, data_fingerprint(found.meta))
    except UserError as error:
        yield refused("run folder", error)
        return
    try:
        status = json.loads((case.run / "status.json").read_text())
        yield ok(
            "run folder",
            f"{case.run}: {run_state(case.run, status)} at step {status['step']}; the same command continues it",
        )
    except (OSError, ValueError, LookupError, TypeError):
        yield ok("run folder", f"{case.run}: {'holds no run yet' if case.run.exists() else 'new'}")


Check = Callable[[CheckContext], Iterator[CheckResult]]

CHECKS: tuple[Check, ...] = (
    software.python, software.torch_build, software.devices, software.nccl, software.triton, software.apex,
    software.libraries, software.arithmetic,
    machine.cores, machine.memory, machine.speed, machine.shared_memory, machine.disk, machine.limits, machine.clock,
    shards, network.cluster, network.job,
    network.host_name, network.interfaces, network.ports, network.all_reduce,
)  # fmt: skip
LIMIT_S = 60.0


def run_check(check: Check, case: CheckContext, limit_s: float = LIMIT_S) -> list[CheckResult]:
    """Run a check and give its results. One that raises or hangs (a dead file server, a driver) is a problem of its own."""
    rows: list[CheckResult] = []
    broken: list[Exception] = []

    def run() -> None:
        try:
            rows.extend(check(case))
        except Exception as error:
            broken.append(error)

    name = check.__name__.replace("_", " ")
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        hangs = problem(
            name,
            f"no answer in {limit_s:.0f} s: probably a file server, a driver or a name server hangs",
            "dmesg | tail; df; nvidia-smi",
        )
        return [*rows, hangs]
    for error in broken:
        failed = f"the check itself failed: {type(error).__name__}: {first_line(error)}"
        rows.append(problem(name, failed, "a bug in p2w doctor: please report this line"))
    return rows


COLOUR = {"ok": "green", "note": "yellow", "problem": "bold red"}
WIDTH = 160  # characters, without a terminal


@dataclass(frozen=True)
class DoctorOptions:
    """Command line of p2w doctor."""

    shards: str | None = None
    """Folder (or http, https, s3 URL) of shards; default: shards, if it exists."""
    run: Annotated[Path | None, tyro.conf.arg(aliases=["--run-dir"])] = None
    """Folder of the run; default: runs/RECIPE."""
    ranks: Annotated[int | None, tyro.conf.arg(aliases=["--nproc-per-node"])] = None
    """Processes on this machine; default: one per GPU, or one."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print JSON instead of a table."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def main(argv: list[str]) -> int:
    """Run all checks and print the results; the exit code. Raises UserError for an unknown recipe or setting."""
    first = bool(argv) and not argv[0].startswith("-")
    recipe = argv[0] if first else "paper"
    base = settings.read_config(Path(recipe)) if recipe.endswith(".json") else named(recipe)
    options = tyro.cli(
        DoctorOptions, args=argv[1:] if first else argv, default=DoctorOptions(config=base),
        prog="p2w doctor [RECIPE | CONFIG.json]", description=USAGE,
    )  # fmt: skip
    settings.check_config(options.config)
    if options.ranks is not None and options.ranks < 1:
        raise UserError(f"--ranks {options.ranks}: must be at least 1; leave it out for one per GPU")
    console = Console(stderr=True)
    with console.status("checking") as status:
        rows = run_checks(options, recipe, lambda name: status.update(f"checking {name}"))
    problems = [row for row in rows if row.status == "problem"]
    if options.json:
        print(json.dumps({"problems": len(problems), "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        show_checks(rows, recipe)
    return 1 if problems else 0


def run_checks(options: DoctorOptions, recipe: str, say: Callable[[str], None]) -> list[CheckResult]:
    """The results of all checks."""
    rows, cuda, ranks = [], False, 1
    try:
        cuda = World.from_env().device.type == "cuda"
        ranks = torch.cuda.device_count() if cuda else 1
    except UserError as error:
        rows.append(refused("device", error))
    name = f"{Path(recipe).resolve().parent.name}-again" if recipe.endswith(".json") else recipe
    run = options.run or Path("runs") / name
    case = CheckContext(recipe, options.config, options.shards, run, options.ranks or ranks, cuda)
    for check in CHECKS:
        say(check.__name__.replace("_", " "))
        rows += run_check(check, case)
    return rows


def show_checks(rows: list[CheckResult], recipe: str) -> None:
    """Print the results as a table: a line per row, with the remedy below a problem or note."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    table = Table.grid(padding=(0, 1))
    for row in rows:
        found = Text(row.found, overflow="fold")
        if row.remedy:
            found.append(f"\n-> {row.remedy}", style=COLOUR[row.status])
        table.add_row(Text(row.status, style=COLOUR[row.status]), row.name, found)
    console.print(table)
    count = {status: sum(row.status == status for row in rows) for status in COLOUR}
    verdict = f"{count['problem']} problem(s), {count['note']} note(s): recipe {recipe}"
    console.print(verdict, style=COLOUR["problem" if count["problem"] else "ok"], markup=False)
