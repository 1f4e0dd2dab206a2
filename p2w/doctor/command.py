"""Look at this machine, and say what would keep a run from working, and what to type about it.

    p2w doctor                                                        this machine, for recipe paper
    p2w doctor demo --shards demo/shards --run-dir demo/run --ranks 2
    p2w doctor large --data.batch 32 --json
    srun --nodes=2 --ntasks-per-node=1 p2w doctor paper --shards /data/shards    every node of a Slurm job

It changes nothing. Exit code 0, or 1 when there is a problem. `p2w verify DIR` checks every byte of a set.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from p2w import config as settings
from p2w.config import Config
from p2w.doctor.row import Case, Row, problem, refused
from p2w.errors import UserError
from p2w.recipes import named

COLOUR = {"ok": "green", "note": "yellow", "problem": "bold red"}
WIDTH = 160  # off a terminal


@dataclass(frozen=True)
class Options:
    """Command line of p2w doctor."""

    shards: str | None = None
    """Folder (or http, https, s3 URL) of shards; default shards, if it is there."""
    run: Annotated[Path | None, tyro.conf.arg(aliases=["--run-dir"])] = None
    """Folder of the run; default runs/RECIPE."""
    ranks: Annotated[int | None, tyro.conf.arg(aliases=["--nproc-per-node"])] = None
    """Processes on this machine; default one a GPU, or one."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print JSON instead of a table."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def main(argv: list[str]) -> int:
    """Ask every check, print the page. Raises UserError for a recipe or setting that there is not."""
    first = bool(argv) and not argv[0].startswith("-")
    recipe = argv[0] if first else "paper"
    base = settings.read(Path(recipe)) if recipe.endswith(".json") else named(recipe)
    options = tyro.cli(
        Options, args=argv[1:] if first else argv, default=Options(config=base),
        prog="p2w doctor [RECIPE | CONFIG.json]", description=__doc__,
    )  # fmt: skip
    settings.check(options.config)
    if options.ranks is not None and options.ranks < 1:
        raise UserError(f"--ranks {options.ranks}: must be at least 1; leave it out for one a GPU")
    console = Console(stderr=True)
    with console.status("looking") as status:
        rows = look(options, recipe, lambda name: status.update(f"looking at {name}"))
    problems = [row for row in rows if row.status == "problem"]
    if options.json:
        print(json.dumps({"problems": len(problems), "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        show(rows, recipe)
    return 1 if problems else 0


def look(options: Options, recipe: str, say: Callable[[str], None]) -> list[Row]:
    """The rows of all checks. A torch that cannot be imported is the only row: nothing else would work."""
    try:
        from p2w.doctor.checks import CHECKS, answer  # noqa: PLC0415
        from p2w.world import World  # noqa: PLC0415
    except Exception as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        return [
            problem(
                "torch",
                f"p2w cannot be imported by {sys.executable}: {text}",
                "make install   # or  pip install --editable .",
            )
        ]
    rows, cuda, ranks = [], False, 1
    try:
        import torch  # noqa: PLC0415

        cuda = World.place().device.type == "cuda"
        ranks = torch.cuda.device_count() if cuda else 1
    except UserError as error:
        rows.append(refused("device", error))
    name = f"{Path(recipe).resolve().parent.name}-again" if recipe.endswith(".json") else recipe
    run = options.run or Path("runs") / name
    case = Case(recipe, options.config, options.shards, run, options.ranks or ranks, cuda)
    for check in CHECKS:
        say(check.__name__.replace("_", " "))
        rows += answer(check, case)
    return rows


def show(rows: list[Row], recipe: str) -> None:
    """The page: a line a row, and below a problem or note what to type."""
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
