"""One run under faults: the command that is repeated, the content of its folder, and its uninterrupted reference run."""

import errno
import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from faults.launched_run import Forked, LaunchedRun, Torchrun
from faults.run_clock import RunClock
from faults.services import Services

STEPS, EVERY = 120, 6
FLAGS = """
demo --data.batch 4 --pretext.size 8 16 16 --model.width 2 --train.precision fp32 --optim.lr 1e-2 --optim.schedule plateau
--optim.plateau-patience 0 --train.validate-every 20 --train.log-every 1 --train.hang-minutes 0.5
""".split()  # noqa: SIM905
LIFE_S = 150.0


class Wrong(AssertionError):
    """A promise that the run has broken."""


def hold(true: bool, what: str) -> None:
    """Raise Wrong with `what` unless it is true."""
    if not true:
        raise Wrong(what)


def wait_for(
    happened: Callable[[], bool],
    what: str,
    seconds: float = LIFE_S,
    every: float = 0.01,
    progress: Callable[[], object] = lambda: None,
) -> None:
    """Poll until it has happened; Wrong after so many seconds, by RunClock, in which `progress` did not change either."""
    has_happened = bounded(happened, what, seconds, progress)
    while not has_happened():
        time.sleep(every)


def bounded(
    happened: Callable[[], bool],
    what: str,
    seconds: float = LIFE_S,
    progress: Callable[[], object] = lambda: None,
) -> Callable[[], bool]:
    """`happened` with the bound of `wait_for`, for a loop of others."""
    clock, reached = RunClock(), progress()

    def check() -> bool:
        nonlocal reached
        if happened():
            return True
        if (now := progress()) != reached:
            reached = now
            clock.restart()
        hold(
            clock.seconds() < seconds,
            f"{what} did not come in {seconds:.0f} s, without {clock.waited:.0f} s for a core",
        )
        return False

    return check


def happens(happened: Callable[[], bool], seconds: float) -> bool:
    """Whether it happens within so many seconds of the wall clock: for how long a fault lasts, not for a bound."""
    end = time.monotonic() + seconds
    while not (found := happened()) and time.monotonic() < end:
        time.sleep(0.01)
    return found


def noted(run: Path) -> list[dict]:
    """The starts in run.json."""
    path = run / "run.json"
    return json.loads(path.read_text())["starts"] if path.exists() else []


@dataclass
class Plan:
    """The settings of a run, and which ranks did which of its steps; stored, so that a later soak continues it."""

    number: int
    form: str = "tar"
    ranks: int = 2
    poison: list[int] = field(default_factory=list)  # steps whose gradient is not finite
    small_disk: bool = False
    segments: list[tuple[int, int]] = field(default_factory=list)  # (first step, ranks)

    def name(self) -> str:
        """The folder of the uninterrupted run that this one must equal."""
        parts = [f"{first}x{ranks}" for first, ranks in self.segments]
        return "-".join([*parts, *(f"nan{step}" for step in self.poison)])


