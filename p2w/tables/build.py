"""Transfers -> a table: which run stands in which cell, on which metric, with how much of the training data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from p2w.analysis.report.markup import several
from p2w.errors import UserError
from p2w.tables.marks import claims, known, marks
from p2w.tables.table import Cell, Column, Table
from p2w.target import paper
from p2w.target.results import Transfer
from p2w.target.statistics import Summary, Trials, summarise, values

RowOf = Callable[[Transfer], str | None]  # the row a transfer stands in, None when in none


@dataclass(frozen=True)
class Choice:
    """What may be chosen about a table."""

    metric: Mapping[str, str]  # by task, "" for all
    fraction: Mapping[str, float]  # by task, "" for all
    ours: str
    against: str  # "" the best of the others
    correct: bool


def chosen(pairs: Sequence[str], flag: str) -> dict[str, str]:
    """`ncc=0.45 ncs=0.1`, or one value for all tasks -> by task, "" for all. Raises UserError."""
    found: dict[str, str] = {}
    for pair in pairs:
        task, equals, value = pair.rpartition("=")
        if not value or (equals and not task) or task.lower() in found:
            raise UserError(f"{flag} {pair}: must be VALUE for all tasks, or TASK=VALUE once a task")
        found[task.lower()] = value
    return found


def numbers(pairs: Sequence[str], flag: str) -> dict[str, float]:
    """The same for shares of the training data."""
    found = {}
    for task, value in chosen(pairs, flag).items():
        try:
            found[task] = float(value)
        except ValueError as error:
            raise UserError(f"{flag} {value}: is no number; e.g. {flag} ncc=0.45 ncs=0.1") from error
        if not 0 < found[task] <= 1:
            raise UserError(f"{flag} {value}: must be above 0 and at most 1, a share of the training data")
    return found


def by_fraction(
    task: str, transfers: Sequence[Transfer], asked: Mapping[str, float], usual: float
) -> tuple[list[Transfer], float]:
    """Transfers of one task with the share of training data asked for, else the paper's, else the only one there is."""
    there = sorted({one.fraction for one in transfers})
    wanted = asked.get(task, asked.get("", usual))
    kept = [one for one in transfers if abs(one.fraction - wanted) < 1e-9]
    if kept:
        return kept, wanted
    told = task in asked or "" in asked
    if len(there) > 1 or told:
        has = ", ".join(f"{share:g}" for share in there)
        raise UserError(
            f"task {task}: no run with {wanted:g} of the training data, there are {has}; "
            f"choose one: --fraction {task}={there[0]:g}"
        )
    return list(transfers), there[0]


def metric_of(task: str, transfers: Sequence[Transfer], asked: Mapping[str, str]) -> str:
    """The metric that a task is compared on: asked for, else the paper's, else AUC or IoU by the kind of task."""
    usual = "auc" if transfers and transfers[0].kind == "classification" else "iou"
    metric = asked.get(task, asked.get("", paper.COMPARED.get(task, usual)))
    there = sorted({name for one in transfers for trial in one.trials for name in trial.metrics})
    if there and metric not in there:
        raise UserError(
            f"task {task}: no metric {metric}, its trials have {', '.join(there)}; choose one: --metric {task}={there[0]}"
        )
    return metric


def one_a_row(task: str, transfers: Sequence[Transfer], row_of: RowOf) -> dict[str, Transfer]:
    """Transfers of one task by row. Raises UserError when two stand in one, or when they are of two target sets."""
    found: dict[str, Transfer] = {}
    for one in transfers:
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


def percent(trials: Trials) -> dict[int, tuple[int, float]]:
    """Seeds and values in percent."""
    return {index: (seed, round(100 * value, 10)) for index, (seed, value) in trials.items()}


def cell(row: str, task: str, trials: Trials, planned: int, folder: str, published: Summary | None) -> Cell:
    """Without marks. `trials` in percent."""
    own, order = summarise(values(trials)), sorted(trials)
    return Cell(
        row, task, known(own.mean), known(own.sd), own.n, planned,
        paper_mean=published.mean if published else None, paper_sd=published.sd if published else None, trials=order,
        seeds=[trials[index][0] for index in order], values=[trials[index][1] for index in order], folder=folder,
    )  # fmt: skip


