"""Cut the data of a target task into shards of labelled samples.

    p2w prepare ncc --source LUNA16 --out targets/ncc

`p2w prepare TASK --help` says what a task reads and what can be set. Stop it whenever you like:
the same command goes on where it stopped. Exit code 0; 1 when a case was bad (named, and listed in report.json); 2 when
nothing could be done.
"""

import sys
from dataclasses import dataclass
from typing import Annotated, Generic, TypeVar

import tyro

from p2w.errors import UserError, program
from p2w.tasks import TASKS
from p2w.tasks.prepare import PreparationOptions, prepare_samples

T = TypeVar("T")


@dataclass(frozen=True)
class Command(Generic[T]):
    """The options of all tasks and those of one."""

    common: Annotated[PreparationOptions, tyro.conf.arg(name="")]
    task: Annotated[T, tyro.conf.arg(name="")]


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and prepare the samples of the task that it names."""
    argv = sys.argv[1:] if argv is None else argv
    name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if name in ("-h", "--help"):
        print(
            f"usage: {program('prepare')} {{{','.join(TASKS)}}} --source FOLDER --out FOLDER [options]\n\n{__doc__}"
        )
        return 0
    if name not in TASKS:
        raise UserError(f"no task {name}; one of {', '.join(TASKS)}")
    task = TASKS[name]
    options = tyro.cli(
        Command[task],  # type: ignore[valid-type]
        args=rest,
        prog=f"{program('prepare')} {name}",
        description=task.__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return prepare_samples(options.task, options.common)
