"""Sweeps: the commands for Table 1, Table 2 and Fig. 3, and how to run them, several at a time.

    FOLDER/logs/NAME.txt     output of a job
    FOLDER/logs/NAME.lock    locked by the job's process, so that no second sweep starts it, even if the first one was killed

A stop signal is passed on once to every job, and each of them exits. A job that fails is reported, and the others go on.
"""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np

from p2w.errors import UserError
from p2w.files import FileLock
from p2w.finetune import results
from p2w.finetune.run_manifest import task_fingerprint
from p2w.finetune.task_types import task_type
from p2w.log import read_metrics
from p2w.progress import Progress, say
from p2w.reproduce import paper_numbers
from p2w.resources import usable_cores
from p2w.tasks.reader import open_target
from p2w.train.checkpoint import Checkpoints
from p2w.world import variables


@dataclass(frozen=True)
class SweepJob:
    """A command that fills `folder` with `units` trials of a fine-tuning, or with one pretraining."""

    name: str
    folder: Path
    command: tuple[str, ...]  # begins with `python` or `torchrun`
    units: int
    pretrains: bool = False
    needs: str = ""  # name of the job whose result it starts from
    test_set: str = ""  # of a fine-tuning, as in `results.FineTuningResult`
    fraction: float = 1.0

    def count(self) -> int:
        """Finished units. Raises UserError when the folder has a fine-tuning on other data."""
        if self.pretrains:
            return int(self._state() in ("finished", "stopped early"))
        try:
            found = results.read_fine_tuning(self.folder)
        except UserError:  # not begun
            return 0
        if self.test_set and (found.test_set, found.fraction) != (self.test_set, self.fraction):
            raise UserError(
                f"{self.folder}: is of target set {found.test_set} and --fraction {found.fraction:g}, the sweep's are "
                f"{self.test_set} and {self.fraction:g}; name another --out"
            )
        return min(self.units, len(found.trials))

    @property
    def done(self) -> bool:
        """Whether all units are finished."""
        return self.count() == self.units

    @property
    def line(self) -> str:
        """The command quoted for a shell."""
        return shlex.join(self.command)

    def _state(self) -> str:
        try:
            return str(json.loads((self.folder / "status.json").read_text())["state"])
        except (OSError, ValueError, LookupError, TypeError):
            return ""


@dataclass(frozen=True)
class SweepTask:
    """A target set: folder, name of the task, its kind, number of folds, and the set's fingerprint."""

    folder: Path
    task: str
    kind: str
    folds: int
    fingerprint: str


@dataclass(frozen=True)
class FineTuningPlan:
    """The options that all fine-tunings of a sweep share."""

    tasks: Mapping[str, SweepTask]  # by their name in this sweep
    out: Path
    trials: int
    fraction: Mapping[str, float]  # by task, "" for all
    width: int | None = None
    more: tuple[str, ...] = ()  # further arguments of p2w finetune
    folds: tuple[int, ...] = ()  # folds to test on, for sets with folds; () is all
    program: tuple[str, ...] = ("-m", "p2w")  # what Python runs

    def jobs(
        self, task: str, init: str, label: str, usual: Mapping[str, float], network: str = "", decoder: str = "",
        needs: str = "",
    ) -> list[SweepJob]:  # fmt: skip
        """One command of p2w finetune for each fold; `usual` is the default share of the training data by task."""
        target = self.tasks[task]
        chosen = sorted(set(self.folds)) or list(range(target.folds))
        if target.folds and not set(chosen) <= set(range(target.folds)):
            raise UserError(
                f"--folds {' '.join(map(str, chosen))}: {target.folder} has folds 0 to {target.folds - 1}"
            )
        folds: list[int] | list[None] = chosen if target.folds else [None]
        share = usual.get(target.task, 1.0)
        given = (self.fraction.get(name) for name in (task, target.task, ""))
        share = next((one for one in given if one is not None), share)
        return [self._job(task, init, label, share, network, decoder, needs, fold) for fold in folds]

    def _job(
        self, task: str, init: str, label: str, share: float, network: str, decoder: str, needs: str,
        fold: int | None,
    ) -> SweepJob:  # fmt: skip
        target, folder = self.tasks[task], self.out / task / slug(label)
        name, test_set = f"{task}-{folder.name}", target.fingerprint
        flags: list[object] = ["--task", target.folder, "--init", init, "--label", label]
        flags += ["--trials", self.trials]
        if fold is not None:
            flags += ["--fold", fold]
            folder, name, test_set = folder / f"fold-{fold}", f"{name}-fold-{fold}", f"{test_set} fold {fold}"
        flags += ["--network", network] if network else []
        flags += ["--width", self.width] if self.width is not None else []
        flags += ["--fraction", f"{share:g}"] if share != 1 else []
        flags += ["--decoder", decoder] if decoder else []
        command = (
            *("python", *self.program, "finetune"), *map(str, flags), "--run-dir", str(folder), *self.more,
        )  # fmt: skip
        return SweepJob(name, folder, command, self.trials, False, needs, test_set, float(f"{share:g}"))


