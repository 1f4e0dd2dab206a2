"""`p2w table2 RUNS`: the scale of the parts, and skip connections, beside the paper's Table 2.

    p2w table2 runs/table2                          prints it; writes runs/table2/tables/table2.csv, .tex, .json, tables.html
    p2w table2 runs/table2 --fraction ncc=0.45 ncs=0.1

A run stands in the row of the parts that its network was pretrained with. `w/ skips`: pretrained with skip connections,
encoder and decoder fine-tuned; else the decoder starts at random. NCC with 45 %, NCS with 10 % of the training data, unless
--fraction says otherwise. Networks that started at random have a row of their own.
"""

import math

from p2w.tables.build import build
from p2w.tables.command import parse, read, write
from p2w.target import paper
from p2w.target.results import Transfer

PUBLISHED = {parts.label: cells for parts, cells in paper.TABLE2.items()}


def row_of(one: Transfer) -> str | None:
    """The row of what a network was pretrained with; None where that is not known."""
    if one.volume_fraction is None:
        return "Scratch" if one.source == "random" else None
    low, high = one.volume_fraction
    for parts in paper.TABLE2:  # as printed, whatever the last digit of the setting is
        if math.isclose(low, parts.low, rel_tol=0.01) and math.isclose(high, parts.high, rel_tol=0.01):
            low, high = parts.low, parts.high
    return paper.Parts(low, high, skips(one)).label


def skips(one: Transfer) -> bool:
    """Whether it was pretrained with skip connections; where that is not known, whether its decoder is fine-tuned too."""
    return one.decoder == "pretrained" if one.skips is None else one.skips


def main(argv: list[str]) -> int:
    """Collect, print, write."""
    options = parse(argv, "table2", __doc__ or "")
    transfers = read(options)
    choice = options.choice(paper.Parts(1 / 16, 1 / 4).label)
    title = "Table 2: scale of the parts, and skip connections"
    table = build(
        "table2", title, transfers, row_of, PUBLISHED, paper.FRACTIONS, tuple(paper.FRACTIONS), choice
    )
    write(table, options)
    return 0