def build(
    name: str, title: str, transfers: Sequence[Transfer], row_of: RowOf, published: Mapping[str, Mapping[str, Summary]],
    usual: Mapping[str, float], tasks: Sequence[str], choice: Choice,
) -> Table:  # fmt: skip
    """The table: rows and tasks of the paper first, then what else the runs have, in the order of their names.

    `usual` is the share of the training data by task, 1 where it has none. Raises UserError for what cannot stand in one
    table.
    """
    there = {one.task for one in transfers if row_of(one) is not None}
    columns, placed, runs, other = [], {}, {}, 0
    for task in [*tasks, *sorted(there - set(tasks))]:
        some = [one for one in transfers if one.task == task and row_of(one) is not None]
        share = choice.fraction.get(task, choice.fraction.get("", usual.get(task, 1.0)))
        if some:
            kept, share = by_fraction(task, some, choice.fraction, share)
            other += len(some) - len(kept)
            some = kept
        metric = metric_of(task, some, choice.metric)
        runs[task] = one_a_row(task, some, row_of)
        placed[task] = {row: percent(one.metric(metric)) for row, one in runs[task].items()}
        prints = {one.test_set for one in runs[task].values()}
        head = paper.TASKS.get(task, task), metric, paper.METRICS.get(metric, metric)
        columns.append(Column(task, *head, share, next(iter(prints), "")))
    shown = {
        column.task: {row: at[column.task] for row, at in published.items() if column.task in at}
        if column.metric in paper.MAY_COMPARE.get(column.task, ())
        else {}
        for column in columns
    }
    extra = sorted({row for at in placed.values() for row in at} - set(published))
    rows = [*published, *extra]
    cells = _marked(rows, columns, placed, runs, shown, choice.correct)
    told = claims(placed, choice.ours, choice.against, "here")
    told += claims(shown, choice.ours, choice.against, "paper")
    said = notes(columns, choice, cells)
    if other:
        said.append(f"Left out: {several(other, 'run')} with other shares of the training data (--fraction).")
    return Table(name, title, rows, columns, cells, told, said)


def _marked(
    rows: Sequence[str],
    columns: Sequence[Column],
    placed: Mapping[str, Mapping[str, Trials]],
    runs: Mapping[str, Mapping[str, Transfer]],
    shown: Mapping[str, Mapping[str, Summary]],
    correct: bool,
) -> list[Cell]:
    cells = []
    for column in columns:
        task = column.task
        here, there = marks(placed[task], correct), marks(shown[task], correct)
        for row in rows:
            run, found, printed = runs[task].get(row), here.get(row), there.get(row)
            planned, folder = (run.planned, str(run.folder)) if run else (0, "")
            made = cell(row, task, placed[task].get(row, {}), planned, folder, shown[task].get(row))
            if found:
                made = replace(made, mark=found.mark, test=found.test, p=found.p, p_used=found.p_used)
            cells.append(replace(made, paper_mark=printed.mark if printed else ""))
    return cells


def notes(columns: Sequence[Column], choice: Choice, cells: Sequence[Cell]) -> list[str]:
    """What a reader must know to read the numbers."""
    said = ["Percent, mean ± standard deviation of the trials; the paper's numbers beside them are of ten."]
    family = "Holm's correction over the comparisons of a column" if choice.correct else "each p by itself"
    tests = sorted({one.test for one in cells if one.test})
    how = "; ".join(tests) if tests else "paired t-test where seeds agree, else Welch's"
    said.append(
        f"Bold, *: the best of its column. Underlined, ≈: not significantly different from it (p ≥ 0.05, {how}; {family}), "
        "which is no proof that they are equal."
    )
    if any(one.paper_mark for one in cells):
        said.append(
            "The paper's trials are not published: marks on its numbers are by Welch's test from means and deviations."
        )
    for column in columns:
        if column.task in paper.INFERRED and column.metric == paper.COMPARED[column.task]:
            said.append(
                f"{column.title} is compared on {METRIC_IN_FULL.get(column.metric, column.metric)}: "
                f"{paper.INFERRED[column.task]}, the paper says IoU; --metric {column.task}=NAME changes it."
            )
    short = [one for one in cells if one.planned and one.n < one.planned]
    if short:
        said.append(
            f"Fewer trials than planned in {several(len(short), 'cell')}: numbers are of those that are finished."
        )
    return said


METRIC_IN_FULL = {
    "iou": "foreground IoU at threshold 0.5",
    "mean_iou": "the mean of background and foreground IoU over thresholds 0.50 to 0.95",
}
