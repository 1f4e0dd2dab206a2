"""Do the readers survive whatever bytes they are given?

    python bench/fuzz.py --minutes 10            # results/fuzz.json; goes on behind the last run's cases, tries its
                                                 # findings again first and lists those that are none any more as fixed
    python bench/fuzz.py --seconds 5 --out X     # a slice, as the tests take it
    python bench/fuzz.py --case shard-tar 1234   # one case again, in this process

Valid files of every kind are mutated, by bytes (flips, cuts, runs, insertions, numbers at the limits) and by structure
(header fields, JSON values), and read as the product reads them. A case is a function of (kind, number). It must end
`read` or `refused` (a UserError of one line) within 20 s, in memory below 2 x the files + what they may unpack to +
320 MiB. Anything else is a finding: another exception, a crash or a hang (a worker process is watched), memory, or a
change that a checksum should have found.
"""

import json
import os
import platform
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from fuzzing.kinds import Kind, kinds
from fuzzing.mutations import mutate

from p2w.resources import usable_cores

RESULT = Path(__file__).parent / "results" / "fuzz.json"
HANG_S, SLACK = 20.0, 320 << 20


def peak_memory(reset: bool = False) -> int:
    """Highest resident memory of this process since the last reset, bytes (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def one(kind: str, number: int, table: dict[str, Kind], valid: Path) -> tuple[str, str]:
    """Outcome of a case, and what it said."""
    from p2w.errors import UserError  # noqa: PLC0415

    entry = table[kind]
    rng = np.random.default_rng([number, *kind.encode()])
    with tempfile.TemporaryDirectory(dir=valid.parent) as work:
        folder = Path(work) / "case"
        shutil.copytree(valid / kind, folder)
        changed = mutate(rng, folder, kind)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        before = peak_memory(reset=True)
        said, outcome = "", "read"
        try:
            entry.read(folder)
        except UserError as error:
            said, outcome = str(error), "refused" if "\n" not in str(error) else "more than a line"
        except Exception as error:
            said, outcome = f"{type(error).__name__}: {error}", "exception"
        memory = peak_memory() - before
    if memory > 2 * size * (1 + entry.expands) + SLACK:
        return "memory", f"{memory >> 20} MiB for files of {size:,} bytes; {said}"
    if outcome == "read" and changed & set(entry.sealed):
        return "unnoticed", f"{changed} changed"
    return outcome, said


def work(valid: Path) -> None:
    """A worker: `KIND NUMBER` in, an outcome out."""
    import resource  # noqa: PLC0415

    from p2w.ct.scan import quiet_itk  # noqa: PLC0415

    quiet_itk(1)
    table = kinds()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    for kind in table:  # imports, and every reader reads what is valid
        table[kind].read(shutil.copytree(valid / kind, valid / "warm" / kind))
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    print(json.dumps("ready"), file=answers)
    for line in sys.stdin:
        kind, number = line.split()
        print(json.dumps(one(kind, int(number), table, valid)), file=answers)


class Worker:
    """A process that may crash, hang or starve."""

    def __init__(self, valid: Path) -> None:
        shutil.rmtree(valid / "warm", ignore_errors=True)
        command = [sys.executable, __file__, "--worker", str(valid)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._answer(120) != "ready":
            raise SystemExit("a reader does not read what is valid")

    def _answer(self, seconds: float) -> object:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            self.process.kill()
            return ["hang", f"no answer in {seconds:.0f} s"]
        line = self.process.stdout.readline()
        return json.loads(line) if line else ["crash", f"exit code {self.process.wait()}"]

    def ask(self, kind: str, number: int) -> tuple[str, str]:
        """Have case `number` of this kind read: its outcome, and what was said."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{kind} {number}\n")
        self.process.stdin.flush()
        outcome, said = self._answer(HANG_S)  # type: ignore[misc]
        return outcome, said


@dataclass(frozen=True)
class Options:
    """Do the readers survive whatever bytes they are given?"""

    minutes: float = 10.0
    seconds: float = 0.0
    """Instead of minutes."""
    out: Path = RESULT
    only: tuple[str, ...] = ()
    """Kinds to fuzz; all."""
    case: tuple[str, ...] = ()
    """KIND NUMBER: do this one and say what came."""
    worker: Path | None = None
    """For the program's own use."""


def main() -> int:
    """Fuzz, one case of each kind after the other."""
    options = tyro.cli(Options, description=__doc__)
    if options.worker:
        work(options.worker)
        return 0
    table = kinds()
    with tempfile.TemporaryDirectory() as root:
        valid = Path(root) / "valid"
        for kind, entry in table.items():
            (valid / kind).mkdir(parents=True)
            entry.make(valid / kind)
        if options.case:
            print(*one(options.case[0], int(options.case[1]), table, valid))
            return 0
        return fuzz(options, options.only or tuple(table), valid)


def fuzz(options: Options, names: tuple[str, ...], valid: Path) -> int:
    """Until the time is over; the exit code is 1 when there is a finding."""
    result = json.loads(options.out.read_text()) if options.out.exists() else {"cases": 0, "seconds": 0.0}
    counts = {kind: Counter(result.get("outcomes", {}).get(kind, {})) for kind in names}
    findings, number = result.get("findings", []), result["cases"]
    fixed, worker = result.get("fixed", []), Worker(valid)
    for finding in list(findings):  # of earlier runs: what has become of them
        if worker.ask(finding["kind"], finding["number"])[0] in ("read", "refused"):
            findings.remove(finding)
            fixed.append(finding)
        if worker.process.poll() is not None:
            worker = Worker(valid)
    began = said_at = time.monotonic()
    limit = options.seconds or options.minutes * 60
    while time.monotonic() - began < limit:
        kind = names[number % len(names)]
        outcome, said = worker.ask(kind, number)
        counts[kind][outcome] += 1
        if outcome not in ("read", "refused"):
            findings.append({"kind": kind, "number": number, "outcome": outcome, "said": said[:300]})
            print(f"finding: {kind} {number}: {outcome}: {said[:300]}", flush=True)
        if worker.process.poll() is not None or outcome in ("hang", "crash"):
            worker = Worker(valid)
        number += 1
        if time.monotonic() - said_at > 10:
            said_at = time.monotonic()
            rate = (number - result["cases"]) / (said_at - began)
            print(
                f"{number} cases, {rate:.0f}/s, {len(findings)} findings, {limit - said_at + began:.0f} s left",
                flush=True,
            )
    worker.process.kill()
    seconds = result["seconds"] + time.monotonic() - began
    record = {
        "cases": number, "seconds": round(seconds, 1), "findings": findings, "fixed": fixed,
        "outcomes": result.get("outcomes", {}) | {kind: dict(sorted(counts[kind].items())) for kind in names},
        "machine": {"python": platform.python_version(), "cores": usable_cores(), "system": platform.platform()},
    }  # fmt: skip
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{number} cases in {seconds:.0f} s, {len(findings)} findings: {options.out}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
