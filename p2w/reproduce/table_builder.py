"""Builds a table from fine-tunings: the run of each cell, joined folds, significance marks and claims.

The value of a trial is the mean of its metric over the folds, and n is the number of trials: folds share training
patients, so they are not independent trials. Predictions of folds are not pooled, because networks' scores differ in scale.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from p2w.errors import UserError
from p2w.finetune.results import FineTuningResult, TrialResult, is_share
from p2w.finetune.task_types import task_type
from p2w.report.markup import several
from p2w.reproduce import paper_numbers
from p2w.reproduce.table import BEST, EQUIVALENT, Cell, Claim, Column, Number, Table
from p2w.stats import LEVEL, Comparison, Summary, Trials, compare, holm, summarise, values, welch


@dataclass(frozen=True)
class Significance:
    """Mark of a row in a column, the test against the best row, its p, and the p after correction."""

    mark: str
    test: str = ""
    p: Number = None
    p_used: Number = None


def finite(value: float) -> Number:
    """A number for JSON; None for NaN and infinity."""
    return value if math.isfinite(value) else None


def summary_of(one: Trials | Summary) -> Summary:
    """Mean and deviation of trials, or the paper's own."""
    return one if isinstance(one, Summary) else summarise(values(one))


def test(a: Trials | Summary, b: Trials | Summary) -> Comparison:
    """The test of `a` against `b`: Welch's if one is a summary of the paper, else as `compare` chooses."""
    if isinstance(a, Summary) or isinstance(b, Summary):
        return welch(summary_of(a), summary_of(b))
    return compare(a, b)


def significance_marks(column: Mapping[str, Trials | Summary], correct: bool) -> dict[str, Significance]:
    """Marks of the best and the equivalent rows. A row with fewer than two trials has none, nor has a single row.

    `correct`: Holm over the comparisons with the best of this column; else each p by itself, as in the paper.
    """
    judged = {row: one for row, one in column.items() if summary_of(one).n > 1}
    if len(judged) < 2:
        return {}
    best = max(judged, key=lambda row: summary_of(judged[row]).mean)
    found = {row: test(judged[best], one) for row, one in judged.items() if row != best}
    used = [one.p for one in found.values()]
    used = holm(used) if correct else used
    marks = {best: Significance(BEST)}
    for (row, one), p in zip(found.items(), used, strict=True):
        method = one.method + (f" ({one.why})" if one.why else "")
        marks[row] = Significance(EQUIVALENT if p >= LEVEL else "", method, finite(one.p), finite(p))
    return marks


def claims(
    columns: Mapping[str, Mapping[str, Trials | Summary]], ours: str, against: str, source: str
) -> list[Claim]:
    """Tests of our row against the best of the others (`against` empty) or a named row on each task; Holm over the tasks."""
    made = []
    for task, column in columns.items():
        judged = {row: one for row, one in column.items() if summary_of(one).n > 1}
        others = [row for row in judged if row != ours and against in ("", row)]
        if ours not in judged or not others:
            continue
        other = max(others, key=lambda row: summary_of(judged[row]).mean)
        one = test(judged[ours], judged[other])
        made.append(
            Claim(
                task, ours, other, finite(one.difference), one.method, list(one.n), finite(one.t), finite(one.df),
                finite(one.p), None, one.why, source, finite(one.low), finite(one.high),
            )
        )  # fmt: skip
    adjusted = holm([math.nan if claim.p is None else claim.p for claim in made])
    return [replace(claim, p_holm=finite(p)) for claim, p in zip(made, adjusted, strict=True)]


def join_folds(results: Sequence[FineTuningResult]) -> list[FineTuningResult]:
    """The results of one task, where those of several folds become one result over all the folds of the task.

    A trial counts when it is finished in every one of these folds, with one seed. With one fold all stay as they are.
    """
    folds = sorted({one.fold for one in results if one.fold is not None})
    if len(folds) < 2:
        return list(results)
    groups: dict[object, list[FineTuningResult]] = {}
    for one in results:
        alike = (one.label, one.source, one.network, one.width, one.decoder, one.fraction, one.fingerprint)
        groups.setdefault((*alike, sorted(one.recipe.items())).__repr__(), []).append(one)
    return [made for group in groups.values() for made in _join(group, folds)]


