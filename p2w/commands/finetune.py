"""Fine-tune a starting point on a target task, in trials, and judge it on the task's test samples.

    torchrun -m p2w finetune --task targets/ncs --init runs/paper --label Parts2Whole --run-dir runs/ncs-p2w
    torchrun -m p2w finetune --task targets/ncs --init random --run-dir runs/ncs-scratch --fraction 0.1
    torchrun --nproc_per_node=4 -m p2w finetune --task targets/lcs --init runs/paper@35000 --run-dir runs/lcs-p2w
    p2w finetune --task targets/ncs --init random --width 8 --workers 4 --run-dir runs/small   side by side
    p2w finetune --task targets/ncs --init runs/paper --run-dir runs/ncs-modern --recipe modern    augmentation and more
    p2w finetune --task targets/ours --init runs/paper --run-dir runs/cv --folds 5 [--fold 2]      cross-validation
    p2w finetune --task targets/ncs --init runs/paper --run-dir runs/ncs-p2w --dry-run

The encoder is transferred, what is behind it starts at random (`--decoder pretrained`, `--decoder up-path`: the decoder
is transferred too). The same command on the same folder continues: finished trials are skipped, one that was interrupted
goes on after its last checkpoint. Processes that are started with the same command share the trials, on one machine or
many. A trial comes out the same on any number of ranks, but for rounding. `p2w table1 RUN…` reads the results. What the
settings do, and where they are from: docs/finetune_recipes.md.

Exit code 0 when no trial is left to this process, 2 for bad input, 143 when told to stop before.
"""

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from p2w import report
from p2w.errors import UserError, program, refuse_old_options
from p2w.finetune import run_manifest
from p2w.finetune.cross_validation import fold_folder, folds_of_run, report_folds, with_folds
from p2w.finetune.deep_supervision import wants_supervision
from p2w.finetune.init import init_leak, resolve_init
from p2w.finetune.recipe import FineTuneRecipe, RecipeName, check_recipe, recipe_of
from p2w.finetune.results import RUN_MANIFEST
from p2w.finetune.run_manifest import (
    check_run_manifest,
    kept_settings,
    recorded_init,
    show_fine_tuning_plan,
    show_results,
    write_run_manifest,
)
from p2w.finetune.trainer import StopRequested
from p2w.finetune.trials import FineTuning, check_crop_size, check_data, run_trials
from p2w.inference.drawing import draw_test_samples
from p2w.log import Log
from p2w.rank_errors import run_on_ranks
from p2w.tasks.reader import TargetSet, open_target
from p2w.trackers import LogConfig
from p2w.train.optim import Precision, choose_precision
from p2w.train.preflight import check_rank_consistency
from p2w.train.watchdog import StopRequest, Watchdog
from p2w.weights.hub import is_hub_name, parse_hub_name, pin
from p2w.world import World, weights_checksum

STOPPED = 143


