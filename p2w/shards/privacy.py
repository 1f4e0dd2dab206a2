"""What a data set, a run folder or an export tells about people and about the machine that it was made on.

    p2w verify shards --privacy
    p2w verify runs/paper --privacy
    p2w verify encoder.safetensors --privacy

Every text in the files is looked at: JSON, tables, pages, lists and logs, the metadata and text columns of Parquet, the
metadata of safetensors. Voxels and other weights are not.
"""

import getpass
import json
import re
import socket
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from p2w.errors import UserError

TEXTS = {".json", ".jsonl", ".txt", ".csv", ".md", ".html", ".log", ".yaml", ".yml", ".toml", ".out", ".err"}
MOST_BYTES = 64 << 20  # of a file or header that is looked at
EXAMPLES = 3
COMMON_NAMES = {"", "root", "user", "localhost", "docker"}  # of users and machines, which tell nothing
DATE = r"(?:19[2-9]\d|20[0-4]\d)(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])"
SUSPECTS = {
    "absolute paths": re.compile(
        # Two folders or more; those that every machine has tell nothing. A closing tag and a picture in a page are none,
        # nor is what follows a variable in quotes, as in a command of a README.
        r"(?:(?<![\w./:<+-])(?<!base64,)(?<!\$PWD\")|(?<=file://))/(?!(?:bin|dev|etc|lib\w*|proc|sys|usr)/)(?:[\w.@+-]+/)+[\w.@+-]+"
        r"|\b[A-Z]:(?:\\{1,4}|/)\w[\w\\/. -]+"
    ),
    "names of persons, as DICOM writes them": re.compile(r"[^\W\d_](?:[^\W\d_]|['-])+\^[^\W\d_]+"),
    "dates of a day": re.compile(
        rf"(?<![\d]){DATE}(?!\d)|\.{DATE}\d*(?=\.)"
        # Up to 2024, before any run of this program: a run's own dates are none of a person.
        r"|\b(?:19[2-9]\d|20[01]\d|202[0-4])-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])\b"
        r"|\b(?:0[1-9]|[12]\d|3[01])\.(?:0[1-9]|1[0-2])\.(?:19[2-9]\d|20[01]\d|202[0-4])\b"
    ),
}


def texts_of(path: Path) -> Iterator[tuple[str, str]]:
    """(name of a file, its text) of a file or of all files below a folder, names included. Raises UserError."""
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        try:
            yield name, f"{name}\n{_text(file)}"
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read ({error}), so nothing says what it tells") from error


def _text(file: Path) -> str:
    if file.suffix == ".parquet":
        table = pq.read_table(file)
        meta = b"\n".join((table.schema.metadata or {}).values()).decode("utf-8", "replace")
        columns = [
            table[name] for name in table.column_names if str(table.schema.field(name).type) == "string"
        ]
        return "\n".join([meta, *(str(value) for column in columns for value in column.unique().to_pylist())])
    with file.open("rb") as opened:
        if file.suffix == ".safetensors":
            length = int.from_bytes(opened.read(8), "little")
            head: dict[str, Any] = json.loads(opened.read(min(length, MOST_BYTES)))
            return "\n".join(str(value) for value in head.get("__metadata__", {}).values())
        return opened.read(MOST_BYTES).decode("utf-8", "replace") if file.suffix in TEXTS else ""


def suspects(path: Path) -> dict[str, dict[str, list[str]]]:
    """Kind of text that may identify somebody -> the texts that were found -> the files that have them."""
    own = {getpass.getuser(), socket.gethostname().partition(".")[0]} - COMMON_NAMES
    kinds = dict(SUSPECTS)
    if own:
        names = "|".join(re.escape(name) for name in sorted(own))
        kinds["the user or machine that made it"] = re.compile(rf"\b(?:{names})\b")
    found: dict[str, dict[str, list[str]]] = {kind: defaultdict(list) for kind in kinds}
    for name, text in texts_of(path):
        for kind, pattern in kinds.items():
            for said in dict.fromkeys(pattern.findall(text)):
                found[kind][said].append(name)
    return {kind: dict(texts) for kind, texts in found.items() if texts}


def set_lines(meta: dict[str, Any]) -> list[str]:
    """What the manifest of a data set tells of its scans and patients, by intention."""
    sources = meta.get("sources", [])
    split = meta.get("split", {})
    files = [str(one.get("file", "")) for one in sources if one.get("file")]
    such = f", named by uid, such as {', '.join(_few(str(one['uid']) for one in sources))}" if sources else ""
    lines = [f"scans          {len(sources)}{such}"]
    if files:
        lines.append(f"paths          {len(files)} below --scans, such as {', '.join(_few(files))}")
    hashed = sum("patient" in one for one in sources)
    named = "task" in meta
    if named:
        patients = {str(one.get("patient", "")) for one in sources}
        lines.append(f"patients       {len(patients)}, named {', '.join(_few(sorted(patients)))}")
    elif not hashed:
        lines.append("patients       nothing tells which scans are of one patient")
    else:
        who = (
            "nobody without the secret salt"
            if split.get("secret")
            else "whoever knows identifiers can try them out"
        )
        lines.append(f"patients       hashes of {hashed} scans' ({who})")
    if any("patient_hash" in one for one in sources):
        lines.append(
            "               and hashes of their PatientIDs: whoever knows identifiers can try them out"
        )
    return lines


def _few(texts: Any) -> list[str]:
    return list(dict.fromkeys(texts))[:EXAMPLES]


def privacy_lines(path: Path, meta: dict[str, Any] | None) -> tuple[list[str], bool]:
    """Lines for the user on a file or folder, `meta` being the manifest's if it is a data set; whether all is in order."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    found = suspects(path)
    lines = set_lines(meta) if meta is not None else []
    for kind, texts in found.items():
        files = sorted({name for names in texts.values() for name in names})
        more = f" and {len(texts) - EXAMPLES} more" if len(texts) > EXAMPLES else ""
        lines.append(
            f"look at        {kind}: {', '.join(_few(texts))}{more}, in {', '.join(files[:EXAMPLES])}"
        )
    if not found:
        lines.append(
            "look at        nothing: no absolute path, date of a day, person's name, user or machine was found"
        )
    return lines, not found