def _join(group: list[FineTuningResult], folds: list[int]) -> list[FineTuningResult]:
    # A fold twice: building the table raises, and names both
    if len({one.fold for one in group}) < len(group):
        return group
    trials = []
    for index in sorted({trial.index for one in group for trial in one.trials}):
        same = [trial for one in group for trial in one.trials if trial.index == index]
        if len(same) == len(folds) and len({trial.seed for trial in same}) == 1:
            names = set.intersection(*(set(trial.metrics) for trial in same))
            metrics = {name: fmean(trial.metrics[name] for trial in same) for name in sorted(names)}
            trials.append(TrialResult(index, same[0].seed, metrics))
    first = group[0]
    where = first.folder.parent if len(group) > 1 else first.folder
    planned = max(one.planned for one in group)
    return [
        replace(first, folder=where, fold=None, folds=tuple(folds), planned=planned, trials=tuple(trials))
    ]


def folds_note(title: str, results: Sequence[FineTuningResult]) -> str | None:
    """A note on the folds of a column: those that were not tested, or that trials are means; else None."""
    for one in results:
        tested = one.folds or (() if one.fold is None else (one.fold,))
        if tested and len(tested) < one.of_folds:
            return f"{title}: of {one.of_folds} folds only {', '.join(map(str, tested))} tested on."
        if tested and len(tested) > 1:
            return f"{title}: a trial is the mean over {len(tested)} folds."
    return None


def mixed_settings_note(title: str, rows: dict[str, FineTuningResult]) -> str | None:
    """A warning if the rows of a column differ in their fine-tuning recipe, or in the width of a network; else None."""
    names = sorted({name for one in rows.values() for name in one.recipe} - {"seed"})
    found = []
    for name in names:
        by: dict[object, str] = {}
        for row, one in rows.items():
            if name in one.recipe:
                by.setdefault(one.recipe[name], row)
        if len(by) > 1:
            found.append(f"{name} " + ", ".join(f"{value} ({row})" for value, row in by.items()))
    widths: dict[str, dict[int, str]] = {}
    for row, one in rows.items():
        if one.width is not None:
            widths.setdefault(one.network, {}).setdefault(one.width, row)
    for network, own in widths.items():
        if len(own) > 1:
            found.append(f"width of {network} " + ", ".join(f"{width} ({row})" for width, row in own.items()))
    if not found:
        return None
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"Warning: {title}: rows differ by more than their starting point: {'; '.join(found[:3])}{more}."


RowOf = Callable[[FineTuningResult], str | None]  # the row of a result; None if it belongs to none


@dataclass(frozen=True)
class TableChoice:
    """Options of a table."""

    metric: Mapping[str, str]  # by task, "" for all
    fraction: Mapping[str, float]  # by task, "" for all
    ours: str
    against: str  # "" is the best of the others
    correct: bool


def values_by_task(pairs: Sequence[str], flag: str) -> dict[str, str]:
    """`ncc=0.45 ncs=0.1`, or one value for all tasks -> by task, "" for all. Raises UserError."""
    found: dict[str, str] = {}
    for pair in pairs:
        task, equals, value = pair.rpartition("=")
        if not value or (equals and not task) or task.lower() in found:
            raise UserError(f"{flag} {pair}: must be VALUE for all tasks, or TASK=VALUE once a task")
        found[task.lower()] = value
    return found


def numbers_by_task(pairs: Sequence[str], flag: str) -> dict[str, float]:
    """As `values_by_task`, for shares of the training data in (0, 1]."""
    found = {}
    for task, value in values_by_task(pairs, flag).items():
        try:
            found[task] = float(value)
        except ValueError as error:
            raise UserError(f"{flag} {value}: is no number; e.g. {flag} ncc=0.45 ncs=0.1") from error
        if not 0 < found[task] <= 1:
            raise UserError(f"{flag} {value}: must be above 0 and at most 1, a share of the training data")
    return found


