"""Run the stages of the GPU day, each with its own time limit; `day.sh` prepares the machine and starts this.

    python3 bench/gpu/day.py 1           stages of the first call; OUT and DAY are folders (rows.py), LIMIT seconds in all
    python3 bench/gpu/day.py 2           stages of the second call, after it what the first had no time for
    python3 bench/gpu/day.py 3           whether pretraining transfers, with data of its own
    python3 bench/gpu/day.py --rehearse  all at toy size on the CPU, into OUT/1, OUT/2 and OUT/3, and a table of them

A stage that fails or is too slow does not stop the next one. A stage is skipped where the time that is left is needed by
later stages of more worth. OUT then has at most 8 files: rows-N.jsonl and log-N.txt are written as stages go.
Exit code 0 when every stage went through, 1 when one did not, 2 for bad arguments. The standard library alone.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
HERE = "bench/gpu"
MOST_FILES = 8  # that come back from the machine
TAIL = 12  # lines of a stage's log on the terminal
GRACE_S = 8.0  # between SIGTERM and SIGKILL of a stage that is too slow
LEAVING_S = 6.0  # reserved for the end
REHEARSED = 10.0  # a rehearsal's stages may take so many times their limit: the machine may be slow and busy


@dataclass(frozen=True)
class Stage:
    """One process of at most `limit_s` s, skipped if less than `least_s` are left. Worth 1 is the most important."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    least_s: float
    worth: int = 1


def stages(call: int, out: Path, day: Path, toy: bool) -> list[Stage]:
    """The stages of a call, in order: correctness, speed, science."""
    recipe = "demo" if toy else "paper"
    rounds = (
        ("--rounds", "1", "--batch", "4", "--threads", "1") if toy else ("--rounds", "20", "--batch", "16")
    )
    small = ("--small",) if toy else ()
    first = [
        Stage("machine", (f"{HERE}/machine.py",), 25, 5),
        Stage("tests", (f"{HERE}/correctness.py", "tests"), 100, 40),
        Stage("kernel", ("bench/kernel.py", "--rounds", "11", "--out", str(out / "kernel.json")), 50, 20),
        Stage("selfcheck", (f"{HERE}/correctness.py", "selfcheck", "held"), 50, 15),
        Stage("training", (f"{HERE}/correctness.py", "resume", "precisions"), 85, 30),
        Stage("step", (f"{HERE}/speed.py", "step", "profile"), 130, 60),
        Stage(
            "end to end",
            ("bench/end_to_end.py", "--recipe", recipe, *rounds, *small, "--shards", str(day / "structured"),
             "--out", str(out / "end_to_end.json")),
            45, 25,
        ),
        Stage("start", (f"{HERE}/speed.py", "start"), 45, 15, 2),
        Stage("layers", (f"{HERE}/layers.py", "ceilings", "norms", "upsampling", "convolutions_bf16"), 60, 15, 2),
    ]  # fmt: skip
    second = [
        Stage("pretrain", (f"{HERE}/science.py", "pretrain"), 150, 60),
        Stage("finetune", (f"{HERE}/science.py", "finetune"), 150, 60),
        Stage("batches", (f"{HERE}/speed.py", "batches"), 60, 20, 2),
        Stage("layers fp16", (f"{HERE}/layers.py", "convolutions_fp16"), 30, 12, 3),
    ]
    if call == 1:
        return first
    if call == 3:
        return [Stage("transfer", (f"{HERE}/science.py", "transfer"), 390, 150)]
    missed = day / "missed.json"
    names = json.loads(missed.read_text()) if missed.exists() else []
    return second + [stage for stage in first if stage.name in names]


