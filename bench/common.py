"""What all benches share: the machine, turns taken within one run, and one form for figures and goals.

A result is rows and goals. Rows of one group are compared with each other, a higher value being better; a goal is a
number that must be at least, or at most, so much. `bench/table.py` draws them all. Standard library alone: benches of
the GPU run on bare machines.
"""

import datetime
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from p2w.resources import total_memory, usable_cores

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "numpy", "pyarrow", "crc32c", "triton", "webdataset", "litdata", "mosaicml-streaming", "grain",
            "array-record", "monai", "kornia", "torchio", "nvidia-dali-cuda120")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One way to do the thing of its group: `value` is a rate, `spread` the lowest and highest round."""

    group: str
    name: str
    value: float
    unit: str
    kind: str = "peer"  # ours, peer, bound
    spread: tuple[float, float] | None = None
    note: str = ""


@dataclass(frozen=True)
class Goal:
    """What the value must be: at least `bound`, or at most."""

    text: str
    value: float
    bound: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        """Whether the measured value reaches the bound."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def machine() -> dict[str, Any]:
    """Where figures come from; `load_average` above the cores says that other work was timed too."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    features = next((line.split() for line in lines if line.startswith("flags")), [])
    return {
        "cpu": next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown"
        ),
        "bf16": [name for name in ("avx512_bf16", "amx_bf16") if name in features],
        "cores": usable_cores(),
        "memory_gib": round(total_memory() / 2**30, 1),
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": found,
    }


def rotate(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Every way in turn, round after round; what each returned. Round 0 warms up and does not count."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            value = way()
            if turn:
                found[name].append(value)
    return found


def over(one: Iterable[float], other: Iterable[float]) -> float:
    """Median of the rounds' ratios: within a round the machine was in one state."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def row(group: str, name: str, rates: list[float], unit: str, kind: str = "peer", note: str = "") -> Row:
    """A row from the rates of all rounds."""
    return Row(group, name, statistics.median(rates), unit, kind, (min(rates), max(rates)), note)


def save(
    path: Path, question: str, command: str, rows: list[Row], goals: list[Goal], **more: Any
) -> dict[str, Any]:
    """Write a result; returns it. Rows of one group are put together, groups in the order of their first rows."""
    groups = list(dict.fromkeys(row.group for row in rows))
    rows = sorted(rows, key=lambda row: groups.index(row.group))
    result = {
        "question": question,
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "rows": [asdict(row) for row in rows],
        "goals": [asdict(goal) | {"met": goal.met} for goal in goals],
        **more,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return result


def show(result: dict[str, Any]) -> None:
    """Rows and goals as lines with bars, without any library."""
    print(result["question"])
    group, most = "", 1.0
    for one in result["rows"]:
        if one["group"] != group:
            group = one["group"]
            most = max(other["value"] for other in result["rows"] if other["group"] == group) or 1.0
            print(f" {group}")
        bar = ("█" if one["kind"] == "ours" else "░") * max(1, round(30 * one["value"] / most))
        print(f"  {one['name']:52} {one['value']:11,.3g} {one['unit']:12} {bar} {one['note']}")
    for goal in result["goals"]:
        sign = ">=" if goal["at_least"] else "<="
        print(
            f"  {'met ' if goal['met'] else 'NOT '} {goal['text']}: {goal['value']:.3g} ({sign} {goal['bound']:g})"
        )
