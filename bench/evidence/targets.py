"""What is pretraining worth downstream? The paper's Tables 1 and 2 at CPU size. Fills docs/targets.md.

    make targets                                             # phantoms; with P2W_REAL_DATA=FOLDER the sarcoma set too
    python bench/evidence/targets.py --folder evidence --real scans --parts table1

Five phantom tasks in the public sets' formats, 100 patients each, and real soft-tissue sarcomas. `rates`: the learning rate
of each pretraining, chosen by the fine-tunings' loss on validation patients. `table1`: random, autoencoder, Models Genesis
and Parts2Whole, pretrained for the same arithmetic, a tenth of the training patients, ten trials of each of SEEDS
pretrainings. `table2`: Parts2Whole with other scales of its parts, and with skips. `control`: what there is to gain.
`gate`: whether coarse features matter on a task at all, printed beside every table. `frozen`: what features tell before
they are fine-tuned. The same command continues one that was stopped.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import gate
import linear_probe
import targets_page
from designs import METHODS, cost
from gate import read_gates
from jobs import REPO, Job, work
from page import table
from run import data_jobs

from p2w.files import write_atomic
from p2w.reproduce.sweep_jobs import slug
from p2w.reproduce.table import Table, load_table
from p2w.resources import usable_cores
from p2w.tasks.reader import open_target

PATIENTS, WIDTH, TRIALS, TABLE2_TRIALS = 100, 8, 10, 3
SHORT = "--recipe.max-epochs 16 --recipe.epoch-steps 10 --recipe.patience 16 --recipe.batch 8 --recipe.precision auto"
ALL_LABELS = "--recipe.max-epochs 12 --recipe.patience 12 --recipe.batch 8 --recipe.precision auto"
RAW = {"ncc": "LUNA16", "ncs": "LIDC-IDRI", "lcs": "LiTS", "ecc": "CTPA", "bms": "BraTS"}
CUT = {  # crops that two cores can train on
    "ncc": "--size 16 16 16 --max-negatives 20",
    "ncs": "--size 16 16 16 --spacing 1.5 1.5 1.5 --crops 4",
    "lcs": "--size 16 16 16 --spacing 2.5 2.5 2.5 --max-tiles 8 --train 0-59 --val 60-69 --test 70-99",
    "ecc": "--size 16 16 16",
    "bms": "--size 16 16 16 --crop-mm 48 48 48 --crops 4",
    "sarcoma": "--size 16 16 16 --spacing 3 3 3 --max-tiles 12 --images *_ct.nii.gz --masks *_gtv.nii.gz",
}
TABLE1 = {"Autoencoder": "autoencoder", "Models Genesis": "models_genesis", "Parts2Whole": "parts2whole"}
TABLE1_STEPS = 1800  # of Parts2Whole's pretraining, and as much arithmetic of the others'
TABLE2_STEPS = 400
# Where `rates` was not run; from the demo's 2e-3 nothing that is fine-tuned gains: docs/targets.md
RATE = 3e-4
RATES, RATE_STEPS, RATE_TRIALS, RATE_SEED = (
    (1e-4, 3e-4, 1e-3),
    600,
    3,
    1000,
)  # another seed than any that is tested
SEEDS = 3  # pretrainings of each method
CONTEST = ("ncc", "ncs")  # what Table 2 is fine-tuned on


def set_jobs(folder: Path, real: Path | None) -> list[list[Job]]:
    """Phantoms, then the target sets cut from them."""
    raw = folder / "targets-raw"
    command = f"-m p2w.phantom.target_tasks --out {raw} --patients {PATIENTS} --workers {usable_cores()}"
    cut = []
    for task, flags in CUT.items():
        source = raw / RAW[task] if task in RAW else real and real / "sarcoma"
        if source:
            out, kind = folder / "targets" / task, task if task in RAW else "general"
            made = ["preprocess/prepare_target.py", kind, "--source", source, "--out", out, "--workers", 1]
            cut.append(Job(f"cut-{task}", [*made, *flags.split()], out / "manifest.parquet"))
    # Phantoms are there when all are cut
    done = next((job.done for job in cut if not job.finished), cut[0].done)
    return [[Job("targets-raw", command.split(), done)], cut]


def sweep(
    folder: Path, out: Path, what: str, tasks: Iterable[str], *more: object, recipe: str = SHORT
) -> None:
    """Fine-tune: launch/sweep.py with this size's settings. Folds of a task: the first, as a sample of all."""
    command = [
        sys.executable, "launch/sweep.py", what, "--out", out, "--width", WIDTH, "--folds", 0,
        "--jobs", usable_cores(), f"--finetune-args={recipe}",
        "--tasks", *(f"{task}={folder / 'targets' / task}" for task in tasks), *more,
    ]  # fmt: skip
    call(command)


