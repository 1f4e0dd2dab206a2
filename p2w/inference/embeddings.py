"""Tables that `p2w embed` writes, read for probes and neighbours; labels by scan; features made comparable."""

import functools
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from p2w.ct.dicom import salted_hash
from p2w.errors import UserError
from p2w.inference.cohort import SCAN, identifiers_of
from p2w.tasks.source_files import read_csv

Features = Literal["mean", "max", "std", "all"]
Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]
KINDS = ("mean", "max", "std")


@dataclass(frozen=True)
class Embeddings:
    """Features (N, C) float64 of N scans, and what is known of them."""

    path: Path
    values: Doubles
    scans: tuple[str, ...]
    """Identifiers."""
    names: tuple[str, ...]
    """The scans' names in the table, "" where names were not kept."""
    patients: tuple[str, ...]
    """The scans' patients, hashed; a scan whose patient is unknown has its own identifier here."""
    known_patients: bool
    """Whether the patient of every scan is known."""
    settings: dict[str, Any]
    """The settings of `p2w embed`."""

    def display_name(self, index: int) -> str:
        """The name of a scan in output."""
        return self.names[index] or self.scans[index]

    def index_of(self, text: str, salt: str) -> int | None:
        """The scan that a path, uid, name or identifier stands for; None where there is none."""
        if text in self._rows_by_name:
            return self._rows_by_name[text]
        return next((self._rows[one] for one in identifiers_of(text, salt) if one in self._rows), None)

    @functools.cached_property
    def _rows(self) -> dict[str, int]:
        return {scan: row for row, scan in enumerate(self.scans)}

    @functools.cached_property
    def _rows_by_name(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.names) if name}


def read_embeddings(path: Path, features: Features, salt: str) -> Embeddings:
    """The table of scans at `path`. Raises UserError where it is none of `p2w embed`, or was written with another salt."""
    try:
        table = pq.read_table(path)
        record = json.loads(table.schema.metadata[b"p2w"])
        kinds = KINDS if features == "all" else (features,)
        values = np.concatenate([features_of(table, kind) for kind in kinds], 1).astype(np.float64)
        columns = [table[name].to_pylist() for name in ("scan", "name", "patient")]
        check = record["salt"]
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: no table of scans of p2w embed ({said}); name its --out") from error
    if check != salt_check(salt):
        raise UserError(f"{path}: was written with another --salt; pass the one that p2w embed was given")
    if not np.isfinite(values).all():
        raise UserError(f"{path}: holds features that are not finite; run p2w embed again")
    scans, names, patients = columns
    owners = tuple(patient or scan for patient, scan in zip(patients, scans, strict=True))
    return Embeddings(path, values, tuple(scans), tuple(names), owners, all(patients), record)


@dataclass(frozen=True)
class Labels:
    """Labels of some scans of a table of embeddings."""

    rows: tuple[int, ...]
    """The scans, as row numbers of the embeddings."""
    labels: tuple[str, ...]
    patients: tuple[str, ...]
    unknown: tuple[str, ...]
    """Scans of the label table that have no features."""
    known_patients: bool


def read_labels(path: Path, column: str, embeddings: Embeddings, salt: str) -> Labels:
    """The labels in a CSV table with a column `scan`, the column of labels, and maybe `patient`.

    A row without a label is passed over. Raises UserError for a scan that is there twice, and where none has features.
    """
    rows: dict[int, tuple[str, str, int]] = {}
    unknown = []
    columns = [(*SCAN, "series", "seriesuid"), (column,), ("patient", "patientid", "")]
    for line, (scan, label, patient) in read_csv(str(path), columns):
        if not label:
            continue
        index = embeddings.index_of(scan, salt)
        if index is None:
            unknown.append(scan)
        elif index in rows:
            raise UserError(
                f"{path}, line {line}: scan {scan} is in line {rows[index][2]} too; leave one of them out"
            )
        else:
            rows[index] = label, salted_hash(patient, salt), line
    if not rows:
        first = f", such as {unknown[0]!r}" if unknown else ""
        raise UserError(
            f"{path}: not one of its scans is in {embeddings.path}{first}; name them by their paths below --scans of p2w "
            "embed (or uid, or identifier), and pass its --salt"
        )
    order = sorted(rows)
    hashes = [rows[index][1] for index in order]
    owners = tuple(own or embeddings.patients[index] for own, index in zip(hashes, order, strict=True))
    known = all(hashes) or (embeddings.known_patients and not any(hashes))
    return Labels(tuple(order), tuple(rows[index][0] for index in order), owners, tuple(unknown), known)


def centred_directions(values: Doubles) -> Doubles:
    """Features (N, C) -> unit vectors: each feature less its mean over the cohort and divided by its deviation.

    Without centring, all similarities are near 1, since features after a ReLU are positive, and a few large features decide.
    A scan whose features are all the cohort's means becomes zeros.
    """
    spread = values.std(0)
    scaled = (values - values.mean(0)) / np.where(
        spread > 1e-12 * np.abs(values).max(initial=1e-300), spread, np.inf
    )
    length = np.linalg.norm(scaled, axis=1, keepdims=True)
    directions: Doubles = scaled / np.where(length > 0, length, 1.0)
    return directions


def neighbours(
    directions: Doubles, query: int, count: int, patients: Sequence[str] | None = None
) -> list[tuple[int, float]]:
    """The `count` scans most similar to scan `query`, with the cosine, the most similar first.

    `directions`: unit vectors (N, C) of `centred_directions`. Left out are the scan itself and, with `patients`, all
    scans of its patient.
    """
    similarity = directions @ directions[query]
    order = np.argsort(-similarity, kind="stable")
    allowed = (
        int(one) for one in order if one != query and (patients is None or patients[one] != patients[query])
    )
    return [(one, float(similarity[one])) for one in itertools.islice(allowed, count)]


def salt_check(salt: str) -> str:
    """A hash by which another command recognises the salt; it does not give the salt away."""
    return salted_hash("salt", salt)


def features_of(table: pa.Table, kind: str) -> Floats:
    """The column of vectors `kind` of a table, (N, C) float32."""
    column = table[kind].combine_chunks()
    flat = column.flatten() if isinstance(column, pa.FixedSizeListArray) else pa.concat_arrays(
        [chunk.flatten() for chunk in column.chunks]
    )  # fmt: skip
    found: Floats = np.asarray(flat, np.float32).reshape(len(table), -1)
    return found
