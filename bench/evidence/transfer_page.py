"""Writes the tables of `transfer.py` into docs/targets.md: from what is in its folder, missing cells as "not run".

Dice in percent. The pretraining is the replicate: tests are of `p2w.stats.compare_pretrainings`, p is Holm's over the rows
of a table. `trials_needed` says how many trials the differences of Table 2 would take.
"""

import json
import math
import re
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from gate import Gate
from jobs import REPO
from page import table
from targets_page import OURS, gate_rows, put

from p2w.files import write_atomic
from p2w.finetune.results import read_fine_tuning
from p2w.reproduce.render import probability
from p2w.stats import LEVEL, Comparison, Pretrainings, Trials, compare_pretrainings, holm

RANDOM, CONTROL, MISSING = "Random", "Trained on all labels", "not run"
FROZEN = (RANDOM, "Autoencoder", "Models Genesis", "SimMIM", OURS)
TUNED = ("Scratch", "Autoencoder", "Models Genesis", OURS)
TUNED_TASKS = {"organs": "dice", "ncs": "mean_iou", "lcs": "iou"}
MAIN = "dice"
MEASURED = {MAIN: "mean Dice", "explained": "variance of the masks explained, %"}
GATE_TRIALS, TUNED_TRIALS = 1, 6
SEEDS = 3  # pretrainings of each method
MORE_SEEDS = 6  # of E1, fixed before the first of them was run: other seeds, tested apart from the first
RESULTS = REPO / "bench" / "results" / "frozen_decoder.json"  # E1, each decoder of each pretraining
ALL_LABELS = (
    "--recipe.max-epochs 16 --recipe.patience 16 --recipe.epoch-steps 15 --recipe.batch 16 --recipe.precision auto "
    "--recipe.lr 3e-3 --recipe.schedule cosine --recipe.warmup-epochs 2"
)
TENTH = (
    "--fraction 0.1 --recipe.max-epochs 20 --recipe.patience 20 --recipe.epoch-steps 20 --recipe.batch 8 "
    "--recipe.precision auto --recipe.schedule cosine --recipe.warmup-epochs 2 --recipe.encoder-lr 0.1"
)
POINTS, POWER = 3.0, 0.8  # to be seen, and how likely
SPREAD = re.compile(r"\*{0,2}([\d.]+) ± ([\d.]+)\*{0,2}")


def write(folder: Path) -> None:
    """Fill the blocks `frozen decoder`, `frozen confirmed`, `matched` and `power` of docs/targets.md; E1 also as JSON."""
    first, more = range(SEEDS), range(SEEDS, SEEDS + MORE_SEEDS)
    put("frozen decoder", frozen_table(folder / "context", first))
    put("frozen confirmed", frozen_table(folder / "context", more, False))
    write_results(folder / "context")
    put("matched", tuned_table(folder / "matched"))
    put("power", power_table((REPO / "docs" / "targets.md").read_text()))


def write_results(place: Path) -> None:
    """The numbers behind the tables of E1, a line for each pretraining; nothing where none was run."""
    runs = read_frozen(place, range(SEEDS + MORE_SEEDS))
    lines = []
    for own in runs.values():
        for seed, one in sorted(own.items()):
            decoders = [(round(it["test"][MAIN], 5), round(it["explained"], 5)) for it in one["decoders"]]
            found = {
                "method": one["method"],
                "seed": seed,
                "rate": one["chosen"],
                f"{MAIN}, explained": decoders,
            }
            lines.append(json.dumps(found))
    if lines:
        write_atomic(RESULTS, "[\n" + ",\n".join(lines) + "\n]\n")


