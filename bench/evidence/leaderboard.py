"""Every pretext beside the others: separability and retrieval on phantoms and real scans. Fills docs/leaderboard.md.

    make leaderboard                                       # phantom; with P2W_REAL_DATA=FOLDER the real scans too
    python bench/evidence/leaderboard.py --folder evidence --real scans --methods spark voco
    python bench/evidence/leaderboard.py --folder evidence --real scans --tune    # fine-tunes what is pretrained
    python bench/evidence/leaderboard.py --page-only       # from bench/results/pretrainings.json

A row of one's own is a line in METHODS of designs.py. Runs are shared with `make evidence`; `--methods` begins with those it
names, and the page always has all rows. The same command continues one that was stopped.
"""

from collections.abc import Iterable
from pathlib import Path

import pretrainings
from designs import METHODS, MOST, STEPS, cost, data_sets, plan, steps_of
from fine_tuned import set_jobs, tune_job
from jobs import REPO, work
from page import fill, table
from pretrainings import NOT_RUN, Found, column, compare, counted, tested, values
from run import arguments, measure_job, run_all

BARE = ("histogram", "pixels", "random")
NUMBERS = {"AUC": "plain", "top-1": "top1"}
PROBE, TUNED = "probe", "tuned"
KINDS = ("phantom", "real")
COLUMNS = {
    "phantom": (*NUMBERS, "frozen probe, R²", "fine-tuning, AUC of NCC"),
    "real": (*NUMBERS, "frozen probe, R²", "fine-tuning, Dice of sarcomas"),
}


def write(docs: Path, found: Found) -> None:
    """Fill DOCS/leaderboard.md."""
    path = docs / "leaderboard.md"
    text = fill(path.read_text(), "leaderboard", board(found))
    text = fill(text, "against random", against_random(found))
    path.write_text(fill(text, "compute", compute(found)))
    print(path)


def ranked(found: Found) -> list[str]:
    """The rows: methods by their mean AUC on real scans, then on phantoms, and those that were not run last."""

    def score(label: str) -> tuple[float, float]:
        means = [[*values(found, kind, label, "plain").values()] for kind in ("real", "phantom")]
        first, second = (sum(some) / len(some) if some else -1.0 for some in means)
        return first, second

    return sorted((*METHODS, *BARE), key=score, reverse=True)


def board(found: Found) -> str:
    """Methods x (AUC, retrieval, frozen probe, fine-tuning) x (phantom, real)."""
    heads = [f"{kind}: {name}" for kind in KINDS for name in ("pretrainings", *COLUMNS[kind])]
    rows = []
    for label in ranked(found):
        cells = []
        for kind in KINDS:
            cells.append(counted(found, kind, label))
            cells += [column("", number)[1](found, kind, label) for number in (*NUMBERS.values(), PROBE)]
            bare = label in ("histogram", "pixels")  # no networks
            cells.append("-" if bare else column("", TUNED)[1](found, kind, label))
        rows.append([label, *cells])
    return table(("method", *heads), rows)


def against_random(found: Found) -> str:
    """Each method less the network it began as: difference, interval, p by Holm over the whole table."""
    keys = [(name, kind, number) for name in METHODS for kind in KINDS for number in NUMBERS.values()]
    said = tested(
        {
            (name, kind, number): compare(
                values(found, kind, name, number), values(found, kind, "random", number)
            )
            for name, kind, number in keys
        }
    )
    rows = [
        [name, *(said[name, kind, number] for kind in KINDS for number in NUMBERS.values())]
        for name in ranked(found)
        if name in METHODS
    ]
    return table(("less random", *[f"{kind}: {name}" for kind in KINDS for name in NUMBERS]), rows)


def compute(found: Found) -> str:
    """Arithmetic of a step, steps, and the processor time that training took."""
    rows = []
    for name in METHODS:
        spent = [one["training_s"] for one in found if one["method"] == name and one.get("training_s")]
        took = f"{sum(spent) / len(spent):.0f} s" if spent else NOT_RUN
        rows.append([name, f"{cost(name):.2f}", f"{steps_of(name)}", took])
    head = f"arithmetic of a step, steps for that of {STEPS} steps of parts2whole or at most {MOST}"
    return table(("method", *head.split(", "), "processor time of a pretraining"), rows)


def tune(folder: Path, real: Path | None, seeds: int, workers: int, methods: Iterable[str]) -> None:
    """Fine-tune the networks that are pretrained and measured."""
    for stage in set_jobs(folder, real):
        work(stage, folder, workers)
    wanted = plan(methods, data_sets(bool(real)), seeds)
    work([tune_job(folder, one) for one in wanted if measure_job(folder, one).finished], folder, workers)


def main() -> None:
    """Train, measure, fine-tune where asked, and write the page."""
    args, folder, real = arguments(__doc__, tunes=True)
    if args.tune:
        tune(folder, real, args.seeds, args.workers, args.methods or [*METHODS])
    elif not args.page_only:
        first = args.methods or []
        methods = (*first, *(name for name in METHODS if name not in first))
        run_all(folder, real, methods, args.seeds, args.workers)
    write(REPO / "docs", pretrainings.collect(folder))


if __name__ == "__main__":
    main()
