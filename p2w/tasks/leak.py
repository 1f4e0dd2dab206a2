"""Whether pretraining has seen what a target task is tested on.

    check_leak(target, open_manifest("shards").meta)     # raises UserError naming the first test scan seen
    check_run(target, Path("runs/paper"), allow_leak)    # finds the run's data set itself; says what could not be checked

A scan is the same when its uid is, or when its file is, byte for byte (size and checksum). A patient is the same when the
name that the target task has is the one that the pretraining set was told, whose manifest holds hashes
(`p2w.shards.grouping`), or where both are of DICOM and have one PatientID; of a set with a secret salt, patients cannot
be compared.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from p2w.ct.dicom import salted_hash
from p2w.errors import UserError
from p2w.files import parse_json, type_mismatch
from p2w.shards.grouping import identity_in_set
from p2w.shards.manifest import candidate_data_paths, data_fingerprint, open_manifest
from p2w.shards.mixture import is_mixture, parse_mixture
from p2w.tasks.reader import TargetSet

REMEDY = (
    "pretrain on other scans, test on others, or pass --allow-leak and say so where you report the result"
)


def check_leak(target: TargetSet, pretrain: dict[str, Any], fold: int | None = None) -> None:
    """Compare the scans that `target` tests on with those that a pretraining set trains on.

    `pretrain` is the metadata of that set's manifest; of a set with folds, `fold` names one, None all of them.

    Raises:
        UserError: pretraining trained on a scan of the test split; the message names the first.
    """
    if said := _first_leak(target, pretrain, fold):
        raise UserError(f"{target.where}: {said}: {REMEDY}")


def check_run(target: TargetSet, run: Path | None, allow_leak: bool = False, fold: int | None = None) -> str:
    """Compare `target` with the set that a run was trained on, and say in one line what was found.

    `run` None means that nothing was pretrained. With `allow_leak` the line tells of a leak, or of what could not be
    checked, in place of an error.

    Raises:
        UserError: a leak, or, where the run's data set cannot be reached any more, that it cannot be ruled out.
    """
    if run is None:
        return "no pretraining: no test scan can have been seen"
    return _checked(target, str(run), lambda: pretraining_of(run), allow_leak, fold)


def check_shards(
    target: TargetSet, of: str, data: dict[str, str], allow_leak: bool = False, fold: int | None = None
) -> str:
    """As `check_run`, for weights named `of` of which the data alone is known: `shards` and, maybe, `fingerprint`."""
    return _checked(
        target, of, lambda: _open_first(Path(of), data, data.get("fingerprint"), of), allow_leak, fold
    )


def _checked(
    target: TargetSet,
    of: str,
    find: Callable[[], list[tuple[dict[str, Any], str]]],
    allow_leak: bool,
    fold: int | None,
) -> str:
    try:
        sets = find()
        said = next((leak for meta, _ in sets if (leak := _first_leak(target, meta, fold))), None)
    except UserError as error:
        if allow_leak:
            return f"not checked whether pretraining saw test scans (--allow-leak): {error}"
        raise UserError(
            f"{error}; whether it saw test scans cannot be ruled out: put the set back, or pass --allow-leak"
        ) from error
    if said and not allow_leak:
        raise UserError(f"{target.where}: {of}: {said}: {REMEDY}")
    if said:
        return f"warning: {said} (--allow-leak)"
    return "; ".join(_no_leak(meta, where) for meta, where in sets)


def _no_leak(meta: dict[str, Any], where: str) -> str:
    """What was compared with a set, in words."""
    line = f"no test scan is among the {len(meta['split']['train_scans'])} scans that {where} trains on"
    if "salt" not in meta["split"]:
        return line
    if meta["split"].get("secret"):
        return f"{line} (patients were not compared, it hashes them with a secret salt)"
    return f"{line}, and no patient who is tested on is among theirs"


def pretraining_of(run: Path) -> list[tuple[dict[str, Any], str]]:
    """Metadata of the manifest that a run was last trained on, and where it is; of a mixture, of each of its sets.

    Raises UserError when they are out of reach.
    """
    path = run / "run.json"
    try:
        starts = parse_json(path.read_bytes(), {"starts": [{"shards": str}]})["starts"]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: does not say which data set the run was trained on ({error})") from error
    if not starts:
        raise UserError(f"{path}: does not say which data set the run was trained on")
    return _open_first(run, starts[-1], starts[-1].get("data"), str(run))


def _open_first(near: Path, start: dict[str, Any], data: Any, of: str) -> list[tuple[dict[str, Any], str]]:
    """Open the set at the first possible location that holds it. Raises the first one's UserError where none does."""
    refused: UserError | None = None
    for location in candidate_data_paths(near, start):
        try:
            return _open(location, data, of)
        except UserError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _open(where: str, data: Any, of: str) -> list[tuple[dict[str, Any], str]]:
    """The manifests there, which must still be those of the set `data` (a fingerprint; None: not known)."""
    if is_mixture(where):
        from p2w.stream.stream import open_set  # noqa: PLC0415 - torch, and webdataset for remote sets

        if data is not None and data_fingerprint(open_set(where).meta) != data:
            raise UserError(f"{where}: is another mixture now than {of} was trained on")
        return [found for part in parse_mixture(where) for found in _open(part.where, None, of)]
    if "://" in where:
        from p2w.stream.stream import open_set  # noqa: PLC0415 - webdataset serves remote sets only

        meta = open_set(where).meta
    else:
        meta = open_manifest(where).meta
    if data is not None and data_fingerprint(meta) != data:
        raise UserError(f"{where}: is another data set now than {of} was trained on")
    return [(meta, where)]