def read_frozen(place: Path, seeds: Collection[int]) -> dict[str, dict[int, dict[str, Any]]]:
    """What was run of E1 with one of `seeds`: method -> seed of the pretraining -> the content of its file."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted((place / "frozen").glob("*.json")):
        one = json.loads(path.read_text())
        if one["seed"] in seeds:
            found.setdefault(one["method"], {})[int(one["seed"])] = one
    return found


def pretrainings_of(runs: Mapping[int, Mapping[str, Any]], metric: str) -> dict[int, Trials]:
    """A metric in percent of each decoder of each pretraining."""
    return {
        seed: {
            at: (one["seed"], 100 * ({**one["test"], **one}[metric]))
            for at, one in enumerate(run["decoders"])
        }
        for seed, run in runs.items()
    }


def frozen_table(place: Path, seeds: Collection[int], references: bool = True) -> str:
    """E1: a row a method with Parts2Whole's differences to it, and what follows; with `references` control and gate."""
    runs = read_frozen(place, seeds)
    others = [method for method in FROZEN if method != OURS]
    cells = {
        metric: {method: pretrainings_of(own, metric) for method, own in runs.items()} for metric in MEASURED
    }
    tests = {
        metric: {
            method: compare_pretrainings(*of_same_seeds(values[OURS], values[method]))
            for method in others
            if values.get(method, {}).keys() & values.get(OURS, {}).keys()
        }
        for metric, values in cells.items()
    }
    adjusted = {
        metric: dict(zip(found, holm([one.p for one in found.values()]), strict=True))
        for metric, found in tests.items()
    }
    rows = []
    for method in (*FROZEN, *([CONTROL] if references else [])):
        row = [f"**{method}**" if method == OURS else method]
        for metric in MEASURED:
            test, p = tests[metric].get(method), adjusted[metric].get(method, math.nan)
            said = (
                "-"
                if test is None
                else f"{difference(test)}, {probability(p) if math.isfinite(p) else test.why}"
            )
            row += [spread(cells[metric].get(method)), said]
        rows.append([*row, chosen_rate(runs.get(method))])
    gate = read_gate(place, "organs", "dice")
    if references:
        gates = {"organs": gate} if gate else {}
        rows += [[*row, "-", "-", "-", "-"] for row in gate_rows(["organs"], gates)] or [
            ["Scratch, all labels; zeroing encoder levels 3 and 4 there", MISSING, "-", "-", "-", "-"]
        ]
    head = ["start"]
    for name in MEASURED.values():
        head += [name, f"{OURS} - it (95 %), p by Holm"]
    said = verdict(tests[MAIN], adjusted[MAIN], others, gate)
    return table([*head, "rate"], rows) + "\n\n" + said + (costs(place) if references else "")


def of_same_seeds(
    one: dict[int, Trials], other: dict[int, Trials]
) -> tuple[dict[int, Trials], dict[int, Trials]]:
    """The pretrainings whose seeds both methods have: they began with the same weights, and are paired."""
    seeds = sorted(one.keys() & other.keys())
    return {seed: one[seed] for seed in seeds}, {seed: other[seed] for seed in seeds}


def spread(values: Mapping[Any, Trials] | None) -> str:
    """Mean and deviation over pretrainings, with their number and that of trials."""
    if not values:
        return MISSING
    means = [statistics.fmean(value for _, value in one.values()) for one in values.values()]
    sd = f" ± {statistics.stdev(means):.2f}" if len(means) > 1 else ""
    return f"{statistics.fmean(means):.2f}{sd} (n = {len(means)} x {min(map(len, values.values()))})"


def difference(test: Comparison) -> str:
    """`+4.42 (0.70 to 8.14)`."""
    around = f" ({test.low:.2f} to {test.high:.2f})" if math.isfinite(test.low) else ""
    return f"{test.difference:+.2f}{around}"


def chosen_rate(runs: Mapping[int, Mapping[str, Any]] | None) -> str:
    """What the validation patients chose."""
    rate = runs[min(runs)]["chosen"] if runs else 0
    return f"{rate:g}" if rate else "-"


def verdict(
    tests: Mapping[str, Comparison], adjusted: Mapping[str, float], others: Sequence[str], gate: Gate | None
) -> str:
    """What the table says of the claim that Parts2Whole learns what others do not, by its first metric."""
    gated = " The gate was not run: whether the task counts is open."
    if gate is not None:
        gated = "" if gate.passes else " Fine-tuned with skips, this task would not count: see the gate."
    open_yet = [name for name in others if name not in tests or not math.isfinite(adjusted[name])]
    tested = {name: one for name, one in tests.items() if name not in open_yet}
    ahead = [name for name, one in tested.items() if one.difference > 0 and adjusted[name] < LEVEL]
    level = [name for name in tested if name not in ahead]
    rest = f" Open, with fewer than two pretrainings: {', '.join(open_yet)}." if open_yet else ""
    if level:
        first = f"significantly ahead of {', '.join(ahead)}, and " if ahead else ""
        return (
            f"**The claim fails here**: Parts2Whole is {first}not ahead of {', '.join(level)}.{rest}{gated}"
        )
    if open_yet:
        said = f" Parts2Whole is ahead of {', '.join(ahead)} (Holm's p below {LEVEL})." if ahead else ""
        return f"**Not decided.**{said}{rest}{gated}"
    return f"**Parts2Whole is ahead of {', '.join(ahead)}** (Holm's p below {LEVEL}).{gated}"


def costs(place: Path) -> str:
    """The processor's time that the pretrainings took, those at rates that were not chosen among them."""
    seconds = [
        json.loads(path.read_text())["cpu_s"] for path in sorted((place / "starts").glob("*/cost.json"))
    ]
    if not seconds:
        return ""
    return f"\n\n{len(seconds)} pretrainings took {sum(seconds) / 60:.0f} minutes of one core, a decoder three seconds."


