"""Does reconstruction alone make contrastive features? Trains, measures and updates docs/evidence.md.

    make evidence                                          # phantom; with P2W_REAL_DATA=FOLDER the real scans too
    python bench/evidence/run.py --folder evidence --real scans
    python bench/evidence/run.py --folder evidence --sets varied --seeds 2    # phantoms that differ more, and nothing else
    python bench/evidence/run.py --page-only               # from bench/results/pretrainings.json

What is trained on what: designs.py. What is measured of each network: measure_run.py. The same command continues one that
was stopped; the page says of every row how many pretrainings it rests on, and `not run` where there are none. The runs are
shared with `make leaderboard`, which has more methods.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import evidence_page
import pretrainings
from designs import (
    EVIDENCE,
    ON_VARIED,
    REAL,
    REFERENCE,
    SEEDS,
    VARIED,
    Pretraining,
    check,
    cut_job,
    data_sets,
    folds_of,
    link_scans,
    phantom_jobs,
    plan,
)
from jobs import REPO, Job, work

PATIENTS, FIRST_FOLD = 11, 3  # real scans, one of each patient; those of the first fold
SETS = ("usual", VARIED)  # usual: the phantoms, and the real scans where --real names them
FIGURES_OF = ("real-0", "phantom")  # data sets whose first network analyze.py draws


def data_jobs(folder: Path, real: Path | None) -> list[list[Job]]:
    """Stages that cut the phantoms and the first fold of the real scans, from which the other folds follow."""
    stages = phantom_jobs(folder)
    if real:
        link_scans(folder, real)
        stages.insert(0, [cut_job(folder, 0, FIRST_FOLD / PATIENTS, 0)])
    return stages


def prepare(folder: Path, real: Path | None, workers: int) -> None:
    """Cut all data sets."""
    for stage in data_jobs(folder, real):
        work(stage, folder, workers)
    if real:
        folds = folds_of(folder)
        if folds[0] != (FIRST_FOLD / PATIENTS, 0):
            sys.exit(
                f"error: {real}: its folders {', '.join(REAL)} must hold {PATIENTS} scans in all, one a patient"
            )
        work([cut_job(folder, at, *fold) for at, fold in enumerate(folds)], folder, workers)


def measure_job(folder: Path, one: Pretraining) -> Job:
    """Train and measure one network."""
    command = ["bench/evidence/measure_run.py", folder, one.data, one.method, one.seed]
    return Job(one.name, command, folder / "runs" / one.name / "measured.json")


def analysis_job(folder: Path, data: str) -> Job:
    """Draw Fig. 2 of the first network on a data set, against those that were trained on the same."""
    run, other = (folder / "runs" / Pretraining(name, data, 0).name for name in (REFERENCE, "autoencoder"))
    against = f"histogram,pixels,random,autoencoder={other}"
    command = ["launch/analyze.py", "--run", run, "--against", against, "--shards", folder / data]
    sizes = "--max-wholes 40 --parts 8 --scales 6 --scale-parts 3 --scatter-parts 100"
    return Job(f"{data}-analysis", [*command, *sizes.split()], run / "analysis" / "summary.json")


def run_varied(folder: Path, methods: Sequence[str], seeds: int, workers: int) -> None:
    """Everything on varied phantoms that is not there yet."""
    for stage in phantom_jobs(folder, VARIED):
        work(stage, folder, workers)
    work([measure_job(folder, one) for one in plan(methods, [VARIED], seeds)], folder, workers)


def run_all(folder: Path, real: Path | None, methods: tuple[str, ...], seeds: int, workers: int) -> None:
    """Everything that is not there yet, the most telling first."""
    check()
    prepare(folder, real, workers)
    sets = data_sets(bool(real))
    todo = [measure_job(folder, one) for one in plan(methods, sets, seeds)]
    figures = [analysis_job(folder, data) for data in FIGURES_OF if data in sets]
    work([*todo, *figures], folder, workers)


def arguments(
    text: str, tunes: bool = False, sets: Sequence[str] = ()
) -> tuple[argparse.Namespace, Path, Path | None]:
    """The command line that run.py and leaderboard.py share, the folder of runs, and that of real scans.

    With `tunes` it has --tune; with `sets`, names of data sets, --sets.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=REPO / "evidence", help="data, runs and logs")
    parser.add_argument("--real", default="", help=f"folder with {', '.join(REAL)}; empty: phantoms only")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="pretrainings of a method on each data set")
    parser.add_argument("--workers", type=int, default=0, help="runs at a time; 0: one for each core")
    parser.add_argument("--methods", nargs="+", help="of designs.py, in this order; default: the page's")
    if tunes:
        parser.add_argument("--tune", action="store_true", help="fine-tune the networks that are pretrained")
    if sets:
        words = f"{' or '.join(sets)}: which data; default: the first"
        parser.add_argument("--sets", nargs="+", choices=sets, default=[sets[0]], help=words)
    parser.add_argument("--page-only", action="store_true", help="write the page from what is there")
    args = parser.parse_args()
    real = Path(args.real).resolve() if args.real else None
    if real and not all((real / name).is_dir() for name in REAL):
        sys.exit(f"error: {real}: must hold the folders {', '.join(REAL)}; leave --real out to do without")
    return args, args.folder.resolve(), real


def main() -> None:
    """Train, measure and write the page."""
    args, folder, real = arguments(__doc__, sets=SETS)
    if not args.page_only and "usual" in args.sets:
        run_all(folder, real, tuple(args.methods or EVIDENCE), args.seeds, args.workers)
    if not args.page_only and VARIED in args.sets:
        run_varied(folder, args.methods or ON_VARIED, args.seeds, args.workers)
    evidence_page.write(REPO / "docs", folder, pretrainings.collect(folder))


if __name__ == "__main__":
    main()
