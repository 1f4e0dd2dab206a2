"""What is pretraining worth downstream? The paper's Table 1 at CPU size. Fills docs/targets.md.

    make targets                                             # phantoms; with P2W_REAL_DATA=FOLDER the sarcoma set too
    python bench/evidence/targets.py --folder evidence --real ../shared/data
    python bench/evidence/targets.py --inits methods         # the contenders of methods.py, on two tasks, for its table

Five phantom tasks in the public sets' formats, 40 patients each, and real soft-tissue sarcomas; a tenth of the training
patients, ten trials. Starting points: random, autoencoder, Models Genesis, Parts2Whole, all pretrained by methods.py for the
same arithmetic. The same command continues one that was stopped.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import methods
from jobs import REPO, Job, work
from page import fill, table
from run import data_jobs

from p2w.tables.table import BEST, Cell, load

PATIENTS = 40
SHORT = "--recipe.max-epochs 30 --recipe.epoch-steps 4 --recipe.patience 12"
RAW = {"ncc": "LUNA16", "ncs": "LIDC-IDRI", "lcs": "LiTS", "ecc": "CTPA", "bms": "BraTS"}
CUT = {  # crops that two cores can train on
    "ncc": "--size 16 32 32 --max-negatives 20",
    "ncs": "--size 16 32 32 --spacing 2 2 2 --crops 4",
    "lcs": "--size 16 32 32 --train 0-23 --val 24-27 --test 28-39",
    "ecc": "--size 16 32 32",
    "bms": "--size 16 32 32 --crops 4",
    "sarcoma": "--size 16 32 32 --images *_ct.nii.gz --masks *_gtv.nii.gz",
}
TABLE1 = {"Autoencoder": "autoencoder", "Models Genesis": "models_genesis", "Parts2Whole": "parts2whole"}
CONTEST = ("ncc", "ncs")  # what the contenders are fine-tuned on


def set_jobs(folder: Path, real: Path | None) -> list[list[Job]]:
    """Phantoms, then the target sets cut from them."""
    raw = folder / "targets-raw"
    command = [
        "-m",
        "p2w.data.phantom.targets",
        "--out",
        raw,
        "--patients",
        PATIENTS,
        "--workers",
        os.cpu_count(),
    ]
    cut = []
    for task, flags in CUT.items():
        source = raw / RAW[task] if task in RAW else real and real / "sarcoma"
        if source:
            out, kind = folder / "targets" / task, task if task in RAW else "general"
            made: list[object] = [
                "preprocess/prepare_target.py",
                kind,
                "--source",
                source,
                "--out",
                out,
                "--workers",
                1,
            ]
            cut.append(Job(f"cut-{task}", [*made, *flags.split()], out / "manifest.parquet"))
    return [[Job("targets-raw", command, folder / "targets" / "ncc" / "manifest.parquet")], cut]


def sweep(folder: Path, out: Path, tasks: Iterable[str], starts: dict[str, object], trials: int) -> list[str]:
    """The command that fine-tunes all starting points on all tasks."""
    return [
        sys.executable, "launch/sweep.py", "table1", "--out", str(out), "--trials", str(trials), "--width", "8",
        "--fraction", "0.1", "--jobs", str(os.cpu_count()), f"--transfer-args={SHORT}",
        "--tasks", *(f"{task}={folder / 'targets' / task}" for task in tasks),
        "--inits", *(f"{label}={start}" for label, start in starts.items()),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=REPO / "evidence", help="data, runs and logs")
    parser.add_argument(
        "--real", default="", help="folder of real scans with `sarcoma` in it; empty: phantoms only"
    )
    parser.add_argument(
        "--inits", choices=("table1", "methods"), default="table1", help="which starting points"
    )
    parser.add_argument(
        "--trials", type=int, default=0, help="default 10; 2 for methods, whose seeds count too"
    )
    args = parser.parse_args()
    folder, real = args.folder.resolve(), Path(args.real).resolve() if args.real else None
    for stage in (*data_jobs(folder, None), *set_jobs(folder, real)):
        work(stage, folder)
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    if args.inits == "methods":
        runs = [
            methods.folder_of(folder, name, seed)
            for seed in range(methods.SEEDS)
            for name in methods.CONTENDERS
            if methods.train_job(folder, name, seed).finished
        ]
        starts = {"scratch": "random", **{run.name: run for run in runs}}
        command = sweep(folder, folder / "transfer", CONTEST, starts, args.trials or 2)
        sys.exit(subprocess.run(command, cwd=REPO, env=env, check=False).returncode)
    work([methods.train_job(folder, name, 0) for name in TABLE1.values()], folder)
    starts = {
        "Scratch": "random",
        **{label: methods.folder_of(folder, name, 0) for label, name in TABLE1.items()},
    }
    tasks = [task for task in CUT if (folder / "targets" / task / "manifest.parquet").exists()]
    subprocess.run(
        sweep(folder, folder / "table1", tasks, starts, args.trials or 10), cwd=REPO, env=env, check=True
    )
    subprocess.run(
        [sys.executable, "-m", "p2w", "table1", folder / "table1", "--fraction", "0.1", "--against", "Scratch"],
        cwd=REPO, env=env, check=True,
    )  # fmt: skip
    write(REPO / "docs" / "targets.md", folder / "table1" / "tables" / "table1.json")


def write(page: Path, found: Path) -> None:
    """Fill the block `table1` of docs/targets.md."""
    seen = load(found)
    columns = [
        column for column in seen.columns if any(cell.n for cell in seen.cells if cell.task == column.task)
    ]
    claims = {claim.task: claim for claim in seen.claims if claim.other == "Scratch"}
    rows = [[row, *(_cell(seen.cell(row, column.task)) for column in columns)] for row in seen.rows]
    rows = [row for row in rows if any(cell != "-" for cell in row[1:])]
    tests = [claims.get(column.task) for column in columns]
    rows.append(
        [
            "Parts2Whole - Scratch",
            *("-" if t is None else f"{t.difference:+.2f}, p = {t.p:.2g}" for t in tests),
        ]
    )
    head = ("", *(column.head for column in columns))
    page.write_text(fill(page.read_text(), "table1", table(head, rows)))
    print(page)


def _cell(cell: Cell) -> str:
    """`**91.2 ± 0.3**`, the best in bold; fewer trials than planned are said."""
    if cell.mean is None:
        return "-"
    text = f"{cell.mean:.2f} ± {cell.sd or 0:.2f}"
    return (f"**{text}**" if cell.mark == BEST else text) + (f" ({cell.missing})" if cell.missing else "")


if __name__ == "__main__":
    main()
