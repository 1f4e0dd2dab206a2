"""Pretrain an encoder.

    torchrun --standalone --nproc_per_node=2 -m p2w train demo --shards demo/shards --run-dir demo/run
    torchrun --nproc_per_node=8 -m p2w train paper --shards shards --run-dir runs/paper
    torchrun -m p2w train                                    recipe paper, shards/ -> runs/paper
    torchrun -m p2w train paper --stage-to /scratch          copies the shards to each node's own disk first
    torchrun -m p2w train paper --init runs/other            from the weights of a run, or of others' files
    p2w train demo --shards shards --dry-run       what it would do and cost; starts nothing
    p2w train runs/paper/config.json --run-dir runs/again --optim.lr 5e-4

The first argument is a recipe or a config.json; every setting can be overridden by its dotted name. The same command on
the same run folder continues it, at any number of ranks that divides the batch; with --train.elastic at any number.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from p2w import config as settings
from p2w.config import Config
from p2w.errors import UserError, program, refuse_old_options
from p2w.pretext import build_pretext_and_network
from p2w.pretext.protocol import Pretext
from p2w.pretrain import Staging, elastic_settings, pretrain, ranks_that_train
from p2w.rank_errors import run_on_ranks
from p2w.recipes import RECIPES, named
from p2w.shards.manifest import BETWEEN, data_fingerprint
from p2w.stream.local import RANDOM_CROPS, ShardSet
from p2w.stream.prefetch import refuse_random_crops
from p2w.stream.sampler import Sampler
from p2w.stream.stream import open_set
from p2w.train.optim import Precision, choose_precision
from p2w.train.run_dir import RunDir
from p2w.weights.hub import pin
from p2w.weights.start import read_init
from p2w.world import World

MARKS = "Settings marked [P] are published with the paper, [I] inferred from its patent and code family, [?] our choice."
RENAMED = {
    "--max-steps": "--train.steps",
    "--on-bad-sample": "--data.on-bad-sample",
    "--data.readers": "--data.reader-threads",
    "--data.on-device": "--data.cache-on-device",
    "--data.no-on-device": "--data.no-cache-on-device",
    "--train.look-every": "--train.probe-every",
    "--train.amp": "--train.precision",
    "--train.max-skipped": "--train.max-nonfinite",
    "--pretext.aspect-range": "--pretext.max-aspect",
    "--train.no-channels-last": "--train.channels-last off",
}  # options of earlier versions


@dataclass(frozen=True)
class Args:
    """Command line of p2w train."""

    shards: tuple[str, ...] = ("shards",)
    """Folder (or http, https, s3 URL) of shards with their manifest; or several with weights, such as a:0.7 b:0.3."""
    run: Annotated[Path | None, tyro.conf.arg(aliases=["--run-dir"])] = None
    """Folder of the run; default runs/RECIPE. Under torchrun with Python 3.11 spell it --run-dir: torchrun's own parser
    takes --run for an abbreviation of its --run-path, also behind the script's name."""
    init: str = ""
    """Start from the weights of a run, a file that `p2w inspect` can read, or hf://org/name; short for --model.init."""
    stage_to: Path | None = None
    """Copy the shards to this folder of each node's own disk first, compared with their checksums, and read them there. One
    rank of a node copies what is not there yet; the order stays."""
    stage_remove: tyro.conf.FlagCreatePairsOff[bool] = False
    """Delete the copies when the run ends."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print configuration, parameters, arithmetic, memory and steps, then stop."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)

    @property
    def folder(self) -> Path:
        """The run folder, which is known after `parse`."""
        assert self.run is not None
        return self.run


def parse(argv: list[str], speaks: bool = True) -> tuple[Args, str]:
    """Command line -> arguments with a checked configuration, and the recipe's name. Raises UserError.

    One process a node `speaks`: help and complaints about flags would otherwise come once a rank.
    """
    refuse_old_options(argv, RENAMED)
    named_first = bool(argv) and not argv[0].startswith("-")
    recipe = argv[0] if named_first else "paper"
    from_file = recipe.endswith(".json")
    base = settings.read_config(Path(recipe)) if from_file else named(recipe)
    table = "\n".join(f"    {name:8}{entry.summary}" for name, entry in RECIPES.items())
    args = tyro.cli(
        Args,
        args=argv[1:] if named_first else argv,
        default=Args(config=base),
        prog=f"{program('train')} [RECIPE | CONFIG.json]",
        description=f"{__doc__}\nRecipes (defaults below are those of {recipe}):\n\n{table}\n\n{MARKS}",
        console_outputs=speaks,
    )
    run = args.run or Path("runs") / (f"{Path(recipe).resolve().parent.name}-again" if from_file else recipe)
    if init := args.init or args.config.model.init:
        model = replace(args.config.model, init=pin(init, _recorded_init(run)))
        args = replace(args, config=replace(args.config, model=model))
    return replace(args, config=settings.check_config(args.config), run=run), recipe


def _recorded_init(run: Path) -> str | None:
    """The starting point of a run that continues; None where none has begun."""
    path = run / "config.json"
    return settings.read_config(path).model.init if path.exists() else None


@dataclass(frozen=True)
class Job:
    """The run that the command line describes. `recipe` is the name that it begins with."""

    args: Args
    config: Config  # of this start: with train.elastic, passes may be others than those of args.config
    ranks: int  # that train
    recipe: str
    shards: ShardSet
    precision: Precision


def build(argv: list[str], world: World) -> Job:
    """Everything that can be refused before a process group starts. Raises UserError."""
    args, recipe = parse(argv, speaks=world.speaks)
    precision = choose_precision(args.config.train.precision, world.device)
    ranks = ranks_that_train(args.config, world.size)
    if world.rank >= ranks:
        if world.rank == ranks and not args.dry_run:
            world.report(
                f"train.elastic: {ranks} of {world.size} ranks train, since a batch of {args.config.data.batch} cannot be "
                f"shared evenly by more of them; rank(s) {ranks} to {world.size - 1} leave"
            )
        world.leave(0)
    config = elastic_settings(args.config, RunDir(args.folder).ranks_of_first_start() or ranks, ranks)
    shards = open_set(
        BETWEEN.join(args.shards),
        on_bad=config.data.on_bad_sample,
        retry_s=60 * config.data.retry_minutes,
        order=RunDir(args.folder).order(),
        order_version=RunDir(args.folder).order_version(),
        # torchrun ends the ranks of a node when the first one refuses; without it each finds out for itself.
        check_shards=world.speaks or not world.agent,
    )
    config.log.check_installed()
    rows = Sampler(
        shards, "train", config.data.batch, config.data.seed, world.rank, ranks, training=True
    ).rows
    if rows % config.optim.accumulate:
        raise UserError(
            f"optim.accumulate={config.optim.accumulate}: does not divide a rank's {rows} samples; pass a divisor"
        )
    with torch.device("meta"):
        pretext, _ = build_pretext_and_network(config)
    refuse_other_wholes(pretext, config, shards)
    RunDir(args.folder).check_may_continue(args.config, data_fingerprint(shards.meta))
    read_init(config, args.folder)
    return Job(args, config, ranks, recipe, shards, precision)


def refuse_other_wholes(pretext: Pretext, config: Config, shards: ShardSet) -> None:
    """Raise UserError where a set whose sub-scans are cut elsewhere in each epoch does not go with the settings."""
    if config.data.cache_on_device:
        refuse_random_crops(shards)
    if pretext.knows_wholes and shards.random_crops:
        raise UserError(
            f"pretext.name={config.pretext.name}: remembers every whole from epoch to epoch, and {shards.where} "
            "stores whole scans, of which every epoch cuts others: take another pretext, such as simclr or moco, or "
            "cut the set with --store subscans"
        )


def show_plan(job: Job, world: World) -> None:
    """Print what the run would do and cost."""
    from p2w.train.estimate import describe_scaling, run_cost  # noqa: PLC0415  (torch's FLOP counter imports triton: only for this page)

    config, batch, precision = job.config, job.config.data.batch, job.precision
    samples = max(1, batch // job.ranks // config.optim.accumulate)
    facts = run_cost(
        config, lambda: build_pretext_and_network(config), samples, 4 if precision.dtype is None else 2
    )
    wholes, steps = len(job.shards.ids("train")), config.train.steps
    epoch = max(1, job.shards.samples_per_epoch(job.shards.ids("train")) // batch)
    if config.train.kernels == "plain":
        facts = replace(facts, folds=())
    print(f"recipe          {job.recipe}\n{settings.config_to_json(job.args.config)}")
    print(
        f"data            {job.shards.where}: {wholes:,} sub-scans to train, {len(job.shards.ids('val')):,} to validate"
        f"{RANDOM_CROPS * job.shards.random_crops}"
    )
    print(f"run             {job.args.folder}")
    print(f"processes       {world.describe()}; {precision.name} ({precision.reason})")
    print("\n".join(facts.lines()))
    print(f"steps           {steps:,} of {batch} wholes = {steps / epoch:.1f} epochs of {epoch:,} steps")
    kept = (config.train.keep + 1) * facts.checkpoint_bytes / 2**30
    print(
        f"checkpoints     {facts.checkpoint_bytes / 2**30:.2f} GiB each, {kept:.2f} GiB for the newest ones and the best"
    )
    print(f"in all          {facts.total(batch, job.ranks, steps)}")
    card = world.device_reason if world.device.type == "cuda" else ""
    said = describe_scaling(facts, card, ranks=job.ranks, per_node=world.local_size, batch=batch, steps=steps)
    print("\n".join(f"{'' if number else 'forecast':16}{line}" for number, line in enumerate(said)))


def dry_run(job: Job, world: World) -> int | None:
    """With --dry-run, print the plan once and return exit code 0; else None."""
    if job.args.dry_run and world.is_main:
        show_plan(job, world)
    return 0 if job.args.dry_run else None


def start(job: Job) -> World:
    """Let the ranks meet."""
    train, patience = job.args.config.train, 60 * job.args.config.data.retry_minutes
    # The watchdog knows more than a collective that is not joined; one rank may have to wait for a web server.
    wait, meet = max(World.WAIT_S, 120 * train.hang_minutes, 2 * patience), World.MEET_S
    meet += patience if "://" in job.shards.where else 0.0
    return World.start(wait, meet, deterministic=train.deterministic, ranks=job.ranks)


def work(job: Job, world: World) -> int:
    """Train; the exit code."""
    args = job.args
    staging = Staging(args.stage_to, args.stage_remove)
    pretrain(args.config, job.shards, args.folder, world, job.precision, staging)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Parse, build, run."""
    return run_on_ranks(build, work, argv, alone=dry_run, start=start)
