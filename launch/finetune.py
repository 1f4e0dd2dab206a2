"""Fine-tune a starting point on a target task, in trials, and judge it on the task's test samples.

    torchrun launch/finetune.py --task targets/ncs --init runs/paper --label Parts2Whole --run-dir runs/ncs-p2w
    torchrun launch/finetune.py --task targets/ncs --init random --run-dir runs/ncs-scratch --fraction 0.1
    torchrun --nproc_per_node=4 launch/finetune.py --task targets/lcs --init runs/paper@35000 --run-dir runs/lcs-p2w
    python launch/finetune.py --task targets/ncs --init random --width 8 --workers 4 --run-dir runs/small   side by side
    python launch/finetune.py --task targets/ncs --init runs/paper --run-dir runs/ncs-p2w --dry-run

The encoder is transferred, what is behind it starts at random (`--decoder pretrained`: the decoder is transferred too). The
same command on the same folder continues: finished trials are skipped, one that was interrupted goes on after its last
checkpoint. Processes that are started with the same command share the trials, on one machine or many. A trial comes out
the same on any number of ranks, but for rounding. `p2w table1 RUN…` reads the results.

Exit code 0 when no trial is left to this process, 2 for bad input, 143 when told to stop before.
"""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from p2w.errors import UserError, exits
from p2w.finetune import run_manifest
from p2w.finetune.init import init_leak, resolve_init
from p2w.finetune.recipe import FineTuneRecipe, check_recipe, recipe_of
from p2w.finetune.run_manifest import (
    announce,
    check_run_manifest,
    show_fine_tuning_plan,
    show_results,
    write_run_manifest,
)
from p2w.finetune.trainer import StopRequested
from p2w.finetune.trials import FineTuning, check_crop_size, check_data, run_trials
from p2w.log import Log
from p2w.rank_errors import leave, refuse
from p2w.tasks.reader import TargetSet, open_target
from p2w.train.optim import Precision, choose_precision
from p2w.train.preflight import check_rank_consistency
from p2w.train.stop import StopRequest
from p2w.train.watchdog import Watchdog
from p2w.world import World, weights_checksum

STOPPED = 143


@dataclass(frozen=True)
class Args:
    """Command line of launch/finetune.py."""

    task: Path
    """Folder of a set that preprocess/prepare_target.py wrote."""
    init: str
    """Starting point: random, a run (its best checkpoint, else the newest), RUN@STEP, or a file of weights."""
    run: Annotated[Path, tyro.conf.arg(aliases=["--run-dir"])]
    """Folder of the results. Under torchrun with Python 3.11 spell it --run-dir, see launch/train.py."""
    label: str = ""
    """What tables call the starting point; default: the folder of the run, the file's name, or Scratch."""
    network: str | None = None
    """Which encoder; default unet3d, or that of the file."""
    width: int | None = None
    """Its width; default the published one, or that of the file."""
    trials: int = 10
    """How many trials; trial k has seed recipe.seed + k."""
    trial: tuple[int, ...] = ()
    """Do these alone, for a job array; default: all."""
    fraction: float = 1.0
    """Share of the training patients."""
    decoder: Literal["scratch", "pretrained"] = "scratch"
    """Segmentation: a new decoder with skips, or the one that was pretrained with the encoder."""
    fold: int | None = None
    """Which fold is tested on, of a set that has folds; default 0."""
    workers: int = 1
    """Processes that do trials side by side on this machine, without torchrun; each has its share of the cores."""
    allow_leak: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on although the starting point was pretrained on scans that are tested on."""
    hang_minutes: float = 10.0
    """Several ranks: end with the name of the one that hangs when none gets further for this long."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print what would be done, then stop."""
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print no summary at the end."""
    recipe: FineTuneRecipe = field(default_factory=FineTuneRecipe)


def parse(argv: list[str], speaks: bool = True) -> tuple[Args, TargetSet]:
    """Command line -> arguments and the set they name; the recipe's defaults are those of its task. Raises UserError."""

    def read(recipe: FineTuneRecipe) -> Args:
        return tyro.cli(
            Args,
            args=argv,
            prog="torchrun launch/finetune.py",
            description=f"{__doc__}\nSettings marked [C] are those of the paper's protocol, [?] our choice.",
            console_outputs=speaks,
            default=_defaults(recipe),
        )

    args = read(FineTuneRecipe())
    source = open_target(args.task)
    return read(recipe_of(str(source.meta["task"]))), source