def _first_leak(target: TargetSet, pretrain: dict[str, Any], fold: int | None) -> str | None:
    """One line on the first test scan that pretraining trains on; None when there is none."""
    form = {"split": {"train_scans": [str]}, "sources": [{"uid": str, "nbytes": int, "checksum": str}]}
    if said := type_mismatch(pretrain, form, "the manifest of the pretraining set"):
        raise UserError(f"{said}: it does not say which scans it trains on: cut the set again")
    trained = set(pretrain["split"]["train_scans"])
    files = {
        (one["nbytes"], one["checksum"]): one["uid"] for one in pretrain["sources"] if one["uid"] in trained
    }
    patients, salt = _trained_patients(pretrain, trained)
    for source in target.meta["sources"]:
        if source["uid"] not in _tested(target, fold):
            continue
        if source["uid"] in trained:
            return f"pretraining trained on test scan {source['uid']}"
        for file in source["files"]:
            if other := files.get((file["nbytes"], file["checksum"])):
                return f"pretraining trained on test scan {source['uid']}: its file {file['file']} is scan {other} there"
        for hashed in (salted_hash(source["patient"], ""), source.get("patient_hash")):
            if isinstance(hashed, str) and (other := patients.get(identity_in_set(hashed, salt))):
                return f"pretraining trained on scan {other} of a patient who is tested on, in scan {source['uid']}"
    return None


def _trained_patients(pretrain: dict[str, Any], trained: set[str]) -> tuple[dict[str, str], str]:
    """Patient, as the pretraining set hashes them -> one of the scans trained on, and the set's salt.

    Raises UserError for hashes that cannot be.
    """
    split = pretrain["split"]
    if "salt" not in split or split.get("secret"):
        return {}, ""
    known = [one for one in pretrain["sources"] if "patient" in one]
    said = type_mismatch(
        {"split": split, "sources": known}, {"split": {"salt": str}, "sources": [{"patient": str}]}
    )
    if said:
        raise UserError(f"the manifest of the pretraining set makes no sense ({said}): cut the set again")
    return {one["patient"]: one["uid"] for one in known if one["uid"] in trained}, split["salt"]


def _tested(target: TargetSet, fold: int | None) -> set[str]:
    """The uids of the scans that are tested on."""
    scans: dict[str, list[str]] = target.meta["split"]["scans"]
    if not target.folds:
        return set(scans["test"])
    if fold is not None and not 0 <= fold < target.folds:
        raise UserError(f"{target.where}: no fold {fold}; the set has folds 0 to {target.folds - 1}")
    return {uid for name, uids in scans.items() if fold is None or name == str(fold) for uid in uids}