def allowed_s(stage: Stage, later: list[Stage], left: float) -> float:
    """Seconds that a stage may take of those that are left; 0 where it is to be skipped.

    Time is given out by worth, then in order: every stage that still fits gets the least it needs, and this one also what
    stages of less worth would need.
    """
    fits: list[Stage] = []
    for one in sorted([stage, *later], key=lambda one: one.worth):
        if sum(other.least_s for other in fits) + one.least_s <= left:
            fits.append(one)
    if stage not in fits:
        return 0.0
    kept = sum(other.least_s for other in fits if other is not stage and other.worth <= stage.worth)
    return min(stage.limit_s, left - kept)


class Call:
    """One call of the day: its folders, its clock, its rows."""

    def __init__(self, number: int, out: Path, day: Path, toy: bool, ends: float) -> None:
        self.number, self.out, self.day, self.toy, self.ends = number, out, day, toy, ends
        out.mkdir(parents=True, exist_ok=True)
        (day / "background").mkdir(parents=True, exist_ok=True)
        self.rows, self.log = out / f"rows-{number}.jsonl", out / f"log-{number}.txt"

    def environment(self, stage: str, ends: float, **more: str) -> dict[str, str]:
        """Environment variables of a stage; see rows.py."""
        variables = {
            "OUT": str(self.out), "ROWS": self.rows.name, "DAY": str(self.day), "STAGE": stage,
            "STAGE_ENDS": str(ends), "TOY": "1" if self.toy else "0", "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        # One thread: two that wait for each other on busy cores take many times as long.
        variables |= {"P2W_DEVICE": "cpu", "OMP_NUM_THREADS": "1"} if self.toy else {}
        return os.environ | variables | more

    def say(self, **row: object) -> None:
        """Add a row of the driver's own."""
        with open(self.rows, "a") as file:
            file.write(json.dumps(row) + "\n")

    def background(self) -> subprocess.Popen[bytes] | None:
        """Start to make the data sets in parallel, in a session of its own: this process may end before it."""
        what, last = ("transfer_data", "cut organs") if self.number == 3 else ("data", "candidates")
        note = self.day / "background" / ("pid" if what == "data" else "pid-3")
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(note.read_text()), 0)
            return None  # that of the first call is at work
        if (self.day / f"{last}.ok").exists():
            return None
        environment = self.environment(
            "data", float("inf"), OUT=str(self.day / "background"), ROWS="rows.jsonl", OMP_NUM_THREADS="1"
        )
        with open(self.day / "background" / "log.txt", "ab") as log:
            process = subprocess.Popen(
                ["nice", "-n", "19", sys.executable, f"{HERE}/science.py", what],
                cwd=REPO, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        note.write_text(str(process.pid))
        return process

    def stage(self, stage: Stage, allowed: float) -> str:
        """Run one stage; "done", "failed" or "too slow"."""
        began, own = time.time(), self.day / f"stage-{self.number}.log"
        print(f"== {stage.name}: up to {allowed:.0f} s, {self.ends - began:.0f} s are left", flush=True)
        with open(own, "wb") as log:
            process = subprocess.Popen(
                [sys.executable, *stage.command], cwd=REPO, env=self.environment(stage.name, began + allowed),
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(allowed)
                state = "failed" if code else "done"
            except subprocess.TimeoutExpired:
                code, state = _end(process), "too slow"
        seconds = round(time.time() - began, 1)
        self.say(
            stage=stage.name, what="stage", state=state, exit_code=code, seconds=seconds,
            allowed_s=round(allowed, 1),
        )  # fmt: skip
        said = own.read_text(errors="replace")
        with open(self.log, "a") as log:
            log.write(f"==== {stage.name}: {state}, exit code {code}, {seconds} s\n{said}\n")
        for line in said.splitlines()[-TAIL:]:
            print(f"   {line[:240]}")
        print(f"   {state}, exit code {code}, {seconds} s", flush=True)
        return state

    def run(self) -> dict[str, str]:
        """All stages of this call; what became of each, by name."""
        self.background()
        found: dict[str, str] = {}
        todo = stages(self.number, self.out, self.day, self.toy)
        for place, stage in enumerate(todo):
            left = self.ends - LEAVING_S - time.time()
            allowed = allowed_s(stage, todo[place + 1 :], left) if not self.toy else REHEARSED * stage.limit_s
            if allowed < stage.least_s:
                found[stage.name] = "skipped"
                reason = (
                    f"{left:.0f} s left, {stage.least_s:.0f} s needed beside what stages of more worth need"
                )
                self.say(stage=stage.name, what="stage", state="skipped", seconds=0, reason=reason)
                print(f"== {stage.name}: skipped, {reason}", flush=True)
                continue
            found[stage.name] = self.stage(stage, allowed)
        missed = [name for name, state in found.items() if state == "skipped"]
        (self.day / "missed.json").write_text(json.dumps(missed if self.number == 1 else []))
        self._take_background()
        pack(self.out)
        return found

    def _take_background(self) -> None:
        """Rows and log of the background so far; both calls may have them, the table takes equal rows once."""
        rows, log = self.day / "background" / "rows.jsonl", self.day / "background" / "log.txt"
        if rows.exists():
            with open(self.rows, "a") as file:
                file.write(rows.read_text())
        if log.exists():
            with open(self.log, "a") as file:
                file.write(f"==== background\n{log.read_text(errors='replace')[-20_000:]}\n")


def _end(process: subprocess.Popen[bytes]) -> int:
    """End a stage and what it has started: SIGTERM to its group, then SIGKILL."""
    for number, seconds in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            if number == signal.SIGTERM:  # its own children may have stayed
                continue
    return process.returncode


def pack(out: Path) -> None:
    """Move files beyond MOST_FILES, smallest first, and folders into one archive."""
    kept = sorted((path for path in out.iterdir() if path.is_file()), key=lambda path: -path.stat().st_size)
    own = [path for path in kept if path.name.startswith(("rows-", "log-"))]
    others = [path for path in kept if path not in own]
    extra = [path for path in out.iterdir() if path.is_dir()]
    if len(kept) + bool(extra) > MOST_FILES:
        extra += others[MOST_FILES - len(own) - 1 :]
    if not extra:
        return
    with tarfile.open(out / "more.tgz", "w:gz") as archive:
        for path in extra:
            archive.add(path, path.name)
    for path in extra:
        if path.is_file():
            path.unlink()


def rehearse(out: Path, day: Path) -> dict[str, str]:
    """All calls at toy size, then the table of their rows."""
    found: dict[str, str] = {}
    for number in (1, 2, 3):
        call = Call(number, out / str(number), day, True, time.time() + 3600)
        found |= call.run()
    table = Stage(
        "table",
        (f"{HERE}/table.py", str(out / "1"), str(out / "2"), str(out / "3"), "--out", str(out / "gpu_day.json")),
        60, 5,
    )  # fmt: skip
    last = Call(2, out / "2", day, True, time.time() + 60)
    found["table"] = last.stage(table, 60)
    return found


def main() -> int:
    """Read the arguments, run, sum up."""
    given = sys.argv[1:]
    if given not in (["1"], ["2"], ["3"], ["--rehearse"]):
        print("bench/gpu/day.py: one argument: 1, 2, 3 or --rehearse", file=sys.stderr)
        return 2
    out, day = (
        Path(os.environ.get("OUT", "gpu-day")).resolve(),
        Path(os.environ.get("DAY", "/tmp/day")).resolve(),
    )
    began = float(os.environ.get("BEGAN", time.time()))
    if given == ["--rehearse"]:
        found = rehearse(out, day)
    else:
        limit = float(os.environ.get("LIMIT", "400"))
        found = Call(int(given[0]), out, day, False, began + limit).run()
    width = max(map(len, found))
    print("\n".join(["", *(f"{name:{width}}  {state}" for name, state in found.items())]))
    print(f"{out}: {time.time() - began:.0f} s", flush=True)
    return 0 if set(found.values()) == {"done"} else 1


if __name__ == "__main__":
    sys.exit(main())