def call(command: Iterable[object]) -> None:
    """Run a command of this repository; exits if it fails."""
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    if code := subprocess.run([*map(str, command)], cwd=REPO, env=env, check=False).returncode:
        sys.exit(code)


def start_job(
    folder: Path, name: str, seed: int, rate: float, steps: int = TABLE1_STEPS, place: str = "starts"
) -> Job:
    """Pretrain a starting point for the arithmetic of `steps` steps of Parts2Whole."""
    run = folder / place / f"{name}-seed{seed}-lr{rate:g}"
    words: list[object] = ["launch/train.py", "demo", *length(round(steps / cost(name)), rate)]
    words += [*METHODS[name], "--shards", folder / "phantom", "--run", run]
    words += ["--train.seed", seed, "--data.seed", seed]
    return Job(f"pretrain-{run.name}", words, run / "status.json")


def length(steps: int, rate: float = RATE) -> list[str]:
    """Of a pretraining, which is looked at when it is over."""
    last = (f"--train.{what} {steps}" for what in ("steps", "validate-every", "probe-every"))
    return f"{' '.join(last)} --optim.lr {rate:g}".split()


def rates(folder: Path) -> None:
    """Choose each method's rate by the mean loss on validation patients of its fine-tunings; no test sample is looked at."""
    asked = {(label, rate): name for label, name in TABLE1.items() for rate in RATES}
    jobs = {
        key: start_job(folder, name, RATE_SEED, key[1], RATE_STEPS, "rate-starts")
        for key, name in asked.items()
    }
    work([*jobs.values()], folder)
    out = folder / "rates"
    starts = {key: f"{key[0]} {key[1]:g}" for key in jobs}
    inits = [f"{starts[key]}={job.done.parent}" for key, job in jobs.items()]
    sweep(folder, out, "table1", CONTEST, "--trials", RATE_TRIALS, "--fraction", 0.1, "--inits", *inits)
    found = {
        key: {task: validation_loss(out / task / slug(label)) for task in CONTEST}
        for key, label in starts.items()
    }
    chosen = choose_rates(found)
    write_atomic(out / "chosen.json", json.dumps(chosen, indent=1))
    targets_page.rates(found, chosen)


def validation_loss(run: Path) -> float:
    """The mean over a run's trials of their best loss on the validation patients."""
    results = [json.loads(path.read_text()) for path in sorted(run.glob("trial-*/result.json"))]
    return statistics.fmean(one["best_val_loss"] for one in results)


def choose_rates(found: Mapping[tuple[str, float], Mapping[str, float]]) -> dict[str, float]:
    """By method, the rate with the lowest validation losses, by their geometric mean: tasks' losses differ in scale."""
    score = {key: statistics.geometric_mean(losses.values()) for key, losses in found.items()}
    methods_of = dict.fromkeys(method for method, _ in found)
    return {
        method: min((rate for name, rate in found if name == method), key=lambda rate: score[method, rate])
        for method in methods_of
    }


def rate_of(folder: Path, label: str) -> float:
    """The rate that `rates` chose for a method; RATE where it was not run."""
    path = folder / "rates" / "chosen.json"
    return float(json.loads(path.read_text())[label]) if path.exists() else RATE


def table1(folder: Path) -> None:
    """Starting points on every task; each pretraining a row of its own, which the page joins by method."""
    jobs = {
        f"{label} seed {seed}": start_job(folder, name, seed, rate_of(folder, label))
        for label, name in TABLE1.items()
        for seed in range(SEEDS)
    }
    work([*jobs.values()], folder)
    starts = ["Scratch=random", *(f"{label}={job.done.parent}" for label, job in jobs.items())]
    out = folder / "table1"
    sweep(folder, out, "table1", tasks_of(folder), "--trials", TRIALS, "--fraction", 0.1, "--inits", *starts)
    targets_page.write("table1", collected(out, 0.1), "Scratch", read_gates(folder))


