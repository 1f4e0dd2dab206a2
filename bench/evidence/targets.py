"""What is pretraining worth downstream? The paper's Tables 1 and 2 at CPU size. Fills docs/targets.md.

    make targets                                             # phantoms; with P2W_REAL_DATA=FOLDER the sarcoma set too
    python bench/evidence/targets.py --folder evidence --real ../shared/data --parts table1
    python bench/evidence/targets.py --parts methods         # the contenders of methods.py, on two tasks, for its table

Five phantom tasks in the public sets' formats, 100 patients each, and real soft-tissue sarcomas; ten trials. `table1`:
random, autoencoder, Models Genesis and Parts2Whole, pretrained by methods.py for the same arithmetic, and a tenth of the
training patients. `table2`: Parts2Whole with other scales of its parts, and with skips. The same command continues one
that was stopped.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import frozen
import methods
from jobs import REPO, Job, work
from page import fill, table
from run import data_jobs

from p2w.tables.table import BEST, Cell, Table, load
from p2w.target.dataset import open_target

PATIENTS, WIDTH, TRIALS, TABLE2_TRIALS = 100, 8, 10, 5
SHORT = (
    "--recipe.max-epochs 16 --recipe.epoch-steps 10 --recipe.patience 16 --recipe.batch 8 --recipe.amp auto"
)
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
TABLE1_STEPS = 600  # of Parts2Whole's pretraining, and as much arithmetic of the others'
TABLE2_STEPS = 200
CONTEST = ("ncc", "ncs")  # what Table 2 and the contenders are fine-tuned on


def set_jobs(folder: Path, real: Path | None) -> list[list[Job]]:
    """Phantoms, then the target sets cut from them."""
    raw = folder / "targets-raw"
    command = f"-m p2w.data.phantom.targets --out {raw} --patients {PATIENTS} --workers {os.cpu_count()}"
    cut = []
    for task, flags in CUT.items():
        source = raw / RAW[task] if task in RAW else real and real / "sarcoma"
        if source:
            out, kind = folder / "targets" / task, task if task in RAW else "general"
            made = ["preprocess/prepare_target.py", kind, "--source", source, "--out", out, "--workers", 1]
            cut.append(Job(f"cut-{task}", [*made, *flags.split()], out / "manifest.parquet"))
    done = next(
        (job.done for job in cut if not job.finished), cut[0].done
    )  # phantoms are there when all are cut
    return [[Job("targets-raw", command.split(), done)], cut]


def sweep(folder: Path, out: Path, what: str, tasks: Iterable[str], *more: object) -> None:
    """Fine-tune: launch/sweep.py with this size's settings. Folds of a task: the first, as a sample of all."""
    command = [
        sys.executable, "launch/sweep.py", what, "--out", out, "--width", WIDTH, "--folds", 0,
        "--jobs", os.cpu_count(), f"--transfer-args={SHORT}",
        "--tasks", *(f"{task}={folder / 'targets' / task}" for task in tasks), *more,
    ]  # fmt: skip
    call(command)


def call(command: Iterable[object]) -> None:
    """Run a command of this repository; its failure is ours."""
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    if code := subprocess.run([*map(str, command)], cwd=REPO, env=env, check=False).returncode:
        sys.exit(code)


def table1(folder: Path) -> None:
    """Starting points on every task there is."""
    jobs = {label: methods.train_job(folder, name, 0, TABLE1_STEPS) for label, name in TABLE1.items()}
    work([*jobs.values()], folder)
    starts = ["Scratch=random", *(f"{label}={job.done.parent}" for label, job in jobs.items())]
    tasks = [task for task in CUT if (folder / "targets" / task / "manifest.parquet").exists()]
    out = folder / "table1"
    sweep(folder, out, "table1", tasks, "--trials", TRIALS, "--fraction", 0.1, "--inits", *starts)
    call([sys.executable, "-m", "p2w", "table1", out, "--fraction", 0.1, "--against", "Scratch"])
    write("table1", load(out / "tables" / "table1.json"), "Scratch")


