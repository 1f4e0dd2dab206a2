"""The values of Fig. 3: does a checkpoint that reconstructs better also score better after fine-tuning?"""

import csv
import dataclasses
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from p2w.errors import UserError
from p2w.files import parse_json
from p2w.finetune.results import FineTuningResult
from p2w.report.markup import several
from p2w.reproduce import paper_numbers
from p2w.reproduce.table import MAYBE, Number
from p2w.reproduce.table_builder import (
    TableChoice,
    by_fraction,
    finite,
    folds_note,
    join_folds,
    metric_of,
    percent,
)
from p2w.stats import pearson, summarise, values


@dataclass(frozen=True)
class Point:
    """A checkpoint: 1 - validation MSE of its pretraining, and the mean score of its fine-tunings in percent."""

    step: int
    quality: float
    mean: float
    sd: Number
    n: int
    planned: int
    folder: str


@dataclass(frozen=True)
class Panel:
    """A task: its points by step, Pearson's r of quality and mean with its 95 % interval, and the paper's r."""

    task: str
    title: str
    metric: str
    metric_title: str
    fraction: float
    points: list[Point]
    r: Number
    low: Number
    high: Number
    p: Number
    paper_r: Number


@dataclass(frozen=True)
class Figure3:
    """The panels of Fig. 3 and its footnotes."""

    name: str
    title: str
    panels: list[Panel]
    notes: list[str]


def build_fig3(results: Sequence[FineTuningResult], choice: TableChoice) -> Figure3:
    """Fig. 3 from the results whose checkpoint and validation MSE are known.

    Raises UserError when there are none, two of one checkpoint, or two target sets of one task.
    """
    usable = [one for one in results if one.step is not None and one.val_mse is not None]
    if not usable:
        raise UserError(
            "fig3: no run says the step and validation MSE of its pretraining; fine-tune checkpoints of a run, "
            "--init RUN@STEP"
        )
    panels, notes = [], _notes(len(results) - len(usable), usable)
    for task in sorted({one.task for one in usable}, key=_order):
        some = [one for one in usable if one.task == task]
        share = choice.fraction.get(task, choice.fraction.get("", paper_numbers.FRACTIONS.get(task, 1.0)))
        kept, share = by_fraction(task, some, choice.fraction, share)
        if len(kept) < len(some):
            notes.append(
                f"{task}: left out {several(len(some) - len(kept), 'run')} with other shares of the data."
            )
        kept = join_folds(kept)
        panels.append(_panel(task, kept, share, metric_of(task, kept, choice.metric)))
        if said := folds_note(paper_numbers.TASKS.get(task, task), kept):
            notes.append(said)
        unfinished = sum(not one.finished for one in kept)
        if unfinished:
            notes.append(f"{task}: {several(unfinished, 'checkpoint')} with fewer fine-tunings than planned.")
    return Figure3("fig3", "Fig. 3: reconstruction against transfer, checkpoint by checkpoint", panels, notes)


def pretraining(one: FineTuningResult) -> str:
    """The run of a checkpoint, from RUN/checkpoints/step-… or RUN@STEP; else its source as it is."""
    return re.sub(r"(/checkpoints/step-\d+|@\d+)$", "", one.source)


def _order(task: str) -> tuple[int, str]:
    known_ones = list(paper_numbers.TASKS)
    return (known_ones.index(task) if task in known_ones else len(known_ones), task)


def _notes(unknown: int, usable: Sequence[FineTuningResult]) -> list[str]:
    notes = [
        "A point is the mean of the fine-tunings of one checkpoint, its bar their standard deviation. Checkpoints of one "
        "training are not independent: the interval of r is too narrow."
    ]
    runs = sorted({pretraining(one) for one in usable})
    if len(runs) > 1:
        notes.append(f"Checkpoints are of {len(runs)} pretrainings: {', '.join(runs)}.")
    if unknown:
        notes.append(f"Left out: {several(unknown, 'run')} without step and validation MSE of a pretraining.")
    return notes


def _panel(task: str, results: Sequence[FineTuningResult], share: float, metric: str) -> Panel:
    """The panel of one task."""
    points: list[Point] = []
    seen: dict[tuple[str, int], Path] = {}
    sets = {one.test_set for one in results}
    if len(sets) > 1:
        raise UserError(
            f"task {task}: two target sets, {' and '.join(sorted(sets)[:2])}; name the folders of one of them"
        )
    for one in sorted(results, key=lambda result: result.step or 0):
        assert one.step is not None and one.val_mse is not None
        checkpoint = (pretraining(one), one.step)
        if checkpoint in seen:
            raise UserError(
                f"task {task}, checkpoint {one.step}: two runs, {seen[checkpoint]} and {one.folder}; name the folders of one"
            )
        seen[checkpoint] = one.folder
        scores = summarise(values(percent(one.metric(metric), metric)))
        if scores.n:
            counts = scores.n, one.planned
            points.append(
                Point(one.step, 1 - one.val_mse, scores.mean, finite(scores.sd), *counts, str(one.folder))
            )
    found = pearson([point.quality for point in points], [point.mean for point in points])
    numbers = (finite(found.r), finite(found.low), finite(found.high), finite(found.p_value))
    titles = paper_numbers.TASKS.get(task, task), metric, paper_numbers.METRICS.get(metric, metric)
    return Panel(task, *titles, share, points, *numbers, paper_numbers.FIG3_R.get(task))


def fig3_sentence(panel: Panel) -> str:
    """The correlation of a panel as a sentence."""
    head = f"{panel.title} {panel.metric_title}, {100 * panel.fraction:g} % of the data"
    count = several(len(panel.points), "checkpoint")
    printed = "" if panel.paper_r is None else f"; the paper has {panel.paper_r:.2f}"
    if panel.r is None:
        return f"{head}: no correlation of {count}{printed}"
    between = "" if panel.low is None else f", 95 % interval {panel.low:.2f} to {panel.high:.2f}"
    return f"{head}: Pearson r = {panel.r:.2f}{between}, n = {count}{printed}"


def fig3_to_json(figure: Figure3) -> str:
    """JSON that `load_fig3` reads."""
    return json.dumps(dataclasses.asdict(figure), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


POINT = {"step": int, "quality": float, "mean": float, "sd": MAYBE, "n": int, "planned": int, "folder": str}
PANEL = dict.fromkeys(("task", "title", "metric", "metric_title"), str) | {
    "fraction": float,
    "points": [POINT],
}
PANEL |= dict.fromkeys(("r", "low", "high", "p", "paper_r"), MAYBE)
FORM = {"name": str, "title": str, "panels": [PANEL], "notes": [str]}


def load_fig3(path: Path) -> Figure3:
    """Read what `fig3_to_json` wrote. Raises UserError when it is missing or damaged."""
    try:
        tree = parse_json(path.read_bytes(), FORM)
        panels = [
            Panel(**panel | {"points": [Point(**point) for point in panel["points"]]})
            for panel in tree["panels"]
        ]
        return Figure3(tree["name"], tree["title"], panels, tree["notes"])
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; make it again: p2w fig3") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged ({str(error).splitlines()[0]}); make it again: p2w fig3") from error


def fig3_csv(figure: Figure3) -> str:
    """CSV with one line for each checkpoint."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("task", "metric", "fraction", *(each.name for each in dataclasses.fields(Point))))
    for panel in figure.panels:
        for point in panel.points:
            writer.writerow((panel.task, panel.metric, panel.fraction, *dataclasses.astuple(point)))
    return file.getvalue()