@dataclass(frozen=True)
class Args:
    """Command line of p2w finetune."""

    task: Path
    """Folder of a set that p2w prepare wrote."""
    init: str
    """Starting point: random, a run (its best checkpoint, else the newest), RUN@STEP, a file of weights, or hf://org/name."""
    run: Annotated[Path, tyro.conf.arg(aliases=["--run-dir"])]
    """Folder of the results. Under torchrun with Python 3.11 spell it --run-dir, see p2w train --help."""
    label: str = ""
    """The name of the starting point in tables; default: the folder of the run, the file's name, or Scratch."""
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
    decoder: Literal["scratch", "pretrained", "up-path"] = "scratch"
    """Where the task has a decoder. scratch: a new one with skips. pretrained: the one that was pretrained with the encoder,
    with skips if it had them. up-path: one with skips that begins as the pretrained one without: its weights where both have
    them, zero where a level reads the skip."""
    folds: int = 0
    """k-fold cross-validation: deal the patients to so many folds, and test on each in turn, below RUN/fold-0, fold-1, …;
    with --fold, on that one alone, as one job of several."""
    fold: int | None = None
    """Which fold is tested on, of --folds or of a set that has folds; of the latter, default 0."""
    workers: int = 1
    """Processes that do trials side by side on this machine, without torchrun; each has its share of the cores."""
    allow_leak: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on although the starting point was pretrained on scans that are tested on."""
    hang_minutes: float = 10.0
    """Minutes without progress of any rank after which the command ends and names the rank that hangs."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print what would be done, then stop."""
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print no summary at the end, and draw no report.html."""
    defaults: Annotated[RecipeName, tyro.conf.arg(name="recipe")] = "paper"
    """The settings below to begin with: the paper's protocol, or augmentation and what else is usual today. The help shows
    those of the recipe that is named before --help."""
    recipe: FineTuneRecipe = field(default_factory=FineTuneRecipe)
    log: LogConfig = field(default_factory=lambda: LogConfig(to="none"))


def parse(argv: list[str], speaks: bool = True) -> tuple[Args, TargetSet]:
    """Command line -> arguments and the set they name; the recipe's defaults are those of its task. Raises UserError."""
    renamed = {"amp": "precision", "held-gib": "cache-gib", "no-channels-last": "channels-last off"}
    refuse_old_options(argv, {f"--recipe.{old}": f"--recipe.{new}" for old, new in renamed.items()})
    named = _recipe_name(argv)

    def read(recipe: FineTuneRecipe) -> Args:
        return tyro.cli(
            Args,
            args=argv,
            prog=program("finetune"),
            description=f"{__doc__}\nSettings marked [C] are those of the paper's protocol, [?] our choice.",
            console_outputs=speaks,
            default=Args(task=tyro.MISSING, init=tyro.MISSING, run=tyro.MISSING, recipe=recipe),
        )

    args = read(recipe_of("", named))
    source = open_target(args.task)
    return read(recipe_of(str(source.meta["task"]), named)), source


def _recipe_name(argv: list[str]) -> str:
    """What follows the last `--recipe`, which decides the other settings' defaults."""
    named = "paper"
    for word, following in itertools.pairwise([*argv, ""]):
        if word == "--recipe":
            named = following
        elif word.startswith("--recipe="):
            named = word.partition("=")[2]
    return named


def label_of(init: str) -> str:
    """The label of a starting point where none was given."""
    if init == "random":
        return "Scratch"
    if is_hub_name(init):
        return parse_hub_name(init).repo.partition("/")[2]
    name = Path(init.partition("@")[0])
    folder = next((up for up in (name, *name.parents) if (up / "checkpoints").is_dir()), None)
    return folder.name if folder else name.stem


@dataclass(frozen=True)
class FoldJob:
    """The trials of one fold, or of a set without folds, and what transfer.json says of them."""

    fine_tuning: FineTuning
    tree: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """All that the command line asks for, checked; `weights`: a checksum."""

    argv: list[str]
    args: Args
    folds: tuple[FoldJob, ...]
    precision: Precision
    weights: str

    @property
    def first(self) -> FoldJob:
        """The first fold; the only one without --folds."""
        return self.folds[0]


def build(argv: list[str], world: World) -> Job:
    """Everything that can be refused before a process group starts. Raises UserError."""
    args, source = parse(argv, speaks=world.speaks)
    check_recipe(args.recipe)
    args.log.check_installed()
    if not 1 <= args.trials <= 1000 or any(not 0 <= one < args.trials for one in args.trial):
        raise UserError(f"--trials {args.trials} --trial {args.trial}: from 1 to 1000, numbered from 0")
    if args.workers < 1 or (args.workers > 1 and world.size > 1):
        raise UserError(f"--workers {args.workers}: at least 1, and more than one without torchrun only")
    if args.folds and (args.run / RUN_MANIFEST).exists():
        raise UserError(
            f"{args.run}: is a run without --folds; a cross-validation gets a folder of its own: --run-dir"
        )
    if not args.folds and folds_of_run(args.run):
        raise UserError(f"{args.run}: is a cross-validation; repeat its --folds, or name another --run-dir")
    source = with_folds(source, args.folds) if args.folds else source
    precision = choose_precision(args.recipe.precision, world.device).apply()
    jobs, weights, folds = [], "", _folds(args, source)
    began = args.run if not args.folds else fold_folder(args.run, folds[0] or 0)
    init = resolve_init(pin(args.init, recorded_init(began)))
    for fold in folds:
        folder = args.run if fold is None or not args.folds else fold_folder(args.run, fold)
        fine_tuning = FineTuning(
            source, init, args.label or label_of(args.init), args.network, args.width, args.trials,
            args.fraction, args.decoder == "pretrained", fold, args.recipe, folder, args.log, args.decoder == "up-path",
        )  # fmt: skip
        check_data(fine_tuning, world.size)
        said = init_leak(init, source, args.allow_leak, fold)
        if not weights:
            network, _ = fine_tuning.build(0)
            check_crop_size(fine_tuning, network.encoder)
            wants_supervision(network, args.recipe.deep_supervision)
            weights = weights_checksum(network)
        jobs.append(FoldJob(fine_tuning, check_run_manifest(fine_tuning) | {"leak": said}))
    return Job(argv, args, tuple(jobs), precision, weights)


