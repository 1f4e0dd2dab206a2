"""Draws faults, injects them into one run after another, repeats the command, and checks the promises."""

import json
import random
import shutil
import subprocess
import time
import traceback
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from faults.kinds import KINDS, NOT_FINITE
from faults.run_clock import RunClock
from faults.runs import EVERY, STEPS, Plan, Run, Wrong, calm, hold, wait_for
from faults.services import Services

NEAR_END = 20  # steps: nearer to its end a run is left alone
TOLD_S = 30.0  # a run that was told to stop is gone by then; this and all other bounds are by RunClock
BACK_S = 240.0  # a run trains again by then
MEANWHILE = 0.45  # how often the folder or the data suffers too before the command is typed again


class Soak:
    """Does one run after another; its state is in `faults.jsonl` and each run's plan.json."""

    def __init__(
        self, folder: Path, faults: int, minutes: float, torchrun: float, seed: int, kinds: tuple[str, ...]
    ) -> None:
        self.folder, self.faults, self.torchrun, self.kinds = folder, faults, torchrun, kinds
        self.until = time.monotonic() + 60 * minutes
        path = folder / "faults.jsonl"
        self.log = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self.done = [entry for entry in self.log if "kind" in entry]
        self.rng = random.Random(f"{seed} {len(self.log)}")
        self.services = Services(folder)
        self.run: Run | None = None
        self.began, self.first = time.monotonic(), len(self.done)

    def go(self) -> None:
        """Run until there were enough faults, or the time is over, and the current run has ended."""
        while self.run is not None or (len(self.done) < self.faults and time.monotonic() < self.until):
            run = self.run = self.run or self.open()
            try:
                self.turn(run)
            except Wrong as error:
                self.note(wrong=str(error)[:2000], run=run.plan.number)
                self.clear(run, keep=True)
            except Exception:  # of the soak itself, not of what it tries
                self.note(harness=traceback.format_exc()[-2000:], run=run.plan.number)
                self.clear(run, keep=True)
                if len(self.log) > 2 and all(
                    "wrong" in entry or "harness" in entry for entry in self.log[-3:]
                ):
                    break  # something else is broken

    def close(self) -> None:
        """End all processes; a later start of the soak continues."""
        if self.run and self.run.life:
            self.run.life.kill()
        self.services.close()

    def note(self, **entry) -> None:
        """Record a fault, the end of a run, or an error."""
        self.log.append(entry)
        with open(self.folder / "faults.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")
        if "kind" not in entry:
            print(json.dumps(entry), flush=True)
            return
        self.done.append(entry)
        rate = (len(self.done) - self.first) / (time.monotonic() - self.began) * 60
        left = max(0, self.faults - len(self.done)) / rate
        print(
            f"{len(self.done)}/{self.faults}  run {entry['run']} at {entry['at']}, {entry['by']} x{entry['ranks']}: "
            f"{entry['kind']}; lost {entry['lost']}, back in {entry['back_s']} s   {rate:.1f} a minute, {left:.0f} min left",
            flush=True,
        )

    def open(self) -> Run:
        """The unfinished run, or a new one; every fourth on a small disk, every fourth with NaN gradients."""
        number = max((entry["run"] for entry in self.log), default=-1)
        number += not (self.folder / f"run-{number:03d}" / "plan.json").exists()
        if (path := self.folder / f"run-{number:03d}" / "plan.json").exists():
            plan = Plan(**json.loads(path.read_text()))
            plan.segments = [(first, ranks) for first, ranks in plan.segments]
            return Run(plan, self.folder, self.folder / "set", self.services)
        plan = Plan(number, self.rng.choice(("tar", "arrow")), self.rng.choice((2, 2, 2, 2, 4, 1)))
        plan.small_disk, plan.segments = number % 4 == 1, [(0, plan.ranks)]
        if number % 4 == 3:
            plan.poison = sorted(self.rng.sample(range(5, STEPS - NEAR_END), 2))
        run = Run(plan, self.folder, self.folder / "set", self.services)
        self.sweep(run)
        run.disk.mkdir(parents=True)
        if plan.small_disk:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(run.disk)], check=True)
        run.save()
        return run

    def clear(self, run: Run, keep: bool = False) -> None:
        """Delete a finished run, or move it to DIR/kept."""
        if run.life:
            run.life.kill()
        self.services.end_forked()
        if keep:
            shutil.copytree(run.folder, self.folder / "kept" / run.folder.name, dirs_exist_ok=True)
        self.sweep(run)
        self.run = None

    def sweep(self, run: Run) -> None:
        """Remove its folder, and the disk in it."""
        if run.disk.is_mount():
            subprocess.run(["umount", "-l", str(run.disk)], check=True)
        shutil.rmtree(run.folder, ignore_errors=True)

    def draw(self, phase: str, run: Run) -> str | None:
        """A kind of fault that fits this start: one that has not been yet, or else one of those that were rarest so far."""
        had = Counter(entry["kind"] for entry in self.done)
        fits, left = run.traits(), STEPS - run.step()
        saved = any((run.run / "checkpoints").glob("step-*/meta.json"))
        names = [
            name
            for name in self.kinds
            if (saved or "newest checkpoint" not in name)
            and (kind := KINDS[name]).phase == phase
            and (not kind.needs or kind.needs in fits)
            and left > kind.room
            and run.plan.ranks >= kind.least
        ]
        self.rng.shuffle(names)
        return min(names, key=lambda name: had[name] and had[name] + 3 * self.rng.random(), default=None)

    def begin(self, run: Run) -> None:
        """Run the command, by torchrun for a share of the starts."""
        by = Counter(entry["by"] for entry in self.done)
        run.start(self.rng, by["torchrun"] <= self.torchrun * by.total())

    def turn(self, run: Run) -> None:
        """Inject one fault into the current run and check what follows; or let the run end."""
        if run.life is None:
            run.calm = calm(run)[0] if len(run.plan.segments) == 1 else None
            before = run.starts()
            self.begin(run)
            wait_for(
                lambda: run.resumed(before) is not None or not run.life.running(),
                "the start",
                progress=run.starts,
            )
            run.took_up(run.resumed(before) or 0)
        name = self.draw("live", run) if self.ahead(run) and len(self.done) < self.faults else None
        if name is None:
            return self.finish(run)
        facts = {"run": run.plan.number, "at": run.step(), "ranks": run.life.count}
        facts["by"] = "torchrun" if run.life.agent else "forked"
        before, clock = run.starts(), RunClock()
        promise = KINDS[name].inject(run, self.rng)
        if promise == "goes on":
            clock, aim = RunClock(), min(run.step() + 3, STEPS)
            wait_for(
                lambda: run.step() >= aim or not run.life.running(),
                f"step {aim}",
                every=0.02,
                progress=run.step,
            )
            hold(
                run.step() >= aim,
                f"{name}: ended with {run.life.codes()}" if not run.life.running() else name,
            )
            lost, left, more = 0, None, []
        else:
            lost, left, more = self.again(run, before, clock, promise)
        damaged = sum("newest checkpoint" in other for other in more)
        allowed = EVERY * damaged + (EVERY + run.beside if promise == "killed" or more else 0)
        hold(lost <= allowed, f"{[name, *more]}: lost {lost} steps, {allowed} allowed")
        run.check(run.calm if len(run.plan.segments) == 1 else None)
        run.save()
        facts["restarted"] = promise != "goes on"
        back = round(time.monotonic() - clock.began, 1) if not more else None
        self.note(kind=name, lost=None if more else lost, back_s=back, left_s=left, **facts)
        for other in more:
            self.note(kind=other, lost=None, back_s=None, left_s=None, **facts)

    def ahead(self, run: Run) -> bool:
        """Let the run take some steps; False when it comes near its end."""
        aim = run.step() + self.rng.randint(1, 7)
        wait_for(
            lambda: run.step() >= aim or not run.life.running(), f"step {aim}", every=0.02, progress=run.step
        )
        alive = run.life.running()
        hold(
            alive or run.status()["state"] == "finished",
            "" if alive else f"ended by itself: {run.life.codes()}",
        )
        return alive and run.step() < STEPS - NEAR_END

    def again(
        self, run: Run, before: int, clock: RunClock, promise: str
    ) -> tuple[int, float | None, list[str]]:
        """Repeat the command each time it ends, until the run trains again; `clock` began with the fault.

        Returns the steps lost, after how many seconds by `clock` all ranks were gone (None: torchrun stayed), and the
        faults that folder or data suffered meanwhile.
        """
        reached, left, more, bound = run.step(), None, list[str](), clock
        run.beside = 1  # steps done while a checkpoint was being written that a kill has cost
        while (resumed := run.resumed(before)) is None:
            reached, writing = max(reached, run.step()), run.writing()
            run.beside = max(run.beside, 0 if writing is None else reached - writing)
            hold(
                bound.seconds() < BACK_S,
                f"{promise}: does not train again in {BACK_S:.0f} s, without {bound.waited:.0f} s for a core",
            )
            running = run.life.running()
            seconds = clock.seconds()  # asked often, see there
            if not running:
                left = left or round(seconds, 1)
                if promise == "told":
                    hold(
                        left < TOLD_S,
                        f"told to stop, left after {left} s, without {clock.waited:.1f} s for a core",
                    )
                    hold(run.status()["state"] == "told to stop", f"told to stop, but {run.status()}")
                if not more and self.rng.random() < MEANWHILE and (other := self.draw("down", run)):
                    more = [other]
                    KINDS[other].inject(run, self.rng)
                    bound = RunClock()
                    reached = max(reached, run.step())
                before = run.starts()
                self.begin(run)
            time.sleep(0.01)
        run.took_up(resumed)
        wait_for(lambda: run.step() > resumed or not run.life.running(), "the first new step", every=0.02)
        hold(run.step() > resumed, "ended before its first new step")
        return reached - resumed, left, more

    def finish(self, run: Run) -> None:
        """Without further faults, the run must finish and equal the uninterrupted one."""
        wait_for(
            lambda: not run.life.running(), "a step or the end of the run", every=0.05, progress=run.step
        )
        hold(run.status() == {"state": "finished", "step": STEPS, "why": ""}, f"ended as {run.status()}")
        records, weights = calm(run)
        run.check(records)
        hold(
            run.weights() == weights, f"the last weights differ from those of the calm run {run.plan.name()}"
        )
        facts = {"run": run.plan.number, "by": "forked", "ranks": run.plan.ranks, "restarted": False}
        for step in run.plan.poison:
            hold(f"step {step + 1}: gradient norm nan" in run.said(), f"step {step + 1} was not named")
            self.note(kind=NOT_FINITE, at=step + 1, lost=0, back_s=None, left_s=None, **facts)
        self.note(finished=run.plan.name(), run=run.plan.number, plan=asdict(run.plan), equal=True)
        self.clear(run)