def _defaults(recipe: FineTuneRecipe) -> Any:
    """Arguments with the recipe filled in; what the user must name is missing."""
    return Args(task=tyro.MISSING, init=tyro.MISSING, run=tyro.MISSING, recipe=recipe)


def label_of(init: str) -> str:
    """What a starting point is called where no label was given."""
    if init == "random":
        return "Scratch"
    name = Path(init.partition("@")[0])
    folder = next((up for up in (name, *name.parents) if (up / "checkpoints").is_dir()), None)
    return folder.name if folder else name.stem


@dataclass(frozen=True)
class Job:
    """What the command line comes to. `leak`: one line on what pretraining has seen; `weights`: a checksum."""

    args: Args
    transfer: FineTuning
    tree: dict[str, Any]
    precision: Precision
    leak: str
    weights: str


def build(argv: list[str], world: World) -> Job:
    """Everything that can be refused before a process group starts. Raises UserError."""
    args, source = parse(argv, speaks=world.speaks)
    check_recipe(args.recipe)
    if not 1 <= args.trials <= 1000 or any(not 0 <= one < args.trials for one in args.trial):
        raise UserError(f"--trials {args.trials} --trial {args.trial}: from 1 to 1000, numbered from 0")
    if args.workers < 1 or (args.workers > 1 and world.size > 1):
        raise UserError(f"--workers {args.workers}: at least 1, and more than one without torchrun only")
    fold = 0 if args.fold is None and source.folds else args.fold
    transfer = FineTuning(
        source, resolve_init(args.init), args.label or label_of(args.init), args.network, args.width, args.trials,
        args.fraction, args.decoder == "pretrained", fold, args.recipe, args.run,
    )  # fmt: skip
    precision = choose_precision(args.recipe.precision, world.device).apply()
    check_data(transfer, world.size)
    said = init_leak(transfer.origin, source, args.allow_leak, fold)
    network, _ = transfer.build(0)
    check_crop_size(transfer, network.encoder)
    weights = weights_checksum(network)
    return Job(args, transfer, check_run_manifest(transfer) | {"leak": said}, precision, said, weights)


def work(job: Job, world: World) -> int:
    """The trials that this process, with its ranks, does. Returns the exit code."""
    args, log = job.args, Log(job.args.run, world.is_main, 0)
    given = write_run_manifest(job.tree) | {
        "--trials": args.trials,
        "--trial": list(args.trial),
        "weights": job.weights,
    }
    check_rank_consistency(world, given, job.precision, job.tree["task"]["fingerprint"], "--recipe.precision")
    if world.is_main:
        announce(job.transfer, job.tree, world)
    log.line(job.leak)
    world.barrier()
    indices = sorted(set(args.trial)) or list(range(args.trials))
    several = world.size > 1
    watchdog = Watchdog(world, 60 * args.hang_minutes)
    watching: contextlib.AbstractContextManager[Any] = watchdog if several else contextlib.nullcontext()
    with watching, StopRequest(speaks=False, ignore_after_error=several) as stop:
        try:
            run_trials(job.transfer, indices, world, job.precision, _stop_check(stop, world, watchdog))
        except StopRequested:
            log.line(f"{stop.name or 'another rank'}: told to stop; the same command continues")
            return STOPPED
    if world.is_main and not args.quiet:
        show_results(args.run)
    return 0


def _stop_check(stop: StopRequest, world: World, watchdog: Watchdog) -> Callable[[], bool]:
    """Whether this rank was told to stop; every call is a sign that it gets further."""
    calls = 0

    def stop_requested() -> bool:
        nonlocal calls
        calls += 1
        watchdog.at(calls, "computing")
        return stop.requested or world.orphaned()

    return stop_requested


def main() -> int:
    """Parse, build, run."""
    world = World.from_env()
    try:
        job = build(sys.argv[1:], world)
    except (UserError, SystemExit) as error:
        return refuse(world, error)
    if job.args.dry_run:
        if world.is_main:
            show_fine_tuning_plan(job.transfer, job.tree, job.precision, world)
        world.leave(0)
    try:
        if job.args.workers > 1:
            announce(job.transfer, job.tree, world)
            code = run_manifest.run_workers(sys.argv, job.args.workers)
            if not code:
                show_results(job.args.run)
        else:
            world = World.start(max(World.WAIT_S, 120 * job.args.hang_minutes))
            code = work(job, world)
    except Exception as error:
        leave(world, error)
    del job
    world.close()
    # Seen with torch 2.13 and pyarrow: threads of the manifest's reader abort an interpreter that is finalised.
    world.leave(code)


if __name__ == "__main__":
    exits(main)()
