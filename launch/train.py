"""Pretrain an encoder.

    torchrun --standalone --nproc_per_node=2 launch/train.py demo --shards demo/shards --run-dir demo/run
    torchrun --nproc_per_node=8 launch/train.py paper --shards shards --run-dir runs/paper
    torchrun launch/train.py                                    recipe paper, shards/ -> runs/paper
    python launch/train.py demo --shards shards --dry-run       what it would do and cost; starts nothing
    python launch/train.py runs/paper/config.json --run-dir runs/again --optim.lr 5e-4

The first argument is a recipe or a config.json; every setting can be overridden by its dotted name. The same command on
the same run folder continues it, at any number of ranks that divides the batch.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from p2w import config as settings
from p2w.config import Config
from p2w.errors import UserError, exits
from p2w.pretext import build_pretext_and_network
from p2w.pretrain import pretrain
from p2w.rank_errors import leave, refuse
from p2w.recipes import RECIPES, named
from p2w.shards.manifest import data_fingerprint
from p2w.stream.local import ShardSet
from p2w.stream.sampler import Sampler
from p2w.stream.stream import open_set
from p2w.train.optim import Precision, choose_precision
from p2w.train.run_dir import RunDir
from p2w.world import World

MARKS = "Settings marked [P] are published with the paper, [I] inferred from its patent and code family, [?] our choice."


@dataclass(frozen=True)
class Args:
    """Command line of launch/train.py."""

    shards: str = "shards"
    """Folder (or http, https, s3 URL) of shards with their manifest."""
    run: Annotated[Path | None, tyro.conf.arg(aliases=["--run-dir"])] = None
    """Folder of the run; default runs/RECIPE. Under torchrun with Python 3.11 spell it --run-dir: torchrun's own parser
    takes --run for an abbreviation of its --run-path, also behind the script's name."""
    max_steps: int | None = None
    """Steps in all; the same as --train.steps."""
    on_bad_sample: Literal["stop", "skip"] | None = None
    """About a sub-scan that is damaged; the same as --data.on-bad-sample."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print configuration, parameters, arithmetic, memory and steps, then stop."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)

    @property
    def folder(self) -> Path:
        """The run folder, once `parse` has settled it."""
        assert self.run is not None
        return self.run


def parse(argv: list[str], speaks: bool = True) -> tuple[Args, str]:
    """Command line -> arguments with a checked configuration, and the recipe's name. Raises UserError.

    One process a node `speaks`: help and complaints about flags would otherwise come once a rank.
    """
    named_first = bool(argv) and not argv[0].startswith("-")
    recipe = argv[0] if named_first else "paper"
    from_file = recipe.endswith(".json")
    base = settings.read_config(Path(recipe)) if from_file else named(recipe)
    table = "\n".join(f"    {name:8}{entry.summary}" for name, entry in RECIPES.items())
    args = tyro.cli(
        Args,
        args=argv[1:] if named_first else argv,
        default=Args(config=base),
        prog="torchrun launch/train.py [RECIPE | CONFIG.json]",
        description=f"{__doc__}\nRecipes (defaults below are those of {recipe}):\n\n{table}\n\n{MARKS}",
        console_outputs=speaks,
    )
    config = args.config
    if args.max_steps is not None:
        config = replace(config, train=replace(config.train, steps=args.max_steps))
    if args.on_bad_sample is not None:
        config = replace(config, data=replace(config.data, on_bad_sample=args.on_bad_sample))
    run = args.run or Path("runs") / (f"{Path(recipe).resolve().parent.name}-again" if from_file else recipe)
    return replace(args, config=settings.check_config(config), run=run), recipe


def show_plan(args: Args, recipe: str, shards: ShardSet, world: World, precision: Precision) -> None:
    """The dry run's page."""
    from p2w.train.estimate import describe_scaling, run_cost  # noqa: PLC0415  (torch's FLOP counter imports triton: only for this page)

    config, batch = args.config, args.config.data.batch
    samples = max(1, batch // world.size // config.optim.accumulate)
    facts = run_cost(
        config, lambda: build_pretext_and_network(config), samples, 4 if precision.dtype is None else 2
    )
    wholes, steps = len(shards.ids("train")), config.train.steps
    epoch = max(1, wholes // batch)
    flops = facts.flops_per_sample * batch * steps
    print(f"recipe          {recipe}\n{settings.config_to_json(config)}")
    print(
        f"data            {shards.where}: {wholes:,} sub-scans to train, {len(shards.ids('val')):,} to validate"
    )
    print(f"run             {args.folder}")
    print(f"processes       {world.describe()}; {precision.name} ({precision.reason})")
    print("\n".join(facts.lines()))
    print(f"steps           {steps:,} of {batch} wholes = {steps / epoch:.1f} epochs of {epoch:,} steps")
    kept = (config.train.keep + 1) * facts.checkpoint_bytes / 2**30
    print(
        f"checkpoints     {facts.checkpoint_bytes / 2**30:.2f} GiB each, {kept:.2f} GiB for the newest ones and the best"
    )
    print(f"in all          {flops / 1e15:,.0f} PFLOP forward and backward")
    card = world.device_reason if world.device.type == "cuda" else ""
    said = describe_scaling(
        facts, card, ranks=world.size, per_node=world.local_size, batch=batch, steps=steps
    )
    print("\n".join(f"{'' if number else 'forecast':16}{line}" for number, line in enumerate(said)))


def prepare(argv: list[str], world: World) -> tuple[Args, str, ShardSet, Precision]:
    """Everything that can be refused before a process group starts. Raises UserError."""
    args, recipe = parse(argv, speaks=world.speaks)
    precision = choose_precision(args.config.train.precision, world.device)
    shards = open_set(args.shards, on_bad=args.config.data.on_bad_sample)
    config = args.config
    rows = Sampler(
        shards, "train", config.data.batch, config.data.seed, world.rank, world.size, training=True
    ).rows
    if rows % config.optim.accumulate:
        raise UserError(
            f"optim.accumulate={config.optim.accumulate}: does not divide a rank's {rows} samples; pass a divisor"
        )
    with torch.device("meta"):
        build_pretext_and_network(config)
    RunDir(args.folder).agrees(config, data_fingerprint(shards.meta))
    return args, recipe, shards, precision


def main() -> int:
    """Parse, build, run."""
    world = World.from_env()
    try:
        args, recipe, shards, precision = prepare(sys.argv[1:], world)
    except (UserError, SystemExit) as error:
        return refuse(world, error)
    if args.dry_run:
        if world.is_main:
            show_plan(args, recipe, shards, world, precision)
        return 0
    try:
        # The watchdog knows more than a collective that is not joined.
        wait_s = max(World.WAIT_S, 120 * args.config.train.hang_minutes)
        world = World.start(wait_s, deterministic=args.config.train.deterministic)
        pretrain(args.config, shards, args.folder, world, precision)
    except Exception as error:
        leave(world, error)
    world.close()
    world.leave()


if __name__ == "__main__":
    exits(main)()
