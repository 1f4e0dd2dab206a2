"""Fine-tunes a network of designs.py on a small task, for the leaderboard; writes RUN/tuned.json.

    python bench/evidence/fine_tuned.py FOLDER phantom parts2whole 0

Networks pretrained on phantoms tell nodules from other candidates, of other phantoms, with a quarter of the training
patients (AUC); those pretrained on real chests draw soft-tissue sarcomas of eight patients, with all of them (Dice). TRIALS
trials each, with the short recipe of targets.py. Beside the reference stands the network that nothing was taught.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from designs import METHODS, REFERENCE, Pretraining, seed_of
from jobs import Job
from targets import CUT, SHORT, WIDTH, call

from p2w.files import write_atomic
from p2w.finetune.results import read_fine_tuning

TASKS = {"phantom": ("ncc", 0.25), "real": ("sarcoma", 1.0)}
MAIN = {"ncc": "auc", "sarcoma": "dice"}
TRIALS, PATIENTS = 3, 60


def task_of(folder: Path, kind: str) -> Path:
    """The target set that networks pretrained on `real` or `phantom` scans are fine-tuned on."""
    return folder / "fine-tuning" / TASKS[kind][0]


def set_jobs(folder: Path, real: Path | None) -> list[list[Job]]:
    """Cut the target sets."""
    raw = folder / "fine-tuning" / "raw"
    make: list[object] = [
        "-m", "p2w.phantom.target_tasks", "--out", raw, "--tasks", "ncc", "--patients", PATIENTS,
    ]  # fmt: skip
    sources: dict[str, tuple[str, Path]] = {"phantom": ("ncc", raw / "LUNA16")}
    if real:
        sources["real"] = ("custom", real / "sarcoma")
    cut = []
    for kind, (layout, source) in sources.items():
        out = task_of(folder, kind)
        command = ["preprocess/prepare_target.py", layout, "--source", source, "--out", out, "--workers", 1]
        cut.append(Job(f"cut-{out.name}", [*command, *CUT[out.name].split()], out / "manifest.parquet"))
    return [[Job("fine-tuning-raw", make, task_of(folder, "phantom") / "manifest.parquet")], cut]


def tune_job(folder: Path, one: Pretraining) -> Job:
    """Fine-tune one network."""
    command = ["bench/evidence/fine_tuned.py", folder, one.data, one.method, one.seed]
    return Job(f"{one.name}-tuned", command, folder / "runs" / one.name / "tuned.json")


def tuned(folder: Path, one: Pretraining, label: str) -> float:
    """Mean over the trials of the task's main metric on test samples."""
    task, fraction = TASKS[one.kind]
    run = folder / "runs" / one.name
    out = folder / "fine-tuning" / "runs" / f"{one.name}-{label}"
    start = ["--init", "random", "--width", WIDTH] if label == "random" else ["--init", run]
    call([
        sys.executable, "launch/finetune.py", "--task", task_of(folder, one.kind), *start, "--label", label,
        "--run-dir", out, "--trials", TRIALS, "--fraction", fraction, "--quiet", *SHORT.split(),
        "--recipe.seed", 10 * seed_of(one), "--recipe.no-keep-weights",
    ])  # fmt: skip
    return statistics.fmean(trial.metrics[MAIN[task]] for trial in read_fine_tuning(out).trials)


def main() -> None:
    """Fine-tune the network of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="data sets and runs, as leaderboard.py makes them")
    parser.add_argument("data", help="real-0, real-1, … or phantom")
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("seed", type=int)
    args = parser.parse_args()
    one, folder = Pretraining(args.method, args.data, args.seed), args.folder.resolve()
    labels = (one.method, *(("random",) if one.method == REFERENCE else ()))
    found = {label: tuned(folder, one, label) for label in labels}
    write_atomic(folder / "runs" / one.name / "tuned.json", json.dumps(found, indent=1))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
