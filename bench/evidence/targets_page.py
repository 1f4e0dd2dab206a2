"""Updates the tables of docs/targets.md, and leaves the text between them as it is."""

import math
import re
from collections.abc import Mapping, Sequence

from gate import ZEROED, Gate
from jobs import REPO
from page import fill, table

from p2w.reproduce.render import effect, probability
from p2w.reproduce.table import BEST, Cell, Claim, Column, Table
from p2w.stats import Trials, compare_pretrainings, holm, summarise

SEED = re.compile(r"(.+) seed (\d+)")  # the label of one of several pretrainings by a method
OURS = "Parts2Whole"


def write(block: str, seen: Table, against: str = "", gates: Mapping[str, Gate] | None = None) -> None:
    """Fill a block of docs/targets.md.

    The last rows, where asked for: what Parts2Whole has more than `against`, here and in the paper, which are different
    tests of different data; p is Holm's over the tasks. Below, for each task, what all labels give and what it costs to
    zero coarse levels.
    """
    columns = [
        column for column in seen.columns if any(cell.n for cell in seen.cells if cell.task == column.task)
    ]
    methods = list(dict.fromkeys(method_of(row) for row in seen.rows))
    rows = [[method, *(_cell_of(seen, method, column) for column in columns)] for method in methods]
    rows = [row for row in rows if any(cell != "-" for cell in row[1:])]
    if against:
        rows += _differences(seen, columns, against)
    rows += gate_rows([column.task for column in columns], gates or {})
    put(block, table(("", *(column.head for column in columns)), rows))


def method_of(row: str) -> str:
    """`Parts2Whole seed 2` -> `Parts2Whole`."""
    found = SEED.fullmatch(row)
    return found[1] if found else row


def pretrainings(seen: Table, method: str, task: str) -> dict[str | None, Trials]:
    """The trials of each pretraining of a method, by its seed; those of a row that was not pretrained under None."""
    found: dict[str | None, Trials] = {}
    for row in seen.rows:
        cell, seed = seen.cell(row, task), SEED.fullmatch(row)
        if method_of(row) == method and cell.values:
            trials = zip(cell.trials, cell.seeds, cell.values, strict=True)
            found[seed[2] if seed else None] = {index: (own, value) for index, own, value in trials}
    return found


def _cell_of(seen: Table, method: str, column: Column) -> str:
    """One pretraining: as `shown`. Several: mean and deviation of the pretrainings, which are the replicates."""
    if method in seen.rows:
        return shown(seen.cell(method, column.task))
    means = [
        summarise([value for _, value in one.values()]).mean
        for one in pretrainings(seen, method, column.task).values()
    ]
    if not means:
        return "-"
    found = summarise(means)
    spread = "" if math.isnan(found.sd) else f" ± {found.sd:.2f}"
    return f"{found.mean:.2f}{spread} ({found.n} pretrainings)"


def _differences(seen: Table, columns: Sequence[Column], against: str) -> list[list[str]]:
    """Rows of Parts2Whole's difference to `against`, with interval and Holm's p over the tasks."""
    several = any(SEED.fullmatch(row) for row in seen.rows)
    rows = []
    for source, said in (("here", ""), ("paper", " in the paper")):
        if several and source == "here":
            claims = _nested_claims(seen, columns, against)
        else:
            claims = {one.task: one for one in seen.claims if (one.other, one.source) == (against, source)}
        cells = [_difference(claims.get(column.task)) for column in columns]
        rows.append([f"{OURS} - {against}{said}", *cells])
    return rows


def _nested_claims(seen: Table, columns: Sequence[Column], against: str) -> dict[str, Claim]:
    """The test of the method on each task, with the pretraining as the replicate."""
    tests = {}
    for column in columns:
        ours, others = (pretrainings(seen, method, column.task) for method in (OURS, against))
        if ours and others:
            tests[column.task] = compare_pretrainings(ours, others)
    adjusted = holm([one.p for one in tests.values()])
    finite = lambda value: value if math.isfinite(value) else None  # noqa: E731
    return {
        task: Claim(
            task, OURS, against, one.difference, one.method, list(one.n), finite(one.t), finite(one.df), finite(one.p),
            finite(p), one.why, "here", finite(one.low), finite(one.high),
        )
        for (task, one), p in zip(tests.items(), adjusted, strict=True)
    }  # fmt: skip


def _difference(claim: Claim | None) -> str:
    if claim is None:
        return "-"
    return f"{effect(claim)}, " + (claim.why if claim.p_holm is None else probability(claim.p_holm))


def gate_rows(tasks: Sequence[str], gates: Mapping[str, Gate]) -> list[list[str]]:
    """Two rows for below a table with a column for each of `tasks`: all labels, and the gate; none where none was run."""
    if not any(task in gates for task in tasks):
        return []
    levels = " and ".join(map(str, ZEROED))
    return [
        [
            "Scratch, all labels",
            *(f"{gates[task].all_labels:.2f}" if task in gates else "-" for task in tasks),
        ],
        [
            f"zeroing encoder levels {levels} there",
            *(gates[task].shown() if task in gates else "-" for task in tasks),
        ],
    ]


def rates(found: Mapping[tuple[str, float], Mapping[str, float]], chosen: Mapping[str, float]) -> None:
    """Fill the block of learning rates: the fine-tunings' loss on validation patients; the lowest of a method is chosen."""
    tasks = list(dict.fromkeys(task for losses in found.values() for task in losses))
    rows = [
        [
            f"**{method}, {rate:g}**" if chosen[method] == rate else f"{method}, {rate:g}",
            *(f"{losses[task]:.4f}" if task in losses else "-" for task in tasks),
        ]
        for (method, rate), losses in found.items()
    ]
    put("rates", table(("pretrained at", *(f"{task.upper()}, validation loss" for task in tasks)), rows))


def control(tenth: Table, taught: Table, every: Table, gates: Mapping[str, Gate] | None = None) -> None:
    """What there is to gain: a tenth of the labels from scratch, then from encoders that were taught, and all labels."""
    kinds = (
        ("Scratch", tenth, "Scratch"),
        ("from an encoder trained on all labels of NCS", taught, "NCS"),
        ("from one trained on all labels of the task itself", taught, "Full"),
        ("Scratch, all labels", every, "Scratch"),
    )
    tasks = {column.task: column.head.split(",")[0] for column in taught.columns}
    rows: list[Sequence[str]] = [
        (head, *(shown(seen.cell(row, task)).replace("**", "") for task in tasks))
        for head, seen, row in kinds
    ]
    put("control", table(("", *tasks.values()), rows + gate_rows([*tasks], gates or {})[1:]))


def put(block: str, text: str) -> None:
    """Write a block of docs/targets.md."""
    page = REPO / "docs" / "targets.md"
    page.write_text(fill(page.read_text(), block, text))
    print(page)


def shown(cell: Cell) -> str:
    """`**91.2 ± 0.3**`, the best in bold, with a note if trials are missing."""
    if cell.mean is None:
        return "-"
    text = f"{cell.mean:.2f} ± {cell.sd or 0:.2f}"
    return (f"**{text}**" if cell.mark == BEST else text) + (f" ({cell.missing})" if cell.missing else "")
