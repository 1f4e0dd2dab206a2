"""The run in the report: state, data set, hardware, starts, settings, and the commands that repeat it."""

import math
import shlex
from datetime import datetime
from pathlib import Path

from p2w.log import hours_minutes_seconds
from p2w.report.markup import (
    DASH,
    TIMES,
    Markup,
    command_lines,
    figure,
    join_markup,
    keep_units,
    several,
    table,
    tag,
)  # fmt: skip
from p2w.report.run_reader import RunFacts, child, defaults, floats, number


def quoted(path: Path) -> str:
    """A path quoted for a shell."""
    return shlex.quote(str(path))


def header(facts: RunFacts, good: set[str], running: set[str]) -> Markup:
    """The page's head: name, state, and one line on pretext, network and size."""
    state, start = facts.state, facts.last_start
    kind = "good" if state in good else "open" if state in running else "bad"
    why = facts.status.get("why") or {
        "killed": "its process is gone without a message; the same command continues it"
    }.get(state)
    size = TIMES.join(f"{edge:.0f}" for edge in floats(facts.config.get("pretext.size")))
    weights = number(start.get("parameters"))
    named = (("", "pretext.name"), ("", "model.name"), ("width ", "model.width"))
    what = [f"{title}{facts.config[key]}" for title, key in named if key in facts.config]
    what += [f"{weights / 1e6:.2f} M parameters"] * (not math.isnan(weights)) + [
        f"{size} voxels (z y x)"
    ] * bool(size)
    what += [f"{start.get('precision')}"] * bool(start.get("precision"))
    return page_head(facts.run, state, kind, why or "", what)


def page_head(run: Path, state: str, kind: str, why: str, what: list[str]) -> Markup:
    """The page's head; `kind` is good, open or bad, and colours the state."""
    return tag(
        "header",
        tag("h1", run.resolve().name),
        tag("span", state, class_=f"state {kind}"),
        tag("span", why, class_="note"),
        tag("p", keep_units(" · ".join(what))),
    )


DATE = "%Y-%m-%d %H:%M %z"  # of all times on the page


def date(time: object) -> str:
    """The time of a start as the page writes it; as it stands in the file where it is none."""
    try:
        return datetime.strptime(str(time), "%Y-%m-%dT%H:%M:%S%z").strftime(DATE)
    except (ValueError, OverflowError):
        return str(time)


def title(facts: RunFacts) -> str:
    """The title of the page, which tells two runs that are open side by side apart: folder, its parent, state, step."""
    run, step = facts.run.resolve(), number(facts.status.get("step"))
    at = "" if math.isnan(step) else f" at step {step:,.0f}"
    return f"{run.parent.name}/{run.name}: {facts.state}{at}"


def own_scale(facts: RunFacts) -> str:
    """Text for the scale of a part as in training."""
    low_high = floats(facts.config.get("pretext.volume_fraction"))
    return (
        f"as in training ({low_high[0]:.3g} to {low_high[1]:.3g})" if len(low_high) == 2 else "as in training"
    )


def whole_edges_mm(facts: RunFacts) -> list[float]:
    """Edges z, y, x in mm of a typical whole, from run.json; empty when unknown."""
    data_facts = child(facts.last_start, "data_set")
    rows = data_facts.get("spacing_mm")
    middle = floats(rows[1]) if isinstance(rows, list) and len(rows) == 3 else []
    edges = [n * mm for n, mm in zip(floats(data_facts.get("shape")), middle, strict=False)]
    return edges if len(edges) == 3 and all(0 < edge < math.inf for edge in edges) else []


def data_set(facts: RunFacts) -> Markup | None:
    """The data set of the newest start."""
    start = facts.last_start
    data_facts = child(start, "data_set")
    rows: list[tuple[object, object]] = [
        ("shards", start.get("shards", "")),
        ("fingerprint", start.get("data", "")),
    ]
    for split, title in (("train", "to train"), ("val", "to validate")):
        counts = child(data_facts, split)
        if counts:
            of = several(int(number(counts.get("scans", 0)) or 0), "scan")
            rows.append((title, f"{number(counts.get('sub_scans')):,.0f} sub-scans of {of}"))
    shape, window = floats(data_facts.get("shape")), floats(data_facts.get("window_hu"))
    if shape:
        rows.append(("sub-scan", TIMES.join(f"{edge:.0f}" for edge in shape) + " voxels (z y x)"))
    if data_facts.get("store") == "scans":
        rows.append(("cut", "from whole scans, in training at random places"))
    if window:
        rows.append(("window", " to ".join(f"{hu:g}" for hu in window) + " HU"))
    rows += [(axis, text) for axis, text in _spacings(data_facts) if text]
    for name, value in sorted(child(data_facts, "tiling").items()):
        if name == "tile" and floats(value) == shape:
            continue  # the sub-scan, said above
        rows.append((TILING.get(name, name.replace("_", " ")), _in_words(value)))
    rows += [("format", data_facts["format"])] if data_facts.get("format") else []
    rows = [(name, keep_units(value) if isinstance(value, str) else value) for name, value in rows]
    return table((), [row for row in rows if row[1] != ""]) if start else None


def _in_words(value: object) -> object:
    """A list or an object of JSON as text; other values as they are."""
    if isinstance(value, list):
        return TIMES.join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {part}" for key, part in value.items())
    return value