@dataclass(frozen=True)
class SweepInit:
    """A row of Table 1: `LABEL=INIT` or `LABEL=INIT,NETWORK`."""

    label: str
    init: str
    network: str


def parse_inits(texts: Sequence[str]) -> list[SweepInit]:
    """Parse `--inits`; `random` alone has the label Scratch. Raises UserError."""
    found = []
    for text in texts:
        label, equals, rest = text.partition("=")
        label, rest = (label, rest) if equals else ("Scratch" if text == "random" else Path(text).name, text)
        init, _, network = rest.partition(",")
        if not label or not init:
            raise UserError(
                f"--inits {text}: must be LABEL=INIT or LABEL=INIT,NETWORK, e.g. Parts2Whole=runs/paper"
            )
        found.append(SweepInit(label, init, network))
    _distinct([start.label for start in found], "--inits")
    return found


def parse_tasks(texts: Sequence[str]) -> dict[str, SweepTask]:
    """Parse `--tasks`: NAME=DIR, or DIR, whose last part is then the name. Raises UserError for what is no target set."""
    found = {}
    for text in texts:
        name, equals, where = text.partition("=")
        folder = Path(where if equals else text)
        if not folder.is_dir():
            raise UserError(f"--tasks {text}: no folder {folder}; name sets that p2w prepare wrote")
        meta = open_target(folder).meta
        own = (
            str(meta["task"]).lower(),
            str(meta["kind"]),
            int(meta["split"]["folds"]),
            task_fingerprint(meta),
        )
        found[(name if equals else folder.resolve().name).lower()] = SweepTask(folder, *own)
    if len(found) < max(1, len(texts)):
        raise UserError(
            f"--tasks {' '.join(texts)}: at least one, each name once; NAME=DIR gives a set a name"
        )
    return found


def slug(label: str) -> str:
    """A folder name for a label: `[1/16,1/4]` -> `1of16-1of4`."""
    plain = re.sub(r"[^a-z0-9.]+", "-", label.lower().replace("w/", "").replace("/", "of")).strip("-.")
    return plain or "run"


