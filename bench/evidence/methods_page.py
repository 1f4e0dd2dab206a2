"""Updates the tables and pictures of docs/methods.md, and leaves the text between them as it is (see page.py)."""

import json
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gate import read_gates
from page import fill, table
from PIL import Image
from targets_page import gate_rows

from p2w.reproduce.render import probability
from p2w.reproduce.sweep_jobs import slug
from p2w.stats import Comparison, compare_pretrainings, holm

COLUMNS: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "AUC": lambda one: one["plain"],
    "same tile, other scan": lambda one: one["against_one_tile"],
    "standardised": lambda one: one["standardised"],
    "gamma": lambda one: one["gamma"],
    "whole found, top-1": lambda one: one["retrieval"]["top1"],
}
TASKS = {"ncc": ("auc", "nodules told apart, AUC"), "ncs": ("mean_iou", "nodules cut out, mean IoU")}


def write(
    docs: Path, folder: Path, methods: Iterable[str], share: Callable[[str], float],
    folder_of: Callable[[Path, str, int], Path], block: str = "comparison",
) -> None:  # fmt: skip
    """Fill a block of DOCS/methods.md; pictures of seed 0 go to DOCS/methods with the first of them."""
    path = docs / "methods.md"
    rows = [_row("random initialisation", _found(folder, "parts2whole", folder_of, "untrained.json"), "")]
    for name in methods:
        rows.append(_row(name, _found(folder, name, folder_of, "compared.json"), f"{share(name):.2f}"))
        if block == "comparison":
            _draw_run(folder_of(folder, name, 0), docs / "methods")
    rows = [row for row in rows if row[1] != "0"]
    if not rows:
        return
    tests = against_random(
        folder, [name for name in methods if any(row[0] == name for row in rows)], folder_of
    )
    rows = [[*row, *(tests.get((row[0], task), "-") for task in TASKS)] for row in rows]
    tasks = [title for _, title in TASKS.values()]
    heads = (
        "",
        "seeds",
        "cost of a step",
        *COLUMNS,
        *tasks,
        *(f"{title}: against random" for title in tasks),
    )
    gates = read_gates(folder)
    found = [gate for gate in gate_rows([*TASKS], gates) if gate]
    blank = ["", "", *[""] * len(COLUMNS)]
    rows += [[head, *blank, *cells, *[""] * len(TASKS)] for head, *cells in found]
    path.write_text(fill(path.read_text(), block, table(heads, rows)))
    print(path)


def against_random(
    folder: Path, methods: Iterable[str], folder_of: Callable[[Path, str, int], Path]
) -> dict[tuple[str, str], str]:
    """By method and task, the difference to random weights with its 95 % interval, and p by Holm over the whole table.

    The pretraining is the replicate, so a method with one seed has no test.
    """
    tests: dict[tuple[str, str], Comparison] = {}
    for name in methods:
        for task, (metric, _) in TASKS.items():
            runs = {seed: folder_of(folder, name, seed) for seed in range(99)}
            tuned = folder / runs[0].parent.name.replace("methods", "transfer") / task
            found = {seed: _trials(tuned / slug(run.name), metric) for seed, run in runs.items()}
            ours = {seed: trials for seed, trials in found.items() if trials}
            scratch = _trials(tuned / "scratch", metric)
            if ours and scratch:
                tests[name, task] = compare_pretrainings(ours, {None: scratch})
    adjusted = holm([one.p for one in tests.values()])
    return {key: _difference(one, p) for (key, one), p in zip(tests.items(), adjusted, strict=True)}


def _difference(one: Comparison, p: float) -> str:
    if math.isnan(p):
        return f"{one.difference:+.3f}, {one.why}"
    return f"{one.difference:+.3f} ({one.low:.3f} to {one.high:.3f}), {probability(p)}"


def _trials(run: Path, metric: str) -> dict[int, tuple[int, float]]:
    """Seed and metric of each finished trial of a fine-tuning, by its number; empty where there is none."""
    results = [json.loads(path.read_text()) for path in sorted(run.glob("trial-*/result.json"))]
    return {one["trial"]: (one["seed"], one["metrics"][metric]) for one in results}


def _draw_run(run: Path, place: Path) -> None:
    """Copy the run's picture of inputs and outputs, if it has one."""
    for figure in ("reconstruction.png", "views.png"):
        if (source := run / "figures" / figure).exists():
            draw(source, place / f"{run.name.removesuffix('-seed0')}.png")


def draw(source: Path, target: Path) -> None:
    """The first two of four wholes, in 64 colours, at most 900 pixels wide."""
    target.parent.mkdir(exist_ok=True)
    image = Image.open(source).convert("RGB")
    image = image.crop((0, 0, image.width, image.height * 52 // 100))
    image.thumbnail((900, 900))
    image.quantize(64, dither=Image.Dither.NONE).save(target, optimize=True)


def _found(
    folder: Path, name: str, folder_of: Callable[[Path, str, int], Path], file: str
) -> list[dict[str, Any]]:
    """The measurements of each seed, with the fine-tunings from its weights."""
    found = []
    for seed in range(99):
        run = folder_of(folder, name, seed)
        if not (run / file).exists():
            break
        one = json.loads((run / file).read_text())
        untrained = file != "compared.json"
        start = "scratch" if untrained else slug(run.name)
        tuned = folder / run.parent.name.replace("methods", "transfer")
        one["tasks"] = {task: _scores(tuned / task / start, metric) for task, (metric, _) in TASKS.items()}
        if untrained and seed:  # scratch is one start, whatever the seed of a run
            one["tasks"] = dict.fromkeys(TASKS)
        found.append(one)
    return found


def _scores(run: Path, metric: str) -> float | None:
    """Mean of a metric over the trials of one fine-tuning; None where there are none."""
    results = [json.loads(path.read_text()) for path in sorted(run.glob("trial-*/result.json"))]
    values = [one["metrics"][metric] for one in results]
    return statistics.mean(values) if values else None


def _row(name: str, found: list[dict[str, Any]], cost: str) -> list[str]:
    measured = [[column(one) for one in found] for column in COLUMNS.values()]
    measured += [[one["tasks"][task] for one in found] for task in TASKS]
    return [name, str(len(found)), cost, *map(_cell, measured)]


def _cell(values: list[float | None]) -> str:
    """Mean ± standard deviation over seeds."""
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    spread = f" ± {statistics.stdev(there):.3f}" if len(there) > 1 else ""
    return f"{statistics.mean(there):.3f}{spread}"
