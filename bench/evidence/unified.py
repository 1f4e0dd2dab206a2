"""Chooses weight and temperature of reconstruction with contrast, on phantoms alone. Fills a table of docs/evidence.md.

    python bench/evidence/unified.py --folder evidence
    python bench/evidence/unified.py --page-only           # from bench/results/unified.json

One pretraining of every candidate of designs.py, with a seed that no other table has. The rule, written before the first
result: the candidate with the highest AUC on the ten phantoms set aside. No real patient is looked at. The same command
continues one that was stopped.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from designs import CANDIDATES, REFERENCE, SELECTION_SEED, Pretraining
from jobs import REPO, work
from page import fill, table
from run import measure_job, prepare

from p2w.files import write_atomic

RESULTS = REPO / "bench" / "results" / "unified.json"
HEAD = ("weight", "temperature", "intensity strength", "AUC", "top-1", "MSE of the whole", "steps")


def measured(folder: Path) -> dict[str, dict[str, Any]]:
    """Candidate or reference -> its numbers, of those that are there; kept in bench/results too."""
    found = {}
    for name in (REFERENCE, *CANDIDATES):
        path = folder / "runs" / Pretraining(name, "phantom", SELECTION_SEED).name / "measured.json"
        if path.exists():
            one = json.loads(path.read_text())
            features = one["features"][name]
            found[name] = {
                "auc": features["plain"], "top1": features["top1"], "mse": one["mse"], "steps": one["steps"],
            }  # fmt: skip
    if found:
        write_atomic(RESULTS, json.dumps(found, indent=1) + "\n")
    return found or (json.loads(RESULTS.read_text()) if RESULTS.exists() else {})


def chosen(found: dict[str, dict[str, Any]]) -> str:
    """The candidate with the highest AUC."""
    return max((name for name in found if name in CANDIDATES), key=lambda name: found[name]["auc"])


def choice(found: dict[str, dict[str, Any]]) -> str:
    """The table; the candidate that the rule takes is in bold."""
    rows = []
    for name, one in sorted(found.items(), key=lambda item: -item[1]["auc"]):
        cells = [f"{one['auc']:.3f}", f"{one['top1']:.3f}", f"{one['mse']:.4f}", f"{one['steps']}"]
        weight, temperature, strength = (
            (part[1:] for part in name.split("_")[1:]) if name in CANDIDATES else ("no contrast", "-", "0")
        )
        bold = "**" if name == chosen(found) else ""
        rows.append([f"{bold}{weight}{bold}", temperature, strength, *cells])
    return table(HEAD, rows)


def main() -> None:
    """Train, measure and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=REPO / "evidence", help="data, runs and logs")
    parser.add_argument("--workers", type=int, default=0, help="runs at a time; 0: one for each core")
    parser.add_argument("--page-only", action="store_true", help="write the table from what is there")
    args = parser.parse_args()
    folder = args.folder.resolve()
    if not args.page_only:
        prepare(folder, None, args.workers)
        todo = [
            measure_job(folder, Pretraining(name, "phantom", SELECTION_SEED))
            for name in (*CANDIDATES, REFERENCE)
        ]
        work(todo, folder, args.workers)
    page = REPO / "docs" / "evidence.md"
    page.write_text(fill(page.read_text(), "unified choice", choice(measured(folder))))
    print(page)


if __name__ == "__main__":
    main()