def read_gate(place: Path, task: str, metric: str) -> Gate | None:
    """The gate of a task, where both runs have a finished trial."""
    scores = [runs_of(place / name / task, metric) for name in ("full", "gate")]
    if not all(scores):
        return None
    all_labels, zeroed = (statistics.fmean(value for _, value in own.values()) for own in scores)
    return Gate(all_labels, zeroed)


def runs_of(run: Path, metric: str) -> Trials:
    """The finished trials of a fine-tuning in percent; {} without any."""
    if not (run / "transfer.json").exists():
        return {}
    found = read_fine_tuning(run).metric(metric)
    return {index: (seed, 100 * value) for index, (seed, value) in found.items()}


def tuned_table(place: Path) -> str:
    """E2: a row a method, a column a task, then Parts2Whole's differences, and the gates."""
    cells = {(method, task): tuned_runs(place, method, task) for method in TUNED for task in TUNED_TASKS}
    rows = [[method, *(spread(cells[method, task]) for task in TUNED_TASKS)] for method in TUNED]
    for method in TUNED[:-1]:
        tests = {
            task: compare_pretrainings(cells[OURS, task], cells[method, task])
            for task in TUNED_TASKS
            if cells[OURS, task] and cells[method, task]
        }
        adjusted = dict(zip(tests, holm([one.p for one in tests.values()]), strict=True))
        said = {
            task: f"{difference(one)}, "
            + (probability(adjusted[task]) if math.isfinite(adjusted[task]) else one.why)
            for task, one in tests.items()
        }
        rows.append([f"{OURS} - {method}", *(said.get(task, MISSING) for task in TUNED_TASKS)])
    gates = {
        task: found
        for task, metric in TUNED_TASKS.items()
        if (found := read_gate(place, task, metric)) is not None
    }
    rows += gate_rows([*TUNED_TASKS], gates) or [
        ["Scratch, all labels; zeroing encoder levels 3 and 4 there", *[MISSING] * len(TUNED_TASKS)]
    ]
    return table(("", *(f"{task} {metric}, 10 %" for task, metric in TUNED_TASKS.items())), rows)


def tuned_runs(place: Path, method: str, task: str) -> Pretrainings:
    """Trials of each pretraining of a method; of Scratch under None."""
    folder = place / "tuned" / task
    if method == "Scratch":
        own = runs_of(folder / method, TUNED_TASKS[task])
        return {None: own} if own else {}
    runs = {path.name.rpartition(" ")[2]: path for path in sorted(folder.glob(f"{method} seed *"))}
    return {seed: own for seed, path in runs.items() if (own := runs_of(path, TUNED_TASKS[task]))}


def trials_needed(sd: float, points: float, level: float, power: float = POWER, paired: bool = False) -> int:
    """Trials of each of two rows, for a two-sided t-test to find a difference of `points` with this power.

    `sd` is that of the trials of a row, which the rows share; of paired trials, that of their differences. By the noncentral
    t distribution.
    """
    from scipy.stats import nct, t  # noqa: PLC0415

    for n in range(2, 100_000):
        df, shift = (
            (n - 1, points / sd * math.sqrt(n)) if paired else (2 * n - 2, points / sd * math.sqrt(n / 2))
        )
        bound = t.ppf(1 - level / 2, df)
        if nct.sf(bound, df, shift) + nct.cdf(-bound, df, shift) >= power:
            return n
    raise ValueError(f"no number of trials finds {points} with a deviation of {sd}")


def power_table(page: str) -> str:
    """How many trials a row Table 2 would take, from the deviations in its cells on the page."""
    block = re.search(r"<!-- table2 -->\n(.*?)<!-- /table2 -->", page, re.DOTALL)
    assert block is not None, "docs/targets.md has no table2"
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in block[1].strip().splitlines()]
    head, body = lines[0][-2:], [line for line in lines[2:] if any(SPREAD.fullmatch(cell) for cell in line)]
    rows = []
    for at, name in enumerate(head, start=-2):
        found = [match for line in body if (match := SPREAD.fullmatch(line[at]))]
        sd = math.sqrt(statistics.fmean(float(one[2]) ** 2 for one in found))
        means = sorted(float(one[1]) for one in found)
        comparisons = len(found) - 1
        rows.append([
            name, f"{sd:.2f}", f"{means[-1] - means[0]:.2f}", str(trials_needed(sd, POINTS, LEVEL)),
            str(trials_needed(sd, POINTS, LEVEL / comparisons)),
        ])  # fmt: skip
    head = [
        "", "deviation of a trial", "best less worst row", f"trials a row for {POINTS:g} points, one comparison",
        "trials a row, each with one other row",
    ]  # fmt: skip
    return table(head, rows)
