"""Cut the data of a target task into shards of labelled samples.

    p2w prepare ncc --source LUNA16 --out targets/ncc

`p2w prepare TASK --help` says what a task reads and what can be set. Stop it whenever you like:
the same command goes on where it stopped. Exit code 0; 1 when a case was bad (named, and listed in report.json); 2 when
nothing could be done.
"""

import sys
from dataclasses import dataclass
from typing import Annotated, Generic, Literal, TypeVar

import tyro

from p2w.errors import UserError, program
from p2w.shards.build import check_workers
from p2w.shards.build_folder import JobShare
from p2w.tasks import TASKS
from p2w.tasks.prepare import PreparationJob, prepare_samples

T = TypeVar("T")


@dataclass(frozen=True)
class PreparationOptions:
    """Options that every task has."""

    source: str
    """Folder that holds the data as it is published."""
    out: str
    """Folder to write, new or of an earlier run of the same settings."""
    size: Annotated[tuple[int, int, int] | None, tyro.conf.arg(metavar="Z Y X")] = None
    """Voxels of a stored sample, which is the network's input; default: the paper's."""
    format: Literal["tar", "arrow"] = "tar"
    """tar opens with webdataset, arrow with pyarrow; both are read alike."""
    workers: int = 0
    """Cases cut at the same time; 0: one for each core, as far as memory goes (2 GiB each)."""
    shard_of: str = "0/1"
    """i/n: cut the i-th of n shares of the cases (i from 0), as one task of a job array."""
    dry_run: bool = False
    """Print cases, splits, samples, bytes and free disk, and stop."""
    strict: bool = False
    """Stop at the first bad case, with exit code 2."""

    def job(self, size: tuple[int, int, int]) -> PreparationJob:
        """The job that these options ask for; `size` is the task's default. Raises UserError for a value out of range."""
        share = JobShare.parse(self.shard_of)
        check_workers(self.workers)
        size = self.size or size
        if not all(4 <= n <= 1024 for n in size):
            raise UserError(f"--size {' '.join(map(str, size))}: voxels z y x, each from 4 to 1024")
        return PreparationJob(
            self.source, self.out, size, self.format, share, self.workers, self.dry_run, self.strict
        )


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
    return prepare_samples(options.task, options.common.job(task.size))
