"""What was measured of every pretraining, as tables: means with intervals, and tests whose replicate is the pretraining.

On real scans the unit is the fold: seeds of a fold are averaged, and folds differ in the patients that are tested, in those
that are trained on, and in weights. On phantoms it is the seed. Two methods are compared by a paired t-test over the units
that both have, on the pretrainings that both have; p is Holm's over all tests of a table.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from designs import REFERENCE, SELECTION_SEED
from jobs import REPO

from p2w.files import write_atomic
from p2w.stats import Comparison, holm, paired

RESULTS = REPO / "bench" / "results" / "pretrainings.json"
NOT_RUN = "not run"
Found = list[dict[str, Any]]
Values = dict[tuple[str, int], float]
"""Of one method: data set and seed of each pretraining -> a number."""
Units = dict[str | int, float]
"""Fold or seed -> a number."""


def collect(folder: Path) -> Found:
    """All measurements below FOLDER/runs but those of unified.py; kept in bench/results, read there if it has none."""
    found = [_measured(path) for path in sorted((folder / "runs").glob("*/measured.json"))]
    found = [one for one in found if one["seed"] != SELECTION_SEED]
    if found:
        lines = (json.dumps(_rounded(one), separators=(",", ":")) for one in found)
        write_atomic(RESULTS, "[\n" + ",\n".join(lines) + "\n]\n")
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def _measured(path: Path) -> dict[str, Any]:
    """What measure_run.py wrote of a run, with what fine_tuned.py wrote beside it as the number `tuned`."""
    found: dict[str, Any] = json.loads(path.read_text())
    beside = path.with_name("tuned.json")
    for label, value in (json.loads(beside.read_text()) if beside.exists() else {}).items():
        found["features"][label]["tuned"] = value
    return found


def _rounded(value: Any) -> Any:
    """Floats with five digits."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def values(found: Found, kind: str, label: str, number: str) -> Values:
    """A number of the features called `label`: a method, or `random`, `histogram`, `pixels`, measured beside the reference.

    `mse` is the error of a network's reconstruction, and has no other label than its method.
    """
    seen: Values = {}
    for one in found:
        if one["data"].partition("-")[0] != kind:
            continue
        value = one["features"].get(label, {}).get(number)
        if number == "mse" and one["method"] == label:
            value = one.get("mse")
        if value is not None and math.isfinite(value):
            seen[one["data"], one["seed"]] = value
    return seen


def units(seen: Values) -> Units:
    """The independent values: of real scans each fold's mean over seeds, of phantoms each seed's."""
    gathered: dict[str | int, list[float]] = {}
    for (data, seed), value in sorted(seen.items()):
        gathered.setdefault(data if data.startswith("real") else seed, []).append(value)
    return {unit: float(np.mean(some)) for unit, some in gathered.items()}


def compare(a: Values, b: Values) -> Comparison:
    """Paired t-test over units of what both have; none where no unit differs from another."""
    both = sorted(a.keys() & b.keys())
    one, two = ([*units({key: side[key] for key in both}).values()] for side in (a, b))
    found = paired(one, two)
    if len(one) > 1 and alike(np.subtract(one, two)):
        return dataclasses.replace(found, p=math.nan, low=math.nan, high=math.nan, why=ALIKE)
    return found


def alike(some: Iterable[float]) -> bool:
    """Whether values are the same but for rounding: no replicates, of which a test could say something."""
    return bool(np.ptp(np.array([*some])) < 1e-4)


def cell(seen: Values, digits: int = 3, share: bool = False) -> str:
    """Mean of the units and its 95 % interval by Student's t, of a share no further than from 0 to 1."""
    there = [*units(seen).values()]
    if not there:
        return NOT_RUN
    low, high = interval(there)
    if share and math.isfinite(low):
        low, high = max(low, 0.0), min(high, 1.0)
    around = f" ({low:.{digits}f} to {high:.{digits}f})" if math.isfinite(low) else ""
    return f"{np.mean(there):.{digits}f}{around}"


def interval(there: Iterable[float]) -> tuple[float, float]:
    """95 % interval of the mean of independent values; NaN for fewer than two, and for those that are all the same."""
    from scipy.stats import t as student  # noqa: PLC0415  (a second of imports)

    some = np.array([*there])
    if len(some) < 2 or alike(some):
        return math.nan, math.nan
    half = float(student.ppf(0.975, len(some) - 1) * some.std(ddof=1) / math.sqrt(len(some)))
    return float(some.mean()) - half, float(some.mean()) + half


def tested(tests: Mapping[Any, Comparison], digits: int = 3) -> dict[Any, str]:
    """Each difference with its interval, and p by Holm over all of them."""
    adjusted = holm([one.p for one in tests.values()])
    return {key: _say(one, p, digits) for (key, one), p in zip(tests.items(), adjusted, strict=True)}


def _say(one: Comparison, p: float, digits: int) -> str:
    if not one.n[0]:
        return NOT_RUN
    if math.isnan(p):
        return f"{one.difference:+.{digits}f}, {one.why or 'one pretraining'}: no test"
    said = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    return f"{one.difference:+.{digits}f} ({one.low:+.{digits}f} to {one.high:+.{digits}f}), {said}"


def counted(found: Found, kind: str, label: str) -> str:
    """How many pretrainings a row rests on, and on how many units."""
    seen = values(found, kind, label, "plain")
    if not seen:
        return NOT_RUN
    return f"{len(seen)} in {len(units(seen))} folds" if kind == "real" else f"{len(seen)}"


def runs_of(found: Found, kind: str, method: str) -> Found:
    """The measurements of a method on one kind of data."""
    return [one for one in found if one["method"] == method and one["data"].partition("-")[0] == kind]


def mean_image_error(found: Found, kind: str) -> Values:
    """Error of the mean image of the tested wholes: what an output that ignores its input comes to at best."""
    return {(one["data"], one["seed"]): one["mse_of_mean"] for one in runs_of(found, kind, REFERENCE)}


ALIKE = "the same in each pretraining"
SHARES = {"tuned", "plain", "standardised", "gamma", "against_one_scan", "against_one_tile", "top1", "mrr"}
Column = tuple[str, Callable[[Found, str, str], str]]


def column(title: str, number: str, digits: int = 3) -> Column:
    """A column of a table: mean and interval of one number."""
    share = number in SHARES
    return title, lambda found, kind, label: cell(values(found, kind, label, number), digits, share)
