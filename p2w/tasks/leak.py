"""Whether pretraining has seen what a target task is tested on.

    check_run(target, Path("runs/paper"), allow_leak)    # finds the run's data set itself; says what could not be checked
    first_leak(target, training_scans(meta), fold)       # compares with one set, of whose manifest `meta` is the metadata

A scan is the same when its uid is, or when its file is, byte for byte (size and checksum). A patient is the same when both
sets were given the same name for them (`--groups`, `--salt`), of which the pretraining set's manifest holds hashes
(`p2w.shards.grouping`), or where both are of DICOM and have one PatientID; of a set with a secret salt, patients cannot
be compared. Of exported weights whose set is not found, the hashes of scans, files and patients in the card are compared.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from p2w.ct.dicom import salted_hash
from p2w.errors import UserError
from p2w.files import parse_json
from p2w.shards.training_scans import SEEN, TrainingScans, read_hashed_scans, training_scans
from p2w.stream.stream import open_trained_sets
from p2w.tasks.reader import TargetSet

REMEDY = (
    "pretrain on other scans, test on others, or pass --allow-leak and say so where you report the result"
)


def check_run(target: TargetSet, run: Path | None, allow_leak: bool = False, fold: int | None = None) -> str:
    """Compare `target` with the set that a run was trained on, and say in one line what was found.

    `run` None means that nothing was pretrained. With `allow_leak` the line tells of a leak, or of what could not be
    checked, instead of an error.

    Raises:
        UserError: a leak, or, where the run's data set cannot be reached any more, that it cannot be ruled out.
    """
    if run is None:
        return "no pretraining: no test scan can have been seen"
    return _checked(target, str(run), lambda: _of_manifests(pretraining_of(run)), allow_leak, fold)


def check_shards(
    target: TargetSet, of: str, data: Mapping[str, Any], allow_leak: bool = False, fold: int | None = None
) -> str:
    """As `check_run`, for weights named `of` of which `training.data` of their card is known.

    It has `shards` and maybe the `fingerprint` of the set, which is opened where it is found; else `seen`, the hashes of
    what the set trains on (`p2w.shards.training_scans`), is compared, where the card has it.
    """
    return _checked(target, of, lambda: _of_card(of, data), allow_leak, fold)


Pretraining = Iterable[tuple[TrainingScans, str]]  # a set's training scans, and where the set is, in words


def _of_manifests(found: list[tuple[dict[str, Any], str]]) -> Pretraining:
    """Read one manifest after the other: what is wrong with a later one does not hide a leak in an earlier one."""
    return ((training_scans(meta), where) for meta, where in found)


def _of_card(of: str, data: Mapping[str, Any]) -> Pretraining:
    """The set that a card names, where it is found, else its hashes. Raises UserError where there is neither."""
    try:
        if "shards" not in data:
            raise UserError(f"{of}: its card does not name the data set")
        return _of_manifests(open_trained_sets(Path(of), data, data.get("fingerprint"), of))
    except UserError:
        if SEEN not in data:
            raise
        where = f"the data set of {of} (by the hashes in its card)"
        return [(scans, where) for scans in read_hashed_scans(data[SEEN], of)]


def _checked(
    target: TargetSet, of: str, find: Callable[[], Pretraining], allow_leak: bool, fold: int | None
) -> str:
    said, lines = None, list[str]()
    try:
        for scans, where in find():
            if said := first_leak(target, scans, fold):
                break
            lines.append(_no_leak(scans, where))
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
    return "; ".join(lines)


def _no_leak(scans: TrainingScans, where: str) -> str:
    """The line on a set without a leak, and on what could not be compared."""
    line = f"no test scan is among the {scans.count} scans that {where} trains on"
    if scans.without_patients:
        return f"{line} (patients were not compared, {scans.without_patients})"
    return line if scans.salt is None else f"{line}, and no patient who is tested on is among theirs"


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
    return open_trained_sets(run, starts[-1], starts[-1].get("data"), str(run))


def first_leak(target: TargetSet, trained: TrainingScans, fold: int | None) -> str | None:
    """One line on the first test scan that a set of pretraining trains on; None when there is none.

    Of a target set with folds, `fold` names the one that is tested on, None all of them.
    """
    tested = _tested(target, fold)
    for source in target.meta["sources"]:
        uid = source["uid"]
        if uid not in tested:
            continue
        if trained.has_scan(uid):
            return f"pretraining trained on test scan {uid}"
        for file in source["files"]:
            if other := trained.scan_of_file(file["nbytes"], file["checksum"]):
                return f"pretraining trained on test scan {uid}: its file {file['file']} is {other} there"
        for hashed in (salted_hash(source["patient"], ""), source.get("patient_hash")):
            if isinstance(hashed, str) and (other := trained.scan_of_patient(hashed)):
                return f"pretraining trained on {other} of a patient who is tested on, in scan {uid}"
    return None


def _tested(target: TargetSet, fold: int | None) -> set[str]:
    """The uids of the scans that are tested on."""
    scans: dict[str, list[str]] = target.meta["split"]["scans"]
    if not target.folds:
        return set(scans["test"])
    if fold is not None and not 0 <= fold < target.folds:
        raise UserError(f"{target.where}: no fold {fold}; the set has folds 0 to {target.folds - 1}")
    return {uid for name, uids in scans.items() if fold is None or name == str(fold) for uid in uids}
