"""One table of all results: every way beside ours, with bars, and every goal with what was measured.

python bench/table.py            # draws bench/results/*.json, and writes bench/results/table.md
python bench/table.py stream     # one of them, on the terminal
"""

import json
import sys
from typing import Any

from common import RESULTS
from rich.console import Console
from rich.table import Table

WIDTH = 30
COLOURS = {"ours": "green", "peer": "white", "bound": "blue"}


def results(names: list[str]) -> dict[str, dict[str, Any]]:
    """Name -> result, of those that have rows or goals."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    tables = {k: v for k, v in found.items() if "question" in v and (v.get("rows") or v.get("goals"))}
    return {k: v for k, v in tables.items() if not names or k in names}


def groups(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows of a result by their group."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        found.setdefault(row["group"], []).append(row)
    return found


def bar(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """A bar for the row, as long as its share of the largest value of the group."""
    most = max(other["value"] for other in rows) or 1.0
    return ("█" if row["kind"] == "ours" else "░") * max(1, round(WIDTH * row["value"] / most))


def times(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """How often the fastest of ours in the group is as fast."""
    ours = [other["value"] for other in rows if other["kind"] == "ours"]
    return f"{max(ours) / row['value']:.2f}" if ours and row["value"] and row["kind"] != "ours" else ""


def number(value: float) -> str:
    """A value with at most three digits that count, or whole."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def goal(one: dict[str, Any]) -> str:
    """A goal's rule, such as `>= 3`."""
    return f"{'>=' if one['at_least'] else '<='} {one['bound']:g}"


def draw(found: dict[str, dict[str, Any]], console: Console) -> None:
    """Print all results as tables with bars."""
    for name, result in found.items():
        console.rule(f"{name}: {result['question']}")
        for group, rows in groups(result).items():
            table = Table(
                "", rows[0]["unit"], "", "ours is faster by", "", title=group, title_justify="left", box=None
            )
            for row in rows:
                text = bar(row, rows)
                style = COLOURS[row["kind"]]
                table.add_row(
                    row["name"], number(row["value"]), text, times(row, rows), row["note"], style=style
                )
            console.print(table)
    table = Table("result", "goal", "measured", "asked", "met", title="Goals", title_justify="left")
    for name, result in found.items():
        for one in result["goals"]:
            met = "[green]yes" if one["met"] else "[red]no"
            table.add_row(name, one["text"], number(one["value"]), goal(one), met)
        for line in [*result.get("skipped", []), *result.get("absent", [])]:
            table.add_row(name, line, "", "", "[yellow]skipped")
    console.print(table)


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """All results as a page in Markdown, goals first."""
    lines = [
        "# What was measured",
        "",
        "Written by `python bench/table.py` from the JSON files beside it. Bars are within a",
    ]
    lines += [
        "group, ours solid; `ours` says how often the fastest of ours is as fast as the row.",
        "",
        "## Goals",
        "",
    ]
    lines += ["| result | goal | measured | asked | met |", "|---|---|---|---|---|"]
    for name, result in found.items():
        for one in result["goals"]:
            met = "yes" if one["met"] else "**no**"
            lines.append(f"| {name} | {one['text']} | {number(one['value'])} | {goal(one)} | {met} |")
        for line in [*result.get("skipped", []), *result.get("absent", [])]:
            lines.append(f"| {name} | {line} | | | skipped |")
    for name, result in found.items():
        machine = result["machine"]
        load = machine["load_average"][0]
        lines += ["", f"## {name}: {result['question']}", ""]
        lines += [
            f"`{result['command']}`, {result['date']}; {machine['cores']} cores of {machine['cpu']}; load {load} at the end."
        ]
        for group, rows in groups(result).items():
            lines += [
                "", f"**{group}**, {rows[0]['unit']}", "", "| | | | ours | |", "|---|---:|---|---:|---|",
            ]  # fmt: skip
            for row in rows:
                cells = [
                    row["name"], number(row["value"]), f"`{bar(row, rows)}`", times(row, rows), row["note"],
                ]  # fmt: skip
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write bench/results/table.md from all results."""
    found = results(sys.argv[1:])
    draw(found, Console())
    if not sys.argv[1:]:
        (RESULTS / "table.md").write_text(markdown(found))
        print(f"{RESULTS / 'table.md'}")


if __name__ == "__main__":
    main()
