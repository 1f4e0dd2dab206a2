"""Does reconstruction alone make contrastive features? Trains, analyses and updates docs/evidence.md.

    make evidence                                          # phantom; with P2W_REAL_DATA=FOLDER the real scans too
    python bench/evidence/run.py --folder evidence --real ../shared/data
    python bench/evidence/run.py --page-only               # from what is in the folder

About half an hour on two free cores. The same command continues one that was stopped. On every data set two networks are
trained, alike but for what they see: Parts2Whole parts of 1/16 to 1/4, an autoencoder the whole. launch/analyze.py compares
them with the random network they began as, and with features that are no network; shortcuts.py asks what they read.
"""

import argparse
import sys
from pathlib import Path

import page
from jobs import REPO, Job, work

from p2w.resources import usable_cores

STEPS = {"phantom": 600, "real": 300}  # the real set is a quarter of the phantom's: 40 epochs and 79
EVERY = {"phantom": 25, "real": 12}  # steps between checkpoints, each validated
PRETEXTS: dict[str, list[str]] = {"parts": [], "autoencoder": ["--pretext.volume-fraction", "1", "1"]}
REAL = ("luna16", "dicom", "nifti")  # of the folder of real scans; its other folders hold no whole chests


def data_jobs(folder: Path, real: Path | None) -> list[list[Job]]:
    """Sets of sub-scans: 40 phantom scans, a quarter of them for validation; real scans, one of three for validation."""
    luna, phantom = folder / "LUNA16", folder / "phantom"
    cut: list[object] = ["preprocess/shard_luna.py", "--luna", luna, "--out", phantom, "--subsets", "0-9"]
    phantoms = ["-m", "p2w.phantom", "--out", luna, "--scans", "40", "--workers", str(usable_cores())]
    done = phantom / "manifest.parquet"
    jobs = [Job("phantom-scans", phantoms, done), Job("phantom-cut", [*cut, "--val-fraction", "0.25"], done)]
    if real:
        links = (
            folder / "realscans"
        )  # one folder with nothing else in it: names, and so the split, follow from it
        links.mkdir(parents=True, exist_ok=True)
        for name in REAL:
            if not (links / name).exists():
                (links / name).symlink_to(real / name)
        cut = [
            "preprocess/shard_scans.py",
            "--scans",
            links,
            "--out",
            folder / "real",
            "--val-fraction",
            "0.34",
        ]
        jobs.append(Job("real-cut", cut, folder / "real" / "manifest.parquet"))
    return [[job] for job in jobs]


def train_job(folder: Path, data: str, pretext: str) -> Job:
    """Train one network."""
    run = folder / "runs" / f"{data}-{pretext}"
    steps, every = STEPS[data], EVERY[data]
    length = (
        f"demo --train.steps {steps} --train.validate-every {every} --train.checkpoint-every {every}".split()
    )
    where = [
        "--train.keep",
        "100",
        "--train.checkpoint-minutes",
        "0",
        "--shards",
        folder / data,
        "--run-dir",
        run,
    ]
    return Job(run.name, ["launch/train.py", *length, *where, *PRETEXTS[pretext]], run / "status.json")


def analysis_job(folder: Path, data: str) -> Job:
    """Analyse Parts2Whole against all others, at the last step of each."""
    run, other = (folder / "runs" / f"{data}-{name}" for name in PRETEXTS)
    against = f"histogram,pixels,random,autoencoder={other}@{STEPS[data]}"
    command = ["launch/analyze.py", "--run", run, "--step", STEPS[data], "--against", against]
    sizes = "--max-wholes 40 --parts 10 --scales 6 --scale-parts 4"
    command += ["--shards", folder / data, *sizes.split()]
    return Job(f"{data}-analysis", command, run / "analysis" / "summary.json")


def shortcuts_job(folder: Path, data: str) -> Job:
    """Measure which cues the features of each network use."""
    command = ["bench/evidence/shortcuts.py", folder, data, STEPS[data]]
    return Job(f"{data}-shortcuts", command, folder / "runs" / f"{data}-shortcuts.json")


def main() -> None:
    """Train, analyse and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=REPO / "evidence", help="data, runs and logs")
    parser.add_argument(
        "--real", default="", help="folder of real scans with luna16, dicom, nifti; empty: phantom only"
    )
    parser.add_argument("--page-only", action="store_true", help="write the page from what is there")
    args = parser.parse_args()
    folder, real = args.folder.resolve(), Path(args.real).resolve() if args.real else None
    if real and not all((real / name).is_dir() for name in REAL):
        sys.exit(f"error: {real}: must hold the folders {', '.join(REAL)}; leave --real out to do without")
    sets = ["phantom", *(["real"] if real else [])]
    if not args.page_only:
        for stage in data_jobs(folder, real):
            work(stage, folder)
        work([train_job(folder, data, pretext) for data in sets for pretext in PRETEXTS], folder)
        work([make(folder, data) for data in sets for make in (analysis_job, shortcuts_job)], folder)
    page.write(REPO / "docs", folder, sets)


if __name__ == "__main__":
    main()
