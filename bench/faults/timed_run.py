"""The two trainers of bench/goodput.py, timed: the current step, and the cost of a kill."""

import itertools
import json
import shutil
import time
from pathlib import Path

from faults.launched_run import Torchrun
from faults.run_clock import RunClock
from faults.runs import noted

STUCK_S = 90.0  # without a new step, by RunClock; a start takes ten to thirty seconds
TAIL = 1 << 14


class Way:
    """A run under torchrun --max-restarts whose ranks are killed."""

    name = ""
    lag_s = 0.0

    def __init__(self, folder: Path) -> None:
        self.folder = folder / f"goodput-{self.name}"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.life: Torchrun | None = None
        self.reached, self.durations = 0, list[float]()
        self.lost, self.restarts = list[int](), list[float]()
        self._kill: float | None = None
        self._start, self._still = 0, RunClock()

    def begin(self) -> None:
        """Run the command."""
        self.life = Torchrun(self.folder, self.argv(), 2, 1000, self.script)

    def end(self) -> None:
        """End it."""
        self.life.kill()

    def wait_for_a_step(self, before: int) -> None:
        """Wait until the first step, at which the time starts."""
        while not self.tail() or self.starts() <= before:
            time.sleep(0.05)
        self._start, self.reached = self.starts(), self.tail()[-1]["step"]
        self._still.restart()

    def tail(self) -> list[dict]:
        """The newest lines of the log of steps."""
        path, lines = self.steps, []
        if not path.exists():
            return []
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            text = file.read().decode(errors="replace")
        for line in text.splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if "start" in entry:
                lines = []
            elif "train/loss" in entry:
                lines.append(entry)
        return lines

    def killed(self, now: float) -> None:
        """A rank was killed."""
        self._kill = now if self._kill is None else self._kill
        self._still.restart()

    def look(self, now: float) -> int:
        """Record the run's step; returns 1 when it was stuck and had to be started by hand."""
        starts = self.starts()
        if starts > self._start and (begun := self.resumed(starts)) is not None:
            step = self.tail()[-1]["step"] if self.tail() else 0
            if step > begun:
                if self._kill is not None:
                    self.lost.append(self.reached - begun)
                    self.restarts.append(now - self._kill)
                self._start, self.reached, self._kill = starts, step, None
                self._still.restart()
        elif starts == self._start and (lines := self.tail()) and lines[-1]["step"] > self.reached:
            fresh = [line["time"] for line in lines if line["step"] >= self.reached]
            self.durations += [after - before for before, after in itertools.pairwise(fresh)]
            self.reached = lines[-1]["step"]
            self._still.restart()
        if self._still.seconds() > STUCK_S:
            self.life.kill()
            self.begin()
            self._still.restart()
            return 1
        return 0


class Whole(Way):
    """p2w as users start it."""

    name, script, lag_s = "p2w", "launch/train.py", 0.5

    def __init__(self, folder: Path, batch: int, save_s: float) -> None:
        super().__init__(folder)
        self.set, self.batch, self.save_s = folder / "set" / "tar", batch, save_s
        self.run = self.folder / "run"
        self.steps = self.run / "metrics.jsonl"
        self.stalls = dict[int, float]()

    def argv(self) -> list[str]:
        """The recipe demo in fp32, as the plain loop computes; nothing but steps and checkpoints."""
        flags = (
            f"demo --data.batch {self.batch} --train.precision fp32 --optim.schedule constant --train.log-every 1"
        ).split()
        flags += [
            f"{flag}=1000000"
            for flag in ("--train.steps", "--train.validate-every", "--train.checkpoint-every")
        ]
        flags += ["--train.checkpoint-minutes", str(self.save_s / 60)]
        return [*flags, "--shards", str(self.set), "--run-dir", str(self.run)]

    def starts(self) -> int:
        """The number of starts."""
        return len(noted(self.run))

    def resumed(self, starts: int) -> int | None:
        """The step at which the newest start continued, if it has."""
        return noted(self.run)[-1].get("from_step")

    def look(self, now: float) -> int:
        """As in Way; also records stalls."""
        for line in self.tail():
            if (stall := line.get("speed/checkpoint_stall_s", 0.0)) > 0:
                self.stalls[line["step"]] = stall
        return super().look(now)

    def stall_s(self) -> float:
        """Seconds for which the loop waited for a save."""
        return sum(self.stalls.values()) / max(1, len(self.stalls))

    def every(self, step_s: float) -> float:
        """Steps between saves."""
        return self.save_s / step_s


class Plain(Way):
    """bench/plain_loop.py."""

    name, script = "plain", "bench/plain_loop.py"

    def __init__(self, folder: Path, batch: int, epoch_steps: int) -> None:
        super().__init__(folder)
        self.data, self.batch, self.epoch_steps = folder / "wholes.npy", batch, epoch_steps
        self.steps = self.folder / "steps.jsonl"

    def argv(self) -> list[str]:
        """The command, as in the tutorial."""
        flags = ["--data", str(self.data), "--folder", str(self.folder), "--batch", str(self.batch)]
        return [*flags, "--epoch-steps", str(self.epoch_steps)]

    def _told(self, what: str) -> list:
        lines = (
            (self.folder / "events.jsonl").read_text().splitlines()
            if (self.folder / "events.jsonl").exists()
            else []
        )
        return [entry[what] for entry in map(json.loads, lines) if what in entry]

    def starts(self) -> int:
        """The number of starts."""
        return len(self._told("start"))

    def resumed(self, starts: int) -> int | None:
        """The step at which the newest start continued."""
        return self._told("start")[-1]

    def stall_s(self) -> float:
        """Seconds of a torch.save."""
        saves = self._told("save_s")
        return sum(saves) / max(1, len(saves))

    def every(self, step_s: float) -> float:
        """Steps between saves."""
        return self.epoch_steps
