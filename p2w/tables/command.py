"""What `p2w table1`, `table2` and `fig3` have in common: their options, reading, and writing."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from p2w.errors import UserError
from p2w.log import write_atomic
from p2w.tables import page
from p2w.tables.build import Choice, chosen, numbers
from p2w.tables.formats import csv_text, latex, terminal
from p2w.tables.table import Table, to_json
from p2w.target.results import Transfer, collect


@dataclass(frozen=True)
class Options:
    """Command line of a table."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUNS [RUNS ...]")]
    """Folders that launch/transfer.py wrote, or folders above them."""
    out: Path | None = None
    """Where files are written; default FIRST/tables."""
    metric: tuple[str, ...] = ()
    """What is compared: NAME for all tasks, or TASK=NAME …; default what the paper compares, else AUC or IoU."""
    fraction: tuple[str, ...] = ()
    """Runs with this share of the training data: VALUE for all tasks, or TASK=VALUE …; default the paper's, else the only
    one there is."""
    ours: str = ""
    """The row that is tested against the others; default Parts2Whole, in Table 2 its own range [1/16,1/4]."""
    against: str = ""
    """The row that it is tested against; default the best of the others, task by task."""
    correction: Annotated[str, tyro.conf.arg(metavar="{holm,none}")] = "holm"
    """Over the comparisons with the best of a column: Holm's, or none, as in the paper."""

    @property
    def folder(self) -> Path:
        """Where files go."""
        return self.out or self.runs[0] / "tables"

    def choice(self, ours: str) -> Choice:
        """What was chosen, checked. Raises UserError."""
        if self.correction not in ("holm", "none"):
            raise UserError(f"--correction {self.correction}: must be holm or none")
        metric, fraction = chosen(self.metric, "--metric"), numbers(self.fraction, "--fraction")
        return Choice(metric, fraction, self.ours or ours, self.against, self.correction == "holm")


def parse(argv: list[str], name: str, description: str) -> Options:
    """Command line -> options. Raises UserError."""
    options = tyro.cli(Options, args=argv, prog=f"p2w {name}", description=description)
    if not options.runs:
        raise UserError(f"p2w {name}: no folder named; p2w {name} RUNS [RUNS ...]")
    return options


def read(options: Options) -> list[Transfer]:
    """The transfers, with what is left out or doubtful said on stderr. Raises UserError when nothing is left."""
    transfers, problems = collect(options.runs)
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr, flush=True)
    if not transfers:
        raise UserError(f"{options.runs[0]}: no transfer can be read, see above; repeat its command")
    return transfers


def write(table: Table, options: Options) -> None:
    """Print the table; write CSV, LaTeX, JSON, and the page of all tables in the folder."""
    terminal(table)
    files = {"csv": csv_text(table), "tex": latex(table), "json": to_json(table)}
    save(options.folder, {f"{table.name}.{kind}": text for kind, text in files.items()})


def save(folder: Path, files: dict[str, str | bytes]) -> None:
    """Write files and the page anew; say where they are. Raises UserError when the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_atomic(folder / name, data)
        text, problems = page.render(folder)
        write_atomic(folder / page.NAME, text.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(
            f"{folder}: not written ({error.strerror}); name another folder with --out"
        ) from error
    for problem in problems:
        print(f"not on the page: {problem}", file=sys.stderr, flush=True)
    print("\n".join(str(folder / name) for name in (*files, page.NAME)), flush=True)