def by_fraction(
    task: str, results: Sequence[FineTuningResult], asked: Mapping[str, float], usual: float
) -> tuple[list[FineTuningResult], float]:
    """Results of one task with the share of training data asked for, else the paper's, else the only share there is."""
    there = sorted({one.fraction for one in results})
    wanted = asked.get(task, asked.get("", usual))
    kept = [one for one in results if abs(one.fraction - wanted) < 1e-9]
    if kept:
        return kept, wanted
    explicit = task in asked or "" in asked
    if len(there) > 1 or explicit:
        has = ", ".join(f"{share:g}" for share in there)
        raise UserError(
            f"task {task}: no run with {wanted:g} of the training data, there are {has}; "
            f"choose one: --fraction {task}={there[0]:g}"
        )
    return list(results), there[0]


def metric_of(task: str, transfers: Sequence[FineTuningResult], asked: Mapping[str, str]) -> str:
    """The metric that a task is compared on: asked for, else the paper's, else what its kind of task compares."""
    usual = task_type(transfers[0].kind).compared if transfers else "iou"
    metric = asked.get(task, asked.get("", paper_numbers.COMPARED.get(task, usual)))
    there = sorted({name for one in transfers for trial in one.trials for name in trial.metrics})
    if there and metric not in there:
        raise UserError(
            f"task {task}: no metric {metric}, its trials have {', '.join(there)}; choose one: --metric {task}={there[0]}"
        )
    return metric


def result_by_row(
    task: str, results: Sequence[FineTuningResult], row_of: RowOf
) -> dict[str, FineTuningResult]:
    """Results of one task by row. Raises UserError for two results in a row, or of two target sets."""
    found: dict[str, FineTuningResult] = {}
    for one in results:
        row = row_of(one)
        if row is None:
            continue
        if row in found:
            raise UserError(
                f"task {task}, row {row}: two runs, {found[row].folder} and {one.folder}; name the folders of one of them, "
                "or give one another --label when it is fine-tuned"
            )
        found[row] = one
    sets = {one.test_set: one.folder for one in found.values()}
    if len(sets) > 1:
        (one_print, one_folder), (other_print, other_folder) = list(sets.items())[:2]
        raise UserError(
            f"task {task}: two target sets, {one_print} in {one_folder} and {other_print} in {other_folder}; numbers of two "
            "test sets cannot be compared, name the folders of one of them"
        )
    return found


def percent(trials: Trials, metric: str) -> dict[int, tuple[int, float]]:
    """Seeds and values in percent; of a metric with a unit of its own, such as mae, as they are."""
    factor = 100 if is_share(metric) or metric.partition(":")[0] == "r2" else 1
    return {index: (seed, round(factor * value, 10)) for index, (seed, value) in trials.items()}


def cell(row: str, task: str, trials: Trials, planned: int, folder: str, published: Summary | None) -> Cell:
    """A cell without marks; `trials` are in percent."""
    own, order = summarise(values(trials)), sorted(trials)
    return Cell(
        row, task, finite(own.mean), finite(own.sd), own.n, planned,
        paper_mean=published.mean if published else None, paper_sd=published.sd if published else None, trials=order,
        seeds=[trials[index][0] for index in order], values=[trials[index][1] for index in order], folder=folder,
    )  # fmt: skip


