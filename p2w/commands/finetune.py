"""Fine-tune a starting point on a target task, in trials, and judge it on the task's test samples.

    torchrun -m p2w finetune --task targets/ncs --init runs/paper --label Parts2Whole --run-dir runs/ncs-p2w
    torchrun -m p2w finetune --task targets/ncs --init random --run-dir runs/ncs-scratch --fraction 0.1
    torchrun --nproc_per_node=4 -m p2w finetune --task targets/lcs --init runs/paper@35000 --run-dir runs/lcs-p2w
    p2w finetune --task targets/ncs --init random --width 8 --workers 4 --run-dir runs/small   side by side
    p2w finetune --task targets/ncs --init runs/paper --run-dir runs/ncs-p2w --dry-run

The encoder is transferred, what is behind it starts at random (`--decoder pretrained`: the decoder is transferred too). The
same command on the same folder continues: finished trials are skipped, one that was interrupted goes on after its last
checkpoint. Processes that are started with the same command share the trials, on one machine or many. A trial comes out
the same on any number of ranks, but for rounding. `p2w table1 RUN…` reads the results.

Exit code 0 when no trial is left to this process, 2 for bad input, 143 when told to stop before.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from p2w.errors import UserError, program, refuse_old_options
from p2w.finetune import run_manifest
from p2w.finetune.init import init_leak, resolve_init
from p2w.finetune.recipe import FineTuneRecipe, check_recipe, recipe_of
from p2w.finetune.run_manifest import (
    check_run_manifest,
    kept_settings,
    show_fine_tuning_plan,
    show_results,
    write_run_manifest,
)
from p2w.finetune.trainer import StopRequested
from p2w.finetune.trials import FineTuning, check_crop_size, check_data, run_trials
from p2w.log import Log
from p2w.rank_errors import run_on_ranks
from p2w.tasks.reader import TargetSet, open_target
from p2w.trackers import LogConfig
from p2w.train.optim import Precision, choose_precision
from p2w.train.preflight import check_rank_consistency
from p2w.train.stop import StopRequest
from p2w.train.watchdog import Watchdog
from p2w.world import World, weights_checksum

STOPPED = 143


@dataclass(frozen=True)
class Args:
    """Command line of p2w finetune."""

    task: Path
    """Folder of a set that p2w prepare wrote."""
    init: str
    """Starting point: random, a run (its best checkpoint, else the newest), RUN@STEP, or a file of weights."""
    run: Annotated[Path, tyro.conf.arg(aliases=["--run-dir"])]
    """Folder of the results. Under torchrun with Python 3.11 spell it --run-dir, see p2w train --help."""
    label: str = ""
    """What tables call the starting point; default: the folder of the run, the file's name, or Scratch."""
    network: str | None = None
    """Which encoder; default unet3d, or that of the file."""
    width: int | None = None
    """Width of the encoder; default the published one, or that of the file."""
    trials: int = 10
    """How many trials; trial k has seed recipe.seed + k."""
    trial: tuple[int, ...] = ()
    """Do these alone, for a job array; default: all."""
    fraction: float = 1.0
    """Share of the training patients."""
    decoder: Literal["scratch", "pretrained"] = "scratch"
    """Where the task has a decoder: a new one with skips, or the one that was pretrained with the encoder."""
    fold: int | None = None
    """Which fold is tested on, of a set that has folds; default 0."""
    workers: int = 1
    """Processes that do trials side by side on this machine, without torchrun; each has its share of the cores."""
    allow_leak: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on although the starting point was pretrained on scans that are tested on."""
    hang_minutes: float = 10.0
    """Minutes without progress of any rank after which the command ends and names the rank that hangs."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print what would be done, then stop."""
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print no summary at the end."""
    recipe: FineTuneRecipe = field(default_factory=FineTuneRecipe)
    log: LogConfig = field(default_factory=lambda: LogConfig(to="none"))


def parse(argv: list[str], speaks: bool = True) -> tuple[Args, TargetSet]:
    """Command line -> arguments and the set they name; the recipe's defaults are those of its task. Raises UserError."""

    refuse_old_options(
        argv, {"--recipe.amp": "--recipe.precision", "--recipe.held-gib": "--recipe.cache-gib"}
    )

    def read(recipe: FineTuneRecipe) -> Args:
        return tyro.cli(
            Args,
            args=argv,
            prog=program("finetune"),
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
    """The label of a starting point where none was given."""
    if init == "random":
        return "Scratch"
    name = Path(init.partition("@")[0])
    folder = next((up for up in (name, *name.parents) if (up / "checkpoints").is_dir()), None)
    return folder.name if folder else name.stem


@dataclass(frozen=True)
class Job:
    """All that the command line asks for, checked. `leak`: one line on what pretraining has seen; `weights`: a checksum."""

    argv: list[str]
    args: Args
    fine_tuning: FineTuning
    tree: dict[str, Any]
    precision: Precision
    leak: str
    weights: str


def build(argv: list[str], world: World) -> Job:
    """Everything that can be refused before a process group starts. Raises UserError."""
    args, source = parse(argv, speaks=world.speaks)
    check_recipe(args.recipe)
    args.log.check_installed()
    if not 1 <= args.trials <= 1000 or any(not 0 <= one < args.trials for one in args.trial):
        raise UserError(f"--trials {args.trials} --trial {args.trial}: from 1 to 1000, numbered from 0")
    if args.workers < 1 or (args.workers > 1 and world.size > 1):
        raise UserError(f"--workers {args.workers}: at least 1, and more than one without torchrun only")
    fold = 0 if args.fold is None and source.folds else args.fold
    fine_tuning = FineTuning(
        source, resolve_init(args.init), args.label or label_of(args.init), args.network, args.width, args.trials,
        args.fraction, args.decoder == "pretrained", fold, args.recipe, args.run, args.log,
    )  # fmt: skip
    precision = choose_precision(args.recipe.precision, world.device).apply()
    check_data(fine_tuning, world.size)
    said = init_leak(fine_tuning.init, source, args.allow_leak, fold)
    network, _ = fine_tuning.build(0)
    check_crop_size(fine_tuning, network.encoder)
    weights = weights_checksum(network)
    return Job(
        argv, args, fine_tuning, check_run_manifest(fine_tuning) | {"leak": said}, precision, said, weights
    )


def work(job: Job, world: World) -> int:
    """The trials that this process, with its ranks, does. Returns the exit code."""
    args, log = job.args, Log(job.args.run, world.is_main, 0)
    given = kept_settings(job.tree) | {
        "--trials": args.trials,
        "--trial": list(args.trial),
        "weights": job.weights,
    }
    check_rank_consistency(world, given, job.precision, job.tree["task"]["fingerprint"], "--recipe.precision")
    if world.is_main:
        write_run_manifest(job.fine_tuning, job.tree, world)
    log.line(job.leak)
    world.barrier()
    indices = sorted(set(args.trial)) or list(range(args.trials))
    several = world.size > 1
    watchdog = Watchdog(world, 60 * args.hang_minutes)
    watching: contextlib.AbstractContextManager[Any] = watchdog if several else contextlib.nullcontext()
    with watching, StopRequest(speaks=False, ignore_after_error=several) as stop:
        try:
            run_trials(job.fine_tuning, indices, world, job.precision, _stop_check(stop, world, watchdog))
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


def alone(job: Job, world: World) -> int | None:
    """--dry-run, and --workers, whose processes share the trials: the exit code; else None."""
    if job.args.dry_run:
        if world.is_main:
            show_fine_tuning_plan(job.fine_tuning, job.tree, job.precision, world)
        return 0
    if job.args.workers == 1:
        return None
    write_run_manifest(job.fine_tuning, job.tree, world)
    code = run_manifest.run_workers(job.argv, job.args.workers)
    if not code:
        show_results(job.args.run)
    return code


def main(argv: list[str] | None = None) -> int:
    """Parse, build, run."""
    return run_on_ranks(
        build,
        work,
        argv,
        alone=alone,
        start=lambda job: World.start(max(World.WAIT_S, 120 * job.args.hang_minutes)),
    )