TILING = {
    "tile": "tile (voxels, z y x)", "z_margin": "slices left out at either end", "left_out": "sub-scans left out",
    "min_std_hu": "least standard deviation (HU)", "spacing_mm": "resampled to (mm, z y x)",
    "stride": "stride (voxels, z y x)", "short": "scans that are too short", "body": "least share of the body",
}  # fmt: skip


def _spacings(data_facts: dict[str, object]) -> list[tuple[str, str]]:
    rows = data_facts.get("spacing_mm")
    low, middle, high = map(floats, rows) if isinstance(rows, list) and len(rows) == 3 else ([], [], [])
    if not len(low) == len(middle) == len(high) == 3:
        return []
    spans = [f"{middle[at]:.2f} ({low[at]:.2f} to {high[at]:.2f}) mm" for at in range(3)]
    return [
        ("slice spacing", spans[0]),
        ("pixel spacing", spans[2] if spans[1] == spans[2] else f"y {spans[1]}, x {spans[2]}"),
    ]


MACHINE = {
    "host": "host of rank 0", "world_size": "processes", "nodes": "nodes", "device": "device", "cores": "cores a node",
    "memory_gib": "memory a node (GiB)", "precision": "precision", "torch": "torch", "python": "Python",
    "slurm_job": "Slurm job",
}  # fmt: skip


def hardware(facts: RunFacts) -> Markup | None:
    """The machine of the newest start."""
    start = facts.last_start
    rows = [(title, start[name]) for name, title in MACHINE.items() if start.get(name) not in (None, "")]
    return table((), rows) if rows else None


def starts(facts: RunFacts) -> Markup | None:
    """All starts with the steps that were repeated, and the number of non-finite gradients."""
    if not facts.starts:
        return None
    rows = []
    for at, start in enumerate(facts.starts):
        step, redone = number(start.get("from_step")), number(start.get("redone"))
        rows.append((
            at + 1, date(start.get("time", "")), figure(step, 0), figure(redone, 0), start.get("host", ""),
            start.get("world_size", ""), start.get("device", ""), start.get("torch", ""),
            start.get("slurm_job", ""),
        ))  # fmt: skip
    head = ("start", "when", "from step", "steps redone", "host", "processes", "device", "torch", "Slurm job")
    norms = facts.series("train/grad_norm")[1]
    lost = sum(not math.isfinite(norm) for norm in norms)
    gaps = "Steps redone are those logged before the interruption and not yet in a checkpoint."
    skipped = f"Of {several(len(norms), 'logged step')}, {lost} had a gradient that was not finite and changed nothing."
    spent = facts.training_seconds()
    total = (
        ""
        if math.isnan(spent)
        else f"{several(len(facts.starts), 'start')}, {hours_minutes_seconds(spent)} of work in all."
    )
    return join_markup(
        (
            tag("p", " ".join(filter(None, (total, skipped if norms else "")))),
            table(head, rows, "dated", label="Starts of the run"),
            tag("p", gaps, class_="note"),
        )
    )


def settings(facts: RunFacts) -> Markup | None:
    """The settings that differ from their default, then all settings."""
    if not facts.config:
        return None
    usual = defaults(facts)
    rows = [
        (name, spelled(value), spelled(usual[name]) if name in usual else DASH)
        for name, value in facts.config.items()
    ]
    changed = [row for row in rows if row[1] != row[2]]
    head = ("setting", "this run", "default")
    said = (
        table(head, changed, label="Settings changed from their default")
        if changed
        else tag("p", "Every setting has its default.")
    )
    return join_markup(
        (
            said,
            tag(
                "details",
                tag("summary", f"All {len(rows)} settings"),
                table(head, sorted(rows), label="All settings"),
            ),
        )
    )


def spelled(value: object) -> str:
    """A value of a setting as on the command line."""
    if isinstance(value, list):
        return " ".join(map(spelled, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def commands(facts: RunFacts) -> Markup:
    """The commands that continue the run and that repeat it."""
    start, run = facts.last_start, quoted(facts.run)
    launcher = launcher_of(start)
    shards = shlex.quote(str(start.get("shards", "shards")))
    own = f"{launcher} {start['command']}" if start.get("command") else ""
    again = f"{launcher} -m p2w train {run}/config.json --shards {shards} --run-dir"
    where = f", in {start['cwd']}" if start.get("cwd") else ""
    board = f"tensorboard --logdir {run}/tensorboard\n" if (facts.run / "tensorboard").exists() else ""
    parts = [
        tag("h3", f"Continue it (its own command{where})"),
        command_lines(own or f"{again} {run}"),
        tag("h3", "The same from the beginning, in another folder"),
        command_lines(f"{again} {run}-again"),
        tag("h3", "Curves while it trains; this page again"),
        command_lines(board + f"p2w report {run}"),
    ]
    return join_markup(parts)


def launcher_of(start: dict[str, object]) -> str:
    """torchrun, or plain python for one process."""
    world, nodes = number(start.get("world_size", 1)), number(start.get("nodes", 1))
    if not (world > 1 and nodes >= 1):
        return "python"
    each = f"--nproc_per_node={world // nodes:.0f}"
    if nodes > 1:
        host = shlex.quote(str(start.get("host", "HOST")))
        return f"torchrun --nnodes={nodes:.0f} {each} --rdzv-backend=c10d --rdzv-endpoint={host}:29500"
    return f"torchrun --standalone {each}"