def gates(folder: Path) -> None:
    """Scratch on all labels with coarse levels zeroed, on every task; `control` has it without."""
    work([gate.job(folder, task, WIDTH, ALL_LABELS) for task in tasks_of(folder)], folder)
    for task, found in read_gates(folder).items():
        print(f"{task}: all labels {found.all_labels:.2f}, zeroing {found.shown()}")


def tasks_of(folder: Path) -> list[str]:
    """The tasks whose target sets exist."""
    return [task for task in CUT if (folder / "targets" / task / "manifest.parquet").exists()]


def collected(out: Path, fraction: float) -> Table:
    """The results of the runs in a folder."""
    call([sys.executable, "-m", "p2w", "table1", out, "--fraction", fraction, "--against", "Scratch"])
    return load_table(out / "tables" / "table1.json")


def control(folder: Path) -> None:
    """The possible gain: all labels, and a tenth of them from encoders that were trained on all labels of a task."""
    tasks, full, out = tasks_of(folder), folder / "full", folder / "control"
    sweep(
        folder, full, "table1", tasks, "--trials", 2, "--fraction", 1, "--inits", "Scratch=random",
        recipe=ALL_LABELS,
    )  # fmt: skip
    for task in tasks:
        weights = (next((full / name).rglob("trial-00/model.safetensors")) for name in ("ncs", task))
        starts = (f"{label}={path}" for label, path in zip(("NCS", "Full"), weights, strict=True))
        sweep(folder, out, "table1", [task], "--trials", 3, "--fraction", 0.1, "--inits", *starts)
    targets_page.control(
        collected(folder / "table1", 0.1), collected(out, 0.1), collected(full, 1), read_gates(folder)
    )


def table2(folder: Path) -> None:
    """Scales of parts, on the two tasks and shares of their training data that the paper took."""
    out, more = folder / "table2", " ".join(length(TABLE2_STEPS))
    pretrain = ("--shards", folder / "phantom", "--recipe", "demo", f"--train-args={more}")
    sweep(folder, out, "table2", CONTEST, "--trials", TABLE2_TRIALS, *pretrain)
    call([sys.executable, "-m", "p2w", "table2", out])
    targets_page.write("table2", load_table(out / "tables" / "table2.json"), gates=read_gates(folder))


def features(folder: Path) -> None:
    """Linear probes of the starting points, without fine-tuning, on the two tasks that classify candidates."""
    starts: dict[str, Path | str] = {"Scratch": "random"}
    starts |= {
        label: start_job(folder, name, 0, rate_of(folder, label)).done.parent
        for label, name in TABLE1.items()
    }
    sets = [(task, open_target(folder / "targets" / task)) for task in ("ncc", "ecc")]
    rows = []
    for label, start in starts.items():
        encoder = linear_probe.encoder_of(start)
        told = (f"{auc:.3f}" for _, one in sets for auc in linear_probe.level_aucs(encoder, one))
        rows.append([label, *told, f"{linear_probe.feature_rank(encoder, sets[0][1]):.1f}"])
    head = ("", *(f"{task.upper()}, level {level}" for task, _ in sets for level in (1, 2, 3, 4)), "rank")
    targets_page.put("frozen", table(head, rows))


PARTS: dict[str, Callable[[Path], None]] = {
    "rates": rates,
    "gate": gates,
    "table1": table1,
    "table2": table2,
    "control": control,
    "frozen": features,
}


def main() -> None:
    """Run the chosen stages and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=REPO / "evidence", help="data, runs and logs")
    parser.add_argument(
        "--real", default="", help="folder of real scans with `sarcoma` in it; empty: phantoms only"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=("rates", "gate", "table1", "table2", "control", "frozen"),
        help="what to do",
    )
    args = parser.parse_args()
    folder, real = args.folder.resolve(), Path(args.real).resolve() if args.real else None
    for stage in (*data_jobs(folder, None), *set_jobs(folder, real)):
        work(stage, folder)
    for part in args.parts:
        PARTS[part](folder)


if __name__ == "__main__":
    main()
