"""Writes the tables and figures of docs/evidence.md; the words between them are people's (see page.py)."""

import json
import math
import platform
from pathlib import Path
from typing import Any

import numpy as np
from designs import EVIDENCE, FOLLOWED, LONGER, ON_VARIED, REFERENCE, STEPS, VARIED, Pretraining
from page import fill, shrink, table
from pretrainings import (
    NOT_RUN,
    Found,
    cell,
    column,
    compare,
    counted,
    interval,
    mean_image_error,
    runs_of,
    tested,
    values,
)

from p2w.stats import pearson

FIGURES = ("separability_by_scale", "contrastive", "tsne", "similarity_networks")
BARE = {"histogram": "intensity histogram", "pixels": "pixels", "random": "random initialisation"}
ROWS = (*BARE, *(name for name in EVIDENCE if name != REFERENCE), REFERENCE)
TESTED = {"AUC": "plain", "whole found, top-1": "top1"}
KINDS = ("real", "phantom")
WHOSE = "vs same place of other scans"


def write(docs: Path, folder: Path, found: Found) -> None:
    """Fill every block of DOCS/evidence.md, and draw the figures whose analyses are in the folder."""
    path = docs / "evidence.md"
    text = path.read_text()
    for kind in KINDS:
        blocks = {
            "networks": networks(found, kind),
            "differences": differences(found, kind),
            "cues": cues(found, kind),
            "course": course(found, kind),
        }
        for name, block in blocks.items():
            text = fill(
                text, f"{kind} {name}", block if runs_of(found, kind, REFERENCE) else f"({NOT_RUN} yet)"
            )
        first = folder / "runs" / Pretraining(REFERENCE, "real-0" if kind == "real" else kind, 0).name
        if (first / "analysis" / "summary.json").exists():
            text = fill(
                text, f"{kind} scales", scales(json.loads((first / "analysis" / "summary.json").read_text()))
            )
            for name in FIGURES:
                shrink(first / "figures" / f"{name}.png", docs / "evidence" / f"{kind}-{name}.png")
    text = fill(text, "varied chests", varied(found))
    text = fill(text, "folds", folds(found))
    text = fill(text, "times", times(found))
    path.write_text(text)
    print(f"{path}: {len(found)} pretrainings")


def title(label: str) -> str:
    """The name of a row."""
    return f"**{label}**" if label == REFERENCE else BARE.get(label, label)


def networks(found: Found, kind: str) -> str:
    """Separability, retrieval, rank, contrastive loss and error of every row."""
    columns = [
        column("AUC", "plain"), column("d'", "d_prime", 2), column("whole found: top-1", "top1", 2),
        column("MRR", "mrr", 2), column("rank", "rank", 1), column("contrastive loss", "contrastive_loss"),
        column("MSE of the whole", "mse", 4),
    ]  # fmt: skip
    rows = []
    for label in (*ROWS, *(name for name in LONGER if runs_of(found, kind, name))):
        cells = [fill_in(found, kind, label) for _, fill_in in columns]
        drawn = runs_of(found, kind, label) and cells[-1] != NOT_RUN
        rows.append([title(label), counted(found, kind, label), *cells[:-1], cells[-1] if drawn else "-"])
    some = runs_of(found, kind, REFERENCE)
    chance = [f"{np.mean([1 / one['wholes'] for one in some]):.2f}" if some else NOT_RUN]
    mean = cell(mean_image_error(found, kind), 4)
    rows.append(["chance; the mean image", "", "0.500", "0.00", *chance, "", "", "8.517", mean])
    return table(("features", "pretrainings", *[head for head, _ in columns]), rows)


def differences(found: Found, kind: str) -> str:
    """The reference less each other row: difference, interval, and p by Holm over the table."""
    others = [label for label in ROWS if label != REFERENCE]
    tests = {
        (label, number): compare(values(found, kind, REFERENCE, number), values(found, kind, label, number))
        for label in others
        for number in TESTED.values()
    }
    said = tested(tests)
    rows = [[title(label), *(said[label, number] for number in TESTED.values())] for label in others]
    return table((f"{REFERENCE} less", *TESTED), rows)


def cues(found: Found, kind: str) -> str:
    """AUC without one cue after another, and against some of the negatives alone."""
    columns = [
        column("plain", "plain"), column("standardised", "standardised"), column("random gamma", "gamma"),
        column("vs same scan", "against_one_scan"), column(WHOSE, "against_one_tile"),
    ]  # fmt: skip
    rows = [[title(label), *(fill_in(found, kind, label) for _, fill_in in columns)] for label in ROWS]
    return table(("features", *[head for head, _ in columns]), rows)


