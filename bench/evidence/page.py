"""Fills marked blocks of a page in docs/, and leaves the text between them as it is.

What a command may write stands between `<!-- NAME -->` and `<!-- /NAME -->`; the words around were written by people who had
read the numbers.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from PIL import Image


def fill(text: str, name: str, block: str) -> str:
    """Put `block` between the marks `name`."""
    marks = (f"<!-- {name} -->", f"<!-- /{name} -->")
    filled, count = re.subn(
        rf"{marks[0]}.*?{marks[1]}", lambda _: f"{marks[0]}\n{block}\n{marks[1]}", text, flags=re.DOTALL
    )
    if count != 1:
        raise SystemExit(f"error: the page has {count} blocks {marks[0]}, needs one")
    return filled


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] + ["--:"] * (len(lines[0]) - 1))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shrink(source: Path, target: Path) -> None:
    """The figure in 64 colours, at most 1,300 pixels wide."""
    target.parent.mkdir(exist_ok=True)
    image = Image.open(source).convert("RGB")
    image.thumbnail((1300, 1300))
    image.quantize(64, dither=Image.Dither.NONE).save(target, optimize=True)