def _folds(args: Args, source: TargetSet) -> list[int | None]:
    """The folds to test on, one after the other; of a set without folds, [None]."""
    if args.fold is None and args.folds:
        return [*range(args.folds)]
    return [0 if args.fold is None and source.folds else args.fold]


def work(job: Job, world: World) -> int:
    """The trials that this process, with its ranks, does. Returns the exit code."""
    args, log, tree = job.args, Log(job.args.run, world.is_main, 0), job.first.tree
    given = kept_settings(tree) | {
        "--trials": args.trials,
        "--trial": list(args.trial),
        "weights": job.weights,
    }
    given |= {"--folds": args.folds, "--fold": args.fold}
    check_rank_consistency(world, given, job.precision, tree["task"]["fingerprint"], "--recipe.precision")
    indices = sorted(set(args.trial)) or list(range(args.trials))
    several = world.size > 1
    watchdog = Watchdog(world, 60 * args.hang_minutes)
    watching: contextlib.AbstractContextManager[Any] = watchdog if several else contextlib.nullcontext()
    with watching, StopRequest(speaks=False, ignore_after_error=several) as stop:
        try:
            check = _stop_check(stop, world, watchdog)
            for fold in job.folds:
                if world.is_main:
                    write_run_manifest(fold.fine_tuning, fold.tree, world)
                log.line(fold.tree["leak"])
                world.barrier()
                run_trials(fold.fine_tuning, indices, world, job.precision, check)
                fold.fine_tuning.cached.clear()  # the next fold has other samples
        except StopRequested:
            log.line(f"{stop.name or 'another rank'}: told to stop; the same command continues")
            return STOPPED
    if world.is_main and not args.quiet:
        _show(job, world)
    return 0


def _show(job: Job, world: World) -> None:
    """Print what came out, of the one run or of the folds that are finished so far, and write its page."""
    run = job.args.run
    if job.args.folds:
        report_folds(run, job.args.folds, job.first.fine_tuning.kind)
    else:
        show_results(run)
    log = Log(run, True, 0)
    for fold in job.folds:
        with log.tolerate("figures/predictions.png"):
            draw_test_samples(fold.fine_tuning, world.device)
    with log.tolerate("report.html"):
        log.line(f"report         {report.write_report(run)}")


def _stop_check(stop: StopRequest, world: World, watchdog: Watchdog) -> Callable[[], bool]:
    """Whether this rank has a stop request; to the watchdog every call is progress."""
    calls = 0

    def stop_requested() -> bool:
        nonlocal calls
        calls += 1
        watchdog.at(calls, "computing")
        return stop.requested or world.orphaned()

    return stop_requested


def alone(job: Job, world: World) -> int | None:
    """Do what --dry-run or --workers ask for, and return the exit code; None where neither is given."""
    if job.args.dry_run:
        if world.is_main:
            for fold in job.folds:
                show_fine_tuning_plan(fold.fine_tuning, fold.tree, job.precision, world)
        return 0
    if job.args.workers == 1:
        return None
    for fold in job.folds:
        write_run_manifest(fold.fine_tuning, fold.tree, world)
    code = run_manifest.run_workers(job.argv, job.args.workers)
    if not code:
        _show(job, world)
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
