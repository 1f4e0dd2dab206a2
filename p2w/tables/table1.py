"""`p2w table1 RUNS`: the starting points on the five tasks, beside the paper's Table 1.

    p2w table1 runs/table1                          prints it; writes runs/table1/tables/table1.csv, .tex, .json, tables.html
    p2w table1 runs/a runs/b --out tables --fraction 0.1 --against Scratch
    p2w table1 runs/table1 --metric ncs=iou         another metric: auc, iou, mean_iou, dice

RUNS are folders that launch/transfer.py wrote, or any folders above them. A run stands in the row of its label; `random` is
the paper's Scratch. Cells without enough trials are shown as such.
"""

import re

from p2w.tables.build import build
from p2w.tables.command import parse, read, write
from p2w.target import paper
from p2w.target.results import Transfer

SAME = {
    "random": "Scratch",
    "medicalnetresnet101": "MedicalNet",
    "medicalnet3dresnet101": "MedicalNet",
    "niftynetdensevnet": "NiftyNet",
    "densevnet": "NiftyNet",
    "genesis": "Models Genesis",
    "modelsgenesis": "Models Genesis",
    "p2w": paper.OURS,
}


def row_of(one: Transfer) -> str:
    """The paper's row of a label, however it is spelled; the label itself where the paper has none."""
    plain = re.sub(r"[^a-z0-9]", "", one.label.lower())
    known = {re.sub(r"[^a-z0-9]", "", row.lower()): row for row in paper.TABLE1}
    return SAME.get(plain) or known.get(plain) or one.label


def main(argv: list[str]) -> int:
    """Collect, print, write."""
    options = parse(argv, "table1", __doc__ or "")
    transfers = read(options)
    choice = options.choice(paper.OURS)
    title = "Table 1: starting points on the target tasks"
    table = build("table1", title, transfers, row_of, paper.TABLE1, {}, tuple(paper.TASKS), choice)
    write(table, options)
    return 0