def build_table(
    name: str,
    title: str,
    results: Sequence[FineTuningResult],
    row_of: RowOf,
    published: Mapping[str, Mapping[str, Summary]],
    usual: Mapping[str, float],
    tasks: Sequence[str],
    choice: TableChoice,
) -> Table:
    """Build a table: first the rows and tasks of the paper, then those that only the runs have, sorted by name.

    `usual` is the default share of the training data by task, 1 if it has none. Raises UserError for results that cannot be
    compared in one table.
    """
    there = {one.task for one in results if row_of(one) is not None}
    columns, placed, runs, other = [], {}, {}, 0
    for task in [*tasks, *sorted(there - set(tasks))]:
        some = [one for one in results if one.task == task and row_of(one) is not None]
        share = choice.fraction.get(task, choice.fraction.get("", usual.get(task, 1.0)))
        if some:
            kept, share = by_fraction(task, some, choice.fraction, share)
            other += len(some) - len(kept)
            some = join_folds(kept)
        metric = metric_of(task, some, choice.metric)
        runs[task] = result_by_row(task, some, row_of)
        placed[task] = {row: percent(one.metric(metric), metric) for row, one in runs[task].items()}
        prints = {one.test_set for one in runs[task].values()}
        head = paper_numbers.TASKS.get(task, task), metric, paper_numbers.METRICS.get(metric, metric)
        columns.append(Column(task, *head, share, next(iter(prints), "")))
    shown = {
        column.task: {row: at[column.task] for row, at in published.items() if column.task in at}
        if column.metric in paper_numbers.MAY_COMPARE.get(column.task, ())
        else {}
        for column in columns
    }
    extra = sorted({row for at in placed.values() for row in at} - set(published))
    rows = [*published, *extra]
    cells = _marked(rows, columns, placed, runs, shown, choice.correct)
    tests = claims(placed, choice.ours, choice.against, "here")
    tests += claims(shown, choice.ours, choice.against, "paper")
    footnotes = notes(columns, choice, cells)
    for column in columns:
        own = runs[column.task]
        footnotes += filter(
            None, (folds_note(column.title, [*own.values()]), mixed_settings_note(column.title, own))
        )
    if other:
        footnotes.append(
            f"Left out: {several(other, 'run')} with other shares of the training data (--fraction)."
        )
    return Table(name, title, rows, columns, cells, tests, footnotes)


def _marked(
    rows: Sequence[str],
    columns: Sequence[Column],
    placed: Mapping[str, Mapping[str, Trials]],
    runs: Mapping[str, Mapping[str, FineTuningResult]],
    shown: Mapping[str, Mapping[str, Summary]],
    correct: bool,
) -> list[Cell]:
    cells = []
    for column in columns:
        task = column.task
        here, there = significance_marks(placed[task], correct), significance_marks(shown[task], correct)
        for row in rows:
            run, found, printed = runs[task].get(row), here.get(row), there.get(row)
            planned, folder = (run.planned, str(run.folder)) if run else (0, "")
            made = cell(row, task, placed[task].get(row, {}), planned, folder, shown[task].get(row))
            if found:
                made = replace(made, mark=found.mark, test=found.test, p=found.p, p_used=found.p_used)
            cells.append(replace(made, paper_mark=printed.mark if printed else ""))
    return cells


def notes(columns: Sequence[Column], choice: TableChoice, cells: Sequence[Cell]) -> list[str]:
    """Footnotes on how to read the numbers."""
    lines = ["Percent, mean ± standard deviation of the trials; the paper's numbers are of ten."]
    family = "Holm's correction over the comparisons of a column" if choice.correct else "each p by itself"
    tests = sorted({one.test for one in cells if one.test})
    how = "; ".join(tests) if tests else "paired t-test where seeds agree, else Welch's"
    lines.append(
        f"Bold, *: the best of its column. Underlined, ≈: not significantly different from it (p ≥ 0.05, {how}; {family}), "
        "which does not prove that they are equal."
    )
    if tests:
        lines.append(
            "The trials of a row start from one pretraining: a test is of these weights. To tell methods of pretraining "
            "apart, pretrain several times and compare the pretrainings."
        )
    if any(one.paper_mark for one in cells):
        lines.append(
            "The paper's trials are not published: marks on its numbers are by Welch's test from means and deviations."
        )
    for column in columns:
        if column.task in paper_numbers.INFERRED and column.metric == paper_numbers.COMPARED[column.task]:
            lines.append(
                f"{column.title} is compared on {METRIC_IN_FULL.get(column.metric, column.metric)}: "
                f"{paper_numbers.INFERRED[column.task]}, the paper says IoU; --metric {column.task}=NAME changes it."
            )
    short = [one for one in cells if one.planned and one.n < one.planned]
    if short:
        lines.append(
            f"Fewer trials than planned in {several(len(short), 'cell')}: numbers are of those that are finished."
        )
    return lines


METRIC_IN_FULL = {
    "iou": "foreground IoU at threshold 0.5",
    "mean_iou": "the mean of background and foreground IoU over thresholds 0.50 to 0.95",
}
