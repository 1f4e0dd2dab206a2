"""Splits by patient: which are for training, validation and test, a function of seed and patients alone. No torch.

The random order of patients is that of a hash of seed and patient, so it does not depend on the order or number of files.
"""

import hashlib
from collections.abc import Iterable, Sequence

from p2w.errors import UserError
from p2w.tasks.task import Case, Split


def shuffled_names(names: Iterable[str], seed: int, salt: str = "") -> list[str]:
    """The distinct names, in an order that the seed draws."""
    distinct = sorted(set(names))
    return sorted(distinct, key=lambda name: hashlib.sha256(f"{seed}:{salt}:{name}".encode()).digest())


def by_fractions(weight: dict[str, int], fractions: Sequence[float], seed: int) -> dict[str, int]:
    """Patient -> part, so that part i holds fractions[i] of all the scans; `weight`: scans of each patient.

    Parts fill up in the order of the seed; a patient with several scans goes where they fit. Every part that is to
    hold something gets a patient while there are enough of them.
    """
    total, share = sum(weight.values()), sum(fractions)
    ends = [round(total * sum(fractions[: i + 1]) / share) for i in range(len(fractions))]
    room = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    wanted = [i for i, fraction in enumerate(fractions) if fraction > 0]
    if len(weight) >= len(wanted):
        for i in wanted:
            if room[i] == 0:
                room[max(range(len(room)), key=room.__getitem__)] -= 1
                room[i] = 1
    part: dict[str, int] = {}
    for patient in sorted(shuffled_names(weight, seed), key=lambda name: -weight[name]):
        fits = [i for i in wanted if room[i] >= weight[patient]]
        chosen = fits[0] if fits else max(wanted, key=room.__getitem__)
        part[patient] = chosen
        room[chosen] -= weight[patient]
    return part


def assign_folds(patients: Iterable[str], folds: int, seed: int) -> dict[str, int]:
    """Patient -> fold, folds of equal numbers of patients to within one."""
    return {patient: i % folds for i, patient in enumerate(shuffled_names(patients, seed))}


def split_of_fold(fold_of: dict[str, int], fold: int, val_fraction: float, seed: int) -> dict[str, str]:
    """Patient -> train, val or test where `fold` is tested on: val is carved from the other patients."""
    others = shuffled_names(
        (name for name, own in fold_of.items() if own != fold), seed, f"val of fold {fold}"
    )
    count = round(val_fraction * len(others))
    if val_fraction > 0 and len(others) > 1:
        count = min(max(count, 1), len(others) - 1)
    split = {name: "test" for name, own in fold_of.items() if own == fold}
    return split | {name: "val" if i < count else "train" for i, name in enumerate(others)}


def check_folds(folds: int, val_fraction: float) -> None:
    """Raise UserError for numbers that make no folds."""
    if not 2 <= folds <= 100:
        raise UserError(f"--folds {folds}: from 2 to 100")
    if not 0 <= val_fraction < 1:
        raise UserError(f"--val-fraction {val_fraction:g}: a share of the patients, from 0 to below 1")


def split_by_folds(cases: list[Case], folds: int, val_fraction: float, seed: int) -> Split:
    """Random folds. Raises UserError for fewer patients than folds."""
    patients = {case.patient for case in cases}
    if len(patients) < folds:
        raise UserError(f"{len(patients)} patients cannot be divided into --folds {folds}")
    rule = f"{folds} folds by patient, dealt in the order of sha256(seed:patient); val from the rest alike"
    fold_of = assign_folds(patients, folds, seed)
    return Split(rule, fold_of=fold_of, folds=folds, seed=seed, val_fraction=val_fraction)


def split_by_table_folds(cases: list[Case], folds: int, val_fraction: float, seed: int) -> Split:
    """The folds that a table names for every case, or as many as asked for. Raises UserError for a table in between."""
    without = [case for case in cases if case.fold < 0]
    if len(without) == len(cases):
        return split_by_folds(cases, folds, val_fraction, seed)
    if without:
        raise UserError(f"series {without[0].name} has no fold in the table and others have: all or none")
    fold_of = {case.patient: case.fold for case in cases}
    count = max(fold_of.values()) + 1
    if set(fold_of.values()) != set(range(count)) or count < 2:
        raise UserError(
            f"the table's folds are {sorted(set(fold_of.values()))}: 0, 1, … without gaps, two or more"
        )
    rule = (
        f"{count} folds by patient, as the table says; val from the rest in the order of sha256(seed:patient)"
    )
    return Split(rule, fold_of=fold_of, folds=count, seed=seed, val_fraction=val_fraction)