class Run:
    """A run folder, and at most one start that runs in it."""

    def __init__(self, plan: Plan, root: Path, sets: Path, services: Services) -> None:
        self.plan, self.root, self.sets, self.services = plan, root, sets, services
        self.folder = root / f"run-{plan.number:03d}"
        self.disk = self.folder / "disk"  # where --run-dir lies; a small tmpfs for some runs
        self.run = self.disk / "run"
        self.life: LaunchedRun | None = None
        self.readers = 1
        self.remote = False  # the set of the present start is read from a web server
        self.calm: list[dict] | None = None  # metrics of the calm run
        self.beside = 1  # see Soak.again
        self.gaps = False  # a full disk has kept steps out of metrics.jsonl

    def argv(self, form: str = "", steps: int = STEPS, run: Path | None = None) -> list[str]:
        """The command's arguments: the same in every start, except for settings that may change."""
        sets = self.services.server.url if self.remote else self.sets
        own = ["--shards", f"{sets}/{form or self.plan.form}", "--run-dir", str(run or self.run)]
        own += ["--train.steps", str(steps), "--train.checkpoint-every", str(EVERY)]
        return [*FLAGS, *own, "--data.reader-threads", str(self.readers)]

    def start(self, rng: random.Random, by_torchrun: bool) -> LaunchedRun:
        """Run the command (again): by torchrun, or forked, on one host or two, with the set in a folder or behind http."""
        self.readers, self.remote = rng.choice((0, 1, 2)), rng.random() < 0.3
        hosts = self.services.hosts if self.plan.ranks > 1 and rng.random() < 0.4 else None
        if by_torchrun and not self.plan.poison:
            self.life = Torchrun(self.folder, self.argv(), self.plan.ranks, rng.choice((0, 3)))
        elif hosts:  # the web server is on none of them
            self.life = self.fork(hosts=hosts)
        else:
            locks = rng.choice((0, 0, errno.ENOSYS, errno.ENOLCK))
            self.life = Forked(
                self.services.forge, self.folder, self.argv(), self.plan.ranks, self.plan.poison, locks=locks
            )
        return self.life

    def fork(self, **more) -> Forked:
        """A start by the forge, with the set in its folder."""
        self.remote = False
        return Forked(
            self.services.forge, self.folder, self.argv(), self.plan.ranks, self.plan.poison, **more
        )

    def traits(self) -> set[str]:
        """What a kind of fault may need: the way of the present start, and what else holds for the run and the machine."""
        found = {*(self.life.traits if self.life else ())} | self.services.possible()
        found |= {"remote"} if self.remote else set()
        found |= {"disk"} if self.plan.small_disk else set()
        return found - ({"slurm"} if self.plan.poison else set())  # there are no traps in its jobs

    def said(self) -> str:
        """All that was printed in this run."""
        path = self.folder / "err.txt"
        return path.read_text(errors="replace") if path.exists() else ""

    def records(self) -> list[dict]:
        """Records of metrics.jsonl without values that depend on the clock, and without an incomplete last line."""
        path, kept = self.run / "metrics.jsonl", []
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:
                break
            if "train/loss" in record:
                kept.append({k: v for k, v in record.items() if k != "time" and "speed/" not in k})
        return kept

    def step(self) -> int:
        """The newest step in metrics.jsonl."""
        records = self.records()
        return records[-1]["step"] if records else 0

    def status(self) -> dict:
        """status.json; empty before there is one."""
        path = self.run / "status.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def starts(self) -> int:
        """The number of starts in run.json."""
        return len(noted(self.run))

    def resumed(self, before: int) -> int | None:
        """The step at which start number `before` + 1 continued; None until it has."""
        starts = noted(self.run)
        return starts[-1].get("from_step") if len(starts) > before else None

    def writing(self) -> int | None:
        """The step of the checkpoint that is being written, or was when the processes ended."""
        names = [path.name for path in (self.run / "checkpoints").glob(".step-*[0-9].tmp")]
        return max((int(name.removeprefix(".step-").removesuffix(".tmp")) for name in names), default=None)

    def took_up(self, step: int) -> None:
        """Record which ranks do the steps from `step` on."""
        self.plan.segments = [(first, ranks) for first, ranks in self.plan.segments if first < step]
        if not self.plan.segments or self.plan.segments[-1][1] != self.plan.ranks:
            self.plan.segments.append((step, self.plan.ranks))

    def check(self, calm: list[dict] | None) -> None:
        """Check that each step is logged once, in order, with the same numbers as in the uninterrupted run."""
        records = self.records()
        steps = [record["step"] for record in records]
        if not self.gaps:
            hold(steps == list(range(1, len(steps) + 1)), f"steps in metrics.jsonl: {steps}")
        hold(steps == sorted(set(steps)), f"steps in metrics.jsonl: {steps}")
        if calm is not None:
            by_step = {record["step"]: record for record in calm}
            for record in records:
                hold(
                    str(record) == str(by_step[record["step"]]),  # as text, in which nan is nan
                    f"{record} where the calm run has {by_step[record['step']]}",
                )

    def weights(self) -> bytes:
        """The bytes of the last checkpoint's weights."""
        return (self.run / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors").read_bytes()

    def save(self) -> None:
        """Write plan.json for a later start of the soak."""
        (self.folder / "plan.json").write_text(json.dumps(asdict(self.plan)))


def calm(like: Run) -> tuple[list[dict], bytes]:
    """Metrics and weights of the uninterrupted run with the same changes of ranks; run now when there is none yet."""
    plan = Plan(like.plan.number, ranks=like.plan.ranks, poison=like.plan.poison)
    run = Run(plan, like.root, like.sets, like.services)
    run.folder = like.root / "calm" / like.plan.name()
    run.disk = run.folder
    run.run = run.folder / "run"
    if not (run.folder / "done").exists():
        shutil.rmtree(run.folder, ignore_errors=True)
        run.folder.mkdir(parents=True)
        ends = [first for first, _ in like.plan.segments[1:]] + [STEPS]
        for (_, ranks), end in zip(like.plan.segments, ends, strict=True):
            life = Forked(like.services.forge, run.folder, run.argv(steps=end), ranks, plan.poison)
            wait_for(
                lambda life=life: not life.running(),
                "a step or the end of a calm run",
                every=0.1,
                progress=run.step,
            )
            hold(set(life.codes()) == {0}, f"calm run: exit codes {life.codes()}\n{run.said()}")
        (run.folder / "done").touch()
    return run.records(), run.weights()
