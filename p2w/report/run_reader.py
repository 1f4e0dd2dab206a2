"""Reads a run folder for the report; a missing, truncated or foreign file only loses its own information."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from p2w import config as settings
from p2w.errors import UserError
from p2w.log import read_metrics
from p2w.run_owner import run_state

MARKERS = ("config.json", "status.json", "run.json", "metrics.jsonl")
LARGEST_JSON = 64 << 20  # bytes; ours are a few kB

Record = dict[str, float]


@dataclass
class RunFacts:
    """The content of a run's files. `problems` has one line for each file that could not be read."""

    run: Path
    config: dict[str, Any] = field(default_factory=dict)  # "data.batch" -> 16
    status: dict[str, Any] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric, oldest first."""
        points = [(record["step"], record[name]) for record in self.records if name in record]
        return [step for step, _ in points], [value for _, value in points]

    def loss(self, of: str) -> str:
        """The metric to show for `of`, "train" or "val": the mean squared error, if it is one term of several."""
        return f"{of}/mse" if self.series("val/mse")[0] else f"{of}/loss"

    @property
    def state(self) -> str:
        """`running`, `finished`, `stopped early`, `told to stop`, `failed`; or `killed` if its process is gone."""
        return run_state(self.run, self.status)

    @property
    def last_start(self) -> dict[str, Any]:
        """Machine, data set and command of the newest start."""
        return self.starts[-1] if self.starts else {}

    def clocks(self) -> list[float]:
        """The times of all starts, in seconds since 1970."""
        return [clock for clock in map(_clock, self.starts) if not math.isnan(clock)]

    def training_seconds(self) -> float:
        """Seconds from each start to its last logged line, summed; NaN when unknown."""
        began = self.clocks()
        total = 0.0
        for first, following in pairwise([*began, math.inf]):
            # Times of records have milliseconds, times of starts only seconds.
            within = [r["time"] for r in self.records if first <= r.get("time", -1) < following]
            total += max(within, default=first) - first
        return total or math.nan


def read_run(run: Path) -> RunFacts:
    """Read everything that can be read. Raises UserError when the folder has no run."""
    if not any((run / name).exists() for name in MARKERS):
        found = "holds no run (no config.json, status.json, run.json, metrics.jsonl or transfer.json)"
        raise UserError(f"{run}: {found if run.is_dir() else 'no such folder'}; name a run folder")
    facts = RunFacts(run)
    tree = read_object(facts, "config.json")
    for group, values in tree.items():
        inner = settings.current_settings(group, values) if isinstance(values, dict) else {"": values}
        facts.config.update({f"{group}.{name}".rstrip("."): value for name, value in inner.items()})
    facts.status = read_object(facts, "status.json")
    starts = read_object(facts, "run.json").get("starts", [])
    facts.starts = [s for s in starts if isinstance(s, dict)] if isinstance(starts, list) else []
    facts.summary = read_object(facts, "analysis/summary.json")
    read_records(facts)
    return facts


def read_records(facts: RunFacts) -> None:
    """Fill `facts.records` from metrics.jsonl."""
    try:
        facts.records = [_numbers(record) for record in read_metrics(facts.run)]
    except (OSError, ValueError) as error:
        facts.problems.append(f"metrics.jsonl: not read ({_reason(error)})")


def defaults(facts: RunFacts) -> dict[str, Any]:
    """The default of every setting of the run, as JSON spells them."""
    changed = facts.last_start.get("changed_from")
    if isinstance(changed, dict):
        return facts.config | changed
    # A run of an earlier version did not write them down. Collecting them imports the pretexts' files, and so torch.
    flat: dict[str, Any] = json.loads(json.dumps(settings.flatten(settings.Config())))
    return flat


def number(value: object) -> float:
    """A JSON value as a float; NaN when it is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def floats(values: object) -> list[float]:
    """A JSON list as floats; empty when it is no list."""
    return [number(value) for value in values] if isinstance(values, list) else []


def child(tree: object, *names: str) -> dict[str, Any]:
    """The object below `names` in a JSON tree; empty when there is none."""
    for name in names:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}


def ends(values: Sequence[float]) -> tuple[float, float]:
    """First and last; NaN twice when there are none."""
    return (values[0], values[-1]) if values else (math.nan, math.nan)


def _numbers(record: dict[str, Any]) -> Record:
    """The numbers of a record; other values are left out."""
    kept = {name: number(value) for name, value in record.items() if type(value) in (int, float)}
    return {**kept, "step": float(int(record["step"]))}


def read_object(facts: RunFacts, name: str) -> dict[str, Any]:
    """The object in a JSON file; empty, and a line in `problems`, when it cannot be read."""
    path = facts.run / name
    if not path.exists():
        return {}
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        tree = json.loads(path.read_bytes())
        if not isinstance(tree, dict):
            raise ValueError(f"a {type(tree).__name__}, not an object")
        return tree
    except (OSError, ValueError, RecursionError) as error:
        facts.problems.append(f"{name}: not read ({_reason(error)})")
        return {}


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error).partition("\n")[0]


def _clock(start: dict[str, Any]) -> float:
    """The time of a start, in seconds since 1970; NaN when unknown."""
    try:
        return datetime.strptime(str(start["time"]), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except (KeyError, ValueError, OverflowError):
        return math.nan
