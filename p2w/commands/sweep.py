"""The runs behind Table 1, Table 2 and Fig. 3: lists of p2w finetune commands, run several at a time.

    p2w sweep table1 --tasks targets/ncc targets/ncs --out runs/table1 \\
        --inits random Parts2Whole=runs/paper "Models Genesis=genesis.pt" MedicalNet=resnet_101.pth,resnet101
    p2w sweep table2 --tasks targets/ncc targets/ncs --shards shards --out runs/table2 --ranks 8 --jobs 8
    p2w sweep fig3 --tasks targets/ncc targets/ncs --pretrained runs/paper --out runs/fig3 --jobs 8
    p2w sweep fig3 … --dry-run               prints the commands, and what is done already
    p2w sweep fig3 … --array jobs.txt        writes them for sbatch --array=1-52 slurm/finetune.sbatch jobs.txt

Then: p2w table1 runs/table1. A command whose trials are all finished is skipped, so the same sweep continues after it was
stopped or killed; a trial that was interrupted goes on after its last checkpoint. Exit code 1 when a job failed; the name
of its log is printed.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from p2w.errors import UserError, program, refuse_old_options
from p2w.files import refuse_unwritable, write_atomic
from p2w.reproduce import paper_numbers, sweep_jobs
from p2w.reproduce.sweep_jobs import Sweep, SweepJob, SweepSlots
from p2w.reproduce.table_builder import numbers_by_task


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options of all three sweeps."""

    tasks: tuple[str, ...]
    """Target sets, folders that p2w prepare wrote: DIR, whose last part is the task's name, or NAME=DIR."""
    out: Path
    """Where the runs go: OUT/TASK/ROW."""
    trials: int = paper_numbers.TRIALS
    """Fine-tunings of each starting point on each task."""
    fraction: tuple[str, ...] = ()
    """Share of the training data: VALUE for all tasks, or TASK=VALUE …; default the paper's."""
    folds: tuple[int, ...] = ()
    """Of sets that have folds (ECC, BMS), those to test on; default all, each a command of its own."""
    width: int | None = None
    """Width of the network; default its own."""
    finetune_args: str = ""
    """Further arguments of p2w finetune: --finetune-args='--recipe.max-epochs 30'."""
    jobs: int = 1
    """How many commands run at a time."""
    threads: int = 0
    """Threads of each command; 0: its share of the cores."""
    gpus: int = 0
    """GPUs that the commands take in turn, one each; 0: all that there are."""
    array: Path | None = None
    """Write the commands to this file, one a line, for a Slurm array; run nothing."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the commands; run nothing."""

    def transfers(self) -> sweep_jobs.FineTuningPlan:
        """The plan that all jobs share. Raises UserError for options that contradict one another."""
        least = {"--trials": self.trials, "--jobs": self.jobs}
        if wrong := next((flag for flag, value in least.items() if value < 1), None):
            raise UserError(f"{wrong} {least[wrong]}: must be at least 1")
        if min(self.threads, self.gpus) < 0:
            raise UserError("--threads, --gpus: must be 0 or more")
        more = tuple(shlex.split(self.finetune_args))
        shares = numbers_by_task(self.fraction, "--fraction")
        return sweep_jobs.FineTuningPlan(
            sweep_jobs.parse_tasks(self.tasks), self.out, self.trials, shares, self.width, more, self.folds
        )


@dataclass(frozen=True, kw_only=True)
class Table1(Common):
    """Starting points on target tasks."""

    inits: tuple[str, ...]
    """Rows: LABEL=INIT or LABEL=INIT,NETWORK; INIT is random, RUN, RUN@STEP or a file of weights."""

    def plan(self) -> list[SweepJob]:
        """The jobs of this sweep. Raises UserError for starting points or sets that cannot be used."""
        return sweep_jobs.table1(self.transfers(), sweep_jobs.parse_inits(self.inits))