def table2(folder: Path) -> None:
    """Scales of parts, on the two tasks and shares of their training data that the paper took."""
    out, steps = folder / "table2", TABLE2_STEPS
    length = f"--train.steps {steps} --train.validate-every {steps} --train.look-every {steps}"
    pretrain = ("--shards", folder / "phantom", "--recipe", "demo", f"--train-args={length}")
    sweep(folder, out, "table2", CONTEST, "--trials", TABLE2_TRIALS, *pretrain)
    call([sys.executable, "-m", "p2w", "table2", out])
    write("table2", load(out / "tables" / "table2.json"))


def features(folder: Path) -> None:
    """What the starting points tell before they are fine-tuned, on the two tasks that tell candidates apart."""
    starts: dict[str, Path | str] = {"Scratch": "random"}
    starts |= {label: methods.folder_of(folder, name, 0, TABLE1_STEPS) for label, name in TABLE1.items()}
    sets = [(task, open_target(folder / "targets" / task)) for task in ("ncc", "ecc")]
    rows = []
    for label, start in starts.items():
        encoder = frozen.encoder_of(start)
        rows.append([label, *(f"{auc:.3f}" for _, one in sets for auc in frozen.told(encoder, one))])
    head = ("", *(f"{task.upper()}, level {level}" for task, _ in sets for level in (1, 2, 3, 4)))
    put("frozen", table(head, rows))


def contest(folder: Path) -> None:
    """The runs of methods.py, as far as there are any: three trials of each seed."""
    for names, length in ((methods.CONTENDERS, methods.STEPS), (methods.LONGER, methods.LONG)):
        asked = [(name, seed, length) for seed in range(methods.SEEDS) for name in names]
        runs = [job.done.parent for job in (methods.train_job(folder, *one) for one in asked) if job.finished]
        if runs:
            out = folder / runs[0].parent.name.replace("methods", "transfer")
            starts = ("scratch=random", *(f"{run.name}={run}" for run in runs))
            sweep(folder, out, "table1", CONTEST, "--trials", 3, "--fraction", 0.1, "--inits", *starts)


PARTS: dict[str, Callable[[Path], None]] = {
    "table1": table1,
    "table2": table2,
    "frozen": features,
    "methods": contest,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=REPO / "evidence", help="data, runs and logs")
    parser.add_argument(
        "--real", default="", help="folder of real scans with `sarcoma` in it; empty: phantoms only"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=("table1", "table2", "frozen"), help="what to do"
    )
    args = parser.parse_args()
    folder, real = args.folder.resolve(), Path(args.real).resolve() if args.real else None
    for stage in (*data_jobs(folder, None), *set_jobs(folder, real)):
        work(stage, folder)
    for part in args.parts:
        PARTS[part](folder)


def write(block: str, seen: Table, against: str = "") -> None:
    """Fill a block of docs/targets.md; the last rows, where asked for: what Parts2Whole has more than `against`, here
    and in the paper, which are different tests of different data."""
    columns = [
        column for column in seen.columns if any(cell.n for cell in seen.cells if cell.task == column.task)
    ]
    rows = [[row, *(_cell(seen.cell(row, column.task)) for column in columns)] for row in seen.rows]
    rows = [row for row in rows if any(cell != "-" for cell in row[1:])]
    for source, said in (("here", ""), ("paper", " in the paper")) if against else ():
        claims = {one.task: one for one in seen.claims if (one.other, one.source) == (against, source)}
        tests = [claims.get(column.task) for column in columns]
        differences = ("-" if t is None else f"{t.difference:+.2f}, p = {t.p:.2g}" for t in tests)
        rows.append([f"Parts2Whole - {against}{said}", *differences])
    put(block, table(("", *(column.head for column in columns)), rows))


def put(block: str, text: str) -> None:
    """Write a block of docs/targets.md."""
    page = REPO / "docs" / "targets.md"
    page.write_text(fill(page.read_text(), block, text))
    print(page)


def _cell(cell: Cell) -> str:
    """`**91.2 ± 0.3**`, the best in bold; fewer trials than planned are said."""
    if cell.mean is None:
        return "-"
    text = f"{cell.mean:.2f} ± {cell.sd or 0:.2f}"
    return (f"**{text}**" if cell.mark == BEST else text) + (f" ({cell.missing})" if cell.missing else "")


if __name__ == "__main__":
    main()
