"""Is a run unkillable? Faults of every kind, drawn at random, in real processes; the weights must come out the same.

    python bench/soak.py                             # 200 faults or 60 minutes, then bench/results/soak.json
    python bench/soak.py --faults 20 --minutes 5     # a short one
    python bench/soak.py --folder DIR                # the same command again goes on where it ended

Two, four or one rank over gloo train a small U-Net on phantom scans. A supervisor does what Slurm or systemd does without a
person: a command that ended unfinished is typed again. Where data is damaged, the remedy that the error names is applied,
as a script would. Anything else that is needed, or any promise that is not kept, counts as an intervention: the
run is set aside in DIR/kept, with all that it printed. Kinds and promises: bench/faults/kinds.py.
"""

import json
import platform
import shutil
import signal
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tests"), str(REPO / "tests" / "slurm")]

from faults.kinds import KINDS, PROMISES  # noqa: E402
from faults.run_clock import mark_children  # noqa: E402
from faults.runs import EVERY, STEPS  # noqa: E402
from faults.supervisor import Soak  # noqa: E402


@dataclass(frozen=True)
class Options:
    """How long, and where."""

    faults: int = 200
    minutes: float = 60.0
    torchrun: float = 0.3  # share of the faults that meet a life started by torchrun; the others are forked
    seed: int = 0
    folder: Path = Path("soak")
    only: tuple[str, ...] = ()  # kinds to draw from; default: all
    out: Path = REPO / "bench" / "results" / "soak.json"


def prepare(folder: Path) -> None:
    """Phantom scans, cut into the same sub-scans in both formats."""
    sets = folder / "set"
    if not (sets / "ready").exists():
        shutil.rmtree(sets, ignore_errors=True)
        scans = ["--out", str(sets / "luna"), "--scans", "10", "--shape", "64", "256", "256"]
        subprocess.run([sys.executable, "-m", "p2w.phantom", *scans], check=True, cwd=REPO)
        for form in ("tar", "arrow"):
            cut = ["--luna", str(sets / "luna"), "--out", str(sets / form), "--subsets", "0-9"]
            cut += ["--val-fraction", "0.2", "--min-std", "0", "--format", form]
            subprocess.run([sys.executable, "preprocess/shard_luna.py", *cut], check=True, cwd=REPO)
        (sets / "ready").touch()
    for sound in sets.glob("*/*.sound"):  # the soak was ended while a shard was damaged
        sound.replace(sound.with_suffix(""))


def percentile(values: list[float], share: float) -> float | None:
    """The value below which `share` of them lie; None for none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def summary(log: list[dict]) -> dict:
    """What is reported."""
    faults = [entry for entry in log if "kind" in entry]
    ends = [entry for entry in log if "finished" in entry]
    wrong = [entry for entry in log if "wrong" in entry]
    kinds = Counter(entry["kind"] for entry in faults)
    alone = [entry for entry in faults if entry["lost"] is not None]
    told = [entry for entry in alone if PROMISES[entry["kind"]] == 3]
    killed = [entry for entry in alone if PROMISES[entry["kind"]] == 2 and entry["kind"] != "torchrun killed"]
    back = {
        by: [
            entry["back_s"] for entry in alone if entry["by"] == by and entry["back_s"] and entry["restarted"]
        ]
        for by in ("torchrun", "forked")
    }
    return {
        "faults": len(faults),
        "interventions": len(wrong),
        "runs_finished": len(ends),
        "weights_equal": sum(entry["equal"] for entry in ends),
        "kinds": {name: {"promise": PROMISES[name], "faults": kinds[name]} for name in PROMISES},
        "by": Counter(entry["by"] for entry in faults),
        "ranks": Counter(str(entry["ranks"]) for entry in faults),
        "steps_a_run": STEPS,
        "checkpoint_every": EVERY,
        "lost_steps": {
            "told": {"faults": len(told), "max": max((entry["lost"] for entry in told), default=None)},
            "killed": {
                "faults": len(killed),
                "max": max((entry["lost"] for entry in killed), default=None),
                "more_than_an_interval": sum(entry["lost"] > EVERY for entry in killed),
                "mean": round(statistics.fmean(entry["lost"] for entry in killed), 2) if killed else None,
            },
        },
        "told_left_in_s": {"max": max((entry["left_s"] or 0 for entry in told), default=None)},
        "fault_to_first_new_step_s": {
            by: {"median": percentile(times, 0.5), "p95": percentile(times, 0.95), "n": len(times)}
            for by, times in back.items()
        },
        "wrong": wrong,
        "errors_of_the_soak_itself": sum("harness" in entry for entry in log),
    }


def main() -> int:
    """Soak until enough faults or minutes; 1 when a promise was not kept."""
    options = tyro.cli(Options, description=__doc__)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # leaves no process behind
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, ranks would ignore it too
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    mark_children()
    soak = Soak(
        folder, options.faults, options.minutes, options.torchrun, options.seed, options.only or tuple(KINDS)
    )
    try:
        soak.go()
    finally:
        soak.close()
        found = summary(soak.log)
        machine = {
            "system": platform.platform(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        text = json.dumps({"machine": machine, "seed": options.seed, **found}, indent=1)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
        print(text)
    return int(found["interventions"] > 0)


if __name__ == "__main__":
    sys.exit(main())
