"""The most similar scans of a cohort, as text, as a table, or on a page with a t-SNE of all scans."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from numpy.typing import NDArray

from p2w.errors import UserError
from p2w.files import write_atomic
from p2w.inference.cohort import write_rows
from p2w.inference.embeddings import (
    Embeddings,
    Features,
    centred_directions,
    neighbours,
    read_embeddings,
    read_labels,
)
from p2w.report.markup import Markup, document, join_markup, several, table, tag

USAGE = """The most similar scans of a cohort, by the features that p2w embed wrote.

    p2w neighbours embeddings.parquet --query patient7/chest.nii.gz        a path, uid, name or identifier
    p2w neighbours embeddings.parquet --out neighbours.csv                 of every scan
    p2w neighbours embeddings.parquet --page map.html --labels labels.csv  t-SNE of all scans, and the neighbours of each

Similarity is the cosine of features that are standardised over the cohort: 1 is alike, 0 unrelated. --other-patients leaves
out scans of the same patient.
"""
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7f7f7f",
    "#000000",
)  # Okabe and Ito
NAMED = 40  # points up to which each has its name beside it
LISTED = 500  # scans whose neighbours the page lists


@dataclass(frozen=True)
class NeighbourOptions:
    """Which features, whose neighbours, and where they are written."""

    embeddings: tyro.conf.Positional[Path]
    """The table of scans that p2w embed wrote."""
    query: tuple[str, ...] = ()
    """Scans whose neighbours are printed: path below --scans of p2w embed, uid, name or identifier."""
    k: int = 5
    """Neighbours of each scan."""
    features: Features = "mean"
    """Which features of a scan; all: the three one after the other."""
    other_patients: tyro.conf.FlagCreatePairsOff[bool] = False
    """Leave out the scans of the same patient."""
    salt: str = ""
    """The salt that p2w embed was given."""
    out: Path | None = None
    """Write a CSV with the neighbours of each query, or of every scan."""
    page: Path | None = None
    """Write an HTML page with a t-SNE of all scans, and their neighbours."""
    labels: Path | None = None
    """CSV with a column `scan` and a column of labels: the colours of the page."""
    label: str = "label"
    """The column of labels."""
    seed: int = 0
    """Seed of t-SNE."""


def main(argv: list[str]) -> int:
    """Parse, read, print, write."""
    options = tyro.cli(NeighbourOptions, args=argv, prog="p2w neighbours", description=USAGE)
    if options.k < 1 or not (options.query or options.out or options.page):
        raise UserError(
            f"--k {options.k}: at least 1; and name a scan with --query, or a file with --out or --page"
        )
    if options.labels is not None and options.page is None:
        raise UserError("--labels: colours the page; name one with --page FILE.html")
    embeddings = read_embeddings(options.embeddings, options.features, options.salt)
    if options.other_patients and not embeddings.known_patients:
        raise UserError(
            f"--other-patients: {embeddings.path} does not know the patients of all scans; run p2w embed with --groups"
        )
    patients = embeddings.patients if options.other_patients else None
    directions = centred_directions(embeddings.values)
    queries = []
    for text in options.query:
        index = embeddings.index_of(text, options.salt)
        if index is None:
            raise UserError(
                f"--query {text}: is not among the {len(embeddings.scans)} scans of {embeddings.path}"
            )
        queries.append(index)
    for index in queries:
        print(embeddings.display_name(index))
        for other, similarity in neighbours(directions, index, options.k, patients):
            print(f"    {similarity:6.3f}  {embeddings.display_name(other)}")
    every = queries or list(range(len(embeddings.scans)))
    if options.out is not None:
        rows = [
            (embeddings.display_name(index), rank, embeddings.display_name(other), f"{similarity:.6f}")
            for index in every
            for rank, (other, similarity) in enumerate(neighbours(directions, index, options.k, patients), 1)
        ]
        write_rows(options.out, ("scan", "rank", "neighbour", "similarity"), rows)
        print(f"{options.out}: neighbours of {several(len(every), 'scan')}")
    if options.page is not None:
        labels = _labels(options, embeddings)
        text = map_page(embeddings, labels, options.k, patients, options.seed)
        try:
            write_atomic(options.page, text)
        except OSError as error:
            raise UserError(f"--page {options.page}: not written ({error.strerror}); name another") from error
        print(f"{options.page}: {several(len(embeddings.scans), 'scan')}")
    return 0


def _labels(options: NeighbourOptions, embeddings: Embeddings) -> list[str] | None:
    """The label of every scan, "" for those without; None without a table of labels."""
    if options.labels is None:
        return None
    found = read_labels(options.labels, options.label, embeddings, options.salt)
    label_of = dict(zip(found.rows, found.labels, strict=True))
    return [label_of.get(index, "") for index in range(len(embeddings.scans))]


def map_page(
    embeddings: Embeddings, labels: Sequence[str] | None, k: int, patients: Sequence[str] | None, seed: int
) -> str:
    """An HTML page that needs no network: t-SNE of all scans, coloured by label, and a table of their neighbours."""
    from p2w.analysis.features import tsne  # noqa: PLC0415  (torch)

    directions = centred_directions(embeddings.values)
    points = tsne(directions, seed)
    names = [embeddings.display_name(index) for index in range(len(embeddings.scans))]
    picture = base64.b64encode(draw_map(points, names, labels)).decode()
    head = ["scan", *(["label"] if labels else []), *(f"neighbour {rank}" for rank in range(1, k + 1))]
    rows = []
    for index, name in enumerate(names[:LISTED]):
        found = neighbours(directions, index, k, patients)
        cells = [f"{names[other]} ({similarity:.2f})" for other, similarity in found]
        rows.append([name, *([labels[index]] if labels else []), *cells, *[""] * (k - len(cells))])
    more = f"The first {LISTED} of {len(names)}. " if len(names) > LISTED else ""
    settings = embeddings.settings
    body = join_markup(
        [
            tag("header", tag("h1", f"{len(names)} scans by their features"),
                tag("p", f"{embeddings.path.name}: {settings.get('encoder')}, weights {settings.get('weights')}")),
            tag("section", tag("h2", "t-SNE"),
                tag("figure", tag("img", src=f"data:image/png;base64,{picture}", alt="t-SNE of all scans",
                                  style="max-width:100%"),
                    tag("figcaption", "Scans that lie close have similar features; distances between far groups mean "
                        "nothing. By the cosine of features standardised over the cohort."))),
            tag("section", tag("h2", "Most similar scans"),
                tag("p", f"{more}In brackets the cosine: 1 is alike, 0 unrelated.", class_="note"), table(head, rows)),
        ]
    )  # fmt: skip
    return document("Scans by their features", Markup(body))


def draw_map(points: NDArray[np.floating], names: Sequence[str], labels: Sequence[str] | None) -> bytes:
    """A PNG of the points (N, 2), coloured by label; with names where there are few."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()
    own = labels or [""] * len(names)
    kinds = sorted(set(own))
    for number, kind in enumerate(kinds):
        chosen = np.array([label == kind for label in own])
        marker = "os^Dv"[number // len(COLOURS) % 5]
        axes.scatter(
            points[chosen, 0], points[chosen, 1], s=22, marker=marker, color=COLOURS[number % len(COLOURS)],
            label=kind or "no label",
        )  # fmt: skip
    if len(names) <= NAMED:
        middle = (points[:, 0].min() + points[:, 0].max()) / 2
        # Names stand towards the middle, so that none leaves the frame.
        for (x, y), name in zip(points, names, strict=True):
            side, align = (-4, "right") if x > middle else (4, "left")
            axes.annotate(
                name, (float(x), float(y)), xytext=(side, 3), ha=align, textcoords="offset points", fontsize=7
            )
    if labels:
        axes.legend(fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])
    packed = io.BytesIO()
    figure.savefig(packed, dpi=110, format="png", metadata={"Software": None})
    return packed.getvalue()
