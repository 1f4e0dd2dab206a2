"""Updates the tables of docs/targets.md, and leaves the text between them as it is."""

from jobs import REPO
from page import fill, table

from p2w.reproduce.table import BEST, Cell, Table


def write(block: str, seen: Table, against: str = "") -> None:
    """Fill a block of docs/targets.md; the last rows, where asked for: what Parts2Whole has more than `against`, here
    and in the paper, which are different tests of different data."""
    columns = [
        column for column in seen.columns if any(cell.n for cell in seen.cells if cell.task == column.task)
    ]
    rows = [[row, *(shown(seen.cell(row, column.task)) for column in columns)] for row in seen.rows]
    rows = [row for row in rows if any(cell != "-" for cell in row[1:])]
    for source, said in (("here", ""), ("paper", " in the paper")) if against else ():
        claims = {one.task: one for one in seen.claims if (one.other, one.source) == (against, source)}
        tests = [claims.get(column.task) for column in columns]
        differences = ("-" if t is None else f"{t.difference:+.2f}, p = {t.p:.2g}" for t in tests)
        rows.append([f"Parts2Whole - {against}{said}", *differences])
    put(block, table(("", *(column.head for column in columns)), rows))


def control(tenth: Table, taught: Table, every: Table) -> None:
    """What there is to gain: a tenth of the labels from scratch, then from encoders that were taught, and all labels."""
    kinds = (
        ("Scratch", tenth, "Scratch"),
        ("from an encoder trained on all labels of NCS", taught, "NCS"),
        ("from one trained on all labels of the task itself", taught, "Full"),
        ("Scratch, all labels", every, "Scratch"),
    )
    tasks = {column.task: column.head.split(",")[0] for column in taught.columns}
    rows = [
        (head, *(shown(seen.cell(row, task)).replace("**", "") for task in tasks))
        for head, seen, row in kinds
    ]
    put("control", table(("", *tasks.values()), rows))


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
