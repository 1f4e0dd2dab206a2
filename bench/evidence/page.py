"""Updates the numbers and figures of docs/evidence.md, and leaves the text between them as it is.

What a command may write stands between `<!-- NAME -->` and `<!-- /NAME -->`; the words around were written by people who had
read the numbers.
"""

import json
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from p2w.log import read_metrics
from p2w.stats import pearson

FIGURES = ("separability_by_scale", "contrastive", "tsne", "similarity_networks")
TITLES = {
    "histogram": "intensity histogram",
    "pixels": "pixels",
    "random": "random initialisation",
    "autoencoder": "autoencoder",
}


def write(docs: Path, folder: Path, sets: list[str]) -> None:
    """Fill every block of DOCS/evidence.md that has data, and draw its figures."""
    path = docs / "evidence.md"
    text = path.read_text()
    for data in sets:
        runs = folder / "runs"
        summary = json.loads((runs / f"{data}-parts" / "analysis" / "summary.json").read_text())
        cues = json.loads((runs / f"{data}-shortcuts.json").read_text())
        blocks = {
            "networks": networks(summary, cues),
            "shortcuts": shortcuts(cues),
            "scales": scales(summary),
            "course": course(summary, cues),
            "times": times(runs, data, summary, cues),
        }
        for name, block in blocks.items():
            text = fill(text, f"{data} {name}", block)
        for name in FIGURES:
            shrink(
                runs / f"{data}-parts" / "figures" / f"{name}.png", docs / "evidence" / f"{data}-{name}.png"
            )
    path.write_text(text)
    print(f"{path}: {', '.join(sets)}")


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


def title(label: str) -> str:
    """The name of a feature source on the page."""
    return TITLES.get(label, "**Parts2Whole**")


def order(found: dict[str, Any]) -> list[str]:
    """The feature sources, Parts2Whole last."""
    return [*[name for name in TITLES if name in found], *[name for name in found if name.endswith("-parts")]]


def networks(summary: dict[str, Any], cues: dict[str, Any]) -> str:
    """Separability, contrastive loss and retrieval of every feature source."""
    rows, found = [], summary["networks"]
    for label in order(found):
        pairs, hits = found[label]["similarity"], found[label]["retrieval"]
        alike = f"{cues[label]['plain']:.3f} ± {cues[label]['error']:.3f}"
        rows.append(
            [title(label), alike, f"{pairs['auc']:.3f}", f"{pairs['d_prime']:.2f}",
             f"{found[label]['contrastive_loss']:.3f}", f"{hits['top1']:.2f}", f"{hits['mrr']:.2f}"]
        )  # fmt: skip
    chance = f"{hits['chance_top1']:.2f}", f"{hits['chance_mrr']:.2f}"
    rows.append(["chance", "0.500", "0.500", "0.00", "8.517", *chance])
    return table(
        (
            "features",
            "AUC, all pairs",
            "AUC, drawn pairs",
            "d'",
            "contrastive loss",
            "whole found: top-1",
            "MRR",
        ),
        rows,
    )


def shortcuts(cues: dict[str, Any]) -> str:
    """Separability without one cue after another, and how well a part's position can be predicted."""
    columns = {
        "plain": "plain", "standardised": "standardised", "gamma": "random gamma", "centred": "mean feature removed",
        "against_one_scan": "vs same scan", "against_one_tile": "vs same tile of other scans",
    }  # fmt: skip
    rows = []
    for label in order(cues):
        cells = [cues[label][name] for name in columns]
        place = " ".join(f"{max(0.0, one):.2f}" for one in cues[label]["position_r2"])
        size = f"{max(0.0, cues[label]['size_r2'][0]):.2f}"
        rows.append([title(label), *["-" if cell is None else f"{cell:.3f}" for cell in cells], place, size])
    return table(("features", *columns.values(), "place z y x, R²", "size, R²"), rows)


def scales(summary: dict[str, Any]) -> str:
    """AUC by scale of the parts."""
    found = summary["networks"]
    scale = found[order(found)[-1]]["by_scale"]["scale"]
    rows = [
        [title(label), *[f"{one:.3f}" for one in found[label]["by_scale"]["auc"]]] for label in order(found)
    ]
    return table(("AUC of parts of scale about", *[f"{one:.2f}" for one in scale]), rows)


def course(summary: dict[str, Any], cues: dict[str, Any]) -> str:
    """Pearson's r between validation MSE and contrastive loss over checkpoints."""
    over = summary["over_checkpoints"]
    early = len(over.get("early") or ())
    said = f", {early} early" if early else ""  # their MSE was logged with young statistics of batch norm
    rows = [
        [
            f"**Parts2Whole**, the paper's protocol{said}",
            *correlation(over["contrastive_loss"], over["val_mse"]),
        ]
    ]
    kinds = {
        "contrast": "4 parts of every whole",
        "centred": "the same, mean feature removed",
        "error": "1 - AUC in its place",
    }
    for name, label in (("parts", "**Parts2Whole**"), ("autoencoder", "autoencoder")):
        seen = cues[f"course of {name}"]
        rows += [[f"{label}, {kind}", *correlation(seen[key], seen["mse"])] for key, kind in kinds.items()]
    return table(
        ("contrastive loss of", "first -> last", "r with validation MSE (95 %)", "checkpoints"), rows
    )


def correlation(loss: list[float], mse: list[float]) -> tuple[str, str, str]:
    """First and last loss, r with its interval, number of points."""
    found = pearson(loss, mse)
    return (
        f"{loss[0]:.3f} -> {loss[-1]:.3f}",
        f"{found.r:.2f} ({found.low:.2f} to {found.high:.2f})",
        f"{found.n}",
    )


def times(runs: Path, data: str, summary: dict[str, Any], cues: dict[str, Any]) -> str:
    """Times and machine."""
    parts = []
    for name in ("parts", "autoencoder"):
        seen = read_metrics(runs / f"{data}-{name}")
        parts.append(f"{name} {(seen[-1]['time'] - seen[0]['time']) / 60:.0f} min")
    start = json.loads((runs / f"{data}-parts" / "run.json").read_text())["starts"][-1]
    return (
        f"{data.capitalize()}: training {', '.join(parts)}, one process of one thread each; analysis "
        f"{summary['seconds'] / 60:.0f} min; shortcuts {cues['seconds'] / 60:.0f} min; {start['cores']} cores, torch "
        f"{start['torch']}, {platform.machine()}. Seeds: data 0, weights 0, analysis {summary['settings']['seed']}."
    )


def shrink(source: Path, target: Path) -> None:
    """The figure in 64 colours, at most 1,300 pixels wide."""
    target.parent.mkdir(exist_ok=True)
    image = Image.open(source).convert("RGB")
    image.thumbnail((1300, 1300))
    image.quantize(64, dither=Image.Dither.NONE).save(target, optimize=True)