def varied(found: Found) -> str:
    """On varied phantoms, AUC against all negatives, those of the same scan, and those at the same place of other scans.

    The last asks whose chest it is. Beside it are the difference to the histogram, with p by Holm over the column, and the
    same on the usual phantoms.
    """
    numbers = {"AUC": "plain", "vs same scan": "against_one_scan", WHOSE: "against_one_tile"}
    labels = [*BARE, *(name for name in ON_VARIED if name != REFERENCE), REFERENCE]
    base = values(found, VARIED, "histogram", numbers[WHOSE])
    tests = {
        label: compare(values(found, VARIED, label, numbers[WHOSE]), base)
        for label in labels
        if label != "histogram"
    }
    said = {"histogram": "", **tested(tests)}
    columns = [column(head, number)[1] for head, number in numbers.items()]
    _, usual = column(WHOSE, numbers[WHOSE])
    rows = [
        [
            title(label),
            counted(found, VARIED, label),
            *(fill_in(found, VARIED, label) for fill_in in columns),
            said[label],
            usual(found, "phantom", label),
        ]
        for label in labels
    ]
    heads = ("pretrainings", *numbers, f"{WHOSE}: less the histogram", f"{WHOSE}: the usual phantoms")
    return table(("features", *heads), rows)


def course(found: Found, kind: str) -> str:
    """Contrastive loss and AUC at the first and last checkpoint, the fall beside r with the error, and their intervals."""
    rows = []
    for method in FOLLOWED[::-1]:
        seen = [one["course"] for one in runs_of(found, kind, method) if "course" in one]
        if not seen:
            rows.append([title(method), NOT_RUN, *[""] * 6])
            continue
        ends = [[np.mean([one[key][at] for one in seen]) for at in (0, -1)] for key in ("contrast", "auc")]
        falls = [one["contrast"][0] - one["contrast"][-1] for one in seen]
        late = [one["contrast"][2] - one["contrast"][-1] for one in seen]
        rows.append([
            title(method), f"{len(seen)} x {len(seen[0]['step'])}",
            f"{ends[0][0]:.3f} -> {ends[0][1]:.3f}", around(falls), around(late), f"{ends[1][0]:.3f} -> {ends[1][1]:.3f}",
            correlation(seen, 0), correlation(seen, 2),
        ])  # fmt: skip
    heads = (
        "network", "pretrainings x checkpoints", "contrastive loss, first -> last", "fall (95 %)", "fall from the third on",
        "AUC, first -> last", "r of contrastive loss and MSE (95 %)", "r from the third on",
    )  # fmt: skip
    return table(heads, rows)


def around(some: list[float], digits: int = 3) -> str:
    """Mean and 95 % interval over pretrainings."""
    low, high = interval(some)
    return f"{np.mean(some):.{digits}f}" + (
        f" ({low:.{digits}f} to {high:.{digits}f})" if math.isfinite(low) else ""
    )


def correlation(seen: list[dict[str, list[float]]], first: int) -> str:
    """Pearson's r over the checkpoints of each pretraining, averaged by Fisher's z; the interval is over pretrainings."""
    each = [pearson(one["contrast"][first:], one["mse"][first:]).r for one in seen]
    z = np.arctanh(np.clip(each, -0.999999, 0.999999))
    low, high = np.tanh(interval(z))
    mean = float(np.tanh(np.mean(z)))
    return f"{mean:.2f}" + (f" ({low:.2f} to {high:.2f})" if math.isfinite(low) else "")


def scales(summary: dict[str, Any]) -> str:
    """AUC by scale of the parts, of one network."""
    found = summary["networks"]
    ours = next(label for label in found if label not in (*BARE, "autoencoder"))
    order = [label for label in (*BARE, "autoencoder") if label in found] + [ours]
    rows = [
        [
            title(REFERENCE if label == ours else label),
            *[f"{one:.3f}" for one in found[label]["by_scale"]["auc"]],
        ]
        for label in order
    ]
    return table(
        ("AUC of parts of scale about", *[f"{one:.2f}" for one in found[ours]["by_scale"]["scale"]]), rows
    )


def folds(found: Found) -> str:
    """AUC and retrieval on each fold of patients, means over seeds."""
    rows = []
    for data in sorted({one["data"] for one in found if one["data"].startswith("real")}):
        here = [one for one in found if one["data"] == data]
        cells = []
        for number in TESTED.values():
            for label in ("histogram", "random", REFERENCE):
                some = [*values(here, "real", label, number).values()]
                cells.append(f"{np.mean(some):.3f}" if some else NOT_RUN)
        rows.append([data, f"{here[0]['scans']}", f"{here[0]['wholes']}", *cells])
    heads = [f"{name}: {label}" for name in TESTED for label in ("histogram", "random", REFERENCE)]
    return table(("fold", "patients", "wholes", *heads), rows) if rows else NOT_RUN


def times(found: Found) -> str:
    """Processor time, and what the whole takes at that rate."""
    import torch  # noqa: PLC0415  (for its version)

    spent = [one["training_s"] for one in found if one.get("training_s")]
    if not spent:
        return NOT_RUN
    ours = [one["training_s"] for one in found if one["method"] == REFERENCE and one.get("training_s")]
    total = sum(spent) + sum(one["measuring_s"] for one in found)
    step = f", {np.mean(ours) / STEPS:.2f} s a step of {REFERENCE} with start and end" if ours else ""
    return (
        f"{len(found)} pretrainings: {total / 60:.0f} minutes of processor time{step}; one thread each, torch "
        f"{torch.__version__}, {platform.machine()}."
    )
