"""What a data set trains on, as far as the leak check of target tasks asks: scans, their files and their patients.

    training_scans(open_manifest("shards").meta)       # of a manifest: by name
    hashed_training_scans([meta])                      # for the card of weights: hashes, some thousands of scans at most
    read_hashed_scans(card["training"]["data"]["seen"], "encoder.safetensors")

A hash is 16 letters, the first 64 bits of a SHA-256, so that the check needs no path to the set and cards name no scan. Its
letters are a to p, without digits, so that no hash looks like a date.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from p2w.errors import UserError
from p2w.files import type_mismatch
from p2w.shards.manifest import data_fingerprint

SEEN = "seen"  # the entry of a card's `training.data` that holds the hashes
SEEN_BYTES = 256 << 10  # of JSON in a card: about 5,000 scans with patients, 7,500 without
HASH_CHARACTERS = 17  # with the space between two
RULE = "SHA-256 of fingerprint NUL text, its first 64 bits as letters, a is 0; text: uid, bytes and checksum, or patient"
SECRET = "it hashes them with a secret salt"
LETTERS = str.maketrans("0123456789abcdef", "abcdefghijklmnop")


@dataclass(frozen=True)
class TrainingScans:
    """The scans that a set trains on. `named` turns a text into what the tables below are keyed by: itself, or its hash."""

    count: int
    uids: Set[str]
    files: Mapping[str, str]
    """A scan's file, by size and checksum -> the scan in words."""
    patients: Mapping[str, str]
    """A patient, as the set hashes them -> one of the patient's scans in words."""
    salt: str | None
    """The salt of the set's hashes of patients; None where patients cannot be compared."""
    without_patients: str
    """Why patients cannot be compared although the set knows them; "" where they can, or where it knows none."""
    named: Callable[[str], str] = str

    def has_scan(self, uid: str) -> bool:
        """Whether the set trains on the scan."""
        return self.named(uid) in self.uids

    def scan_of_file(self, nbytes: int, checksum: str) -> str | None:
        """The scan whose file is the same, byte for byte, in words; None where there is none."""
        return self.files.get(self.named(file_text(nbytes, checksum)))

    def scan_of_patient(self, hashed: str) -> str | None:
        """A scan of the patient whose identifier has the unsalted hash `hashed`, in words; None where there is none."""
        if self.salt is None or not hashed:
            return None
        from p2w.shards.grouping import identity_in_set  # noqa: PLC0415 - SimpleITK, which weights do without

        return self.patients.get(self.named(identity_in_set(hashed, self.salt)))


def file_text(nbytes: int, checksum: str) -> str:
    """What stands for the content of a file."""
    return f"{nbytes} {checksum}"


def training_scans(meta: Mapping[str, Any]) -> TrainingScans:
    """What the set with the metadata of this manifest trains on. Raises UserError for one that does not say it."""
    form = {"split": {"train_scans": [str]}, "sources": [{"uid": str, "nbytes": int, "checksum": str}]}
    if said := type_mismatch(meta, form, "the manifest of the pretraining set"):
        raise UserError(f"{said}: it does not say which scans it trains on: cut the set again")
    split = meta["split"]
    trained = set(split["train_scans"])
    sources = [one for one in meta["sources"] if one["uid"] in trained]
    files = {file_text(one["nbytes"], one["checksum"]): f"scan {one['uid']}" for one in sources}
    patients: dict[str, str] = {}
    salt, secret = split.get("salt"), bool(split.get("secret"))
    if "salt" in split and not secret:
        known = [one for one in meta["sources"] if "patient" in one]
        said = type_mismatch(
            {"split": split, "sources": known}, {"split": {"salt": str}, "sources": [{"patient": str}]}
        )
        if said:
            raise UserError(f"the manifest of the pretraining set makes no sense ({said}): cut the set again")
        patients = {one["patient"]: f"scan {one['uid']}" for one in known if one["uid"] in trained}
    comparable = "salt" in split and not secret
    without = SECRET if "salt" in split and secret else ""
    return TrainingScans(
        len(split["train_scans"]), trained, files, patients, salt if comparable else None, without
    )


def hashed_training_scans(metas: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What sets train on, hashed, one entry a set, as plain JSON values: `read_hashed_scans` reads them.

    Raises UserError where the manifests do not say it, and where the entries would take more than SEEN_BYTES.
    """
    count = 0
    for meta in metas:
        split = meta.get("split")
        scans = split.get("train_scans") if isinstance(split, Mapping) else None
        count += len(scans) if isinstance(scans, Sequence) else 0
    # Asked before anything is read: the lists of a set of a million scans would take seconds.
    if count * HASH_CHARACTERS <= SEEN_BYTES:
        entries = [_hashed_entry(training_scans(meta), data_fingerprint(dict(meta))) for meta in metas]
        if len(json.dumps(entries)) <= SEEN_BYTES:
            return entries
    raise UserError(f"hashes of {count:,} training scans take more than {SEEN_BYTES >> 10} KiB")


def _hashed_entry(scans: TrainingScans, fingerprint: str) -> dict[str, Any]:
    def hashes(texts: Set[str]) -> str:
        return " ".join(sorted({hashed(fingerprint, text) for text in texts}))

    entry = {
        "set": fingerprint,
        "rule": RULE,
        "scans": hashes(scans.uids),
        "files": hashes(scans.files.keys()),
    }
    if scans.salt is not None:
        return entry | {"salt": scans.salt, "patients": hashes(scans.patients.keys())}
    return entry | ({"without_patients": scans.without_patients} if scans.without_patients else {})


def hashed(fingerprint: str, text: str) -> str:
    """16 letters that stand for a text in the card of a set with this fingerprint."""
    return hashlib.sha256(f"{fingerprint}\0{text}".encode()).hexdigest()[:16].translate(LETTERS)


def without_patients(entries: Sequence[Mapping[str, Any]], why: str) -> list[dict[str, Any]]:
    """The hashes without those of patients; `why` is the reason in words, where there were some."""
    return [
        {key: value for key, value in one.items() if key not in ("salt", "patients")}
        | ({"without_patients": why} if "salt" in one else {})
        for one in entries
    ]


def read_hashed_scans(entries: Any, where: str) -> list[TrainingScans]:
    """What the sets train on whose hashes the card of `where` holds. Raises UserError where they make no sense."""
    said = type_mismatch(entries, [{"set": str, "rule": str, "scans": str, "files": str}], "it")
    if said or not entries:
        raise UserError(
            f"{where}: the hashes of scans in its card make no sense ({said or 'none'}): export again"
        )
    return [_read_entry(one, where) for one in entries]


def _read_entry(entry: Mapping[str, Any], where: str) -> TrainingScans:
    with_patients = {"salt": str, "patients": str} if "salt" in entry else {}
    why = entry.get("without_patients", "")
    said = type_mismatch(entry, with_patients, "it") or type_mismatch(why, str, "'without_patients'")
    if said:
        raise UserError(f"{where}: the hashes of scans in its card make no sense ({said}): export again")
    if entry["rule"] != RULE:
        raise UserError(
            f"{where}: the hashes of scans in its card are made by another rule ({entry['rule']!r}): update p2w"
        )
    fingerprint = entry["set"]
    uids = frozenset(entry["scans"].split())
    return TrainingScans(
        len(uids), uids, dict.fromkeys(entry["files"].split(), "a scan"),
        dict.fromkeys(entry.get("patients", "").split(), "a scan"), entry.get("salt"), why,
        lambda text: hashed(fingerprint, text),
    )  # fmt: skip