@dataclass(frozen=True, kw_only=True)
class Table2(Common):
    """Five ranges of scale, and skip connections: pretrained, then fine-tuned."""

    shards: str = "shards"
    """The shards to pretrain on."""
    recipe: str = "paper"
    """Recipe of the pretraining."""
    ranks: int = 1
    """Processes of each pretraining."""
    train_args: str = ""
    """Further arguments of p2w train: --train-args='--train.steps 5000'."""

    def plan(self) -> list[SweepJob]:
        """The jobs of this sweep. Raises UserError for starting points or sets that cannot be used."""
        if self.ranks < 1:
            raise UserError(f"--ranks {self.ranks}: must be at least 1")
        more = shlex.split(self.train_args)
        return sweep_jobs.table2(self.transfers(), self.shards, self.recipe, self.ranks, more)


@dataclass(frozen=True, kw_only=True)
class Fig3(Common):
    """Checkpoints of one pretraining."""

    pretrained: Path
    """The run whose checkpoints are fine-tuned; train it with --train.keep-every 1759, the steps between validations."""
    checkpoints: int = paper_numbers.CHECKPOINTS
    """How many checkpoints, evenly spread over the run."""
    trials: int = paper_numbers.FINE_TUNINGS
    """Fine-tunings of each checkpoint on each task."""

    def plan(self) -> list[SweepJob]:
        """The jobs of this sweep. Raises UserError for starting points or sets that cannot be used."""
        if self.checkpoints < 2:
            raise UserError(f"--checkpoints {self.checkpoints}: must be at least 2")
        return sweep_jobs.fig3(self.transfers(), self.pretrained, self.checkpoints)


Args = (
    Annotated[Table1, tyro.conf.subcommand(name="table1")]
    | Annotated[Table2, tyro.conf.subcommand(name="table2")]
    | Annotated[Fig3, tyro.conf.subcommand(name="fig3")]
)


def show(jobs: list[SweepJob]) -> None:
    """Print every command, and behind it whether it is finished or begun."""
    for job in jobs:
        count = job.count()
        state = "  # done" if count == job.units else f"  # {count} of {job.units} done" if count else ""
        print(job.line + state)
    print(f"# {len(jobs)} commands, {sum(job.done for job in jobs)} done", flush=True)


def write_array(jobs: list[SweepJob], path: Path) -> None:
    """Write files of commands for Slurm arrays, one file for pretrainings and one for the rest. Raises UserError."""
    groups = {path: [job for job in jobs if not job.pretrains]}
    groups[path.with_stem(f"{path.stem}-pretraining")] = [job for job in jobs if job.pretrains]
    for where, some in groups.items():
        if not some:
            continue
        with refuse_unwritable(where, "name another with --array"):
            write_atomic(where, "".join(f"{job.line}\n" for job in some))
        what = (
            "sbatch slurm/pretrain.sbatch with the arguments of each line, first" if some[0].pretrains else ""
        )
        print(f"{where}: {what or f'sbatch --array=1-{len(some)} slurm/finetune.sbatch {where}'}", flush=True)


def work(jobs: list[SweepJob], args: Table1 | Table2 | Fig3) -> int:
    """Do the pretrainings, then the fine-tunings of those that succeeded; the exit code."""
    import torch  # noqa: PLC0415

    gpus = args.gpus or torch.cuda.device_count()
    ranks = args.ranks if isinstance(args, Table2) else 1
    first = SweepSlots(1 if ranks > 1 else args.jobs, args.threads, 0 if ranks > 1 else gpus)
    failed = Sweep([job for job in jobs if job.pretrains], args.out, first).run("pretrainings")
    ready = [job for job in jobs if not job.pretrains and job.needs not in failed]
    failed += Sweep(ready, args.out, SweepSlots(args.jobs, args.threads, gpus)).run("trials")
    left = sum(not job.done for job in jobs)
    print(
        f"{len(jobs) - left} of {len(jobs)} commands are finished"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return 1 if left else 0


def main(argv: list[str] | None = None) -> int:
    """Parse, build, run."""
    argv = sys.argv[1:] if argv is None else argv
    refuse_old_options(argv, {"--transfer-args": "--finetune-args"})
    args = tyro.cli(Args, args=argv, prog=program("sweep"), description=__doc__)
    jobs = args.plan()
    if args.array:
        write_array(jobs, args.array)
    elif args.dry_run:
        show(jobs)
    else:
        return work(jobs, args)
    return 0