def _distinct(labels: Sequence[str], flag: str) -> None:
    names = [slug(label) for label in labels]
    twice = next((label for label, name in zip(labels, names, strict=True) if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{flag}: {twice} names the same folder twice; give every row a LABEL of its own")


def table1(common: FineTuningPlan, rows: Sequence[SweepInit]) -> list[SweepJob]:
    """Every starting point on every task, with all training data."""
    return [
        job
        for task in common.tasks
        for row in rows
        for job in common.jobs(task, row.init, row.label, {}, row.network)
    ]


def table2(
    common: FineTuningPlan, shards: str, recipe: str, ranks: int, more: Sequence[str]
) -> list[SweepJob]:
    """Six pretrainings, then each on every task; `w/ skips` fine-tunes the decoder too, if the task has one."""
    jobs = []
    for parts in paper_numbers.TABLE2:
        run = common.out / "pretrained" / slug(parts.label)
        start = ("torchrun", "--standalone", f"--nproc_per_node={ranks}") if ranks > 1 else ("python",)
        what = ["--pretext.volume-fraction", repr(parts.low), repr(float(parts.high))]
        what += ["--pretext.skips"] if parts.skips else []
        where = ("--shards", shards, "--run-dir", str(run))
        command = (*start, *common.program, "train", recipe, *where, *what, *more)
        jobs.append(SweepJob(f"pretrain-{run.name}", run, command, 1, pretrains=True))
    pretrained = list(jobs)
    for task, target in common.tasks.items():
        for parts, before in zip(paper_numbers.TABLE2, pretrained, strict=True):
            decoder = "pretrained" if parts.skips and task_type(target.kind).per_voxel else ""
            jobs += common.jobs(
                task, str(before.folder), parts.label, paper_numbers.FRACTIONS, decoder=decoder,
                needs=before.name,
            )  # fmt: skip
    return jobs


def fig3(common: FineTuningPlan, run: Path, count: int) -> list[SweepJob]:
    """Checkpoints spread evenly over a pretraining, each on every task."""
    steps = spread_steps(validated_steps(run), count)
    return [
        job
        for task in common.tasks
        for step in steps
        for job in common.jobs(task, f"{run}@{step}", f"step-{step:08d}", paper_numbers.FRACTIONS)
    ]


def validated_steps(run: Path) -> list[int]:
    """Steps of the checkpoints of a run whose validation loss is logged. Raises UserError when there are fewer than two."""
    if not (run / "checkpoints").is_dir():
        raise UserError(f"{run}: holds no checkpoints; name the folder of a run with --pretrained")
    losses = {int(record["step"]) for record in read_metrics(run) if "val/loss" in record}
    kept = Checkpoints(run / "checkpoints").steps()
    both = [step for step in kept if step in losses]
    if len(both) < 2:
        raise UserError(
            f"{run}: {len(kept)} checkpoints, {len(both)} of them validated, and a correlation takes more; pretrain with "
            "--train.keep-every 1759, the steps between validations"
        )
    return both


def spread_steps(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of `steps`, ascending: those nearest to evenly spaced steps from the first to the last."""
    if len(steps) <= count:
        return list(steps)
    there = np.array(steps)
    left = np.ones(len(there), bool)
    for step in np.linspace(there[0], there[-1], count):
        left[np.argmin(np.where(left, np.abs(there - step), np.inf))] = False
    return [int(step) for step in there[~left]]


TICK_S = 0.2
COUNT_EVERY_S = 2.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class SweepSlots:
    """Parallel jobs, threads of each job (0: its share of the cores), and GPUs to distribute jobs over (0: not set)."""

    jobs: int = 1
    threads: int = 0
    gpus: int = 0

    def environment(self, slot: int) -> dict[str, str]:
        """Environment variables of the job in a slot."""
        cores = usable_cores()
        device = {"LOCAL_RANK": str(slot % self.gpus)} if self.gpus else {}
        return variables(OMP_NUM_THREADS=str(self.threads or max(1, cores // self.jobs)), **device)


@dataclass
class RunningJob:
    """A job's process, its slot, and its finished units at the last count."""

    job: SweepJob
    process: subprocess.Popen[bytes]
    slot: int
    seen: int


class Sweep:
    """Runs the jobs of one stage."""

    def __init__(self, jobs: Sequence[SweepJob], folder: Path, machine: SweepSlots) -> None:
        self.waiting = [job for job in jobs if not job.done]
        self.logs, self.machine = folder / "logs", machine
        self.running: list[RunningJob] = []
        self.failed: list[str] = []
        self.stopped = 0  # the number of the stop signal
        self._reported_busy: set[str] = set()

    def run(self, what: str) -> list[str]:
        """Run all jobs and return the names of those that failed. Raises SystemExit after a stop signal."""
        if not self.waiting:
            return []
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.logs}: {error.strerror}; name another folder with --out") from error
        total = sum(job.units - job.count() for job in self.waiting)
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        counted = 0.0
        try:
            with Progress(total, what) as progress:
                while self.running or (self.waiting and not self.stopped):
                    self._start()
                    time.sleep(TICK_S)
                    if time.monotonic() - counted > COUNT_EVERY_S:
                        counted = time.monotonic()
                        for one in self.running:
                            self._count(one, progress)
                    self._reap(progress)
                    progress.tick()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.stopped:
            say(f"stopped: {signal.Signals(self.stopped).name}; the same command goes on")
            sys.exit(128 + self.stopped)
        return self.failed

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stopped = self.stopped or number
        for one in self.running:
            if one.process.poll() is None:
                one.process.terminate()

    def _start(self) -> None:
        """Start jobs in free slots. A job that another process has locked waits."""
        for job in list(self.waiting):
            free = set(range(self.machine.jobs)) - {one.slot for one in self.running}
            if not free or self.stopped:
                return
            lock = self._lock(job)
            if lock is None:
                if job.name not in self._reported_busy:
                    self._reported_busy.add(job.name)
                    say(f"{job.name}: another process runs it; waits for that")
                continue
            try:
                self.waiting.remove(job)
                if not job.done:
                    slot = min(free)
                    self.running.append(RunningJob(job, self._launch(job, slot, lock), slot, job.count()))
            finally:
                lock.release()

    def _lock(self, job: SweepJob) -> FileLock | None:
        lock = FileLock(self.logs / f"{job.name}.lock")
        return lock if lock.acquire() else None

    def _launch(self, job: SweepJob, slot: int, lock: FileLock) -> subprocess.Popen[bytes]:
        """Start a job in a session of its own, so that it does not get the terminal's Ctrl-C too; it inherits the lock."""
        program = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
        command = [*program[job.command[0]], *job.command[1:]]
        with open(self.logs / f"{job.name}.txt", "ab") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.machine.environment(slot),
                start_new_session=True, pass_fds=(lock.fileno(),),
            )  # fmt: skip

    def _count(self, one: RunningJob, progress: Progress) -> None:
        now = one.job.count()
        for _ in range(now - one.seen):
            progress.step(one.job.name)
        one.seen = max(one.seen, now)

    def _reap(self, progress: Progress) -> None:
        """Remove the processes that ended, and report those that failed."""
        for one in [one for one in self.running if one.process.poll() is not None]:
            self.running.remove(one)
            self._count(one, progress)
            if one.job.done or self.stopped:
                continue
            self.failed.append(one.job.name)
            log = self.logs / f"{one.job.name}.txt"
            last = log.read_bytes()[-2000:].decode(errors="replace").strip().splitlines()[-1:]
            code = one.process.returncode
            outcome = f"ended with code {code}" if code else "ended, but is not finished"
            say(f"{one.job.name}: {outcome}: {last[0] if last else 'no output'}; see {log}")
