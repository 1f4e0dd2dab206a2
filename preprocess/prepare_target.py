"""Cut the data of a target task into shards of labelled samples.

    python preprocess/prepare_target.py ncc --source LUNA16 --out targets/ncc

`python preprocess/prepare_target.py TASK --help` says what a task reads and what can be set. Stop it whenever you like:
the same command goes on where it stopped. Exit code 0; 1 when a case was bad (named, and listed in report.json); 2 when
nothing could be done.
"""

import sys
from dataclasses import dataclass
from typing import Annotated, Generic, TypeVar

import tyro

from p2w.errors import UserError, exits
from p2w.tasks import TASKS
from p2w.tasks.prepare import PreparationOptions, prepare_samples

T = TypeVar("T")


@dataclass(frozen=True)
class Command(Generic[T]):
    """The options of all tasks and those of one."""

    common: Annotated[PreparationOptions, tyro.conf.arg(name="")]
    task: Annotated[T, tyro.conf.arg(name="")]


@exits
def main() -> int:
    """Parse the command line and prepare the samples of the task that it names."""
    name, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in ("-h", "--help"):
        print(
            f"usage: prepare_target.py {{{','.join(TASKS)}}} --source FOLDER --out FOLDER [options]\n\n{__doc__}"
        )
        return 0
    if name not in TASKS:
        raise UserError(f"no task {name}; one of {', '.join(TASKS)}")
    task = TASKS[name]
    options = tyro.cli(
        Command[task],  # type: ignore[valid-type]
        args=rest,
        prog=f"prepare_target.py {name}",
        description=task.__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return prepare_samples(options.task, options.common)


if __name__ == "__main__":
    main()
